package limeedge.app

import limeedge.BundleArchive
import limeedge.LimeBundle
import limeedge.LimeError
import java.io.File
import java.io.IOException
import java.io.InputStream
import java.net.HttpURLConnection
import java.net.URL

/**
 * Bundles and skills as an app keeps them.
 *
 * @property folder the app's files (Android: `context.filesDir`): bundles/NAME.lime and skills/NAME.safetensors.
 * @property cache where large files that were seen are noted (Android: `context.cacheDir`).
 */
public class BundleStore(private val folder: File, private val cache: File) {
    private val bundles = File(folder, "bundles")
    private val skills = File(folder, "skills")

    /** Names of the bundles that are there, sorted. */
    public fun list(): List<String> = bundles.list().orEmpty().filter { it.endsWith(".lime") && !it.startsWith(".") }.map { it.removeSuffix(".lime") }.sorted()

    /** Open a bundle. @throws LimeError as [LimeBundle.open]. */
    public fun open(name: String): LimeBundle = LimeBundle.open(file(name), cache = cache)

    /**
     * Unpack an archive that `lime-edge pack` wrote.
     *
     * @return the bundle's name. @throws LimeError.Damaged the archive. @throws LimeError.Invalid a bad name, or one that is taken.
     */
    public fun add(name: String, archive: InputStream, progress: (Long) -> Unit = {}): String {
        val plain = checkName(name.removeSuffix(".tar").removeSuffix(".lime"))
        bundles.mkdirs()
        BundleArchive.unpack(archive, file(plain), progress)
        return plain
    }

    /** Delete a bundle. */
    public fun remove(name: String): Boolean = file(name).deleteRecursively()

    /**
     * Keep a skill that another app shared. Whether it fits a bundle says `LimeSession.install`.
     *
     * @return where it is. @throws LimeError.Damaged larger than any skill. @throws LimeError.Invalid a bad name.
     */
    public fun keepSkill(name: String, content: InputStream): File {
        skills.mkdirs()
        val target = File(skills, "${checkName(name.removeSuffix(".safetensors"))}.safetensors")
        val partial = File(skills, ".${target.name}.partial")
        try {
            partial.outputStream().use { out ->
                val buffer = ByteArray(1 shl 16)
                var total = 0L
                while (true) {
                    val count = content.read(buffer)
                    if (count < 0) break
                    total += count
                    if (total > LARGEST_SKILL) throw LimeError.Damaged(name, "larger than $LARGEST_SKILL bytes: no skill", "share one .safetensors file")
                    out.write(buffer, 0, count)
                }
            }
            if (!partial.renameTo(target)) throw IOException("$target: cannot be written")
        } finally {
            partial.delete()
        }
        return target
    }

    /** Skills that were kept, by name. */
    public fun skills(): Map<String, File> =
        skills.listFiles().orEmpty().filter { it.extension == "safetensors" && !it.name.startsWith(".") }.sortedBy { it.name }.associateBy { it.nameWithoutExtension }

    /**
     * Download an archive; what is there of it already is not asked for again, where the server knows ranges.
     *
     * @param progress bytes so far, and in all (-1: unknown). @return the whole file; unpack it with [add], then delete it.
     * @throws IOException the network, or a server that answers anything but 200 and 206; what came so far stays.
     */
    public fun download(url: URL, progress: (Long, Long) -> Unit = { _, _ -> }): File {
        val partial = File(cache, "download-${Integer.toHexString(url.toString().hashCode())}.tar.partial")
        cache.mkdirs()
        val have = partial.length()
        val connection = url.openConnection() as HttpURLConnection
        if (have > 0) connection.setRequestProperty("Range", "bytes=$have-")
        connection.connectTimeout = TIMEOUT
        connection.readTimeout = TIMEOUT
        try {
            val code = connection.responseCode
            if (code == 416 && connection.getHeaderField("Content-Range") == "bytes */$have") return finish(partial)
            if (code != 200 && code != 206) throw IOException("$url: the server answers $code")
            val resumes = code == 206 && connection.getHeaderField("Content-Range")?.startsWith("bytes $have-") == true
            if (code == 206 && !resumes) throw IOException("$url: the server answers another range")
            var done = if (resumes) have else 0L
            val all = connection.contentLengthLong.let { if (it < 0) -1 else it + done }
            java.io.FileOutputStream(partial, resumes).use { out ->
                connection.inputStream.use { stream ->
                    val buffer = ByteArray(1 shl 16)
                    while (true) {
                        val count = stream.read(buffer)
                        if (count < 0) break
                        out.write(buffer, 0, count)
                        done += count
                        progress(done, all)
                    }
                }
            }
            if (all >= 0 && done != all) throw IOException("$url: ended after $done of $all bytes")
            return finish(partial)
        } finally {
            connection.disconnect()
        }
    }

    private fun finish(partial: File): File {
        val whole = File(partial.path.removeSuffix(".partial"))
        if (!partial.renameTo(whole)) throw IOException("$whole: cannot be written")
        return whole
    }

    private fun file(name: String) = File(bundles, "${checkName(name)}.lime")

    private fun checkName(name: String): String {
        if (!NAME.matches(name)) throw LimeError.Invalid(name.take(80), "no name for a file", "letters, digits, '.', '_', '-'")
        return name
    }

    private companion object {
        private val NAME = Regex("[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
        private const val LARGEST_SKILL = 512L shl 20
        private const val TIMEOUT = 30_000
    }
}
