package limeedge.app

import limeedge.Bench
import limeedge.BenchOptions
import limeedge.EngineFactory
import limeedge.Fault
import limeedge.LimeError
import limeedge.Selection
import limeedge.SessionOptions
import java.io.File

/**
 * A benchmark as it is asked for from outside the app: names and texts, such as `adb shell am start --es` gives.
 *
 * | extra | what |
 * |---|---|
 * | `bundle` | name of a bundle in the app's files; required |
 * | `expert` | a selection; by default what the bundle opens with |
 * | `threads`, `prompt_tokens`, `gen_tokens`, `repeat` | numbers |
 * | `output` | name of the JSON file in the app's files; by default `bench.json` |
 */
public class BenchmarkRequest private constructor(
    public val bundle: String, public val expert: Selection?, public val session: SessionOptions, public val options: BenchOptions, public val output: String,
) {
    /** Measure and write the document. @return its file. @throws LimeError as [Bench.run]. */
    public fun run(files: File, cache: File, engines: EngineFactory, machine: Map<String, Any?> = emptyMap(), progress: (Int, Int) -> Unit = { _, _ -> }): File {
        val text = Bench.run(File(files, "bundles/$bundle.lime"), engines, expert, session, options, machine, cache, progress)
        val target = File(files, output)
        val partial = File(files, ".$output.partial")
        partial.writeText(text)
        check(partial.renameTo(target)) { "$target: cannot be written" }
        return target
    }

    public companion object {
        private val FILE = Regex("[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

        /** Read the extras. @throws LimeError.Invalid all that is wrong with them. */
        public fun read(extras: (String) -> String?): BenchmarkRequest {
            val faults = ArrayList<Fault>()
            fun number(name: String, default: Int?): Int? {
                val text = extras(name) ?: return default
                return text.toIntOrNull().also { if (it == null) faults += Fault(name, "a number", text.take(40)) }
            }
            fun name(key: String, default: String?): String {
                val text = extras(key) ?: default
                if (text == null || !FILE.matches(text)) faults += Fault(key, "a name", text?.take(40) ?: "nothing")
                return text.orEmpty()
            }
            val bundle = name("bundle", null)
            val output = name("output", "bench.json")
            val threads = number("threads", null)
            val numbers = listOf("prompt_tokens" to 128, "gen_tokens" to 64, "repeat" to 5).map { (key, default) -> number(key, default) ?: 1 }
            if (faults.isNotEmpty()) throw LimeError.Invalid("benchmark", faults, "am start -n .../.BenchmarkActivity --es bundle NAME --es prompt_tokens 128")
            val (prompt, generated, repeat) = numbers
            return BenchmarkRequest(bundle, extras("expert")?.let { Selection.parse(it) }, SessionOptions(threads), BenchOptions(prompt, generated, repeat), output)
        }
    }
}
