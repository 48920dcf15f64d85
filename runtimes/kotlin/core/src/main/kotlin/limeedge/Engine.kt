package limeedge

import java.io.Closeable
import java.nio.FloatBuffer

/** What every engine is: a loaded model that takes an expert residual. One thread at a time; the session sees to it. */
public interface SwitchableEngine : Closeable {
    /** What the model runs on, as the engine names it. */
    public val provider: String

    /** Whether the graph's functions run as compiled operators; null where the engine knows none. */
    public val operators: Boolean? get() = null

    /** Use d = p - p_ref from the next call on: (sum_H,) float32, direct; it does not change while it is in use. */
    public fun setExpert(residual: FloatBuffer)

    /** Weigh the bundle's own experts per token from the next call on. */
    public fun setRouted()
}

/** A language model with a cache. */
public interface DecoderEngine : SwitchableEngine {
    /** Tokens in the cache. */
    public val length: Int

    /** Tokens that the cache holds. */
    public val capacity: Int

    /**
     * Append tokens to the cache.
     *
     * @param ids (S,) each below the vocabulary's size, S at least 1 and at most `capacity - length`.
     * @param keep of how many of the last positions logits are wanted, 1..S.
     * @param interruption told when nobody waits for the answer any more; the call may then fail, the cache stays as
     *   it was.
     * @return logits (keep, V) float32; overwritten by the next call.
     */
    public fun feed(ids: LongArray, keep: Int, interruption: Interruption? = null): FloatBuffer

    /** Forget the cache after its first [length] tokens. */
    public fun rewind(length: Int)

    /** Memory of one row of [openRows], in bytes; 0 where the engine runs one sequence at a time. */
    public fun rowBytes(capacity: Int): Long = 0

    /** Sequences beside the engine's own, on the same weights. @param count most at once. @param capacity tokens that each holds. */
    public fun openRows(count: Int, capacity: Int): EngineRows = throw UnsupportedOperationException("one sequence at a time")
}

/** A model without a cache. */
public interface EncoderEngine : SwitchableEngine {
    /** All outputs by name, for checked and complete inputs. */
    public fun run(inputs: Map<String, Tensor>): Map<String, Tensor>
}

/** Loads a bundle's artifact for one target. */
public interface EngineFactory {
    /** The bundle's folder that the engine reads: onnx, executorch. */
    public val target: String

    /** Load a language model. @throws LimeError the engine is missing or refuses the artifact. */
    public fun openDecoder(bundle: LimeBundle, options: SessionOptions): DecoderEngine

    /** Load an encoder or a vision model. @throws LimeError the engine is missing or refuses the artifact. */
    public fun openEncoder(bundle: LimeBundle, options: SessionOptions): EncoderEngine
}

/**
 * How to load.
 *
 * @property threads of the engine; null for the bundle's default.
 * @property maxLength tokens the cache holds; null for the model's context or 2048, whichever is less.
 */
public data class SessionOptions(val threads: Int? = null, val maxLength: Int? = null) {
    init {
        val faults = Faults()
        if (threads != null && threads !in 1..1024) faults.add("threads", "1..1024", threads)
        if (maxLength != null && maxLength < 1) faults.add("maxLength", "at least 1", maxLength)
        faults.throwAny { LimeError.Invalid("session", it, "leave it out for the bundle's own default") }
    }
}

/** Says to a running call that nobody waits for it any more. Safe for several threads. */
public class Interruption {
    private var stop: (() -> Unit)? = null
    private var interrupted = false

    /** Interrupt the call that is running under this. */
    @Synchronized
    public fun interrupt() {
        interrupted = true
        stop?.invoke()
    }

    /** Run [call]; [stop] is called when it is interrupted, never before or after it. */
    public fun <T> guard(stop: () -> Unit, call: () -> T): T {
        synchronized(this) {
            this.stop = stop
            if (interrupted) stop()
        }
        try {
            return call()
        } finally {
            synchronized(this) { this.stop = null }
        }
    }
}

/**
 * Numbers with a shape: token ids as long, anything else as float.
 *
 * @property shape sizes of the axes, outermost first. Exactly one of [longs] and [floats] is there, in row-major order.
 */
public class Tensor private constructor(
    public val shape: List<Int>,
    public val longs: LongArray?,
    public val floats: FloatArray?,
) {
    /** Number of values. */
    public val size: Int get() = longs?.size ?: floats!!.size

    public companion object {
        /** Integers, such as token ids. */
        public fun of(values: LongArray, vararg shape: Int): Tensor = Tensor(check(values.size, shape), values, null)

        /** Floats, such as pixels. */
        public fun of(values: FloatArray, vararg shape: Int): Tensor = Tensor(check(values.size, shape), null, values)

        private fun check(count: Int, shape: IntArray): List<Int> {
            val size = shape.fold(1L) { product, axis -> product * axis }
            if (size != count.toLong() || shape.any { it < 0 }) {
                throw LimeError.Invalid("array", listOf(Fault("values", "$size for (${shape.joinToString()})", "$count")), "give them row by row")
            }
            return shape.toList()
        }
    }
}
