package limeedge

import kotlin.test.Test
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith

class SamplingTest {
    private val vectors = Vectors.kept("sampling.json")

    @Test
    fun `the generator gives Python's numbers`() {
        for (case in vectors["generator"].list()) {
            val numbers = SplitMix64(case.map()["seed"].toString().toULong().toLong())
            assertEquals(case.map()["numbers"].list(), List(8) { numbers.next().toULong().toString() })
            val uniform = SplitMix64(case.map()["seed"].toString().toULong().toLong())
            assertEquals(case.map()["uniform"].list().map { it.double() }, List(8) { uniform.uniform() })
        }
    }

    @Test
    fun `every case draws Python's tokens`() {
        for (case in vectors["cases"].list().map { it.map() }) {
            val options = GenerationOptions(
                temperature = case["temperature"].double(), topK = (case["top_k"] as Long).toInt(), topP = case["top_p"].double(),
                seed = case["seed"].toString().toULong(),
            )
            val logits = logits(case["logits"] as String)
            val sampler = Sampler(options)
            val expected = case["tokens"].ints()
            assertContentEquals(expected, IntArray(expected.size) { sampler.pick(logits) }, "$case")
        }
    }

    private fun logits(name: String): FloatArray {
        if (name != "long") return vectors["logits"].map()[name].list().map { if (it == "-inf") Float.NEGATIVE_INFINITY else it.double().toFloat() }.toFloatArray()
        val facts = vectors["long"].map()
        val random = SplitMix64(facts["seed"].toString().toULong().toLong())
        return FloatArray((facts["count"] as Long).toInt()) { ((random.next() ushr 40) * Math.pow(2.0, -20.0)).toFloat() }
    }

    @Test
    fun `logits that are no numbers are an error and never token 0`() {
        for (bad in listOf(Float.NaN, Float.POSITIVE_INFINITY)) for (place in 0..2) for (temperature in listOf(0.0, 1.0)) {
            val logits = floatArrayOf(1f, 2f, 3f).also { it[place] = bad }
            assertFailsWith<LimeError.Engine> { Sampler(GenerationOptions(temperature = temperature)).pick(logits) }
        }
        assertFailsWith<LimeError.Engine> { Sampler.pickBest(FloatArray(3) { Float.NEGATIVE_INFINITY }) }
    }

    @Test
    fun `options out of range are refused, all at once`() {
        val error = assertFailsWith<LimeError.Invalid> { GenerationOptions(maxNewTokens = 0, temperature = Double.NaN, topK = -1, topP = 0.0, stop = listOf("")) }
        assertEquals(5, error.faults.size)
    }
}
