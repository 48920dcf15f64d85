package limeedge

/**
 * One thing that is wrong.
 *
 * @property what the thing: a file, a field, an argument.
 * @property expected what it should be, where that helps.
 * @property found what it is, where that helps.
 */
public data class Fault(val what: String, val expected: String? = null, val found: String? = null) {
    override fun toString(): String = buildString {
        append(what)
        if (expected != null) append(": expected ").append(expected)
        if (found != null) append(if (expected != null) ", found " else ": found ").append(found)
    }
}

/**
 * A fault that the caller can mend; everything that this library throws on purpose.
 *
 * @property where the file, bundle or call it is about.
 * @property faults everything that is wrong there, at least one; [what], [expected] and [found] are the first's.
 * @property hint what to do about it, or empty.
 */
public sealed class LimeError(
    public val where: String,
    public val faults: List<Fault>,
    public val hint: String,
    cause: Throwable? = null,
) : Exception(describe(where, faults, hint), cause) {
    /** What is wrong. */
    public val what: String get() = faults.first().what

    /** What was expected, where that helps. */
    public val expected: String? get() = faults.first().expected

    /** What was found, where that helps. */
    public val found: String? get() = faults.first().found

    /** A file, an engine or a target is not there. */
    public class Missing(where: String, what: String, hint: String) : LimeError(where, listOf(Fault(what)), hint)

    /** Bytes are not what the bundle says, or not what their format says: copy them again. */
    public class Damaged(where: String, faults: List<Fault>, hint: String) : LimeError(where, faults, hint) {
        public constructor(where: String, what: String, hint: String) : this(where, listOf(Fault(what)), hint)
    }

    /** An expert that was made for another shared adapter or another table of sites. */
    public class Foreign(where: String, faults: List<Fault>, hint: String) : LimeError(where, faults, hint)

    /** Sound, but not for this version of the library: a newer schema, a tokenizer or a kind of model it does not know. */
    public class Unsupported(where: String, faults: List<Fault>, hint: String) : LimeError(where, faults, hint) {
        public constructor(where: String, what: String, hint: String) : this(where, listOf(Fault(what)), hint)
    }

    /** A call that asks for what cannot be: unknown names, weights that do not sum to 1, options out of range. */
    public class Invalid(where: String, faults: List<Fault>, hint: String) : LimeError(where, faults, hint) {
        public constructor(where: String, what: String, hint: String) : this(where, listOf(Fault(what)), hint)
    }

    /** The cache has no room for the tokens. */
    public class Full(where: String, what: String, hint: String) : LimeError(where, listOf(Fault(what)), hint)

    /** A call at the wrong time: a closed session, a generation whose cache another call changed, two threads at once. */
    public class Misused(where: String, what: String, hint: String) : LimeError(where, listOf(Fault(what)), hint)

    /** The engine refuses a graph or fails while it runs; `cause` is the engine's own exception. */
    public class Engine(where: String, what: String, hint: String, cause: Throwable? = null) :
        LimeError(where, listOf(Fault(what)), hint, cause)
}

/** At most so many faults are shown. */
private const val SHOWN = 20

private fun describe(where: String, faults: List<Fault>, hint: String): String {
    val body = if (faults.size == 1) {
        "$where: ${faults[0]}"
    } else {
        val lines = faults.take(SHOWN).map { it.toString() } +
            (if (faults.size > SHOWN) listOf("... and ${faults.size - SHOWN} more") else emptyList())
        "$where: ${faults.size} faults" + lines.joinToString("") { "\n  - $it" }
    }
    return if (hint.isEmpty()) body else "$body\n  hint: $hint"
}

/** Collects every fault of one input, so that they are thrown together. */
internal class Faults {
    val list = mutableListOf<Fault>()

    fun add(what: String, expected: Any? = null, found: Any? = null) {
        list += Fault(what, expected?.toString(), found?.toString())
    }

    /** Throw what [error] makes of the faults, if there are any. */
    inline fun throwAny(error: (List<Fault>) -> LimeError) {
        if (list.isNotEmpty()) throw error(list.toList())
    }
}
