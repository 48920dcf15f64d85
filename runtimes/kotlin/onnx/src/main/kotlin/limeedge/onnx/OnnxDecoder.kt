package limeedge.onnx

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import ai.onnxruntime.TensorInfo
import limeedge.DecoderEngine
import limeedge.Fault
import limeedge.Interruption
import limeedge.LimeBundle
import limeedge.LimeError
import limeedge.EngineRows
import limeedge.SessionOptions
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.nio.LongBuffer

/**
 * A language model: one buffer for past and present (attention writes in place), outputs pinned, the expert an input.
 *
 * A routed bundle has a second graph over the same weight file: it is loaded at the first [setRouted] and shares the
 * cache's buffers.
 */
internal class OnnxDecoder(bundle: LimeBundle, options: SessionOptions, private val loader: OnnxEngines.Loader) : DecoderEngine {
    private val environment = loader.environment
    private val facts = loader.facts
    private val vocab = bundle.manifest.vocab
    private val virtual = facts.virtualTokens // in the cache before everything else
    private val heads = bundle.manifest.decoder!!.kvHeads
    private val width = bundle.manifest.decoder!!.headDim
    private val sumH = bundle.manifest.sumH
    override val capacity: Int = chooseCapacity(bundle, options)
    override var length: Int = 0
        private set
    override val provider: String = loader.providers.joinToString("+") { it.getName() }
    override val operators: Boolean get() = loader.usesOperators

    private val pinned = loader.load(facts.file)
    private val experts = ExpertTensors(environment, pinned)
    private var routed: OrtSession? = null
    private var active = pinned
    private val inputs = LinkedHashMap<String, OnnxTensor>() // of the pinned graph; the routed one has no expert
    private val outputs = LinkedHashMap<String, OnnxTensor>()
    private val token = directLongs(1)
    private val keep = directLongs(1)
    private val mask = directLongs(capacity + virtual).also { for (at in 0 until it.capacity()) it.put(at, 1) }
    private val row = directFloats(vocab)
    private val tokenTensor = OnnxTensor.createTensor(environment, token, longArrayOf(1, 1))
    private val rowTensor = OnnxTensor.createTensor(environment, row, longArrayOf(1, 1, vocab.toLong()))

    init {
        try {
            checkGraph(bundle, pinned, facts.expertInput)
            val shape = longArrayOf(1, heads.toLong(), (capacity + virtual).toLong(), width.toLong())
            val size = Math.multiplyExact(Math.multiplyExact(heads, width), capacity + virtual)
            for (layer in 0 until facts.layers) for (kind in listOf("key", "value")) {
                val cache = OnnxTensor.createTensor(environment, directFloats(size), shape)
                inputs["past_key_values.$layer.$kind"] = cache
                outputs["present.$layer.$kind"] = cache
            }
            inputs["logits_to_keep"] = OnnxTensor.createTensor(environment, keep, longArrayOf(1))
        } catch (error: Throwable) {
            close()
            throw error
        }
    }

    override fun setExpert(residual: FloatBuffer) {
        active = pinned
        if (!facts.expertInput) return
        inputs[EXPERT] = experts.of(residual)
    }

    override fun setRouted() {
        active = findRouted()
    }

    private fun findRouted() = routed ?: loader.load(facts.routed!!).also { routed = it }

    override fun rowBytes(capacity: Int): Long = 8L * facts.layers * heads * width * (capacity + virtual)

    override fun openRows(count: Int, capacity: Int): EngineRows {
        val sizes = Sizes(facts.layers, heads, capacity + virtual, width, vocab, virtual, sumH)
        return OnnxRows(environment, Graphs(pinned, facts.expertInput, ::findRouted), sizes, count)
    }

    override fun rewind(length: Int) {
        this.length = minOf(this.length, length) // the buffers are overwritten later
    }

    override fun feed(ids: LongArray, keep: Int, interruption: Interruption?): FloatBuffer {
        val total = length + ids.size
        require(total <= capacity && keep in 1..ids.size)
        this.keep.put(0, keep.toLong())
        val made = ArrayList<OnnxTensor>()
        fun make(values: LongBuffer, vararg shape: Long) = OnnxTensor.createTensor(environment, values, shape).also { made += it }
        try {
            val call = LinkedHashMap(inputs)
            if (active !== pinned) call.remove(EXPERT)
            call[MASK] = make(slice(mask, total + virtual), 1, (total + virtual).toLong())
            if (virtual > 0) { // virtual tokens go before the first call's
                val count = if (length == 0) virtual else 0
                call[VIRTUAL] = make(directLongs(count).also { for (at in 0 until count) it.put(at, at.toLong()) }, 1, count.toLong())
            }
            call[IDS] = if (ids.size == 1) tokenTensor.also { token.put(0, ids[0]) } else make(directLongs(ids.size).also { it.put(ids).rewind() }, 1, ids.size.toLong())
            val logits = if (keep == 1) row else directFloats(Math.multiplyExact(keep, vocab))
            val tensor = if (keep == 1) rowTensor else OnnxTensor.createTensor(environment, logits, longArrayOf(1, keep.toLong(), vocab.toLong())).also { made += it }
            outputs[LOGITS] = tensor
            if (interruption == null) active.run(call, outputs).close() else runInterruptibly(call, interruption)
            length = total
            return logits.duplicate()
        } finally {
            outputs.remove(LOGITS)
            made.forEach { it.close() }
        }
    }

    private fun runInterruptibly(call: Map<String, OnnxTensor>, interruption: Interruption) {
        OrtSession.RunOptions().use { options ->
            interruption.guard({ options.setTerminate(true) }) { active.run(call, emptySet(), outputs, options).close() }
        }
    }

    override fun close() {
        routed?.close()
        pinned.close()
        loader.close()
        inputs.remove(EXPERT)
        experts.close()
        (inputs.values + outputs.values + listOf(tokenTensor, rowTensor)).toSet().forEach { it.close() }
    }

    internal companion object {
        private const val IDS = "input_ids"
        private const val MASK = "attention_mask"
        private const val VIRTUAL = "virtual_ids"
        private const val EXPERT = ExpertTensors.EXPERT
        private const val LOGITS = "logits"
        private const val DEFAULT_LENGTH = 2048

        private fun chooseCapacity(bundle: LimeBundle, options: SessionOptions): Int {
            val context = bundle.manifest.context
            val wanted = options.maxLength ?: minOf(context, DEFAULT_LENGTH)
            val virtual = bundle.manifest.targets.first { it.name == "onnx" }.virtualTokens
            if (wanted > context || virtual >= context) {
                throw LimeError.Invalid(bundle.folder.path, listOf(Fault("maxLength", "1..${context - virtual}", "$wanted")), "the model has seen no longer sequences")
            }
            return minOf(wanted, context - virtual)
        }

        /** The graph is what the manifest says: else sizes would be wrong where nothing checks them. */
        private fun checkGraph(bundle: LimeBundle, graph: OrtSession, takesExpert: Boolean) {
            val manifest = bundle.manifest
            val facts = manifest.targets.first { it.name == "onnx" }
            val faults = ArrayList<Fault>()
            val caches = (0 until facts.layers).flatMap { listOf("past_key_values.$it.key", "past_key_values.$it.value") }
            val wanted = caches.toSet() + setOf(IDS, MASK, "logits_to_keep") + (if (takesExpert) setOf(EXPERT) else emptySet()) +
                (if (facts.virtualTokens > 0) setOf(VIRTUAL) else emptySet())
            if (graph.inputNames != wanted) {
                val odd = (graph.inputNames - wanted).ifEmpty { wanted - graph.inputNames }
                faults += Fault("inputs", "${wanted.size}", "${graph.inputNames.size}, ${odd.take(3)}")
            } else {
                val decoder = manifest.decoder!!
                for (name in caches) compare(faults, name, graph.inputInfo[name]!!.info as TensorInfo, mapOf(1 to decoder.kvHeads, 3 to decoder.headDim))
                if (takesExpert) (graph.inputInfo[EXPERT]!!.info as TensorInfo).let { compare(faults, EXPERT, it, mapOf(it.shape.size - 1 to manifest.sumH)) }
            }
            (graph.outputInfo[LOGITS]?.info as? TensorInfo)?.let { compare(faults, LOGITS, it, mapOf(2 to manifest.vocab)) }
                ?: faults.add(Fault("outputs", LOGITS, "${graph.outputNames.take(3)}"))
            if (faults.isNotEmpty()) throw LimeError.Damaged("${bundle.folder}/${facts.file}", faults, "the graph is not the manifest's: export the bundle again")
        }

        private fun compare(faults: MutableList<Fault>, name: String, info: TensorInfo, axes: Map<Int, Int>) {
            for ((axis, size) in axes) {
                val found = info.shape.getOrNull(axis)
                if (found != size.toLong() && found != -1L) faults += Fault("$name: axis $axis", "$size", "$found")
            }
        }
    }
}

internal fun directFloats(count: Int): FloatBuffer =
    ByteBuffer.allocateDirect(Math.multiplyExact(4, count)).order(ByteOrder.nativeOrder()).asFloatBuffer()

internal fun directLongs(count: Int): LongBuffer =
    ByteBuffer.allocateDirect(Math.multiplyExact(8, count)).order(ByteOrder.nativeOrder()).asLongBuffer()

private fun slice(buffer: LongBuffer, count: Int): LongBuffer = buffer.duplicate().also { it.limit(count) }
