package limeedge

import java.io.File
import java.io.IOException
import java.nio.file.Files
import java.nio.file.LinkOption
import java.nio.file.attribute.BasicFileAttributes

/**
 * An opened bundle: the folder that `lime-edge export` writes, checked as docs/bundle-format.md says ("Reading a bundle").
 *
 * @property folder where it is. @property manifest what lime.json says. @property reference p_ref (sum_H,).
 */
public class LimeBundle private constructor(
    public val folder: File,
    public val manifest: Manifest,
    internal val reference: FloatArray,
    private val seen: SeenFiles,
) {
    /** Size of every file listed, in bytes. */
    public val totalBytes: Long get() = manifest.files.values.fold(0L) { sum, entry -> sum + entry.size }

    /** A file of the bundle that lime.json lists. */
    public fun file(path: String): File = File(folder, path)

    /**
     * Compare what an engine or a tokenizer is about to read with its hashes: every large file below [prefix] that was
     * not seen before or has changed since.
     *
     * @throws LimeError.Damaged a file is not what lime.json says.
     */
    public fun checkLarge(prefix: String) {
        val faults = Faults()
        for ((path, entry) in manifest.files) {
            if (!path.startsWith(prefix) || !manifest.isLarge(path)) continue
            val file = locate(folder, path, entry, faults) ?: continue
            if (seen.knows(path, entry.sha256, file)) continue
            val before = seen.describe(entry.sha256, file)
            val found = hash(file)
            if (found != entry.sha256) faults.add("$path: sha256", entry.sha256.take(16), found.take(16))
            else seen.remember(path, before)
        }
        faults.throwAny { LimeError.Damaged(folder.path, it, COPY_AGAIN) }
    }

    /** Read a listed file and compare its hash, in the bytes that are given back. */
    internal fun readChecked(path: String): ByteArray = readChecked(folder, manifest, path)

    /** The bytes of all expert files as they are now, unchecked, if they are not too many: a session keeps them, whatever becomes of the bundle. */
    internal fun readExpertsAhead(): Map<String, ByteArray> {
        val files = manifest.experts.map { it.file }
        if (files.fold(0L) { sum, path -> sum + manifest.files.getValue(path).size } > AHEAD) return emptyMap()
        return files.mapNotNull { path ->
            val file = locate(folder, path, manifest.files.getValue(path), Faults())
            if (file == null) null else path to readAll(file)
        }.toMap()
    }

    /** An expert file's bytes, checked; [ahead] where they were read before. */
    internal fun readExpert(path: String, ahead: ByteArray?): ByteArray =
        if (ahead != null) check(folder, path, manifest.files.getValue(path), ahead) else readChecked(path)

    /** The hash of every file, companions included. @throws LimeError.Damaged naming all that differ. */
    public fun verifyFiles() {
        val faults = Faults()
        for ((path, entry) in manifest.files) {
            val file = locate(folder, path, entry, faults) ?: continue
            val found = hash(file)
            if (found != entry.sha256) faults.add("$path: sha256", entry.sha256.take(16), found.take(16))
        }
        faults.throwAny { LimeError.Damaged(folder.path, it, COPY_AGAIN) }
    }

    public companion object {
        private const val SMALL = 1L shl 20
        private const val AHEAD = 64L shl 20
        private const val TRIES = 50

        /**
         * Open a bundle.
         *
         * Sizes of all files and hashes of the small ones are compared every time; graph and weights when a session is
         * opened, if they are new or have changed; an expert's when it is used.
         *
         * @param folder the bundle. @param verify compare the hash of every file now.
         * @param cache where to note which large files were seen; null for the user's cache folder (on Android pass
         *   `context.cacheDir`), a folder that cannot be written to notes nothing.
         * @throws LimeError.Missing no bundle. @throws LimeError.Damaged every damaged file is named.
         * @throws LimeError.Unsupported another schema, or a vision-language bundle.
         */
        public fun open(folder: File, verify: Boolean = false, cache: File? = null): LimeBundle {
            val root = try {
                folder.canonicalFile // the bundle's directory itself may be a link
            } catch (error: IOException) {
                throw LimeError.Missing(folder.path, "no such bundle: ${error.message}", "give the folder that lime-edge export wrote")
            }
            repeat(TRIES - 1) {
                val manifest = readManifest(root)
                try {
                    return open(root, manifest, cache).also { if (verify) it.verifyFiles() }
                } catch (error: LimeError.Damaged) {
                    if (readManifest(root).seal == manifest.seal) throw error // else it changed while it was read
                }
            }
            return open(root, readManifest(root), cache).also { if (verify) it.verifyFiles() }
        }

        private fun open(root: File, manifest: Manifest, cache: File?): LimeBundle {
            val faults = Faults()
            val late = manifest.experts.map { it.file }.toSet() // hashed when they are used
            for ((path, entry) in manifest.files) {
                val file = locate(root, path, entry, faults) ?: continue
                if (path in late || manifest.isLarge(path)) continue
                val found = hash(file)
                if (found != entry.sha256) faults.add("$path: sha256", entry.sha256.take(16), found.take(16))
            }
            faults.throwAny { LimeError.Damaged(root.path, it, COPY_AGAIN) }
            if (manifest.kind == "vision-language") {
                throw LimeError.Unsupported(root.path, "a vision-language bundle: this library does not see pictures yet", "open a text bundle")
            }
            val seen = SeenFiles(cache ?: SeenFiles.defaultFolder(), root)
            return LimeBundle(root, manifest, readReference(root, manifest), seen)
        }

        internal fun readManifest(root: File): Manifest {
            if (!root.isDirectory) throw LimeError.Missing(root.path, "no such bundle", "a bundle is a folder written by lime-edge export")
            val file = File(root, ManifestReader.FILE)
            val facts = attributes(file)
                ?: throw LimeError.Missing(root.path, "not a bundle: lime.json is missing", "write one with lime-edge export")
            if (!facts.isRegularFile) throw LimeError.Damaged(file.path, "a link or no file", COPY_AGAIN)
            if (facts.size() > ManifestReader.LARGEST) {
                throw LimeError.Damaged(file.path, listOf(Fault("bytes", "at most ${ManifestReader.LARGEST}", "${facts.size()}")), COPY_AGAIN)
            }
            return ManifestReader.read(readAll(file), file.path)
        }

        private fun readReference(root: File, manifest: Manifest): FloatArray {
            val where = File(root, ManifestReader.REFERENCE).path
            val tensor = try {
                Safetensors.read(readChecked(root, manifest, ManifestReader.REFERENCE)).tensors["reference"]
            } catch (error: Safetensors.Malformed) {
                throw LimeError.Damaged(where, "${error.message}", COPY_AGAIN)
            } catch (error: Json.Malformed) {
                throw LimeError.Damaged(where, "${error.message}", COPY_AGAIN)
            }
            if (tensor?.dtype != "F32" || tensor.shape != listOf(manifest.sumH)) {
                throw LimeError.Damaged(where, listOf(Fault("reference", "F32 (${manifest.sumH},)", "${tensor?.dtype} ${tensor?.shape}")), COPY_AGAIN)
            }
            val values = tensor.floats()
            if (!values.all { it.isFinite() }) throw LimeError.Damaged(where, "holds NaN or infinite values", COPY_AGAIN)
            return values
        }

        private fun Manifest.isLarge(path: String) = files.getValue(path).size > SMALL

        private fun readChecked(root: File, manifest: Manifest, path: String): ByteArray {
            val entry = manifest.files.getValue(path)
            val faults = Faults()
            val file = locate(root, path, entry, faults)
            faults.throwAny { LimeError.Damaged(root.path, it, COPY_AGAIN) }
            if (entry.size > Int.MAX_VALUE - 16) throw LimeError.Damaged(file!!.path, listOf(Fault("bytes", "at most 2 GiB", "${entry.size}")), COPY_AGAIN)
            return check(root, path, entry, readAll(file!!))
        }

        private fun check(root: File, path: String, entry: FileEntry, bytes: ByteArray): ByteArray {
            val found = hex(sha256().digest(bytes))
            if (found != entry.sha256) throw LimeError.Damaged(root.path, listOf(Fault("$path: sha256", entry.sha256.take(16), found.take(16))), COPY_AGAIN)
            return bytes
        }

        /** The file of a path in the bundle if it is plain, of its size, and no link is on the way; else a fault. */
        private fun locate(root: File, path: String, entry: FileEntry, faults: Faults): File? {
            var file = root
            val parts = path.split('/')
            for ((index, part) in parts.withIndex()) {
                file = File(file, part)
                val facts = attributes(file)
                val last = index == parts.size - 1
                when {
                    facts == null -> faults.add("$path is missing")
                    facts.isSymbolicLink -> faults.add("$path: a link")
                    last && !facts.isRegularFile || !last && !facts.isDirectory -> faults.add("$path: no plain file")
                    last && facts.size() != entry.size -> faults.add("$path: size in bytes", entry.size, facts.size())
                    else -> continue
                }
                return null
            }
            return file
        }

        private fun attributes(file: File): BasicFileAttributes? = try {
            Files.readAttributes(file.toPath(), BasicFileAttributes::class.java, LinkOption.NOFOLLOW_LINKS)
        } catch (_: IOException) {
            null
        }

        private fun readAll(file: File): ByteArray = try {
            file.readBytes()
        } catch (error: IOException) {
            throw LimeError.Damaged(file.path, "cannot be read: ${error.message}", COPY_AGAIN)
        }

        private fun hash(file: File): String {
            val digest = sha256()
            try {
                file.inputStream().use { stream ->
                    val buffer = ByteArray(1 shl 16)
                    while (true) {
                        val count = stream.read(buffer)
                        if (count < 0) break
                        digest.update(buffer, 0, count)
                    }
                }
            } catch (error: IOException) {
                throw LimeError.Damaged(file.path, "cannot be read: ${error.message}", COPY_AGAIN)
            }
            return hex(digest.digest())
        }
    }
}
