package limeedge.onnx

import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.runBlocking
import limeedge.ChatFormat
import limeedge.GenerationOptions
import limeedge.LimeBundle
import limeedge.LimeSession
import limeedge.SessionOptions
import limeedge.Turn
import limeedge.Vectors
import limeedge.ints
import limeedge.list
import limeedge.map
import org.junit.jupiter.api.Assumptions.assumeTrue
import java.io.File
import kotlin.test.Test
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals

/** The real demo bundle: every skill's greedy answers, token by token Python's (make demo-kotlin). */
class DemoTest {
    @Test
    fun `every skill answers as in Python`() {
        val folder = System.getProperty("limeedge.demo")
        assumeTrue(folder != null, "make demo-kotlin names the bundle")
        val bundle = LimeBundle.open(File(folder))
        val cases = Vectors.list("demo.json").map { it.map() }
        LimeSession.open(bundle, engines, SessionOptions(threads = 1)).use { session ->
            for (case in cases) {
                session.use("${case["selection"]}")
                val prompt = ChatFormat.of(bundle).render(listOf(Turn("user", "${case["text"]}")))
                val ids = session.tokenizer.encode(prompt)
                assertContentEquals(case["ids"].ints(), ids)
                val found = runBlocking { session.generateIds(ids, GenerationOptions(maxNewTokens = 16)).toList() }
                assertEquals(case["tokens"].ints().asList(), found, "${case["selection"]}: ${case["text"]}")
                println("${case["selection"]}: ${case["text"]} -> ${session.tokenizer.decode(found.toIntArray())}")
            }
        }
        assert(cases.size > 40) { "${cases.size}" }
    }
}
