package limeedge

/** Which names and paths there may be in a bundle; it is copied between systems, so one must mean one file on all of them. */
internal object Names {
    private val EXPERT = Regex("[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
    private val PART = Regex("[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
    private val DEVICES = setOf("con", "prn", "aux", "nul") + (0..9).flatMap { listOf("com$it", "lpt$it") }
    val RESERVED = setOf("none", "routed")

    /** What is wrong with an expert name, or null. */
    fun checkExpert(name: String?): String? = when {
        name == null || !EXPERT.matches(name) -> "'${name.orEmpty().take(80)}' is not a valid expert name (letters, digits, '.', '_', '-'; at most 64)"
        lower(name) in RESERVED -> "'$name' is reserved"
        isDevice(name) || name.endsWith(".") -> "'$name' is no file name on Windows"
        else -> null
    }

    /** What is wrong with a path inside a bundle, or null. */
    fun checkPath(path: String): String? {
        val parts = path.split('/')
        return when {
            parts.size > 8 || parts.any { !PART.matches(it) } -> "'${path.take(80)}' is not a path inside a bundle"
            parts.any { isDevice(it) || it.endsWith(".") } -> "'$path' is no file name on Windows"
            else -> null
        }
    }

    /** What cannot be there together: equal but for letter case, or a file where another needs a folder. */
    fun findClashes(paths: Collection<String>): List<String> {
        val seen = HashMap<String, String>()
        val clashes = ArrayList<String>()
        for (path in paths) seen.put(lower(path), path)?.let { clashes += "'$it' and '$path' are one on some file systems" }
        for ((folded, path) in seen) {
            val parts = folded.split('/')
            for (count in 1 until parts.size) {
                seen[parts.take(count).joinToString("/")]?.let { clashes += "'$it' is a file and '$path' needs a folder there" }
            }
        }
        return clashes
    }

    /** Lower case where the language of the machine does not count (Turkish has another i). */
    fun lower(text: String): String = text.lowercase(java.util.Locale.ROOT)

    private fun isDevice(part: String) = lower(part.substringBefore('.')) in DEVICES
}
