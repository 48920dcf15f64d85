package limeedge.app

import com.sun.net.httpserver.HttpExchange
import com.sun.net.httpserver.HttpServer
import limeedge.LimeError
import limeedge.Vectors
import java.io.File
import java.io.IOException
import java.net.InetAddress
import java.net.InetSocketAddress
import java.net.URL
import java.nio.file.Files
import kotlin.test.AfterTest
import kotlin.test.Test
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith

/** Bundles and skills as an app gets and keeps them; downloads from a server that breaks off. */
class BundleStoreTest {
    private val work = Files.createTempDirectory("store").toFile()
    private val store = BundleStore(File(work, "files"), File(work, "cache"))
    private val archive = File(Vectors.folder, "lora-int4.tar").readBytes()
    private val asked = ArrayList<String?>()
    private var server: HttpServer? = null

    @AfterTest
    fun stop() {
        server?.stop(0)
        work.deleteRecursively()
    }

    private fun serve(answer: (HttpExchange, Int) -> Unit): URL {
        server = HttpServer.create(InetSocketAddress(InetAddress.getLoopbackAddress(), 0), 0).apply {
            createContext("/b.tar") { exchange -> exchange.use { answer(exchange, rangeStart(exchange)) } }
            start()
        }
        return URL("http://127.0.0.1:${server!!.address.port}/b.tar")
    }

    private inline fun HttpExchange.use(call: () -> Unit) = try { call() } finally { close() }

    private fun rangeStart(exchange: HttpExchange): Int {
        val range = exchange.requestHeaders.getFirst("Range")
        asked += range
        return range?.removePrefix("bytes=")?.removeSuffix("-")?.toInt() ?: 0
    }

    /** From [start] on, at most [most] bytes of what is promised. */
    private fun send(exchange: HttpExchange, start: Int, most: Int = Int.MAX_VALUE) {
        if (start > 0) exchange.responseHeaders.add("Content-Range", "bytes $start-${archive.size - 1}/${archive.size}")
        exchange.sendResponseHeaders(if (start > 0) 206 else 200, (archive.size - start).toLong())
        exchange.responseBody.write(archive, start, minOf(most, archive.size - start))
        if (most < archive.size - start) throw IOException("broken off")
    }

    @Test
    fun `a download that breaks off asks for the rest, and the bundle opens`() {
        val url = serve { exchange, start -> send(exchange, start, if (asked.size < 4) archive.size / 4 else Int.MAX_VALUE) }
        repeat(3) { assertFailsWith<IOException> { store.download(url) } }
        val whole = store.download(url)
        assertEquals(listOf(0, 1, 2, 3).map { it * (archive.size / 4) }, asked.map { it?.removePrefix("bytes=")?.removeSuffix("-")?.toInt() ?: 0 })
        assertContentEquals(archive, whole.readBytes())
        assertEquals("tiny", whole.inputStream().use { store.add("tiny.lime.tar", it) })
        assertEquals(listOf("tiny"), store.list())
        assert(store.open("tiny").manifest.experts.isNotEmpty())
        assertFailsWith<LimeError.Invalid> { store.add("tiny", archive.inputStream()) }
        assert(store.remove("tiny") && store.list().isEmpty())
    }

    @Test
    fun `a server without ranges sends it all again, one with another range is refused`() {
        var url = serve { exchange, _ -> send(exchange, 0, if (asked.size == 1) 1000 else Int.MAX_VALUE) }
        assertFailsWith<IOException> { store.download(url) }
        assertContentEquals(archive, store.download(url).readBytes())
        server!!.stop(0)
        asked.clear()
        url = serve { exchange, start -> if (asked.size == 1) send(exchange, 0, 1000) else send(exchange, start + 7) }
        assertFailsWith<IOException> { store.download(url) }
        assert("another range" in assertFailsWith<IOException> { store.download(url) }.message!!)
    }

    @Test
    fun `a server's refusal is said`() {
        val url = serve { exchange, _ -> exchange.sendResponseHeaders(404, -1) }
        assert("404" in assertFailsWith<IOException> { store.download(url) }.message!!)
    }

    @Test
    fun `names lead nowhere, and skills are kept whole or not at all`() {
        for (name in listOf("../x", "a/b", "", ".hidden", "x".repeat(65), "a\u0000b")) {
            assertFailsWith<LimeError.Invalid>(name) { store.add(name, archive.inputStream()) }
            assertFailsWith<LimeError.Invalid>(name) { store.keepSkill(name, archive.inputStream()) }
        }
        val skill = store.keepSkill("new.safetensors", byteArrayOf(1, 2, 3).inputStream())
        assertEquals(mapOf("new" to skill), store.skills())
        val broken = object : java.io.InputStream() {
            override fun read(): Int = throw IOException("gone")
        }
        assertFailsWith<IOException> { store.keepSkill("other", broken) }
        assertEquals(listOf("new.safetensors"), skill.parentFile.list()!!.toList())
    }
}
