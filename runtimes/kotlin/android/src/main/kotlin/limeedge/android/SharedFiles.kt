package limeedge.android

import android.content.ContentResolver
import android.content.Intent
import android.net.Uri
import android.provider.OpenableColumns
import java.io.IOException
import java.io.InputStream

/** A file that another app gave: its name and its content. */
public class SharedFile(public val name: String, private val resolver: ContentResolver, private val uri: Uri) {
    /** Read it. @throws IOException the other app has taken it back. */
    public fun open(): InputStream = resolver.openInputStream(uri) ?: throw IOException("$uri cannot be opened")
}

/** The files of an intent: shared (SEND), opened (VIEW), or picked (a result's data). */
public fun findSharedFiles(intent: Intent, resolver: ContentResolver): List<SharedFile> {
    val uris = when (intent.action) {
        Intent.ACTION_SEND -> listOfNotNull(@Suppress("DEPRECATION") intent.getParcelableExtra<Uri>(Intent.EXTRA_STREAM))
        else -> listOfNotNull(intent.data)
    }
    return uris.map { SharedFile(findName(it, resolver), resolver, it) }
}

/** What the other app calls it, made into a name for a file of ours: letters, digits, '.', '_' and '-'. */
public fun findName(uri: Uri, resolver: ContentResolver): String {
    val told = resolver.query(uri, arrayOf(OpenableColumns.DISPLAY_NAME), null, null, null)?.use { rows ->
        if (rows.moveToFirst() && !rows.isNull(0)) rows.getString(0) else null
    }
    return cleanName(told ?: uri.lastPathSegment ?: "file")
}

/** Only the last part, only plain characters, never hidden. */
public fun cleanName(name: String): String =
    name.substringAfterLast('/').replace(Regex("[^A-Za-z0-9._-]"), "_").trimStart('.', '_', '-').take(64).ifEmpty { "file" }
