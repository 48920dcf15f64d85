package limeedge

import kotlin.test.Test
import kotlin.test.assertEquals

class HalfTest {
    @Test
    fun `every finite half is the number that its bits say`() {
        for (bits in 0..0xFFFF) {
            val mantissa = bits and 0x3FF
            val exponent = (bits shr 10) and 0x1F
            assertEquals(exponent != 0x1F, Half.isFinite(bits.toShort().toInt()), "bits $bits")
            if (exponent == 0x1F) continue
            val sign = if (bits and 0x8000 == 0) 1.0 else -1.0
            val expected = sign * if (exponent == 0) mantissa * Math.pow(2.0, -24.0) else (1024 + mantissa) * Math.pow(2.0, exponent - 25.0)
            assertEquals(expected, Half.toFloat(bits.toShort().toInt()).toDouble(), 0.0, "bits $bits")
            assertEquals(expected.toFloat().toRawBits(), Half.toFloat(bits).toRawBits(), "sign of zero, bits $bits")
        }
    }
}
