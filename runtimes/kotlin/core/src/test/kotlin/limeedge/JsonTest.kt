package limeedge

import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith

class JsonTest {
    @Test
    fun `what RFC 8259 allows is read`() {
        val text = """ {"a" : [1, -2.5e1, true, false, null, "\u00e9\n\ud83d\ude00é"], "b": {}, "c": 12345678901234567890} """
        assertEquals(
            mapOf("a" to listOf(1L, -25.0, true, false, null, "é\n😀é"), "b" to emptyMap<String, Any?>(), "c" to 1.2345678901234567E19),
            Json.parse(text),
        )
    }

    @Test
    fun `what it does not allow is refused`() {
        val bad = listOf(
            "", "{", "[1,]", "{\"a\":1,}", "{\"a\" 1}", "{a:1}", "01", "1.", ".5", "+1", "1e", "nul", "NaN", "Infinity", "\"\\x\"", "\"\\u12\"",
            "\"\\u+123\"", "\"a", "\"a\nb\"", "[1] 2", "{\"a\":1,\"a\":2}", "'a'", "[".repeat(101) + "]".repeat(101), "\u00a01",
        )
        for (text in bad) assertFailsWith<Json.Malformed>(text) { Json.parse(text) }
        Json.parse("[".repeat(100) + "]".repeat(100))
    }

    @Test
    fun `what is written is read again`() {
        val value = mapOf("text" to "\"\\\n\u0000é😀", "numbers" to listOf(1L, 0.1, -1e-300), "none" to null, "yes" to true)
        assertEquals(value, Json.parse(Json.write(value)))
    }
}
