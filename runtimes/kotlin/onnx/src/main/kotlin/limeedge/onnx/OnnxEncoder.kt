package limeedge.onnx

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtSession
import ai.onnxruntime.TensorInfo
import limeedge.EncoderEngine
import limeedge.Fault
import limeedge.LimeBundle
import limeedge.LimeError
import limeedge.Tensor
import java.nio.FloatBuffer

/** An encoder or a vision model: one call in, one call out; the expert is an input. The routed graph loads on first use. */
internal class OnnxEncoder(bundle: LimeBundle, private val loader: OnnxEngines.Loader) : EncoderEngine {
    private val environment = loader.environment
    private val facts = loader.facts
    override val provider: String = loader.providers.joinToString("+") { it.getName() }
    override val operators: Boolean get() = loader.usesOperators
    private val pinned = loader.load(facts.file)
    private var routed: OrtSession? = null
    private var active = pinned
    private val experts = ExpertTensors(environment, pinned)
    private var expert: OnnxTensor? = null

    init {
        val wanted = facts.inputs.map { it.name }.toSet() + (if (facts.expertInput) setOf(EXPERT) else emptySet())
        val last = (pinned.inputInfo[EXPERT]?.info as? TensorInfo)?.shape?.last()
        val faults = ArrayList<Fault>()
        if (pinned.inputNames != wanted) faults += Fault("inputs", "$wanted", "${pinned.inputNames}")
        if (!pinned.outputNames.containsAll(facts.outputs)) faults += Fault("outputs", "${facts.outputs}", "${pinned.outputNames}")
        if (last != null && last != bundle.manifest.sumH.toLong()) faults += Fault(EXPERT, "${bundle.manifest.sumH}", "$last")
        if (faults.isNotEmpty()) {
            close()
            throw LimeError.Damaged("${bundle.folder}/${facts.file}", faults, "the graph is not the manifest's: export the bundle again")
        }
    }

    override fun setExpert(residual: FloatBuffer) {
        active = pinned
        if (!facts.expertInput) return
        expert = experts.of(residual)
    }

    override fun setRouted() {
        active = routed ?: loader.load(facts.routed!!).also { routed = it }
    }

    override fun run(inputs: Map<String, Tensor>): Map<String, Tensor> {
        val call = LinkedHashMap<String, OnnxTensor>()
        try {
            for ((name, values) in inputs) call[name] = wrap(values)
            val all = if (active === pinned && expert != null) call + (EXPERT to expert!!) else call
            return active.run(all, facts.outputs.toSet()).use { result ->
                facts.outputs.associateWith { unwrap(result.get(it).get() as OnnxTensor) }
            }
        } finally {
            call.values.forEach { it.close() }
        }
    }

    private fun wrap(values: Tensor): OnnxTensor {
        val shape = LongArray(values.shape.size) { values.shape[it].toLong() }
        val longs = values.longs
        return if (longs != null) OnnxTensor.createTensor(environment, directLongs(longs.size).also { it.put(longs).rewind() }, shape)
        else OnnxTensor.createTensor(environment, directFloats(values.size).also { it.put(values.floats!!).rewind() }, shape)
    }

    private fun unwrap(tensor: OnnxTensor): Tensor {
        val values: FloatBuffer = tensor.floatBuffer
        val shape = tensor.info.shape
        return Tensor.of(FloatArray(values.remaining()).also { values.get(it) }, *IntArray(shape.size) { shape[it].toInt() })
    }

    override fun close() {
        routed?.close()
        pinned.close()
        loader.close()
        experts.close()
    }

    private companion object {
        private const val EXPERT = ExpertTensors.EXPERT
    }
}
