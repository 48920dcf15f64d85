package limeedge.onnx

import limeedge.GenerationOptions
import limeedge.LimeBundle
import limeedge.LimeSession
import limeedge.SessionOptions
import limeedge.Vectors
import limeedge.double
import limeedge.list
import java.io.File
import kotlin.test.assertEquals

/** Whether the engine is the very library that Python used: then answers are compared number by number, else as far as versions agree. */
internal val sameLibrary: Boolean = System.getProperty("onnxruntime.native.onnxruntime.path") != null

/** Our operators, where `-Dlimeedge.operators` names them: as Python's session had them. */
internal val engines: OnnxEngines = OnnxEngines(System.getProperty("limeedge.operators")?.takeIf { it.isNotEmpty() })

internal fun bundleFile(name: String): File = File(Vectors.folder, "bundles/$name.lime")

internal fun openSession(name: String, options: SessionOptions = SessionOptions(threads = 1)): LimeSession =
    LimeSession.open(LimeBundle.open(bundleFile(name)), engines, options)

internal fun readOptions(facts: Map<*, *>): GenerationOptions = GenerationOptions(
    maxNewTokens = (facts["max_new_tokens"] as Long).toInt(),
    temperature = facts["temperature"]?.double() ?: 0.0,
    topK = (facts["top_k"] as Long? ?: 0L).toInt(),
    topP = facts["top_p"]?.double() ?: 1.0,
    seed = facts["seed"]?.toString()?.toULong(),
    stop = facts["stop"]?.list()?.map { "$it" } ?: emptyList(),
    ignoreEos = facts["ignore_eos"] as Boolean? ?: false,
)

/** The largest difference, and where. */
internal fun assertClose(expected: List<*>, found: FloatArray, limit: Double, message: String) {
    assertEquals(expected.size, found.size, message)
    val worst = found.indices.maxByOrNull { Math.abs(found[it] - expected[it].double()) }!!
    val off = Math.abs(found[worst] - expected[worst].double())
    assert(off <= limit) { "$message: at $worst expected ${expected[worst]}, found ${found[worst]}, $off apart" }
}
