package limeedge

import java.util.PriorityQueue

/**
 * Byte-pair encoding of one word: the pair of lowest rank is merged first, the leftmost of equals.
 *
 * @property ids ids of the 256 bytes; -1: the vocabulary lacks it, and it is left out.
 *
 * Source: Sennrich et al., arXiv 1508.07909; byte-level as in GPT-2.
 */
internal class BytePairs(private val ids: IntArray, merges: Int) {
    private val table = PairTable(merges)

    /** Add a merge; rank by order of addition. */
    fun add(left: Int, right: Int, rank: Int, merged: Int) = table.put(left, right, rank, merged)

    /** Ids of a word's bytes. */
    fun encode(bytes: ByteArray, out: IntList) {
        var symbols = IntArray(bytes.size) { ids[bytes[it].toInt() and 0xFF] }
        if (symbols.any { it < 0 }) symbols = symbols.filter { it >= 0 }.toIntArray()
        if (symbols.size > 1) merge(symbols, out) else symbols.forEach(out::add)
    }

    private fun merge(symbols: IntArray, out: IntList) {
        val next = IntArray(symbols.size) { it + 1 }
        val previous = IntArray(symbols.size) { it - 1 }
        val queue = PriorityQueue<Long>() // rank in the high half, place in the low one
        fun offer(at: Int) {
            if (at < 0 || next[at] >= symbols.size) return
            val found = table.rank(symbols[at], symbols[next[at]])
            if (found >= 0) queue.add(found.toLong() shl 32 or at.toLong())
        }
        for (at in 0 until symbols.size - 1) offer(at)
        while (true) {
            val best = queue.poll() ?: break
            val at = best.toInt()
            if (symbols[at] < 0 || next[at] >= symbols.size) continue
            val right = next[at]
            if (table.rank(symbols[at], symbols[right]).toLong() != best ushr 32) continue // one of the two has changed
            symbols[at] = table.merged(symbols[at], symbols[right])
            symbols[right] = GONE
            next[at] = next[right]
            if (next[at] < symbols.size) previous[next[at]] = at
            offer(previous[at])
            offer(at)
        }
        for (symbol in symbols) if (symbol != GONE) out.add(symbol)
    }

    /** (left, right) -> (rank, merged), open addressing: hundreds of thousands of boxed pairs would be too much for a phone. */
    private class PairTable(count: Int) {
        private val mask = Integer.highestOneBit(maxOf(count, 8)) * 4 - 1
        private val keys = LongArray(mask + 1) { -1L }
        private val values = LongArray(mask + 1)

        fun put(left: Int, right: Int, rank: Int, merged: Int) {
            val at = find(key(left, right))
            keys[at] = key(left, right)
            values[at] = rank.toLong() shl 32 or merged.toLong()
        }

        fun rank(left: Int, right: Int): Int {
            val at = find(key(left, right))
            return if (keys[at] == -1L) -1 else (values[at] ushr 32).toInt()
        }

        fun merged(left: Int, right: Int): Int = values[find(key(left, right))].toInt()

        private fun key(left: Int, right: Int): Long = left.toLong() shl 32 or right.toLong()

        private fun find(key: Long): Int {
            val mixed = key * -7046029254386353131L // 2^64 / golden ratio
            var at = (mixed xor (mixed ushr 32)).toInt() and mask
            while (keys[at] != -1L && keys[at] != key) at = (at + 1) and mask
            return at
        }
    }

    private companion object {
        private const val GONE = -1
    }
}

/** A growing array of ints. */
internal class IntList {
    private var items = IntArray(64)
    var size: Int = 0
        private set

    fun add(item: Int) {
        if (size == items.size) items = items.copyOf(size * 2)
        items[size++] = item
    }

    fun toArray(): IntArray = items.copyOf(size)
}
