package limeedge

/**
 * What one row of [LimeSession.generateMany] is asked.
 *
 * @property text complete prompt, or null where [ids] (S,) are given. @property selection its expert. @property options its own,
 *   or null for those that the call gives to all.
 */
public class Request private constructor(
    public val text: String?, public val ids: IntArray?, public val selection: Selection, public val options: GenerationOptions?,
) {
    /** A complete prompt (chat template applied). */
    public constructor(prompt: String, selection: Selection, options: GenerationOptions? = null) : this(prompt, null, selection, options)

    /** A complete prompt, and a selection as typed: NAME, none, routed, NAME=WEIGHT,NAME=WEIGHT. */
    public constructor(prompt: String, selection: String, options: GenerationOptions? = null) : this(prompt, null, Selection.parse(selection), options)

    /** Token ids: needs no tokenizer to be read. */
    public constructor(ids: IntArray, selection: Selection, options: GenerationOptions? = null) : this(null, ids, selection, options)
}

/**
 * What came of a request.
 *
 * @property row which request, by its place in the list. @property piece text that became certain, may be empty where [end] is there.
 * @property tokens ids behind it, in [LimeSession.generateManyIds]; else empty. @property end why the request has ended, null
 *   while it goes on. @property error what went wrong where [end] is [FinishReason.FAILED]; the others go on.
 */
public class Answer internal constructor(
    public val row: Int, public val piece: String, public val tokens: List<Int>, public val end: FinishReason?, public val error: LimeError?,
) {
    override fun toString(): String = "$row: $piece${tokens.joinToString(" ")}${if (end == null) "" else " ($end)"}"
}

/** Several sequences over one loaded model, each with a cache and an expert of its own, decoded in one pass. */
public interface EngineRows : java.io.Closeable {
    /** Most rows at once. */
    public val count: Int

    /** Take a free row for d (sum_H,) float32, copied (null: routed); its cache begins with [prefix]. @return its number. */
    public fun start(residual: FloatArray?, prefix: SavedPrefix? = null): Int

    /** Give a row back. */
    public fun stop(row: Int)

    /** Another expert, or routing (null), from the row's next token on; its cache stays. */
    public fun setExpert(row: Int, residual: FloatArray?)

    /** Forget a row's tokens after the first [length]. */
    public fun rewind(row: Int, length: Int)

    /** A copy of a row's first [length] tokens. */
    public fun save(row: Int, length: Int): SavedPrefix

    /** Append ids (S,) to one row; its last logits (V,) float32, overwritten by the next call. */
    public fun feed(row: Int, ids: LongArray, interruption: Interruption? = null): java.nio.FloatBuffer

    /** Append one token to each of some rows, in one pass: (V,) float32 of each, overwritten by the next call. */
    public fun step(rows: List<Int>, tokens: List<Long>, interruption: Interruption? = null): List<java.nio.FloatBuffer>
}

/** An engine's copy of a sequence's first tokens in a cache; [bytes] of memory. */
public interface SavedPrefix {
    public val bytes: Long
}
