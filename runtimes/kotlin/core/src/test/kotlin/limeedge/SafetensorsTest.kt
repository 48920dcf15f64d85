package limeedge

import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlin.random.Random
import kotlin.test.Test
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith

class SafetensorsTest {
    private fun file(header: String, data: ByteArray = ByteArray(8)): ByteArray {
        val text = header.toByteArray()
        return ByteBuffer.allocate(8 + text.size + data.size).order(ByteOrder.LITTLE_ENDIAN).putLong(text.size.toLong()).put(text).put(data).array()
    }

    private val good = """{"__metadata__":{"a":"b"},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"""

    @Test
    fun `tensors and metadata`() {
        val data = ByteBuffer.allocate(8).order(ByteOrder.LITTLE_ENDIAN).putFloat(1.5f).putFloat(-2f).array()
        val read = Safetensors.read(file(good, data))
        assertEquals(mapOf("a" to "b"), read.metadata)
        assertContentEquals(floatArrayOf(1.5f, -2f), read.tensors.getValue("x").floats())
    }

    @Test
    fun `headers that do not fit their bytes are refused`() {
        val bad = listOf(
            """{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}""", """{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}""",
            """{"x":{"dtype":"F32","shape":[4294967297],"data_offsets":[0,8]}}""", """{"x":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}""",
            """{"x":{"dtype":"Z","shape":[2],"data_offsets":[0,8]}}""", """{"x":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}""",
            """{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"y":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}""", "[]", "{}", "nonsense",
            """{"__metadata__":{"a":1},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}""",
        )
        for (header in bad) assertFailsWith<Exception>(header) { Safetensors.read(file(header)) }.let { check(it is Safetensors.Malformed || it is Json.Malformed) }
    }

    @Test
    fun `20,000 mutations never throw anything else`() {
        val random = Random(1)
        val whole = file(good)
        repeat(20_000) {
            val mutated = whole.copyOf(if (random.nextInt(4) == 0) random.nextInt(whole.size) else whole.size)
            repeat(random.nextInt(1, 4)) { if (mutated.isNotEmpty()) mutated[random.nextInt(mutated.size)] = random.nextInt().toByte() }
            try {
                Safetensors.read(mutated)
            } catch (_: Safetensors.Malformed) {
            } catch (_: Json.Malformed) {
            }
        }
    }
}
