package limeedge

/**
 * A value of a JSON text (RFC 8259): null, Boolean, Double or Long, String, `List<Any?>`, `Map<String, Any?>`.
 *
 * Files come from outside: nesting is bounded, a name may come once, and nothing but the value may be in the text. A
 * number without point and exponent that fits is a Long.
 */
internal object Json {
    class Malformed(message: String) : Exception(message)

    /** Read a whole text. */
    fun parse(text: String): Any? = Reader(text).readDocument()

    /** Write a value, as short as JSON allows; maps keep their order. */
    fun write(value: Any?): String = StringBuilder().also { append(it, value) }.toString()

    private const val DEEPEST = 100

    private class Reader(private val text: String) {
        private var at = 0
        private var depth = 0

        fun readDocument(): Any? {
            val value = readValue()
            skipSpace()
            if (at != text.length) fail("something follows the value")
            return value
        }

        private fun fail(why: String): Nothing = throw Malformed("$why, at character $at")

        private fun skipSpace() {
            while (at < text.length && text[at].let { it == ' ' || it == '\n' || it == '\r' || it == '\t' }) at++
        }

        private fun readValue(): Any? {
            skipSpace()
            if (at == text.length) fail("the text ends early")
            return when (val first = text[at]) {
                '{' -> nested { readObject() }
                '[' -> nested { readArray() }
                '"' -> readString()
                't' -> readWord("true", true)
                'f' -> readWord("false", false)
                'n' -> readWord("null", null)
                else -> if (first == '-' || first in '0'..'9') readNumber() else fail("unexpected '$first'")
            }
        }

        private inline fun <T> nested(read: () -> T): T {
            if (++depth > DEEPEST) fail("nested deeper than $DEEPEST")
            return read().also { depth-- }
        }

        private fun readWord(word: String, value: Any?): Any? {
            if (!text.startsWith(word, at)) fail("unexpected word")
            at += word.length
            return value
        }

        private fun readObject(): Map<String, Any?> {
            val members = LinkedHashMap<String, Any?>()
            at++
            if (closes('}')) return members
            do {
                skipSpace()
                if (at == text.length || text[at] != '"') fail("expected a name")
                val name = readString()
                skipSpace()
                if (at == text.length || text[at] != ':') fail("expected ':'")
                at++
                val value = readValue()
                if (name in members) fail("\"$name\" comes twice")
                members[name] = value
            } while (continues('}'))
            return members
        }

        private fun readArray(): List<Any?> {
            val items = ArrayList<Any?>()
            at++
            if (closes(']')) return items
            do items.add(readValue()) while (continues(']'))
            return items
        }

        private fun closes(end: Char): Boolean {
            skipSpace()
            return (at < text.length && text[at] == end).also { if (it) at++ }
        }

        private fun continues(end: Char): Boolean {
            skipSpace()
            if (at == text.length) fail("the text ends early")
            val next = text[at++]
            if (next != ',' && next != end) fail("expected ',' or '$end'")
            return next == ','
        }

        private fun readString(): String {
            val start = ++at
            while (at < text.length && text[at] != '"' && text[at] != '\\' && text[at] >= ' ') at++
            if (at < text.length && text[at] == '"') return text.substring(start, at++)
            val built = StringBuilder(text.substring(start, at))
            while (true) {
                if (at == text.length) fail("a string does not end")
                when (val char = text[at++]) {
                    '"' -> return built.toString()
                    '\\' -> built.append(readEscape())
                    else -> if (char < ' ') fail("a control character in a string") else built.append(char)
                }
            }
        }

        private fun readEscape(): Char {
            if (at == text.length) fail("a string does not end")
            return when (val char = text[at++]) {
                '"', '\\', '/' -> char
                'b' -> '\b'
                'f' -> '\u000C'
                'n' -> '\n'
                'r' -> '\r'
                't' -> '\t'
                'u' -> {
                    if (at + 4 > text.length) fail("a string does not end")
                    val code = text.substring(at, at + 4)
                    if (!code.all { it in '0'..'9' || it in 'a'..'f' || it in 'A'..'F' }) fail("bad \\u escape")
                    at += 4
                    code.toInt(16).toChar()
                }
                else -> fail("bad escape '\\$char'")
            }
        }

        private fun readNumber(): Any {
            val start = at
            if (text[at] == '-') at++
            val whole = readDigits()
            if (whole > 1 && text[at - whole] == '0') fail("a number with leading zeros")
            var exact = true
            if (at < text.length && text[at] == '.') {
                at++
                readDigits()
                exact = false
            }
            if (at < text.length && (text[at] == 'e' || text[at] == 'E')) {
                at++
                if (at < text.length && (text[at] == '+' || text[at] == '-')) at++
                readDigits()
                exact = false
            }
            val number = text.substring(start, at)
            return (if (exact) number.toLongOrNull() else null) ?: number.toDouble()
        }

        private fun readDigits(): Int {
            val start = at
            while (at < text.length && text[at] in '0'..'9') at++
            if (at == start) fail("expected a digit")
            return at - start
        }
    }

    private fun append(out: StringBuilder, value: Any?) {
        when (value) {
            null -> out.append("null")
            is Boolean, is Int, is Long -> out.append(value)
            is Number -> appendNumber(out, value.toDouble())
            is Map<*, *> -> value.entries.joinTo(out, ",", "{", "}") { (name, item) -> "${write("$name")}:${write(item)}" }
            is Iterable<*> -> value.joinTo(out, ",", "[", "]") { write(it) }
            else -> appendString(out, value.toString())
        }
    }

    private fun appendNumber(out: StringBuilder, number: Double) {
        require(!number.isNaN() && !number.isInfinite()) { "JSON has no $number" }
        out.append(number)
    }

    private fun appendString(out: StringBuilder, text: String) {
        out.append('"')
        for (char in text) {
            when {
                char == '"' || char == '\\' -> out.append('\\').append(char)
                char == '\n' -> out.append("\\n")
                char < ' ' || char == '\u007F' -> out.append("\\u").append(char.code.toString(16).padStart(4, '0'))
                else -> out.append(char)
            }
        }
        out.append('"')
    }
}
