package limeedge

import java.io.File
import java.io.IOException
import java.nio.file.Files
import java.nio.file.LinkOption

/**
 * Remembers which large files had the right hash, so that opening a bundle again does not read gigabytes.
 *
 * One JSON file per bundle in a folder of the user's or the app's cache; a file is known by its path in the bundle, its
 * hash, and what the file system says about it (size, times, inode). Without a folder nothing is remembered.
 */
internal class SeenFiles(private val folder: File?, bundle: File) {
    private val note = folder?.let { File(it, "${hex(sha256().digest(bundle.path.toByteArray())).take(32)}.json") }
    private val seen: MutableMap<String, String> = read().toMutableMap()

    /** Whether the file was found to have that hash and looks untouched since. */
    fun knows(path: String, sha256: String, file: File): Boolean = folder != null && seen[path] == describe(sha256, file)

    /** Note that the file has that hash; [before] is [describe] from before it was read. */
    fun remember(path: String, before: String) {
        if (folder == null) return
        seen[path] = before
        try {
            folder.mkdirs()
            val partial = File.createTempFile("seen", ".partial", folder)
            partial.writeText(Json.write(seen))
            if (!partial.renameTo(note!!)) partial.delete()
        } catch (_: IOException) { // a full disk costs time at the next open, nothing else
        }
    }

    /** What tells a file from a changed one. */
    fun describe(sha256: String, file: File): String {
        val facts = try {
            val all = Files.readAttributes(file.toPath(), "unix:ino,ctime,lastModifiedTime,size", LinkOption.NOFOLLOW_LINKS)
            "${all["ino"]} ${all["ctime"]} ${all["lastModifiedTime"]} ${all["size"]}"
        } catch (_: UnsupportedOperationException) {
            "${file.lastModified()} ${file.length()}"
        } catch (_: IllegalArgumentException) {
            "${file.lastModified()} ${file.length()}"
        }
        return "$sha256 $facts"
    }

    private fun read(): Map<String, String> = try {
        val known = note?.takeIf { it.isFile }?.let { Json.parse(it.readText()) as? Map<*, *> } ?: emptyMap<String, String>()
        known.entries.associate { (path, value) -> "$path" to "$value" }
    } catch (_: IOException) {
        emptyMap()
    } catch (_: Json.Malformed) {
        emptyMap()
    }

    companion object {
        /** The user's cache folder; null where there is none (Android: pass the app's cacheDir). */
        fun defaultFolder(): File? {
            System.getenv("XDG_CACHE_HOME")?.takeIf { it.isNotEmpty() }?.let { return File(it, "lime-edge/seen-jvm") }
            val home = System.getProperty("user.home")?.let(::File)?.takeIf { it.isDirectory && it.path != "/" } ?: return null
            return File(home, ".cache/lime-edge/seen-jvm")
        }
    }
}

internal fun sha256(): java.security.MessageDigest = java.security.MessageDigest.getInstance("SHA-256")
