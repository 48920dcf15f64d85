package limeedge.onnx

import limeedge.LimeBundle
import limeedge.LimeError
import limeedge.LimeSession
import limeedge.SessionOptions
import limeedge.Vectors
import limeedge.list
import limeedge.map
import java.io.File
import java.nio.file.Files
import kotlin.random.Random
import kotlin.test.Test
import kotlin.test.assertEquals

/** What Python refuses is refused, at the same call, and as the same kind of error. */
class RefusalsTest {
    private val cache = Files.createTempDirectory("seen").toFile()

    private fun open(folder: File) = LimeSession.open(LimeBundle.open(folder, cache = cache), engines, SessionOptions(threads = 1))

    @Test
    fun `every fault that Python finds`() {
        val cases = Json.refusals()
        assert(cases.size > 30)
        for (case in cases) {
            val folder = File(Vectors.folder, "refused/${case["name"]}.lime")
            val error = try {
                run(folder, case["call"] as String)
                error("${case["name"]} was taken; Python: ${case["python"]}")
            } catch (error: LimeError) {
                error
            }
            assertEquals(case["kind"], error.javaClass.simpleName, "${case["name"]}: $error")
            assert(error.hint.isNotEmpty() && error.where.isNotEmpty() && error.what.isNotEmpty()) { "$error" }
        }
    }

    private fun run(folder: File, call: String) {
        val session = open(folder)
        check(call != "open") { "$folder opened" }
        session.use { if (call == "install") it.install(File(folder, "new.safetensors")) else it.use("expert1") }
    }

    @Test
    fun `1,000 mutated bundles are refused or give the same answers`() {
        val random = Random(4)
        val sound = bundleFile("lora")
        val prompt = intArrayOf(5, 17, 200, 31)
        val expected = openSession("lora").use { answer(it, prompt) }
        val files = sound.walkTopDown().filter { it.isFile }.map { it.relativeTo(sound).path }.toList()
        val work = Files.createTempDirectory("mutated").toFile()
        sound.copyRecursively(work, overwrite = true)
        var refused = 0
        repeat(1000) {
            val name = files[random.nextInt(files.size)]
            val bytes = File(sound, name).readBytes()
            File(work, name).writeBytes(mutate(bytes, random))
            try {
                open(work).use { assertEquals(expected, answer(it, prompt), "$name was mutated") }
            } catch (_: LimeError) {
                refused++
            }
            File(work, name).writeBytes(bytes)
        }
        assert(refused > 800) { "only $refused of 1,000 refused" }
        work.deleteRecursively()
    }

    private fun mutate(bytes: ByteArray, random: Random): ByteArray {
        val mutated = when (random.nextInt(4)) {
            0 -> bytes.copyOf(random.nextInt(bytes.size + 1))
            1 -> bytes + ByteArray(random.nextInt(1, 9))
            else -> bytes.copyOf()
        }
        if (mutated.isNotEmpty()) repeat(random.nextInt(1, 6)) { mutated[random.nextInt(mutated.size)] = random.nextInt().toByte() }
        return mutated
    }

    private fun answer(session: LimeSession, prompt: IntArray) = session.experts.map { name ->
        session.use(name)
        session.logits(prompt, keep = 1)[0].asList()
    }

    private object Json {
        fun refusals(): List<Map<*, *>> = Vectors.list("refusals.json").map { it.map() }
    }
}
