package limeedge

import java.nio.ByteBuffer
import java.nio.ByteOrder

/** A tensor of a safetensors file: where its bytes lie. [data] is little endian and holds exactly the tensor. */
internal class StoredTensor(val dtype: String, val shape: List<Int>, val data: ByteBuffer) {
    /** Number of values. */
    val size: Int get() = shape.fold(1) { product, axis -> product * axis }

    /** F16 or F32 values as float. */
    fun floats(): FloatArray = when (dtype) {
        "F32" -> FloatArray(size).also { data.duplicate().order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer().get(it) }
        "F16" -> {
            val halves = halves()
            FloatArray(size) { Half.toFloat(halves[it].toInt()) }
        }
        else -> throw IllegalStateException("dtype $dtype")
    }

    /** The bits of F16 values. */
    fun halves(): ShortArray =
        ShortArray(size).also { data.duplicate().order(ByteOrder.LITTLE_ENDIAN).asShortBuffer().get(it) }

    /** I32 values. */
    fun ints(): IntArray =
        IntArray(size).also { data.duplicate().order(ByteOrder.LITTLE_ENDIAN).asIntBuffer().get(it) }
}

/**
 * A safetensors file: 8 bytes length of the header, the header (JSON), then the tensors' bytes.
 *
 * Refused as the reference reader does: a header that is not JSON or too long, offsets that overlap, leave gaps or
 * point outside, sizes that are not the shape's.
 *
 * Source: the format's description in the safetensors project's README.
 */
internal class Safetensors private constructor(val metadata: Map<String, String>, val tensors: Map<String, StoredTensor>) {
    class Malformed(message: String) : Exception(message)

    companion object {
        private const val LONGEST_HEADER = 100_000_000L
        private const val METADATA = "__metadata__"
        private val BYTES = mapOf(
            "BOOL" to 1, "U8" to 1, "I8" to 1, "F8_E5M2" to 1, "F8_E4M3" to 1, "I16" to 2, "U16" to 2, "F16" to 2,
            "BF16" to 2, "I32" to 4, "U32" to 4, "F32" to 4, "F64" to 8, "I64" to 8, "U64" to 8,
        )

        /** Read a whole file that is in memory. */
        fun read(bytes: ByteArray): Safetensors {
            if (bytes.size < 8) throw Malformed("shorter than its header's length")
            val length = ByteBuffer.wrap(bytes).order(ByteOrder.LITTLE_ENDIAN).getLong(0)
            if (length < 2 || length > LONGEST_HEADER || length > bytes.size - 8) throw Malformed("header length $length")
            val start = 8 + length.toInt()
            val header = try {
                Json.parse(decodeUtf8(bytes, 8, length.toInt()))
            } catch (error: Json.Malformed) {
                throw Malformed("header: ${error.message}")
            }
            if (header !is Map<*, *>) throw Malformed("header: not an object")
            return Safetensors(readMetadata(header[METADATA]), readTensors(header, bytes, start))
        }

        private fun readMetadata(value: Any?): Map<String, String> {
            if (value == null) return emptyMap()
            if (value !is Map<*, *> || value.values.any { it !is String }) throw Malformed("header: $METADATA")
            return value.entries.associate { (name, text) -> name as String to text as String }
        }

        private fun readTensors(header: Map<*, *>, bytes: ByteArray, start: Int): Map<String, StoredTensor> {
            val found = header.filterKeys { it != METADATA }.map { (name, value) -> Entry.read(name as String, value) }
            var end = 0L
            for (entry in found.sortedWith(compareBy({ it.begin }, { it.end }))) {
                if (entry.begin != end) throw Malformed("${entry.name}: offsets overlap or leave a gap")
                end = entry.end
            }
            if (end != (bytes.size - start).toLong()) throw Malformed("holds ${bytes.size - start} bytes, tensors need $end")
            return found.associate { entry ->
                val data = ByteBuffer.wrap(bytes, start + entry.begin.toInt(), (entry.end - entry.begin).toInt())
                entry.name to StoredTensor(entry.dtype, entry.shape, data.slice())
            }
        }

        private class Entry(val name: String, val dtype: String, val shape: List<Int>, val begin: Long, val end: Long) {
            companion object {
                fun read(name: String, value: Any?): Entry {
                    if (value !is Map<*, *>) throw Malformed("$name: not an object")
                    val dtype = value["dtype"] as? String ?: throw Malformed("$name: no dtype")
                    val width = BYTES[dtype] ?: throw Malformed("$name: unknown dtype $dtype")
                    val offsets = (value["data_offsets"] as? List<*>)?.map { it as? Long } ?: emptyList()
                    if (offsets.size != 2 || offsets.any { it == null || it < 0 || it > Int.MAX_VALUE }) {
                        throw Malformed("$name: data_offsets")
                    }
                    var size = width.toLong()
                    val shape = (value["shape"] as? List<*>)?.map { axis ->
                        if (axis !is Long || axis < 0 || axis > Int.MAX_VALUE) throw Malformed("$name: shape")
                        size *= axis
                        if (size > Int.MAX_VALUE) throw Malformed("$name: shape")
                        axis.toInt()
                    } ?: throw Malformed("$name: no shape")
                    val (begin, end) = offsets.map { it!! }
                    if (end - begin != size) throw Malformed("$name: ${end - begin} bytes, its shape needs $size")
                    return Entry(name, dtype, shape, begin, end)
                }
            }
        }
    }
}
