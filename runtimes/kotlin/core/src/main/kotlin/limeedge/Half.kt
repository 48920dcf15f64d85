package limeedge

/** IEEE 754 half precision: what expert vectors are stored in. */
internal object Half {
    /** The value of a finite half, exact; [bits] may be a sign-extended short. Infinities and NaN: see [isFinite]. */
    fun toFloat(bits: Int): Float {
        // exponent and mantissa put where a float has them; its exponent bias is larger by 112, subnormals included
        val magnitude = Float.fromBits((bits and 0x7FFF) shl 13) * TWO_TO_112
        return Float.fromBits(magnitude.toRawBits() or ((bits and 0x8000) shl 16))
    }

    /** Whether the bits are a number: an exponent of all ones is not. */
    fun isFinite(bits: Int): Boolean = bits and 0x7C00 != 0x7C00

    private val TWO_TO_112 = Float.fromBits((127 + 112) shl 23)
}
