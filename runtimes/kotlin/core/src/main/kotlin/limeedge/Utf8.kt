package limeedge

import java.nio.ByteBuffer

/** Strict UTF-8: malformed bytes are refused, not replaced. */
internal fun decodeUtf8(bytes: ByteArray, offset: Int = 0, length: Int = bytes.size): String = try {
    Charsets.UTF_8.newDecoder().decode(ByteBuffer.wrap(bytes, offset, length)).toString()
} catch (_: java.nio.charset.CharacterCodingException) {
    throw Json.Malformed("not UTF-8")
}

/**
 * UTF-8 in which each maximal part of a malformed sequence becomes one U+FFFD, as the tokenizer library has it; Java's own
 * decoder counts some of them otherwise.
 *
 * Source: The Unicode Standard, 3.9, table 3-7 (well-formed sequences) and "U+FFFD Substitution of Maximal Subparts".
 */
internal fun decodeLossy(bytes: ByteArray): String {
    val out = StringBuilder(bytes.size)
    var at = 0
    while (at < bytes.size) {
        val lead = bytes[at].toInt() and 0xFF
        val length = when (lead) {
            in 0x00..0x7F -> 1
            in 0xC2..0xDF -> 2
            in 0xE0..0xEF -> 3
            in 0xF0..0xF4 -> 4
            else -> 0
        }
        var point = if (length > 1) lead and (0x7F shr length) else lead
        var taken = 1
        while (taken < length && at + taken < bytes.size && continues(lead, taken, bytes[at + taken].toInt() and 0xFF)) {
            point = point shl 6 or (bytes[at + taken].toInt() and 0x3F)
            taken++
        }
        if (taken == length) out.appendCodePoint(point) else out.append('\uFFFD')
        at += taken
    }
    return out.toString()
}

/** Whether a byte may be the [place]-th after that lead: the first of them is restricted further than 80 to BF. */
private fun continues(lead: Int, place: Int, byte: Int): Boolean = when {
    place > 1 -> byte in 0x80..0xBF
    lead == 0xE0 -> byte in 0xA0..0xBF
    lead == 0xED -> byte in 0x80..0x9F
    lead == 0xF0 -> byte in 0x90..0xBF
    lead == 0xF4 -> byte in 0x80..0x8F
    else -> byte in 0x80..0xBF
}
