package limeedge

/**
 * Turns token ids into pieces of text that are safe to show, and watches for stop strings.
 *
 * A piece is held back while it may still change: bytes of an unfinished character, or the beginning of a stop string.
 */
internal class TextStream(private val decode: (IntArray) -> String, private val stop: List<String>) {
    private val ids = IntList()
    private var given = 0

    /** Whether a stop string was found. */
    var stopped: Boolean = false
        private set

    /** Take one token; the text that became certain, maybe empty. */
    fun push(token: Int): String {
        ids.add(token)
        val text = decode(ids.toArray())
        val found = stop.map { text.indexOf(it) }.filter { it >= 0 }
        if (found.isNotEmpty()) {
            stopped = true
            return give(text.substring(0, found.min()))
        }
        val safe = text.trimEnd(REPLACEMENT).length
        return give(text.substring(0, minOf(safe, stopBegins(text))))
    }

    /** The text still held back when generation ends without a stop string. */
    fun finish(): String = if (stopped) "" else give(decode(ids.toArray()))

    /** Where the longest tail of [text] starts that a stop string begins with. */
    private fun stopBegins(text: String): Int {
        val longest = (stop.maxOfOrNull { it.length } ?: 1) - 1
        for (length in minOf(text.length, longest) downTo 1) {
            val tail = text.substring(text.length - length)
            if (stop.any { it.startsWith(tail) }) return text.length - length
        }
        return text.length
    }

    private fun give(text: String): String {
        val piece = if (text.length > given) text.substring(given) else ""
        given = maxOf(given, text.length)
        return piece
    }

    private companion object {
        private const val REPLACEMENT = '\uFFFD'
    }
}
