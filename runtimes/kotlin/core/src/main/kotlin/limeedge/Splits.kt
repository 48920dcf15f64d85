package limeedge

import limeedge.CharacterClasses.Kind

/**
 * How a text is cut into words before bytes are merged: the regular expressions of four tokenizers, by hand.
 *
 * Expressions are matched one after another, the first alternative that fits wins (as in Oniguruma, which the
 * tokenizer library uses); every character belongs to exactly one word.
 */
internal enum class Split(private val style: Style, private val digits: Int) {
    /** `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+` */
    GPT2(Style.GPT2, 0),

    /** Every digit is a word of its own, the rest is cut as GPT-2 does. */
    SMOLLM2(Style.GPT2, 1),

    /** `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+` */
    LLAMA3(Style.LLAMA3, 3),

    /** As LLAMA3, but a number is a single digit. */
    QWEN2(Style.LLAMA3, 1),
    ;

    private enum class Style { GPT2, LLAMA3 }

    /** Cut code points: calls [word] with the start and end of every word, in order. */
    fun cut(points: IntArray, classes: CharacterClasses, word: (Int, Int) -> Unit) {
        if (this != SMOLLM2) return cutRange(Scan(points, 0, points.size, classes), word)
        var start = 0
        for (at in points.indices) {
            if (!classes.isDigit(points[at])) continue
            if (at > start) cutRange(Scan(points, start, at, classes), word)
            word(at, at + 1)
            start = at + 1
        }
        if (start < points.size) cutRange(Scan(points, start, points.size, classes), word)
    }

    private fun cutRange(scan: Scan, word: (Int, Int) -> Unit) {
        var at = scan.start
        while (at < scan.end) {
            val next = if (style == Style.GPT2) nextGpt2(scan, at) else nextLlama3(scan, at)
            word(at, next)
            at = next
        }
    }

    private fun nextGpt2(scan: Scan, at: Int): Int {
        scan.contraction(at, anyCase = false).let { if (it > at) return it }
        val first = if (scan.points[at] == ' '.code) at + 1 else at
        val kind = if (first < scan.end) scan.kind(first) else Kind.SPACE
        return if (kind == Kind.SPACE) scan.spaces(at) else scan.run(first, kind)
    }

    private fun nextLlama3(scan: Scan, at: Int): Int {
        scan.contraction(at, anyCase = true).let { if (it > at) return it }
        val point = scan.points[at]
        val kind = scan.kind(at)
        val isBreak = point == '\r'.code || point == '\n'.code
        if (kind == Kind.LETTER) return scan.run(at, Kind.LETTER)
        if (kind == Kind.NUMBER) return scan.run(at, Kind.NUMBER, digits)
        if (!isBreak && scan.isAt(at + 1, Kind.LETTER)) return scan.run(at + 1, Kind.LETTER)
        val first = if (point == ' '.code) at + 1 else at
        if (scan.isAt(first, Kind.OTHER)) return scan.breaks(scan.run(first, Kind.OTHER))
        return scan.lastBreak(at).let { if (it > at) it else scan.spaces(at) }
    }

    /** The code points of one stretch and the small steps that the expressions are made of. */
    private class Scan(val points: IntArray, val start: Int, val end: Int, private val classes: CharacterClasses) {
        fun kind(at: Int): Kind = classes.kind(points[at])

        fun isAt(at: Int, kind: Kind): Boolean = at < end && kind(at) == kind

        /** Where a run of one kind ends, after [most] at the latest. */
        fun run(at: Int, kind: Kind, most: Int = Int.MAX_VALUE): Int {
            var next = at
            while (next < end && next - at < most && kind(next) == kind) next++
            return next
        }

        /** `[\r\n]*` */
        fun breaks(at: Int): Int {
            var next = at
            while (next < end && (points[next] == '\r'.code || points[next] == '\n'.code)) next++
            return next
        }

        /** `\s*[\r\n]+`: behind the last break of the white space, or [at] where there is none. */
        fun lastBreak(at: Int): Int {
            var next = run(at, Kind.SPACE)
            while (next > at && points[next - 1] != '\r'.code && points[next - 1] != '\n'.code) next--
            return next
        }

        /** `\s+(?!\S)|\s+`: white space, less the last of several where something follows. */
        fun spaces(at: Int): Int {
            val next = run(at, Kind.SPACE)
            return if (next < end && next - at > 1) next - 1 else next
        }

        /** `'s|'t|'re|'ve|'m|'ll|'d`: behind it, or [at]. */
        fun contraction(at: Int, anyCase: Boolean): Int {
            if (points[at] != '\''.code) return at
            for (tail in CONTRACTIONS) {
                if (at + tail.length < end && tail.indices.all { same(points[at + 1 + it], tail[it], anyCase) }) {
                    return at + 1 + tail.length
                }
            }
            return at
        }

        private fun same(point: Int, letter: Char, anyCase: Boolean): Boolean =
            point == letter.code || (anyCase && (point == letter.code - 32 || (letter == 's' && point == LONG_S)))
    }

    private companion object {
        private val CONTRACTIONS = listOf("s", "t", "re", "ve", "m", "ll", "d")
        private const val LONG_S = 0x17F // its upper case is S
    }
}
