package limeedge

import kotlin.test.Test
import kotlin.test.assertEquals

class ManifestReaderTest {
    @Test
    fun `mutated manifests are taken and refused as Python does`() {
        var odd = 0
        for ((index, case) in Vectors.list("manifests.json").withIndex()) {
            val error = try {
                ManifestReader.read((case.map()["text"] as String).toByteArray(), "lime.json")
                null
            } catch (error: LimeError) {
                error
            }
            if ((error == null) != case.map()["taken"]) {
                odd++
                println("manifest $index: Python ${if (case.map()["taken"] == true) "takes" else "refuses"} it, here: $error")
            }
        }
        assertEquals(0, odd)
    }
}
