package limeedge

import java.io.File

/** Test data that Python writes: in the repository, and what `tools/write_phone_vectors.py` made for this run. */
internal object Vectors {
    val repository = File(System.getProperty("limeedge.repository") ?: "../../..")

    /** A file of tests/vectors. */
    fun kept(name: String): Map<*, *> = Json.parse(File(repository, "tests/vectors/$name").readText()) as Map<*, *>

    /** The folder of `-Dlimeedge.vectors`. */
    val folder: File
        get() = File(checkNotNull(System.getProperty("limeedge.vectors")) { "make test-kotlin writes the vectors and names their folder" })

    /** A document of that folder. */
    fun made(name: String): Map<*, *> = Json.parse(File(folder, name).readText()) as Map<*, *>

    /** A list of that folder. */
    fun list(name: String): List<*> = Json.parse(File(folder, name).readText()) as List<*>
}

internal fun Any?.list(): List<*> = this as List<*>

internal fun Any?.map(): Map<*, *> = this as Map<*, *>

internal fun Any?.ints(): IntArray = list().map { (it as Long).toInt() }.toIntArray()

internal fun Any?.double(): Double = (this as Number).toDouble()
