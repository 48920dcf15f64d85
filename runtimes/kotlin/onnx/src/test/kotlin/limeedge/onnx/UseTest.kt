package limeedge.onnx

import kotlinx.coroutines.CompletableDeferred
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.cancelAndJoin
import kotlinx.coroutines.delay
import kotlinx.coroutines.flow.take
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.launch
import kotlinx.coroutines.runBlocking
import limeedge.Bench
import limeedge.BenchOptions
import limeedge.CheckResult
import limeedge.Conversation
import limeedge.GenerationOptions
import limeedge.LimeBundle
import limeedge.LimeError
import limeedge.LimeSession
import limeedge.Selection
import limeedge.SessionOptions
import limeedge.Verify
import java.io.File
import java.util.concurrent.atomic.AtomicReference
import kotlin.concurrent.thread
import kotlin.random.Random
import kotlin.test.Test
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertNull

/** Sessions as applications use and abuse them. */
class UseTest {
    private val prompt = intArrayOf(5, 17, 200, 31, 9)
    private val long = GenerationOptions(maxNewTokens = 40, ignoreEos = true)

    private fun fresh(name: String, selection: String): FloatArray = openSession(name).use {
        it.use(selection)
        it.logits(prompt, keep = 1)[0]
    }

    @Test
    fun `10,000 switches equal fresh sessions`() {
        val selections = listOf("expert0", "expert1", "expert2", "expert3", "none", "expert0=0.5,expert1=0.5", "expert1=0.25,expert3=0.75")
        val expected = selections.associateWith { fresh("lora-int4", it) }
        val random = Random(2)
        openSession("lora-int4").use { session ->
            repeat(10_000) { count ->
                val selection = selections[random.nextInt(selections.size)]
                session.use(selection)
                if (count % 10 == 0) assertContentEquals(expected.getValue(selection), session.logits(prompt, keep = 1)[0], "switch $count to $selection")
            }
        }
    }

    @Test
    fun `two sessions in two threads never bleed`() {
        val expected = listOf("expert0", "expert2").associateWith { fresh("lora", it) }
        val failed = AtomicReference<Throwable>()
        val threads = expected.keys.map { name ->
            thread {
                try {
                    openSession("lora").use { session ->
                        repeat(300) {
                            session.use(name)
                            assertContentEquals(expected.getValue(name), session.logits(prompt, keep = 1)[0])
                        }
                    }
                } catch (error: Throwable) {
                    failed.set(error)
                }
            }
        }
        threads.forEach { it.join() }
        failed.get()?.let { throw it }
    }

    @Test
    fun `one session in many threads answers rightly or refuses`() {
        val expected = listOf("expert0", "expert2").associateWith { fresh("lora", it) }
        val wrong = AtomicReference<Throwable>()
        openSession("lora").use { session ->
            List(4) { number ->
                thread {
                    val name = if (number % 2 == 0) "expert0" else "expert2"
                    repeat(200) {
                        try {
                            session.logits(prompt, keep = 1)[0].let { row -> assert(expected.values.any { it.contentEquals(row) }) { "a mixture" } }
                            session.use(name)
                        } catch (_: LimeError.Misused) {
                        } catch (error: Throwable) {
                            wrong.set(error)
                        }
                    }
                }
            }.forEach { it.join() }
        }
        wrong.get()?.let { throw it }
    }

    @Test
    fun `a cancelled generation leaves a usable session`() = runBlocking {
        openSession("lora").use { session ->
            val expected = session.generateIds(prompt, long).toList()
            repeat(50) { count ->
                val started = CompletableDeferred<Unit>()
                val job = launch(Dispatchers.Default) { session.generateIds(prompt, long).collect { started.complete(Unit) } }
                if (count % 2 == 0) started.await() else delay(1)
                job.cancelAndJoin()
                session.reset()
                if (count % 10 == 0) assertEquals(expected, session.generateIds(prompt, long).toList())
            }
            assertEquals(expected.take(3), session.generateIds(prompt, long).take(3).toList())
            assertNull(session.finishReason)
            assertEquals(expected, session.generateIds(prompt, long).toList())
        }
    }

    @Test
    fun `what disturbs a generation ends it with an error`() = runBlocking {
        openSession("lora").use { session ->
            val disturbances = mapOf<String, (LimeSession) -> Unit>(
                "use" to { it.use("expert2") }, "reset" to { it.reset() }, "logits" to { it.logits(prompt) }, "extend" to { it.extend(intArrayOf(4)) },
                "generate" to { other -> runBlocking { other.generateIds(prompt, long).take(1).toList() } },
            )
            for ((name, disturb) in disturbances) {
                session.use("expert0")
                var count = 0
                val error = assertFailsWith<LimeError.Misused>(name) { session.generateIds(prompt, long).collect { if (++count == 3) disturb(session) } }
                assertEquals(3, count, "$name: $error")
            }
            session.use("expert0")
            var count = 0
            session.generateIds(prompt, long).collect { if (++count == 3) session.use("expert0") } // the same one: nothing changed
            assertEquals(40, count)
        }
    }

    @Test
    fun `a closed session refuses every call`() {
        val session = openSession("lora")
        session.close()
        session.close()
        assertFailsWith<LimeError.Misused> { session.use("expert1") }
        assertFailsWith<LimeError.Misused> { session.logits(prompt) }
        assertFailsWith<LimeError.Misused> { runBlocking { session.generateIds(prompt).toList() } }
    }

    @Test
    fun `a skill of the same adapter installs from another bundle, a foreign one does not`() {
        val entry = LimeBundle.open(bundleFile("lora-fold")).manifest.experts[2]
        openSession("lora").use { session ->
            val before = fresh("lora", "expert2")
            assertEquals("late", session.install(bundleFile("lora-fold").resolve(entry.file), "late"))
            session.use("late")
            assertContentEquals(before, session.logits(prompt, keep = 1)[0])
            assertFailsWith<LimeError.Invalid> { session.remove("late") }
            session.use("expert0")
            session.remove("late")
            assertFailsWith<LimeError.Invalid> { session.use("late") }
            val foreign = LimeBundle.open(bundleFile("foreign")).manifest.experts[0]
            assertFailsWith<LimeError.Foreign> { session.install(bundleFile("foreign").resolve(foreign.file), "x") }
        }
    }

    @Test
    fun `every tiny bundle verifies, and a wrong expert is named`() {
        for (name in listOf("lora", "lora-int4", "lora-int8", "lora-single", "dora", "slicefine", "soft", "auto", "bert", "vit", "qwen3")) {
            val checks = Verify.run(LimeBundle.open(bundleFile(name)), engines)
            assert(checks.any { it.result == CheckResult.OK } && checks.none { it.result == CheckResult.MISSED }) { "$name: $checks" }
        }
    }

    @Test
    fun `a cache that is too small is said before anything runs`() {
        openSession("lora", SessionOptions(threads = 1, maxLength = 4)).use { session ->
            assertFailsWith<LimeError.Full> { session.logits(prompt) }
            assertFailsWith<LimeError.Full> { runBlocking { session.generateIds(prompt).toList() } }
            assertEquals(1, session.logits(intArrayOf(3, 4, 5, 6), keep = 1).size)
            assertFailsWith<LimeError.Full> { session.extend(intArrayOf(3)) }
        }
        assertFailsWith<LimeError.Invalid> { openSession("lora", SessionOptions(maxLength = 100_000)) }
        openSession("lora").use { session ->
            for (bad in listOf(intArrayOf(), intArrayOf(-1), intArrayOf(1 shl 20))) assertFailsWith<LimeError.Invalid> { session.logits(bad) }
        }
    }

    @Test
    fun `a conversation keeps what the cache holds and forgets the oldest turns`() = runBlocking {
        openSession("lora").use { session ->
            val talk = Conversation(session, "Be kind.")
            repeat(3) { talk.say("hello", GenerationOptions(maxNewTokens = 3, ignoreEos = true)).toList() }
            assertEquals(listOf("system", "user", "assistant"), talk.turns.map { it.role }.take(3))
            assert(talk.forgotten > 0) { "64 tokens do not hold it all" }
            talk.clear()
            assertEquals(1, talk.turns.size)
        }
    }

    @Test
    fun `the benchmark writes the document of lime-edge bench`() {
        val text = Bench.run(bundleFile("lora-int4"), engines, Selection.Expert("expert1"), SessionOptions(threads = 1), BenchOptions(8, 8, 3, 1, 20))
        File(System.getProperty("java.io.tmpdir"), "lime-edge-kotlin-bench.json").writeText(text)
        assert("\"decode_tokens_per_s\"" in text && "\"switch_us\"" in text)
    }
}
