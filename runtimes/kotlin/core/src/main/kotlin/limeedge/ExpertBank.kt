package limeedge

import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer

/**
 * The experts of one opened bundle, and the residual d = p - p_ref for any selection of them.
 *
 * Vectors keep their stored type and are read when first used; residuals are made on demand, and the last few, 16
 * megabytes in all, are kept so that switching back costs nothing.
 */
internal class ExpertBank(private val bundle: LimeBundle) {
    private val manifest = bundle.manifest
    private val entries = LinkedHashMap(manifest.experts.associateBy { it.name })
    private val vectors = HashMap<String, Expert>()
    private val ahead = HashMap(bundle.readExpertsAhead())
    private val installed = LinkedHashSet(entries.keys)
    private val ready = LinkedHashMap<Selection, FloatBuffer>(16, 0.75f, true) // oldest use first
    private val free = ArrayDeque<FloatBuffer>()
    private val scratch = FloatArray(manifest.sumH)

    /** Installed experts in the order they came. */
    val names: List<String> get() = installed.toList()

    /** Add an expert, or replace the one of the same name. @throws LimeError.Foreign it does not fit. */
    fun install(expert: Expert, where: String) {
        check(expert, where)
        vectors[expert.name] = expert
        entries.remove(expert.name)
        installed += expert.name
        forgetReady()
    }

    /** Forget an expert. @throws LimeError.Invalid no such expert. */
    fun remove(name: String) {
        if (!installed.remove(name)) throw unknown(name)
        vectors.remove(name)
        entries.remove(name)
        forgetReady()
    }

    /**
     * d of a selection: (sum_H,) float32, native order. It lies in one of a few buffers that are used over and over: it holds
     * until other selections, at least one, have been asked for.
     *
     * @throws LimeError.Invalid unknown name, weights that do not sum to 1. @throws LimeError.Damaged an expert file.
     */
    fun residual(selection: Selection): FloatBuffer {
        ready[selection]?.let { return it }
        subtract(selection)
        val slot = freeSlot()
        slot.clear()
        slot.put(scratch)
        slot.clear()
        ready[selection] = slot
        return slot
    }

    private fun subtract(selection: Selection) {
        val reference = bundle.reference
        when (selection) {
            is Selection.Expert -> subtractReference(vector(selection.name), reference, scratch)
            is Selection.Blend -> mix(selection, reference)
            Selection.None -> for (at in scratch.indices) scratch[at] = -reference[at]
            Selection.Routed -> throw IllegalArgumentException("routing has no residual")
        }
        if (!isFinite(scratch)) {
            throw LimeError.Invalid("$selection", "its residual p - p_ref is beyond float32", "such weights or such a vector cannot be run")
        }
    }

    /** The weighted sum in double, rounded once: the same bits in every language. */
    private fun mix(blend: Selection.Blend, reference: FloatArray) {
        val total = blend.weights.values.sum()
        if (blend.weights.isEmpty() || !total.isFinite() || Math.abs(total - 1.0) > 1e-6) {
            val hint = "scale the weights so that they sum to 1 (else the shared vector would be scaled)"
            throw LimeError.Invalid("blend", listOf(Fault("sum of weights", "1", "$total")), hint)
        }
        val sum = DoubleArray(reference.size)
        for ((name, weight) in blend.weights) {
            val expert = vector(name)
            for (at in sum.indices) sum[at] += weight * expert[at]
        }
        for (at in sum.indices) scratch[at] = sum[at].toFloat() - reference[at]
    }

    private fun vector(name: String): Expert {
        vectors[name]?.let { return it }
        val entry = entries[name] ?: throw unknown(name)
        val where = bundle.file(entry.file).path
        val expert = Expert.decode(bundle.readExpert(entry.file, ahead.remove(entry.file)), where)
        if (expert.name != name) {
            throw LimeError.Damaged(where, listOf(Fault("name", name, expert.name)), "the file was renamed: add it with lime-edge experts add --name")
        }
        check(expert, where)
        vectors[name] = expert
        return expert
    }

    private fun check(expert: Expert, where: String) {
        val faults = Faults()
        if (expert.adapterId != manifest.adapterId) faults.add("adapter_id", manifest.adapterId.take(16), expert.adapterId.take(16))
        if (expert.size != manifest.sumH) faults.add("length", manifest.sumH, expert.size)
        faults.throwAny { LimeError.Foreign(where, it, "an expert fits the shared adapter it was trained with, and no other") }
    }

    private fun unknown(name: String) = LimeError.Invalid(
        bundle.folder.path, "unknown expert '${name.take(80)}'", "installed experts: ${installed.joinToString(", ").ifEmpty { "none" }}",
    )

    /** A buffer to write to: never the one that was asked for last. */
    private fun freeSlot(): FloatBuffer {
        free.removeFirstOrNull()?.let { return it }
        if (ready.size < maxOf(2, READY_BYTES / maxOf(1, 4 * manifest.sumH))) return directFloats(manifest.sumH)
        return ready.remove(ready.keys.first())!!
    }

    /** An expert changed: nothing that was made is valid; the buffer in use is the last to be reused. */
    private fun forgetReady() {
        free += ready.values
        ready.clear()
    }

    private companion object {
        private const val READY_BYTES = 16 shl 20
    }
}

/** d = p - p_ref for one expert. */
internal fun subtractReference(expert: Expert, reference: FloatArray, out: FloatArray) {
    val halves = expert.halves
    if (halves != null) {
        for (at in out.indices) out[at] = Half.toFloat(halves[at].toInt()) - reference[at]
    } else {
        val floats = expert.floats!!
        for (at in out.indices) out[at] = floats[at] - reference[at]
    }
}

/** Whether no value is NaN or infinite: x - x is 0 for numbers only, so a sum tells for all at once. */
internal fun isFinite(values: FloatArray): Boolean {
    var sum = 0f
    for (value in values) sum += value - value
    return sum == 0f
}

/** Memory that engines use without copying it. */
internal fun directFloats(count: Int): FloatBuffer =
    ByteBuffer.allocateDirect(4 * count).order(ByteOrder.nativeOrder()).asFloatBuffer()
