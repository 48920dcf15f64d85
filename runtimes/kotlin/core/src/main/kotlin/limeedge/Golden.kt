package limeedge

/**
 * One output's rows, condensed: a language model's less their mean, which no softmax sees.
 *
 * @property values (N, C) at the kept columns. @property best (N,) the largest value's column. @property peak (N,) that
 *   value. @property margin (N,) how far the second lies below it. N counts calls, then rows of a call.
 */
internal class Rows(val values: List<FloatArray>, val best: IntArray, val peak: FloatArray, val margin: FloatArray)

/** One output: which rows of a call and which columns of a row are kept, and what they hold for every selection. */
internal class GoldenOutput(val rows: IntArray, val columns: IntArray, val expected: List<Rows>) {
    /** What errors are measured in: the standard deviation of everything kept. */
    val scale: Double = run {
        var count = 0L
        var sum = 0.0
        for (rows in expected) for (row in rows.values) for (value in row) {
            sum += value
            count++
        }
        val mean = sum / count
        var squares = 0.0
        for (rows in expected) for (row in rows.values) for (value in row) squares += (value - mean) * (value - mean)
        maxOf(Math.sqrt(squares / count), 1e-6)
    }
}

/**
 * What the export knows about the right answers (docs/bundle-format.md, "Golden outputs").
 *
 * @property selections as typed. @property calls inputs by name, one tensor per call. @property steps of a language model:
 *   the prompt and steps - 1 tokens; encoders: 0.
 */
internal class Golden(val selections: List<String>, val calls: List<Map<String, Tensor>>, val steps: Int, val outputs: Map<String, GoldenOutput>) {
    companion object {
        const val FILE = "verify/golden.safetensors"
        private const val PIXEL = 1f / 32

        /** The bundle's golden outputs, null where it was exported without. @throws LimeError.Damaged */
        fun read(bundle: LimeBundle): Golden? {
            if (FILE !in bundle.manifest.files) return null
            val where = bundle.file(FILE).path
            val file = try {
                Safetensors.read(bundle.readChecked(FILE))
            } catch (error: Safetensors.Malformed) {
                throw LimeError.Damaged(where, "${error.message}", COPY_AGAIN)
            } catch (error: Json.Malformed) {
                throw LimeError.Damaged(where, "${error.message}", COPY_AGAIN)
            }
            if (file.metadata["format"] != "lime-edge-golden") throw LimeError.Damaged(where, "holds no golden outputs", COPY_AGAIN)
            if (file.metadata["schema"] != "1") throw LimeError.Unsupported(where, listOf(Fault("schema", "1", "${file.metadata["schema"]}")), "use a newer version of this library")
            try {
                return build(file)
            } catch (error: RuntimeException) { // a tensor that is missing or of another shape
                throw LimeError.Damaged(where, "damaged: $error", COPY_AGAIN)
            } catch (error: Json.Malformed) {
                throw LimeError.Damaged(where, "damaged: $error", COPY_AGAIN)
            }
        }

        private fun build(file: Safetensors): Golden {
            val selections = (Json.parse(file.metadata.getValue("selections")) as List<*>).map { it as String }
            val inputs = file.tensors.filterKeys { it.startsWith("inputs/") }.mapKeys { it.key.removePrefix("inputs/") }
            val count = inputs.values.first().shape[0]
            val calls = List(count) { call -> inputs.mapValues { (_, tensor) -> pickCall(tensor, call, count) } }
            val names = file.tensors.keys.filter { it.endsWith("/columns") }.map { it.removeSuffix("/columns") }
            val outputs = names.associateWith { readOutput(file.tensors, it, selections.size, count) }
            require(calls.isNotEmpty() && outputs.isNotEmpty()) { "no inputs or outputs" }
            return Golden(selections, calls, file.metadata.getValue("steps").toInt(), outputs)
        }

        private fun pickCall(tensor: StoredTensor, call: Int, count: Int): Tensor {
            val shape = tensor.shape.drop(1).toIntArray()
            val size = tensor.size / count
            if (tensor.dtype == "I32") return Tensor.of(tensor.ints().let { all -> LongArray(size) { all[call * size + it].toLong() } }, *shape)
            require(tensor.dtype == "I8") { "inputs of ${tensor.dtype}" }
            return Tensor.of(FloatArray(size) { tensor.data[call * size + it] * PIXEL }, *shape)
        }

        private fun readOutput(tensors: Map<String, StoredTensor>, name: String, selections: Int, calls: Int): GoldenOutput {
            val rows = tensors.getValue("$name/rows").ints()
            val columns = tensors.getValue("$name/columns").ints()
            val values = tensors.getValue("$name/values")
            require(values.shape == listOf(selections, calls, rows.size, columns.size)) { "$name/values" }
            val all = values.floats()
            val best = tensors.getValue("$name/best").ints()
            val peak = tensors.getValue("$name/peak").floats()
            val margin = tensors.getValue("$name/margin").floats()
            val each = calls * rows.size
            require(listOf(best.size, peak.size, margin.size).all { it == selections * each }) { "$name/best" }
            val expected = List(selections) { index ->
                val kept = List(each) { row -> ((index * each + row) * columns.size).let { all.copyOfRange(it, it + columns.size) } }
                fun <T> cut(copy: (Int, Int) -> T) = copy(index * each, (index + 1) * each)
                Rows(kept, cut(best::copyOfRange), cut(peak::copyOfRange), cut(margin::copyOfRange))
            }
            return GoldenOutput(rows, columns, expected)
        }
    }
}

/** Keep of full rows (N, V) what is compared. [centre]: take every row's mean off first. */
internal fun condense(rows: List<FloatArray>, columns: IntArray, centre: Boolean): Rows {
    val best = IntArray(rows.size)
    val peak = FloatArray(rows.size)
    val margin = FloatArray(rows.size)
    val values = rows.mapIndexed { index, row ->
        val mean = if (centre) (row.fold(0.0) { sum, value -> sum + value } / row.size).toFloat() else 0f
        var first = 0
        var second = Float.NEGATIVE_INFINITY
        for (at in 1 until row.size) {
            if (row[at] > row[first]) {
                second = row[first]
                first = at
            } else if (row[at] > second) second = row[at]
        }
        best[index] = first
        peak[index] = row[first] - mean
        margin[index] = if (row.size > 1) row[first] - second else 0f
        FloatArray(columns.size) { row[columns[it]] - mean }
    }
    return Rows(values, best, peak, margin)
}
