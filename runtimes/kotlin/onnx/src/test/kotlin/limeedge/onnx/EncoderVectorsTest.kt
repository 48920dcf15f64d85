package limeedge.onnx

import limeedge.EncoderSession
import limeedge.LimeBundle
import limeedge.LimeError
import limeedge.LimeSession
import limeedge.SessionOptions
import limeedge.Tensor
import limeedge.Vectors
import limeedge.double
import limeedge.ints
import limeedge.list
import limeedge.map
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith

class EncoderVectorsTest {
    private fun open(name: String) = EncoderSession.open(LimeBundle.open(bundleFile(name)), engines, SessionOptions(threads = 1))

    private fun read(facts: Map<*, *>): Tensor {
        val values = facts["values"].list()
        val shape = facts["shape"].ints()
        return if (facts["dtype"] == "int64") Tensor.of(LongArray(values.size) { values[it] as Long }, *shape)
        else Tensor.of(FloatArray(values.size) { values[it].double().toFloat() }, *shape)
    }

    @Test
    fun `outputs are Python's`() {
        for ((name, document) in Vectors.made("encoders.json")) {
            open("$name").use { session ->
                assertEquals(document.map()["experts"], session.experts)
                for (case in document.map()["cases"].list().map { it.map() }) {
                    session.use("${case["selection"]}")
                    val found = session.run(case["inputs"].map().entries.associate { (input, facts) -> "$input" to read(facts.map()) })
                    assertEquals(case["outputs"].map().keys, found.keys as Set<*>)
                    for ((output, facts) in case["outputs"].map()) {
                        assertEquals(facts.map()["shape"].ints().asList(), found.getValue("$output").shape)
                        assertClose(facts.map()["values"].list(), found.getValue("$output").floats!!, if (sameLibrary) 1e-5 else 1e-3, "$name $output ${case["selection"]}")
                    }
                }
            }
        }
    }

    @Test
    fun `inputs that do not fit are refused, all faults at once`() {
        open("bert").use { session ->
            val ids = Tensor.of(LongArray(8) { 5 }, 1, 8)
            session.run(mapOf("input_ids" to ids))
            for ((inputs, faults) in listOf(
                mapOf<String, Tensor>() to 1, mapOf("nothing" to ids) to 2, mapOf("input_ids" to Tensor.of(FloatArray(8), 1, 8)) to 1,
                mapOf("input_ids" to Tensor.of(LongArray(8) { 1L shl 40 }, 1, 8)) to 1, mapOf("input_ids" to Tensor.of(LongArray(8), 8)) to 1,
                mapOf("input_ids" to Tensor.of(LongArray(0), 1, 0)) to 1, mapOf("input_ids" to ids, "attention_mask" to Tensor.of(LongArray(4) { 1 }, 1, 4)) to 1,
                mapOf("input_ids" to Tensor.of(LongArray(100_000), 1, 100_000)) to 1,
            )) {
                assertEquals(faults, assertFailsWith<LimeError.Invalid>("$inputs") { session.run(inputs) }.faults.size, "$inputs")
            }
        }
        assertFailsWith<LimeError.Invalid> { LimeSession.open(LimeBundle.open(bundleFile("bert")), engines) }
        assertFailsWith<LimeError.Invalid> { EncoderSession.open(LimeBundle.open(bundleFile("lora")), engines) }
    }
}
