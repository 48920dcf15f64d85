package limeedge

/** What came of one selection. */
public enum class CheckResult { OK, MISSED, UNCHECKED }

/**
 * One selection on one target.
 *
 * @property why what was missed, or why it was not checked. @property error root mean square error of a row, averaged over rows,
 *   in standard deviations of the output. @property worst the largest of any row. @property agreed of [decisions]: greedy tokens
 *   or classes equal to PyTorch's.
 */
public data class Check(
    val target: String, val selection: String, val result: CheckResult, val why: String = "",
    val error: Double? = null, val worst: Double? = null, val agreed: Int = 0, val decisions: Int = 0,
)

/** Does a bundle compute here what PyTorch computed at export? The files' hashes, then every expert against golden outputs. */
public object Verify {
    /**
     * Compare every file's sha256, then the answers of one target.
     *
     * @param selections some of the golden ones, as typed; all by default.
     * @return one check for every selection. @throws LimeError.Damaged a file. @throws LimeError.Missing no golden outputs.
     */
    public fun run(bundle: LimeBundle, engines: EngineFactory, selections: List<String> = emptyList(), options: SessionOptions = SessionOptions()): List<Check> {
        bundle.verifyFiles()
        val golden = Golden.read(bundle) ?: throw LimeError.Missing(bundle.folder.path, "no golden outputs to compare with", "export the bundle again")
        val known = (golden.selections + bundle.manifest.experts.map { it.name }).distinct()
        val wanted = selections.map { "${Selection.parse(it)}" }
        wanted.firstOrNull { it !in known }?.let { throw LimeError.Invalid(bundle.folder.path, "no golden outputs for '$it'", "there are some for ${golden.selections.joinToString(", ")}") }
        val session = if (bundle.manifest.kind == "encoder") EncoderSession.open(bundle, engines, options) else LimeSession.open(bundle, engines, options)
        return session.use { (wanted.ifEmpty { known }).map { label -> check(session, golden, label) } }
    }

    private fun check(session: ExpertSwitch, golden: Golden, label: String): Check {
        val target = session.facts.name
        obstacle(session, golden, label)?.let { return Check(target, label, CheckResult.UNCHECKED, it) }
        return try {
            session.use(label)
            Judge(golden, session.facts.compute, label).judge(target, replay(session, golden, label))
        } catch (error: LimeError) {
            Check(target, label, CheckResult.MISSED, "${error.where}: ${error.faults.first()}")
        }
    }

    /** Why a selection cannot be compared, or null. */
    private fun obstacle(session: ExpertSwitch, golden: Golden, label: String): String? {
        val selection = Selection.parse(label)
        val experts = session.bundle.manifest.experts.associateBy { it.name }
        val names = when (selection) {
            is Selection.Expert -> listOf(selection.name)
            is Selection.Blend -> selection.weights.keys.toList()
            else -> emptyList()
        }
        val needed = golden.calls.first().values.first().shape.last() + golden.steps
        return when {
            session is LimeSession && session.maxLength < needed -> "its cache holds ${session.maxLength} tokens, $needed are needed"
            selection == Selection.Routed && session.facts.routed == null -> "this target has no routed graph"
            names.any { it !in experts } -> "${names.filter { it !in experts }.joinToString(", ")}: removed after the export"
            label !in golden.selections || names.any { experts.getValue(it).added } -> "came after the export: PyTorch never ran it"
            else -> null
        }
    }

    /** The full rows of every golden output, calls one after another, as the session computes them. */
    private fun replay(session: ExpertSwitch, golden: Golden, label: String): Map<String, List<FloatArray>> = when (session) {
        is LimeSession -> mapOf(DECIDING to replayDecoder(session, golden, label))
        is EncoderSession -> {
            val found = golden.outputs.mapValues { ArrayList<FloatArray>() }
            for (call in golden.calls) {
                val outputs = session.run(call)
                for ((name, output) in golden.outputs) {
                    val tensor = outputs.getValue(name)
                    val width = tensor.shape.last()
                    for (row in output.rows) found.getValue(name) += tensor.floats!!.copyOfRange(row * width, (row + 1) * width)
                }
            }
            found
        }
    }

    /** The prompt, then the oracle's own tokens one by one. */
    private fun replayDecoder(session: LimeSession, golden: Golden, label: String): List<FloatArray> {
        val best = golden.outputs.getValue(DECIDING).expected[golden.selections.indexOf(label)].best
        return golden.calls.flatMapIndexed { index, call ->
            val prompt = call.getValue("input_ids").longs!!
            val answer = best.copyOfRange(index * golden.steps, (index + 1) * golden.steps - 1)
            session.logits(IntArray(prompt.size) { prompt[it].toInt() }, keep = 1) + answer.flatMap { session.extend(intArrayOf(it)) }
        }
    }

    internal const val DECIDING: String = "logits"
}

/** Is an answer PyTorch's, within what rounding explains, and not another selection's? Rules: docs/bundle-format.md. */
internal class Judge(private val golden: Golden, private val compute: String, private val label: String) {
    private val index = golden.selections.indexOf(label)
    private val faults = LinkedHashSet<String>()

    fun judge(target: String, found: Map<String, List<FloatArray>>): Check {
        var error = 0.0
        var worst = 0.0
        var agreed = 0
        var decisions = 0
        for ((name, output) in golden.outputs) {
            val expected = output.expected[index]
            val mine = condense(found.getValue(name), output.columns, golden.steps > 0)
            val errors = DoubleArray(mine.best.size) { distance(mine, expected, it) / output.scale }
            val limits = limits(output.columns.size)
            error = maxOf(error, errors.average())
            worst = maxOf(worst, errors.max())
            if (!(errors.average() <= limits[MEAN] && errors.max() <= limits[WORST])) faults += "$name differ"
            if (name == Verify.DECIDING) {
                val same = mine.best.indices.count { mine.best[it] == expected.best[it] }
                agreed += same
                decisions += mine.best.size
                val sure = mine.best.indices.any { mine.best[it] != expected.best[it] && expected.margin[it] > limits[LEAD] * output.scale }
                if (sure) faults += "another choice where PyTorch was sure"
            }
            compareOthers(mine, output, limits[MEAN] * output.scale)
        }
        if (error.isNaN() || error.isInfinite()) return Check(target, label, CheckResult.MISSED, "NaN or infinite values", null, null, agreed, decisions)
        val result = if (faults.isEmpty()) CheckResult.OK else CheckResult.MISSED
        return Check(target, label, result, faults.joinToString("; "), error, worst, agreed, decisions)
    }

    private fun distance(mine: Rows, expected: Rows, row: Int): Double {
        var squares = square(mine.peak[row] - expected.peak[row])
        for (at in mine.values[row].indices) squares += square(mine.values[row][at] - expected.values[row][at])
        return Math.sqrt(squares / (mine.values[row].size + 1))
    }

    /** After its first token every selection reads another text: only rows that all answer alike are compared. */
    private fun compareOthers(mine: Rows, output: GoldenOutput, limit: Double) {
        val shared = if (golden.steps > 0) mine.best.indices.filter { it % golden.steps == 0 } else mine.best.indices.toList()
        val own = flatten(mine, shared)
        val others = output.expected.map { flatten(it, shared) }
        val away = others.mapIndexed { other, values -> if (other != index && rms(values, others[index]) < limit / 2) Double.POSITIVE_INFINITY else rms(values, own) }
        val nearest = away.indices.minByOrNull { away[it] }!!
        if (nearest != index && away[nearest] <= limit) faults += "answers like ${golden.selections[nearest]}"
        else if (faults.isEmpty() && mayLean(output.columns.size)) {
            findLean(own, others, limit)?.let { faults += "leans towards ${golden.selections[it]}" }
        }
    }

    /** Rounding errors have no direction; a mixture's points from the answers of the one to those of the other. */
    private fun findLean(own: FloatArray, others: List<FloatArray>, limit: Double): Int? {
        var best = -1
        var most = 0.0
        for (other in others.indices) {
            var along = 0.0
            var squares = 0.0
            for (at in own.indices) {
                val way = (others[other][at] - others[index][at]).toDouble()
                along += way * (own[at] - others[index][at])
                squares += way * way
            }
            squares = maxOf(squares / own.size, 1e-30)
            val lean = along / own.size / squares
            val explained = if (lean > LEAN) lean * Math.sqrt(squares) else 0.0
            if (explained > most) {
                most = explained
                best = other
            }
        }
        return best.takeIf { most > LEAN * limit }
    }

    private fun mayLean(width: Int) = compute == "float32" || (label != "routed" && width >= NARROW)

    private fun limits(width: Int): DoubleArray {
        val limits = TOLERANCES.getValue(compute)
        val loose = if (compute == "float32") 1.0 else (if (label == "routed") 2.0 else 1.0) * (if (width < NARROW) 3.0 else 1.0)
        return DoubleArray(3) { limits[it] * loose }
    }

    private fun flatten(rows: Rows, which: List<Int>) = which.flatMap { rows.values[it].asList() }.toFloatArray()

    private fun rms(one: FloatArray, other: FloatArray) = Math.sqrt(one.indices.sumOf { square(one[it] - other[it]) } / one.size)

    private fun square(value: Float) = value.toDouble() * value

    private companion object {
        private const val MEAN = 0
        private const val WORST = 1
        private const val LEAD = 2
        private const val NARROW = 16
        private const val LEAN = 0.25
        private val TOLERANCES = mapOf(
            "float32" to doubleArrayOf(1e-4, 1e-4, 1e-3),
            "float16" to doubleArrayOf(0.02, 0.05, 0.2),
            "int8-dynamic" to doubleArrayOf(0.1, 0.25, 1.0),
            "int8-per-token" to doubleArrayOf(0.2, 0.4, 1.0),
        )
    }
}
