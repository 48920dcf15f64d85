package limeedge

/**
 * What is a letter, a number and white space, by ranges of code points.
 *
 * Java's own classes follow the Unicode version of the machine at hand and differ from the tokenizer library's in
 * thousands of places, so a bundle brings the library's.
 */
internal class CharacterClasses(letters: IntArray, numbers: IntArray, spaces: IntArray, private val digits: IntArray = IntArray(0)) {
    /** The kinds that the splits tell apart. */
    enum class Kind { LETTER, NUMBER, SPACE, OTHER }

    private val starts: IntArray
    private val ends: IntArray
    private val kinds: Array<Kind>

    init {
        val ranges = listOf(letters to Kind.LETTER, numbers to Kind.NUMBER, spaces to Kind.SPACE)
            .flatMap { (bounds, kind) -> (bounds.indices step 2).map { Triple(bounds[it], bounds[it + 1], kind) } }
            .sortedBy { it.first }
        starts = IntArray(ranges.size) { ranges[it].first }
        ends = IntArray(ranges.size) { ranges[it].second }
        kinds = Array(ranges.size) { ranges[it].third }
    }

    private val ascii = Array(128) { search(it) }

    /** The kind of a code point. */
    fun kind(point: Int): Kind = if (point < 128) ascii[point] else search(point)

    /** Whether the library's digit splitter cuts here: not quite the numbers. */
    fun isDigit(point: Int): Boolean {
        val at = digits.binarySearch(point).let { if (it >= 0) it else -it - 2 }
        return at >= 0 && (at % 2 == 0 || digits[at] == point)
    }

    private fun search(point: Int): Kind {
        val at = starts.binarySearch(point).let { if (it >= 0) it else -it - 2 }
        return if (at >= 0 && point <= ends[at]) kinds[at] else Kind.OTHER
    }

    companion object {
        /** Read a bundle's table: JSON, per class a flat list of first and last code points. */
        fun read(text: String, where: String): CharacterClasses {
            val table = try {
                Json.parse(text) as? Map<*, *>
            } catch (error: Json.Malformed) {
                throw LimeError.Damaged(where, "not JSON: ${error.message}", COPY_AGAIN)
            }
            if (table?.get("format") != "lime-edge-classes" || table["schema"] != 1L) {
                throw LimeError.Unsupported(where, listOf(Fault("schema", "1", "${table?.get("schema")}")), "use a newer version of this library")
            }
            val (letters, numbers, spaces) = listOf("letters", "numbers", "spaces").map { readRanges(table[it], "$where: $it") }
            return CharacterClasses(letters, numbers, spaces, table["digits"]?.let { readRanges(it, "$where: digits") } ?: IntArray(0))
        }

        private fun readRanges(value: Any?, where: String): IntArray {
            val bounds = (value as? List<*>)?.map { it as? Long ?: -1L }
            val rising = bounds != null && bounds.size % 2 == 0 && bounds.all { it in 0..0x10FFFF } &&
                bounds.indices.all { it == 0 || bounds[it] > bounds[it - 1] || (it % 2 == 1 && bounds[it] == bounds[it - 1]) }
            if (!rising) throw LimeError.Damaged(where, "no rising ranges of code points", COPY_AGAIN)
            return bounds.map { it.toInt() }.toIntArray()
        }
    }
}
