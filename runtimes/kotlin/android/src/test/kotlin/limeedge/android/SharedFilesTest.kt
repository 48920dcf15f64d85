package limeedge.android

import kotlin.test.Test
import kotlin.test.assertEquals

class SharedFilesTest {
    @Test
    fun `a name from another app becomes a plain one`() {
        for ((given, expected) in mapOf(
            "smollm2.tar" to "smollm2.tar", "a b (1).safetensors" to "a_b__1_.safetensors", "../../etc/passwd" to "passwd", "..hidden" to "hidden",
            "été.tar" to "t_.tar", "" to "file", "///" to "file", "x".repeat(200) to "x".repeat(64), "a\u0000b" to "a_b",
        )) assertEquals(expected, cleanName(given), given)
    }
}
