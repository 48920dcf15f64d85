package limeedge

import java.io.BufferedInputStream
import java.io.File
import java.io.IOException
import java.io.InputStream

/**
 * A bundle as one file, as `lime-edge pack` writes it: an uncompressed tar (POSIX ustar), lime.json first.
 *
 * [unpack] writes beside the bundle and renames once at the end: a bundle is there whole or not at all. A run that was killed is
 * taken up again: files that are whole already are not written anew.
 */
public object BundleArchive {
    private const val BLOCK = 512
    private const val LARGEST = 8L shl 30

    /**
     * Unpack an archive; every file is compared with its hash before the bundle appears.
     *
     * @param archive the whole archive. @param folder the bundle to appear; it must not be there.
     * @param progress bytes read so far.
     * @throws LimeError.Damaged a truncated or foreign archive, files that lime.json does not list, hashes that differ.
     * @throws LimeError.Invalid the folder is there already. @throws IOException nothing can be written.
     */
    public fun unpack(archive: InputStream, folder: File, progress: (Long) -> Unit = {}): LimeBundle {
        if (folder.exists()) throw LimeError.Invalid(folder.path, "is there already", "delete it first, or unpack under another name")
        val stage = File(folder.absoluteFile.parentFile, ".${folder.name}.partial")
        stage.mkdirs()
        Reader(BufferedInputStream(archive, 1 shl 16), stage, progress).run()
        LimeBundle.open(stage, verify = false)
        if (!stage.renameTo(folder)) throw IOException("$folder: cannot be renamed to")
        return LimeBundle.open(folder)
    }

    private class Reader(private val input: InputStream, private val stage: File, private val progress: (Long) -> Unit) {
        private var read = 0L
        private val where = "archive"

        fun run() {
            val first = readHeader() ?: throw damaged("is empty")
            if (first.first != ManifestReader.FILE || first.second > ManifestReader.LARGEST) throw damaged("does not begin with lime.json")
            val text = ByteArray(first.second.toInt()).also { readFully(it, it.size) }
            skipPadding(first.second)
            val manifest = ManifestReader.read(text, "$where: lime.json")
            val missing = HashMap(manifest.files)
            while (true) {
                val (name, size) = readHeader() ?: break
                val entry = missing.remove(name) ?: throw damaged("'${name.take(80)}' is not in lime.json, or comes twice")
                if (size != entry.size) throw damaged("$name: ${entry.size} bytes expected, $size found")
                take(File(stage, name), entry, name)
                skipPadding(size)
            }
            if (missing.isNotEmpty()) throw damaged("${missing.size} files are missing, ${missing.keys.first()} among them")
            File(stage, ManifestReader.FILE).writeBytes(text)
        }

        /** One file: into its place, hashed on the way; left alone where it is there and whole. */
        private fun take(file: File, entry: FileEntry, name: String) {
            val known = file.length() == entry.size && file.isFile && hex(digest(file)) == entry.sha256
            file.parentFile.mkdirs()
            val hash = sha256()
            val buffer = ByteArray(1 shl 16)
            var left = entry.size
            val output = if (known) null else file.outputStream()
            output.use {
                while (left > 0) {
                    val count = minOf(left, buffer.size.toLong()).toInt()
                    readFully(buffer, count)
                    hash.update(buffer, 0, count)
                    output?.write(buffer, 0, count)
                    left -= count
                    progress(read)
                }
                output?.fd?.sync()
            }
            if (hex(hash.digest()) != entry.sha256) {
                file.delete()
                throw damaged("$name: its sha256 is not lime.json's")
            }
        }

        private fun digest(file: File): ByteArray = sha256().also { hash ->
            file.inputStream().use { stream ->
                val buffer = ByteArray(1 shl 16)
                while (true) {
                    val count = stream.read(buffer)
                    if (count < 0) break
                    hash.update(buffer, 0, count)
                }
            }
        }.digest()

        /** Name and size of the next file; null at the end. */
        private fun readHeader(): Pair<String, Long>? {
            val block = ByteArray(BLOCK).also { readFully(it, BLOCK) }
            if (block.all { it.toInt() == 0 }) return null
            val sum = block.indices.sumOf { if (it in 148 until 156) ' '.code else block[it].toInt() and 0xFF }
            if (octal(block, 148, 8) != sum.toLong()) throw damaged("a header's checksum differs")
            if (block[156] != '0'.code.toByte() && block[156].toInt() != 0) throw damaged("holds something that is no plain file")
            val prefix = text(block, 345, 155)
            val name = (if (prefix.isEmpty()) "" else "$prefix/") + text(block, 0, 100)
            Names.checkPath(name)?.let { throw damaged(it) } // no path leads out of the bundle
            val size = octal(block, 124, 12)
            if (size !in 0 until LARGEST) throw damaged("$name: a size of $size")
            return name to size
        }

        private fun text(block: ByteArray, start: Int, length: Int): String {
            val end = (start until start + length).firstOrNull { block[it].toInt() == 0 } ?: (start + length)
            return String(block, start, end - start, Charsets.US_ASCII)
        }

        private fun octal(block: ByteArray, start: Int, length: Int): Long =
            text(block, start, length).trim().ifEmpty { "0" }.toLongOrNull(8) ?: throw damaged("a header's number")

        private fun skipPadding(size: Long) {
            val rest = ((BLOCK - size % BLOCK) % BLOCK).toInt()
            if (rest > 0) readFully(ByteArray(rest), rest)
        }

        private fun readFully(buffer: ByteArray, count: Int) {
            var done = 0
            while (done < count) {
                val more = input.read(buffer, done, count - done)
                if (more < 0) throw damaged("ends early, after $read bytes")
                done += more
                read += more
            }
        }

        private fun damaged(what: String) = LimeError.Damaged(where, what, "download it again")
    }
}
