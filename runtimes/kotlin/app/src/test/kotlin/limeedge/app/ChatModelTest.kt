package limeedge.app

import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.cancel
import kotlinx.coroutines.flow.first
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.runBlocking
import limeedge.ChatFormat
import limeedge.GenerationOptions
import limeedge.LimeBundle
import limeedge.LimeError
import limeedge.LimeSession
import limeedge.SessionOptions
import limeedge.Turn
import limeedge.Vectors
import limeedge.onnx.OnnxEngines
import java.io.File
import java.nio.file.Files
import kotlin.test.AfterTest
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertNotNull
import kotlin.test.assertNull

/** The chat without its screen, on the real engine. */
class ChatModelTest {
    private val options = GenerationOptions(maxNewTokens = 6, ignoreEos = true)
    private val scope = CoroutineScope(Dispatchers.Default)
    private val session = open()
    private val chat = ChatModel(session, scope, options)

    private fun open() = LimeSession.open(LimeBundle.open(bundle("lora")), OnnxEngines(), SessionOptions(threads = 1))

    private fun bundle(name: String) = File(Vectors.folder, "bundles/$name.lime")

    @AfterTest
    fun close() = runBlocking {
        chat.clear().join()
        scope.cancel()
        session.close()
    }

    private fun answer(skill: String, text: String) = open().use {
        it.use(skill)
        runBlocking { it.generate(ChatFormat.of(it.bundle).render(listOf(Turn("user", text))), options).toList() }.joinToString("")
    }

    @Test
    fun `an answer grows under the chip that is in use`() = runBlocking {
        assertEquals(session.experts + "none", chat.state.value.skills)
        chat.select("expert2").join()
        chat.say("hi").join()
        val state = chat.state.value
        assertEquals(listOf(true to "hi", false to answer("expert2", "hi")), state.lines.map { it.fromUser to it.text })
        assertEquals("expert2", state.lines[1].skill)
        assert(!state.isBusy && state.lines.none { it.isOpen } && "cut after 6" in state.notice!!)
        chat.clear().join()
        assert(chat.state.value.lines.isEmpty())
    }

    @Test
    fun `one text to all skills is what each answers alone, and the chip stays`() = runBlocking {
        chat.select("expert1").join()
        chat.askAll("hi").join()
        val lines = chat.state.value.lines
        assertEquals(session.experts.associateWith { answer(it, "hi") }, lines.associate { it.skill to it.text })
        assert(lines.none { it.isOpen })
        assertEquals("expert1", "${session.selection}")
    }

    @Test
    fun `a new action ends the one that runs, and stop leaves a usable chat`() = runBlocking {
        val running = chat.say("hi")
        chat.state.first { state -> state.lines.any { it.isOpen } }
        chat.select("expert3").join()
        assert(running.isCompleted)
        chat.askAll("hi")
        chat.state.first { state -> state.lines.count { it.isOpen } > 1 }
        chat.stop()
        chat.clear().join()
        chat.say("hi").join()
        assertEquals(answer("expert3", "hi"), chat.state.value.lines.last().text)
    }

    @Test
    fun `a skill is added or its refusal is shown`() = runBlocking {
        val foreign = LimeBundle.open(bundle("foreign"))
        chat.install(File(foreign.folder, foreign.manifest.experts[0].file)).join()
        assert("adapter_id" in assertNotNull(chat.state.value.notice))
        chat.select("expert0").join()
        assertNull(chat.state.value.notice)
        chat.select("nobody").join()
        assert("unknown expert" in assertNotNull(chat.state.value.notice))
    }

    @Test
    fun `a benchmark is asked for by words and writes its document`() {
        val files = Files.createTempDirectory("files").toFile()
        bundle("lora-int4").copyRecursively(File(files, "bundles/tiny.lime"))
        val extras = mapOf("bundle" to "tiny", "threads" to "1", "prompt_tokens" to "6", "gen_tokens" to "4", "repeat" to "2", "expert" to "expert1")
        val file = BenchmarkRequest.read(extras::get).run(files, File(files, "cache"), OnnxEngines())
        assertEquals(File(files, "bench.json"), file)
        assert("\"expert\":\"expert1\"" in file.readText().replace(" ", ""))
        val faults = assertFailsWith<LimeError.Invalid> { BenchmarkRequest.read(mapOf("bundle" to "../x", "threads" to "many", "output" to "/etc/x")::get) }.faults
        assertEquals(listOf("bundle", "output", "threads"), faults.map { it.what })
        files.deleteRecursively()
    }
}
