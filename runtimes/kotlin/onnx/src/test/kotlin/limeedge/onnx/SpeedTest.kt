package limeedge.onnx

import kotlinx.coroutines.runBlocking
import limeedge.Bench
import limeedge.GenerationOptions
import limeedge.Json
import limeedge.LimeBundle
import limeedge.LimeSession
import limeedge.Selection
import limeedge.SessionOptions
import limeedge.Vectors
import limeedge.double
import limeedge.list
import limeedge.map
import org.junit.jupiter.api.Assumptions.assumeTrue
import java.io.File
import kotlin.random.Random
import kotlin.test.Test

/** Kotlin beside Python on the same bundle and library, round by round in turn (make demo-kotlin). It measures and asserts no times. */
class SpeedTest {
    private class Round(val decode: Double, val switches: List<Double>)

    @Test
    fun `decoding and switching beside Python`() {
        val folder = System.getProperty("limeedge.demo")
        val python = System.getProperty("limeedge.python")
        assumeTrue(folder != null && python != null, "make demo-kotlin names them")
        val prompt = IntArray(PROMPT) { 50 + 37 * it % 1000 }
        val command = listOf(python, File(Vectors.repository, "tools/phone_vectors/speed.py").path, folder, "$NEW", "$SWITCHES") + prompt.map { "$it" }
        val other = ProcessBuilder(command).redirectError(ProcessBuilder.Redirect.INHERIT).start()
        try {
            val answers = other.inputStream.bufferedReader()
            val questions = other.outputStream.bufferedWriter()
            LimeSession.open(LimeBundle.open(File(folder)), engines, SessionOptions(threads = 1)).use { session ->
                val pairs = List(ROUNDS + WARMUP) { round ->
                    questions.write("$round\n")
                    questions.flush()
                    val facts = (Json.parse(checkNotNull(answers.readLine()) { "Python ended" })).map()
                    Round(facts["decode_ms"].double(), facts["switch_us"].list().map { it.double() }) to run(session, prompt, round)
                }
                report(pairs.drop(WARMUP))
            }
        } finally {
            other.destroy()
        }
    }

    private fun run(session: LimeSession, prompt: IntArray, round: Int): Round {
        session.use(session.experts[0])
        val stamps = ArrayList<Long>()
        runBlocking { session.generateIds(prompt, GenerationOptions(maxNewTokens = NEW, ignoreEos = true)).collect { stamps += System.nanoTime() } }
        session.reset()
        val draw = Random(round)
        val switches = List(SWITCHES) {
            val name = session.experts[draw.nextInt(session.experts.size)]
            val begin = System.nanoTime()
            session.use(Selection.Expert(name))
            (System.nanoTime() - begin) / 1e3
        }
        return Round((stamps.last() - stamps.first()) / 1e6 / (NEW - 1), switches)
    }

    private fun report(pairs: List<Pair<Round, Round>>) {
        val ratios = pairs.map { (python, kotlin) -> kotlin.decode / python.decode }
        fun spread(values: List<Double>) = "%.3f (5 to 95 in 100: %.3f to %.3f)".format(*listOf(50.0, 5.0, 95.0).map { Bench.percentile(values, it) }.toTypedArray())
        println("decoding, ms a token, Python: ${spread(pairs.map { it.first.decode })}")
        println("decoding, ms a token, Kotlin: ${spread(pairs.map { it.second.decode })}")
        println("decoding, Kotlin's time over Python's: ${spread(ratios)}, ${pairs.size} rounds in turn")
        for ((name, of) in listOf<Pair<String, (Pair<Round, Round>) -> Round>>("Python" to { it.first }, "Kotlin" to { it.second })) {
            val all = pairs.flatMap { of(it).switches }
            println("switching, us, $name: p50 %.1f, p95 %.1f, p99 %.1f of ${all.size}".format(*listOf(50.0, 95.0, 99.0).map { Bench.percentile(all, it) }.toTypedArray()))
        }
    }

    private companion object {
        private const val PROMPT = 32
        private const val NEW = 65
        private const val SWITCHES = 200
        private const val ROUNDS = 15
        private const val WARMUP = 2
    }
}
