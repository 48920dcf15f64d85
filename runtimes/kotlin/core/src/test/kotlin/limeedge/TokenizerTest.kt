package limeedge

import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlin.test.Test
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith

class TokenizerTest {
    private val names = listOf("gpt2", "smollm2", "llama3", "qwen2")

    private fun open(folder: File): Tokenizer {
        val facts = Json.parse(File(folder, "facts.json").readText()).map()
        assertEquals("byte-bpe", facts["kind"])
        val classes = CharacterClasses.read(File(folder, "classes.json").readText(), "classes")
        return Tokenizer.read(File(folder, "tokenizer.json").readText(), "tokenizer", Split.values().first { Names.lower(it.name) == facts["split"] }, classes)
    }

    @Test
    fun `2,000 strings of every tokenizer have the library's ids, and ids its text`() {
        for (name in names) {
            val folder = File(Vectors.folder, "tokenizers/$name")
            val tokenizer = open(folder)
            val cases = Json.parse(File(folder, "cases.json").readText()).map()
            for (case in cases["strings"].list()) {
                val (text, ids) = case.list()
                assertContentEquals(ids.ints(), tokenizer.encode(text as String), "$name: ${Json.write(text)}")
            }
            for (case in cases["decoded"].list()) {
                val (ids, text) = case.list()
                assertEquals(text, tokenizer.decode(ids.ints()), "$name: $ids")
            }
        }
    }

    @Test
    fun `every code point of every tokenizer has the library's ids`() {
        for (name in names) {
            val folder = File(Vectors.folder, "tokenizers/$name")
            val tokenizer = open(folder)
            val cases = Json.parse(File(folder, "cases.json").readText()).map()
            val points = (0..0x10FFFF).filter { it !in 0xD800..0xDFFF }
            val hashes = points.chunked((cases["block"] as Long).toInt()).map { block ->
                hash(block.chunked((cases["text"] as Long).toInt()).flatMap { tokenizer.encode(spread(it)).asList() })
            }
            val odd = hashes.indices.filter { hashes[it] != cases["hashes"].list()[it] }
            assertEquals(emptyList(), odd, "$name: blocks of code points that differ")
        }
    }

    private fun spread(points: List<Int>) = points.joinToString("") { point -> String(Character.toChars(point)).let { "a${it}b $it$it 1$it'$it\n" } }

    private fun hash(ids: List<Int>): String {
        val bytes = ByteBuffer.allocate(4 * ids.size).order(ByteOrder.LITTLE_ENDIAN)
        ids.forEach { bytes.putInt(it) }
        return hex(sha256().digest(bytes.array())).take(16)
    }

    @Test
    fun `what the tokenizer does not know is refused by name`() {
        val text = File(Vectors.folder, "tokenizers/gpt2/tokenizer.json").readText()
        val classes = CharacterClasses.read(File(Vectors.folder, "tokenizers/gpt2/classes.json").readText(), "classes")
        for ((from, to, what) in listOf(
            Triple("\"dropout\":null", "\"dropout\":0.1", "dropout"),
            Triple("\"normalizer\":null", "\"normalizer\":{\"type\":\"Lowercase\"}", "normalizer"),
            Triple("\"byte_fallback\":false", "\"byte_fallback\":true", "byte_fallback"),
            Triple("\"type\":\"BPE\"", "\"type\":\"Unigram\"", "model"),
            Triple("\"lstrip\":false", "\"lstrip\":true", "lstrip"),
        )) {
            val compact = Json.write(Json.parse(text))
            assert(from in compact) { from }
            val error = assertFailsWith<LimeError.Unsupported> { Tokenizer.read(compact.replaceFirst(from, to), "x", Split.GPT2, classes) }
            assert(what in error.message!!) { error.message!! }
        }
        for (broken in listOf("", "{}", "{\"model\":{}}", text.dropLast(9))) {
            assertFailsWith<LimeError> { Tokenizer.read(broken, "x", Split.GPT2, classes) }
        }
    }
}
