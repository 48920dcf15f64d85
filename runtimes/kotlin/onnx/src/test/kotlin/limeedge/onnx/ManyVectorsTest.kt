package limeedge.onnx

import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.runBlocking
import limeedge.Answer
import limeedge.FinishReason
import limeedge.GenerationOptions
import limeedge.LimeError
import limeedge.LimeSession
import limeedge.Names
import limeedge.Request
import limeedge.Selection
import limeedge.Vectors
import limeedge.ints
import limeedge.list
import limeedge.map
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith

/** Many requests in one pass: what Python's `generate_many` gave, in the order it gave it. */
class ManyVectorsTest {
    private val greedy = GenerationOptions(maxNewTokens = 8, ignoreEos = true)

    @Test
    fun `every token in the order of Python's, and why each row ended`() {
        for ((name, cases) in Vectors.made("sessions.json")["bundles"].map()) openSession("$name").use { session ->
            for (case in cases.map()["many"].list().map { it.map() }) check("$name", session, case)
        }
    }

    private fun check(name: String, session: LimeSession, case: Map<*, *>) {
        val asText = case["requests"].list()[0].map()["prompt"] is String
        val requests = case["requests"].list().map { it.map() }.map { asked ->
            val selection = Selection.parse("${asked["selection"]}")
            val options = readOptions(asked["options"].map())
            if (asText) Request("${asked["prompt"]}", selection, options) else Request(asked["prompt"].ints(), selection, options)
        }
        val before = session.selection
        val rows = (case["rows"] as Long).toInt()
        val answers = runBlocking {
            if (asText) session.generateMany(requests, rows = rows).toList() else session.generateManyIds(requests, rows = rows).toList()
        }
        assertEquals(before, session.selection, "the session's own selection plays no part")
        val reasons = answers.filter { it.end != null }.associate { it.row to Names.lower("${it.end}") }
        assertEquals(requests.indices.toSet(), reasons.keys, name)
        if (!sameLibrary) return
        val found = answers.flatMap { one -> if (asText) listOf(one.row to one.piece) else one.tokens.map { one.row to it.toLong() } }
        assertEquals(case["events"].list().map { (it.list()[0] as Long).toInt() to it.list()[1]!! }, found.filter { it.second != "" }, name)
        assertEquals(case["reasons"].list(), requests.indices.map { reasons[it] }, name)
    }

    @Test
    fun `row for row the answers of a session of its own`() = runBlocking {
        openSession("lora").use { session ->
            val texts = listOf("expert0", "expert1", "none", "expert0=0.7,expert2=0.5,expert3=-0.2", "expert3", "expert1", "expert0")
            val prompts = texts.indices.map { at -> IntArray(3 + 5 * (at % 3)) { 7 + 11 * at * (it + 1) % 250 } }
            for (rows in listOf(1, 2, 7)) {
                val found = session.generateManyIds(texts.indices.map { Request(prompts[it], Selection.parse(texts[it]), greedy) }, rows = rows).toList()
                for ((at, text) in texts.withIndex()) {
                    session.use(text)
                    assertEquals(session.generateIds(prompts[at], greedy).toList(), found.filter { it.row == at }.flatMap { it.tokens }, "$rows rows, $text")
                }
            }
        }
    }

    @Test
    fun `a request that is wrong is named before anything runs, and memory bounds the rows`() = runBlocking {
        openSession("lora").use { session ->
            val sound = Request(intArrayOf(5, 6, 7), Selection.Expert("expert0"))
            suspend fun ask(requests: List<Request>, rows: Int = 4, memory: Long? = null): List<Answer> = session.generateManyIds(requests, greedy, rows, memory).toList()
            for ((wrong, place) in listOf(
                listOf(sound, Request(intArrayOf(), Selection.None)) to "request 1", listOf(Request(intArrayOf(5), "nobody".let(Selection::parse))) to "request 0",
                listOf(sound, sound, Request(intArrayOf(1 shl 20), Selection.None)) to "request 2", listOf(Request(IntArray(64) { 5 }, Selection.None)) to "request 0",
            )) assert(assertFailsWith<LimeError.Invalid> { ask(wrong) }.where.startsWith(place))
            assertFailsWith<LimeError.Invalid> { ask(emptyList()) }
            assertFailsWith<LimeError.Invalid> { ask(listOf(sound), rows = 0) }
            assertFailsWith<LimeError.Invalid> { ask(listOf(sound), memory = 100) }
            val wide = ask(listOf(sound, sound, sound))
            assertEquals(3, wide.count { it.end == FinishReason.LENGTH })
            assertEquals(wide.filter { it.row == 0 }.flatMap { it.tokens }, ask(listOf(sound, sound), memory = 1L shl 14).filter { it.row == 1 }.flatMap { it.tokens })
        }
    }
}
