package limeedge

import java.io.Closeable
import java.nio.FloatBuffer

/** Who reads tokens: d (sum_H,) float32 copied, null for routing; [selection] tells it from others in a cache. */
internal class Reader(val residual: FloatArray?, val selection: Selection)

/**
 * A request, checked.
 *
 * @property number the caller's. @property ids (S,) of the prompt. @property expert reads them and answers, [silent] first ones
 *   left out, which [before] reads: the original model, where an expert acts from the generation prompt on. @property
 *   most tokens to generate; [limit]: why it ends there.
 */
internal class Order(
    val number: Int, val ids: LongArray, val expert: Reader, val sampler: Sampler, val most: Int, val limit: FinishReason,
    val eos: Set<Int>, val silent: Int, val before: Reader?,
) {
    /** Who reads the prompt's beginning. */
    val first: Reader get() = before ?: expert

    /**
     * Tokens at the beginning that others may have read: all of what the original model reads; else all but two, whose logits are
     * wanted (a call of one may round otherwise); none where routing must see it in one call.
     */
    val shareable: Int
        get() = when {
            silent > 0 -> silent
            expert.residual == null -> 0
            else -> maxOf(0, ids.size - 2)
        }

    /** With how many of the same shareable tokens both begin, under the same expert. */
    fun countCommon(other: Order): Int =
        if (first.selection == other.first.selection) countCommon(ids, shareable, other.ids, other.shareable) else 0
}

/** What came of a request: a token, or its end ([token] is null then), and what went wrong. */
internal class Event(val number: Int, val token: Int?, val end: FinishReason? = null, val error: LimeError? = null)

/**
 * Requests under way together: rows start, end and are refilled while others go on (continuous batching).
 *
 * All rows that have a token to go on with step in one pass; the prompts of new ones are read in pieces between two steps, so
 * that nobody waits long for somebody else's prompt. A beginning that requests share under the same expert is read once.
 * Row for row the answers are those of a session of its own. The rules are lime_edge/session/batch.py's, call by call.
 */
internal class Batch(private val rows: EngineRows, orders: List<Order>) : Closeable {
    private val prefixes = PrefixCache()
    private val queue = ArrayDeque(orders)
    private val jobs = LinkedHashMap<Int, Job>() // by the order's number, in the order they started

    /** An order under way: its row, the prompt tokens that were read, the tokens it gave, and the one to go on with. */
    private class Job(val order: Order, val row: Int, var read: Int, var given: Int = 0, var token: Int? = null) {
        val reads: Boolean get() = read < order.ids.size
    }

    /** Whether there is anything to advance. */
    val isBusy: Boolean get() = queue.isNotEmpty() || jobs.isNotEmpty()

    /** End an order that runs or waits; one that has ended already is nothing to stop. */
    fun stop(number: Int) {
        val job = jobs.remove(number)
        if (job != null) rows.stop(job.row) else queue.removeAll { it.number == number }
    }

    /** Start what fits, read a piece of the prompts that wait, and one step of all rows that answer. */
    fun advance(interruption: Interruption?): List<Event> {
        start()
        val events = ArrayList<Event>()
        readPrompts(events, interruption)
        val stepping = jobs.values.filter { it.token != null }
        if (stepping.isEmpty()) return events
        val logits = rows.step(stepping.map { it.row }, stepping.map { it.token!!.toLong() }, interruption)
        for ((at, job) in stepping.withIndex()) take(job, logits[at], events)
        return events
    }

    override fun close() {
        prefixes.clear()
        rows.close()
    }

    /** Give free rows to the orders that waited longest, those left out that a prompt being read will spare work. */
    private fun start() {
        val waiting = ArrayList<Order>()
        while (queue.isNotEmpty() && jobs.size < rows.count) {
            val order = queue.removeFirst()
            if (isWorthWaiting(order)) waiting += order else jobs[order.number] = begin(order)
        }
        queue.addAll(0, waiting)
    }

    /** Take a row, its cache beginning with what is kept of the prompt. */
    private fun begin(order: Order): Job {
        val prefix = prefixes.find(order)
        var count = prefix?.let { countCommon(it.ids, it.ids.size, order.ids, order.shareable) } ?: 0
        if (count > 0 && count == order.silent - 1) count-- // no single token is left to be read
        val row = rows.start(order.first.residual, prefix?.saved)
        rows.rewind(row, count)
        if (order.silent > 0 && count == order.silent) rows.setExpert(row, order.expert.residual)
        return Job(order, row, count)
    }

    /** Whether a prompt that is being read now will give the order a longer beginning than there is. */
    private fun isWorthWaiting(order: Order): Boolean {
        val found = prefixes.find(order)?.let { countCommon(it.ids, it.ids.size, order.ids, order.shareable) } ?: 0
        return jobs.values.any { it.read < it.order.shareable && it.order.countCommon(order) >= found + PrefixCache.SHORTEST }
    }

    /** About [SLICE] tokens of prompts, first come first; [LimeSession.CHUNK] where nobody answers yet. */
    private fun readPrompts(events: MutableList<Event>, interruption: Interruption?) {
        val size = if (jobs.values.any { it.token != null }) SLICE else LimeSession.CHUNK
        var budget = size
        for (job in jobs.values.filter { it.reads }) {
            while (budget > 0 && job.reads) {
                val before = job.read
                val logits = read(job, size, interruption)
                budget -= job.read - before
                if (!job.reads) take(job, logits, events)
            }
        }
    }

    /** The next piece of a prompt: after [size] tokens or so, where the reader changes, routed at its end. Its last logits (V,). */
    private fun read(job: Job, size: Int, interruption: Interruption?): FloatBuffer {
        val order = job.order
        val end = if (job.read < order.silent) order.silent else order.ids.size
        val whole = job.read >= order.silent && order.expert.residual == null
        val stop = if (whole) end else job.read + planChunks(job.read, end - job.read, size)[0]
        val logits = rows.feed(job.row, order.ids.copyOfRange(job.read, stop), interruption)
        job.read = stop
        if (stop == order.silent) {
            rows.setExpert(job.row, order.expert.residual)
            share(job, stop)
        } else if (stop == order.ids.size && order.silent == 0) {
            share(job, 0)
        }
        return logits
    }

    /** Keep the beginning of a prompt that was read, as far as orders that wait have it too; [least] in any case. */
    private fun share(job: Job, least: Int) {
        val count = maxOf(least, queue.maxOfOrNull { job.order.countCommon(it) } ?: 0)
        if (count < PrefixCache.SHORTEST || count <= prefixes.countKept(job.order, count)) return
        prefixes.keep(job.order.first.selection, job.order.ids.copyOf(count), rows.save(job.row, count))
    }

    /** Pick a token; what comes of it. */
    private fun take(job: Job, logits: FloatBuffer, events: MutableList<Event>) {
        val order = job.order
        val token = try {
            order.sampler.pick(FloatArray(logits.remaining()).also { logits.duplicate().get(it) })
        } catch (error: LimeError) {
            return end(job, FinishReason.FAILED, events, error)
        }
        if (token in order.eos) return end(job, FinishReason.STOP, events)
        job.given++
        job.token = token
        events += Event(order.number, token)
        if (job.given == order.most) end(job, order.limit, events)
    }

    private fun end(job: Job, reason: FinishReason, events: MutableList<Event>, error: LimeError? = null) {
        stop(job.order.number)
        events += Event(job.order.number, null, reason, error)
    }

    private companion object {
        private const val SLICE = 64 // prompt tokens that are read between two steps
    }
}

/** Beginnings of sequences that were read once, for other sequences of the same call to begin with. */
internal class PrefixCache {
    /** Tokens of a beginning, who read them, and the engine's copy of its cache. */
    class Kept(val reader: Selection, val ids: LongArray, val saved: SavedPrefix)

    private val kept = ArrayList<Kept>() // oldest use first

    /** The beginning with most tokens in common with what an order may take; null where it is not worth a copy. */
    fun find(order: Order): Kept? {
        val best = kept.filter { it.reader == order.first.selection }.maxByOrNull { countCommon(it.ids, it.ids.size, order.ids, order.shareable) }
        if (best == null || countCommon(best.ids, best.ids.size, order.ids, order.shareable) < SHORTEST) return null
        kept.remove(best)
        kept += best
        return best
    }

    /** How many of the first [count] tokens of an order are kept. */
    fun countKept(order: Order, count: Int): Int =
        kept.filter { it.reader == order.first.selection }.maxOfOrNull { countCommon(it.ids, it.ids.size, order.ids, count) } ?: 0

    /** Keep a beginning, and no shorter one that it begins with; what no longer fits goes. */
    fun keep(reader: Selection, ids: LongArray, saved: SavedPrefix) {
        kept.removeAll { it.reader == reader && countCommon(it.ids, it.ids.size, ids, ids.size) == it.ids.size }
        kept += Kept(reader, ids, saved)
        while (kept.fold(0L) { sum, one -> sum + one.saved.bytes } > LIMIT) kept.removeAt(0)
    }

    fun clear(): Unit = kept.clear()

    companion object {
        const val SHORTEST: Int = 8 // tokens worth a copy
        private const val LIMIT = 256L shl 20
    }
}

/** With how many of the same both begin, of the first [most] and [otherMost] of each. */
internal fun countCommon(ids: LongArray, most: Int, other: LongArray, otherMost: Int): Int {
    val least = minOf(most, otherMost)
    for (at in 0 until least) if (ids[at] != other[at]) return at
    return least
}
