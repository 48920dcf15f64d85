package limeedge

import java.io.File
import java.io.IOException

/**
 * One expert: its full vector p (sum_H,), gamma * p_shared included, as float16 or float32.
 *
 * @property halves bits of float16, or null. @property floats float32, or null: one of the two is there.
 */
internal class Expert(val name: String, val adapterId: String, val halves: ShortArray?, val floats: FloatArray?) {
    val size: Int get() = halves?.size ?: floats!!.size

    /** The i-th number of p. */
    operator fun get(index: Int): Float = if (halves != null) Half.toFloat(halves[index].toInt()) else floats!![index]

    fun renamed(other: String) = Expert(other, adapterId, halves, floats)

    companion object {
        private const val LONGEST_HEADER = 64L shl 10
        private const val HINT = "copy the file again: it may be truncated"

        /** Read an expert file that lies anywhere. @throws LimeError as [decode]. */
        fun read(file: File): Expert {
            if (!file.isFile) throw LimeError.Missing(file.path, "no such expert file", "an expert is one .safetensors file")
            val bytes = try {
                if (file.length() > Int.MAX_VALUE - 16) throw IOException("longer than 2 GiB")
                file.readBytes()
            } catch (error: IOException) {
                throw LimeError.Damaged(file.path, "cannot be read: ${error.message}", HINT)
            }
            return decode(bytes, file.path)
        }

        /**
         * Read the bytes of an expert file.
         *
         * @throws LimeError.Damaged truncated, no expert file, wrong dtype or shape, NaN or infinite values, a bad name.
         * @throws LimeError.Unsupported another schema.
         */
        fun decode(bytes: ByteArray, where: String): Expert {
            val file = try {
                if (bytes.size >= 8 && java.nio.ByteBuffer.wrap(bytes).order(java.nio.ByteOrder.LITTLE_ENDIAN).getLong(0) > LONGEST_HEADER) {
                    throw Safetensors.Malformed("header longer than 64 KiB")
                }
                Safetensors.read(bytes)
            } catch (error: Safetensors.Malformed) {
                throw LimeError.Damaged(where, "not a readable expert file: ${error.message}", HINT)
            } catch (error: Json.Malformed) {
                throw LimeError.Damaged(where, "not a readable expert file: ${error.message}", HINT)
            }
            val header = file.metadata
            if (header["format"] != "lime-edge-expert") throw LimeError.Damaged(where, "not a LiME expert file", "make one with lime-edge experts pack")
            if (header["schema"] != "2") {
                throw LimeError.Unsupported(where, listOf(Fault("schema", "2", "${header["schema"]}")), "write it anew with lime-edge experts pack")
            }
            return check(header, file.tensors, where)
        }

        private fun check(header: Map<String, String>, tensors: Map<String, StoredTensor>, where: String): Expert {
            val faults = Faults()
            val tensor = tensors["expert"]
            if (tensors.keys != setOf("expert") || tensor == null) faults.add("tensors", "expert alone", tensors.keys)
            else if (tensor.dtype != "F16" && tensor.dtype != "F32") faults.add("dtype", "float16 or float32", tensor.dtype)
            else if (tensor.shape.size != 1) faults.add("shape", "one axis", tensor.shape)
            Names.checkExpert(header["name"])?.let { faults.add("name: $it") }
            val adapter = header["adapter_id"].orEmpty()
            if (!Regex("[0-9a-f]{64}").matches(adapter)) faults.add("adapter_id", "64 hex digits", adapter.take(70).ifEmpty { "none" })
            faults.throwAny { LimeError.Damaged(where, it, "write it anew with lime-edge experts pack") }
            val halves = if (tensor!!.dtype == "F16") tensor.halves() else null
            val floats = if (halves == null) tensor.floats() else null
            val finite = halves?.all { Half.isFinite(it.toInt()) } ?: floats!!.all { it.isFinite() }
            if (!finite) throw LimeError.Damaged(where, "the vector holds NaN or infinite values", "write it anew with lime-edge experts pack")
            return Expert(header.getValue("name"), adapter, halves, floats)
        }
    }
}
