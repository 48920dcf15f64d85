package limeedge

import java.nio.FloatBuffer

/** A stretch of the cache: which selection filled it, and its number of tokens. */
public data class Segment(val selection: String, val tokens: Int)

/**
 * The tokens of one sequence, in step with the engine: after every call both hold the same, or neither changed.
 *
 * [common] counts tokens at its beginning that the original model read for whichever expert is to act after them.
 */
internal class SequenceCache(private val engine: DecoderEngine) {
    private val ids = ArrayList<Long>()
    private val parts = ArrayList<Segment>()
    var common = 0
        private set

    val size: Int get() = ids.size

    /** Who filled it, in order. */
    val segments: List<Segment> get() = parts.toList()

    /** Whether all of it is one selection's. */
    fun isFilledBy(selection: String): Boolean = parts.all { it.selection == selection }

    /** Tokens at its beginning that are those of a sequence, each filled by whom it should be. */
    fun countKept(sequence: LongArray, filler: (Int) -> String): Int {
        var kept = 0
        for (part in parts) repeat(part.tokens) {
            if (kept == sequence.size || ids[kept] != sequence[kept] || filler(kept) != part.selection) return kept
            kept++
        }
        return kept
    }

    /** Forget everything after the first [length] tokens. */
    fun rewind(length: Int) {
        engine.rewind(length)
        while (ids.size > length) ids.removeAt(ids.size - 1)
        common = minOf(common, length)
        var left = length
        val kept = parts.mapNotNull { part ->
            val tokens = minOf(part.tokens, left)
            left -= tokens
            if (tokens > 0) Segment(part.selection, tokens) else null
        }
        parts.clear()
        parts += kept
    }

    /** One call of the engine: append tokens that [filler] fills; logits of the last [keep]. */
    fun feed(piece: LongArray, keep: Int, filler: String, interruption: Interruption?): FloatBuffer {
        val logits = try {
            engine.feed(piece, keep, interruption)
        } catch (error: Throwable) {
            engine.rewind(ids.size)
            throw error
        }
        piece.forEach { ids.add(it) }
        val last = parts.lastOrNull()
        if (last?.selection == filler) parts[parts.size - 1] = Segment(filler, last.tokens + piece.size) else parts += Segment(filler, piece.size)
        return logits
    }

    /** The original model has read the tokens from [start] to [stop]. */
    fun share(start: Int, stop: Int) {
        if (start <= common) common = maxOf(common, stop)
    }
}

/**
 * Where to cut [count] tokens that follow [held]: at multiples of [chunk] in the cache, whatever is held already.
 *
 * So a prompt is cut alike whether or not its beginning was kept. No piece is a single token where there are two: engines
 * run one row in other products than many, and in a quantized bundle the two round differently.
 *
 * @return the end of each piece, the last one [count].
 */
internal fun planChunks(held: Int, count: Int, chunk: Int): List<Int> {
    val stops = ArrayList<Int>()
    var start = 0
    while (start < count) {
        var stop = minOf(count, (held + start) / chunk * chunk + chunk - held)
        while (stop < count && (stop - start == 1 || count - stop == 1)) stop++
        stops += stop
        start = stop
    }
    return stops
}
