package limeedge.onnx

import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.runBlocking
import limeedge.FinishReason
import limeedge.GenerationOptions
import limeedge.LimeError
import limeedge.LimeSession
import limeedge.Selection
import limeedge.Names
import limeedge.Vectors
import limeedge.ints
import limeedge.list
import limeedge.map
import kotlin.test.Test
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith

/** Every answer that Python wrote down, asked again: the same tokens, logits within 1e-5 on the same library. */
class SessionVectorsTest {
    private val bundles = Vectors.made("sessions.json")["bundles"].map()
    private val limit = 1e-5

    /** Another version of the library sums in another order, which the int8 activations of a quantized bundle amplify. */
    private fun limitOf(session: LimeSession) = if (sameLibrary) limit else if (session.bundle.manifest.quant == "none") 1e-3 else 0.3

    private fun forEach(check: (String, Map<*, *>, LimeSession) -> Unit) {
        assert(bundles.size > 8)
        for ((name, cases) in bundles) openSession("$name").use { check("$name", cases.map(), it) }
    }

    @Test
    fun `what a bundle opens with and holds`() = forEach { name, cases, session ->
        assertEquals(cases["experts"], session.experts, name)
        assertEquals(cases["opens_with"], "${session.selection}", name)
    }

    @Test
    fun `selections that Python refuses are refused`() = forEach { name, cases, session ->
        val before = session.selection
        for (text in cases["refused"].list()) {
            assertFailsWith<LimeError.Invalid>("$name: $text") { session.use("$text") }
            assertEquals(before, session.selection, name)
        }
        for (text in cases["allowed"].list()) {
            session.use("$text")
            assertEquals(Selection.parse("$text"), session.selection)
        }
    }

    @Test
    fun `logits of every position`() = forEach { name, cases, session ->
        for (case in cases["logits"].list().map { it.map() }) {
            session.use("${case["selection"]}")
            val rows = session.logits(case["ids"].ints())
            case["logits"].list().forEachIndexed { at, row -> assertClose(row.list(), rows[at], limitOf(session), "$name, ${case["selection"]}, position $at") }
        }
    }

    @Test
    fun `generations draw the same tokens and end for the same reason`() = forEach { name, cases, session ->
        var odd = 0
        for (case in cases["generations"].list().map { it.map() }) {
            session.use("${case["selection"]}")
            val options = readOptions(case["options"].map())
            val (expected, found) = runBlocking {
                if ("tokens" in case) case["tokens"].ints().asList() to session.generateIds(case["ids"].ints(), options).toList()
                else {
                    assertContentEquals(case["ids"].ints(), session.tokenizer.encode("${case["prompt"]}"))
                    case["pieces"] to session.generate("${case["prompt"]}", options).toList()
                }
            }
            val finish = session.finishReason?.let { Names.lower(it.name) }
            if (sameLibrary) {
                assertEquals(expected, found, "$name: $case")
                assertEquals(case["finish"], finish, "$name: $case")
            } else if (expected != found) odd++
        }
        val most = if (session.bundle.manifest.quant == "none") 0 else cases["generations"].list().size / 5
        assert(odd <= most) { "$name: $odd generations differ on another version of the library, $most may" }
    }

    @Test
    fun `the cache holds what Python's holds after every call`() = forEach { name, cases, session ->
        if (!sameLibrary) return@forEach
        for ((index, step) in cases["script"].list().map { it.map() }.withIndex()) {
            val message = "$name, step $index: ${step["do"]}"
            val ids = step["ids"]?.ints()
            when (step["do"]) {
                "reset" -> session.reset()
                "use" -> session.use(Selection.parse("${step["selection"]}"), keepCache = step["keep_cache"] as Boolean)
                "extend" -> assertClose(step["last"].list(), session.extend(ids!!).last(), limit, message)
                "generate" -> assertEquals(step["tokens"].ints().asList(), generate(session, ids!!, 4, step["keep_cache"] as Boolean), message)
                "fill" -> {
                    assertEquals(step["tokens"].ints().asList(), generate(session, ids!!, 1000, false), message)
                    assertEquals(FinishReason.CACHE, session.finishReason, message)
                }
                else -> error(message)
            }
            assertEquals(step["cache"].list().map { it.list()[0] to (it.list()[1] as Long).toInt() }, session.cache.map { it.selection to it.tokens }, message)
        }
    }

    private fun generate(session: LimeSession, ids: IntArray, count: Int, keep: Boolean) =
        runBlocking { session.generateIds(ids, GenerationOptions(maxNewTokens = count, ignoreEos = true), keep).toList() }
}
