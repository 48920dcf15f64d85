package limeedge.onnx

import limeedge.BundleArchive
import limeedge.LimeError
import limeedge.LimeSession
import limeedge.SessionOptions
import limeedge.Vectors
import java.io.ByteArrayInputStream
import java.io.File
import java.io.InputStream
import java.nio.file.Files
import kotlin.random.Random
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith

class ArchiveTest {
    private val bytes = File(Vectors.folder, "lora-int4.tar").readBytes()
    private val work = Files.createTempDirectory("unpacked").toFile()
    private val prompt = intArrayOf(5, 17, 200, 31)

    @Test
    fun `an unpacked bundle answers as the packed one`() {
        val folder = File(work, "b.lime")
        val bundle = BundleArchive.unpack(ByteArrayInputStream(bytes), folder)
        val expected = openSession("lora-int4").use { it.logits(prompt, keep = 1)[0].asList() }
        assertEquals(expected, LimeSession.open(bundle, engines, SessionOptions(threads = 1)).use { it.logits(prompt, keep = 1)[0].asList() })
        assertEquals(listOf("b.lime"), work.list()!!.toList())
        assertFailsWith<LimeError.Invalid> { BundleArchive.unpack(ByteArrayInputStream(bytes), folder) }
    }

    @Test
    fun `an interrupted run is taken up again, and nothing is there before`() {
        val folder = File(work, "b.lime")
        for (cut in listOf(100, 5000, bytes.size / 2, bytes.size - 12_000)) {
            assertFailsWith<LimeError.Damaged> { BundleArchive.unpack(ByteArrayInputStream(bytes, 0, cut), folder) }
            assert(!folder.exists())
        }
        val before = File(work, ".b.lime.partial").walkTopDown().filter { it.isFile }.associateWith { it.lastModified() }
        assert(before.isNotEmpty())
        BundleArchive.unpack(ByteArrayInputStream(bytes), folder)
        val again = before.entries.count { (file, time) -> File(folder, file.relativeTo(File(work, ".b.lime.partial")).path).lastModified() == time }
        assert(again >= before.size - 1) { "$again of ${before.size} files were left alone" }
    }

    @Test
    fun `150 mutated archives are refused or give the bundle`() {
        val random = Random(5)
        var refused = 0
        repeat(150) { count ->
            val mutated = bytes.copyOf()
            repeat(random.nextInt(1, 4)) { mutated[random.nextInt(mutated.size)] = random.nextInt().toByte() }
            try {
                BundleArchive.unpack(mutated.inputStream() as InputStream, File(work, "$count.lime"))
            } catch (_: LimeError) {
                refused++
                assert(!File(work, "$count.lime").exists())
            }
            work.listFiles()!!.forEach { it.deleteRecursively() }
        }
        assert(refused > 110) { "$refused" }
    }
}
