package limeedge.executorch

import limeedge.DecoderEngine
import limeedge.EncoderEngine
import limeedge.EngineFactory
import limeedge.Fault
import limeedge.Interruption
import limeedge.LimeBundle
import limeedge.LimeError
import limeedge.SessionOptions
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor
import java.nio.FloatBuffer

/**
 * ExecuTorch's Android API (`org.pytorch:executorch-android`), on a bundle's `executorch/model.pte`.
 *
 * **Compiled against signatures from the documentation, never run**: docs/bundle-format.md ("The ExecuTorch program") says
 * what each method takes, and the Python runtime does the same through the same runtime library.
 */
public class ExecutorchEngines : EngineFactory {
    override val target: String get() = "executorch"

    override fun openDecoder(bundle: LimeBundle, options: SessionOptions): DecoderEngine = ExecutorchDecoder(bundle, options)

    override fun openEncoder(bundle: LimeBundle, options: SessionOptions): EncoderEngine =
        throw LimeError.Unsupported(bundle.folder.path, "encoders on ExecuTorch", "use the ONNX target")
}

/** The program holds its cache; a sequence goes back by a smaller position. ExecuTorch checks no position: this does. */
internal class ExecutorchDecoder(bundle: LimeBundle, options: SessionOptions) : DecoderEngine {
    private val facts = bundle.manifest.targets.first { it.name == "executorch" }
    private val vocab = bundle.manifest.vocab
    private val virtual = facts.virtualTokens
    private val module = Module.load(bundle.file(facts.file).path, Module.LOAD_MODE_MMAP, options.threads ?: facts.threads ?: 0)
    private var expert: EValue? = null
    private var method = FORWARD
    override val provider: String get() = "XNNPACK"
    override val capacity: Int = facts.maxLength!!
    override var length: Int = 0
        private set

    init {
        val wanted = options.maxLength
        if (wanted != null && wanted > capacity) {
            module.destroy()
            throw LimeError.Invalid(bundle.folder.path, listOf(Fault("maxLength", "at most $capacity", "$wanted")), "the cache is static: export with a larger --max-seq-len")
        }
        module.loadMethod(FORWARD)
    }

    override fun setExpert(residual: FloatBuffer) {
        method = FORWARD
        expert = if (facts.expertInput) EValue.from(Tensor.fromBlob(residual, longArrayOf(residual.remaining().toLong()))) else null
    }

    override fun setRouted() {
        method = facts.routed?.let { ROUTED } ?: throw IllegalStateException("no routed method")
    }

    override fun rewind(length: Int) {
        this.length = minOf(this.length, length)
    }

    override fun feed(ids: LongArray, keep: Int, interruption: Interruption?): FloatBuffer {
        require(length + ids.size <= capacity && keep in 1..minOf(ids.size, facts.rows!!))
        val begins = length == 0 && virtual > 0 // a sequence begins with the virtual tokens, whose ids follow the vocabulary
        val tokens = if (begins) LongArray(virtual) { (vocab + it).toLong() } + ids else ids
        require(tokens.size <= facts.promptLength!!)
        val position = if (length == 0) 0 else length + virtual
        val rows = LongArray(keep) { (tokens.size - keep + it).toLong() }
        val inputs = listOfNotNull(wrap(tokens, 1, tokens.size.toLong()), wrap(longArrayOf(position.toLong()), 1), wrap(rows, keep.toLong()), expert.takeIf { method == FORWARD })
        val logits = module.execute(method, *inputs.toTypedArray())[0].toTensor().dataAsFloatArray
        check(logits.size == keep * vocab) { "${logits.size} logits, ${keep * vocab} expected" }
        length += ids.size
        return FloatBuffer.wrap(logits)
    }

    private fun wrap(values: LongArray, vararg shape: Long) = EValue.from(Tensor.fromBlob(values, shape))

    override fun close() = module.destroy()

    private companion object {
        private const val FORWARD = "forward"
        private const val ROUTED = "routed"
    }
}
