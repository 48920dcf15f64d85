package limeedge.onnx

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import limeedge.Interruption
import limeedge.EngineRows
import limeedge.SavedPrefix
import java.io.Closeable
import java.nio.FloatBuffer

/**
 * Sizes of a decoder's buffers.
 *
 * @property tokens that a row's cache holds, virtual ones included.
 */
internal class Sizes(val layers: Int, val heads: Int, val tokens: Int, val width: Int, val vocab: Int, val virtual: Int, val total: Int) {
    /** Floats of one row of one buffer of keys or values. */
    val row: Int get() = Math.multiplyExact(Math.multiplyExact(heads, width), tokens)
}

/** The graphs that rows run on; the routed one is loaded at the first call. */
internal class Graphs(val pinned: OrtSession, val takesExpert: Boolean, val routed: () -> OrtSession)

/**
 * Several sequences in one pass, each with a cache and an expert of its own, over the graphs of one engine.
 *
 * A step runs the first places of the buffers, because a batch is a view of them: who steps is kept there, and moving a cache is
 * the price of a row that ends in the middle. A prompt is a call for its row alone: ONNX Runtime's GroupQueryAttention takes several
 * tokens after a past for one row only. Routed rows step one by one: routing's scales are those of the whole call.
 */
internal class OnnxRows(private val environment: OrtEnvironment, private val graphs: Graphs, private val sizes: Sizes, override val count: Int) : EngineRows {
    private class Row(var place: Int, var length: Int = 0, var isRouted: Boolean = false)

    private class Saved(val length: Int, val parts: List<FloatArray>) : SavedPrefix {
        override val bytes: Long get() = parts.fold(0L) { sum, part -> sum + 4L * part.size }
    }

    private val names = (0 until sizes.layers).flatMap { listOf("$it.key", "$it.value") }
    private val buffers = names.map { directFloats(Math.multiplyExact(count, sizes.row)) } // (count, heads, tokens, width)
    private val experts = directFloats(Math.multiplyExact(count, sizes.total)) // by place, as the caches are
    private val logits = directFloats(Math.multiplyExact(count, sizes.vocab))
    private val places = arrayOfNulls<Int>(count) // who is there
    private val rows = HashMap<Int, Row>()
    private val calls = HashMap<Pair<Int, Int>, Call>()
    private var next = 0

    override fun start(residual: FloatArray?, prefix: SavedPrefix?): Int {
        val free = places.indices.filter { places[it] == null }
        val number = next++
        val row = Row(if (residual != null) free.first() else free.last()) // who never steps with others stays out of their way
        rows[number] = row
        places[row.place] = number
        setExpert(number, residual)
        if (prefix != null) {
            prefix as Saved
            restore(row.place, prefix.parts)
            row.length = prefix.length
        }
        return number
    }

    override fun stop(row: Int) {
        places[rows.remove(row)!!.place] = null
    }

    override fun setExpert(row: Int, residual: FloatArray?) {
        val own = rows.getValue(row)
        own.isRouted = residual == null
        if (residual != null) experts.duplicate().also { it.position(own.place * sizes.total) }.put(residual)
    }

    override fun rewind(row: Int, length: Int) {
        rows.getValue(row).let { it.length = minOf(it.length, length) }
    }

    override fun save(row: Int, length: Int): SavedPrefix = Saved(length, copy(rows.getValue(row).place, length + sizes.virtual))

    override fun feed(row: Int, ids: LongArray, interruption: Interruption?): FloatBuffer {
        val own = rows.getValue(row)
        val graph = if (own.isRouted) graphs.routed() else graphs.pinned
        call(own.place, 1).run(graph, ids, intArrayOf(own.length), graphs.takesExpert && !own.isRouted, interruption)
        own.length += ids.size
        return logitsOf(own.place)
    }

    override fun step(rows: List<Int>, tokens: List<Long>, interruption: Interruption?): List<FloatBuffer> {
        val given = rows.zip(tokens).toMap()
        val together = rows.filter { !this.rows.getValue(it).isRouted }
        if (together.isNotEmpty()) {
            gather(together)
            val order = places.take(together.size).map { it!! }
            val ids = LongArray(order.size) { given.getValue(order[it]) }
            val lengths = IntArray(order.size) { this.rows.getValue(order[it]).length }
            call(0, order.size).run(graphs.pinned, ids, lengths, graphs.takesExpert, interruption)
            order.forEach { this.rows.getValue(it).length++ }
        }
        return rows.map { row ->
            if (this.rows.getValue(row).isRouted) feed(row, longArrayOf(given.getValue(row)), interruption)
            else logitsOf(this.rows.getValue(row).place)
        }
    }

    override fun close() {
        calls.values.forEach { it.close() }
        calls.clear()
    }

    private fun logitsOf(place: Int) = part(logits, place, 1, sizes.vocab)

    private fun call(first: Int, count: Int) = calls.getOrPut(first to count) { Call(first, count) }

    // places

    /** Bring these rows into the first places. */
    private fun gather(stepping: List<Int>) {
        val strangers = ArrayDeque(stepping.indices.filter { places[it] !in stepping })
        for (row in stepping) {
            if (rows.getValue(row).place >= stepping.size) exchange(rows.getValue(row).place, strangers.removeLast())
        }
    }

    /** Swap two places, of which the first is taken. */
    private fun exchange(source: Int, target: Int) {
        val moving = places[source]!!
        val waiting = places[target]
        val moved = copy(source, rows.getValue(moving).length + sizes.virtual)
        if (waiting != null) restore(source, copy(target, rows.getValue(waiting).length + sizes.virtual))
        restore(target, moved)
        val mine = part(experts, source, 1, sizes.total)
        val theirs = part(experts, target, 1, sizes.total)
        for (at in 0 until sizes.total) mine.get(at).let { mine.put(at, theirs.get(at)); theirs.put(at, it) }
        for ((number, place) in listOf(moving to target, waiting to source)) {
            places[place] = number
            if (number != null) rows.getValue(number).place = place
        }
    }

    /** A copy of a place's first [tokens] in every buffer, (heads, tokens, width) each. */
    private fun copy(place: Int, tokens: Int): List<FloatArray> = buffers.map { buffer ->
        val size = tokens * sizes.width
        FloatArray(sizes.heads * size).also { for (head in 0 until sizes.heads) at(buffer, place, head).get(it, head * size, size) }
    }

    /** Write what [copy] gave into a place. */
    private fun restore(place: Int, parts: List<FloatArray>) {
        for ((buffer, values) in buffers.zip(parts)) {
            val size = values.size / sizes.heads
            for (head in 0 until sizes.heads) at(buffer, place, head).put(values, head * size, size)
        }
    }

    private fun at(buffer: FloatBuffer, place: Int, head: Int) =
        buffer.duplicate().also { it.position(place * sizes.row + head * sizes.tokens * sizes.width) }

    /** The graphs with the caches of [count] places bound, as past and as present: attention writes in place. */
    private inner class Call(private val first: Int, private val count: Int) : Closeable {
        private val inputs = LinkedHashMap<String, OnnxTensor>()
        private val outputs = LinkedHashMap<String, OnnxTensor>()
        private val keep = directLongs(1).also { it.put(0, 1) }
        private val expert = OnnxTensor.createTensor(environment, part(experts, first, count, sizes.total), longArrayOf(count.toLong(), sizes.total.toLong()))

        init {
            val shape = longArrayOf(count.toLong(), sizes.heads.toLong(), sizes.tokens.toLong(), sizes.width.toLong())
            for ((name, buffer) in names.zip(buffers)) {
                val cache = OnnxTensor.createTensor(environment, part(buffer, first, count, sizes.row), shape)
                inputs["past_key_values.$name"] = cache
                outputs["present.$name"] = cache
            }
            inputs["logits_to_keep"] = OnnxTensor.createTensor(environment, keep, longArrayOf(1))
            outputs["logits"] = OnnxTensor.createTensor(environment, part(logits, first, count, sizes.vocab), longArrayOf(count.toLong(), 1, sizes.vocab.toLong()))
        }

        /** Append (count, S) [ids] to caches that hold [lengths] tokens; the last position's logits go where they belong. */
        fun run(graph: OrtSession, ids: LongArray, lengths: IntArray, takesExpert: Boolean, interruption: Interruption?) {
            val each = ids.size / count
            val width = lengths.max() + each + sizes.virtual
            val mask = directLongs(Math.multiplyExact(count, width))
            for ((row, length) in lengths.withIndex()) { // padding is on the right: a row's tokens come first
                for (at in 0 until length + each + sizes.virtual) mask.put(row * width + at, 1)
            }
            val given = LinkedHashMap(inputs)
            val made = ArrayList<OnnxTensor>()
            fun give(name: String, values: java.nio.LongBuffer, size: Int) {
                given[name] = OnnxTensor.createTensor(environment, values, longArrayOf(count.toLong(), size.toLong())).also { made += it }
            }
            try {
                give("attention_mask", mask, width)
                give("input_ids", directLongs(ids.size).also { it.put(ids).rewind() }, each)
                if (sizes.virtual > 0) { // virtual tokens go before the first call's
                    val own = if (lengths.all { it == 0 }) sizes.virtual else 0
                    give("virtual_ids", directLongs(count * own).also { for (at in 0 until it.capacity()) it.put(at, (at % own).toLong()) }, own)
                }
                if (takesExpert) given["expert"] = expert
                if (interruption == null) graph.run(given, outputs).close()
                else OrtSession.RunOptions().use { options ->
                    interruption.guard({ options.setTerminate(true) }) { graph.run(given, emptySet(), outputs, options).close() }
                }
            } finally {
                made.forEach { it.close() }
            }
        }

        override fun close() = (inputs.values + outputs.values + expert).toSet().forEach { it.close() }
    }

    private companion object {
        /** Elements of [count] places, [size] each, from place [first] on: a view. */
        private fun part(buffer: FloatBuffer, first: Int, count: Int, size: Int): FloatBuffer =
            buffer.duplicate().also { it.position(first * size).limit((first + count) * size) }.slice()
    }
}
