package limeedge

import java.io.File
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith

class ChatFormatTest {
    private val templates = Json.parse(File(Vectors.repository, "tests/vectors/prompts.json").readText()).list().map { it.map() }

    private fun read(facts: Map<*, *>): Prompts {
        val roles = facts["roles"].map().entries.associate { (role, speaker) -> "$role" to Speaker(speaker.map()["prefix"] as String, speaker.map()["suffix"] as String) }
        return Prompts(
            facts["begin"] as String, roles, facts["opening"] as String, facts["closing"] as String, facts["default_system"] as String?,
            facts["system_opens_user"] as Boolean, facts["strip"].list().map { "$it" }.toSet(), facts["order"] == "alternating", facts["reason"] as String?,
        )
    }

    @Test
    fun `conversations are written as Python writes them`() {
        assert(templates.size > 3)
        for (template in templates) {
            val format = ChatFormat(read(template["prompts"].map()))
            for (case in template["cases"].list().map { it.map() }) {
                val turns = case["turns"].list().map { turn -> turn.list().let { Turn(it[0] as String, it[1] as String) } }
                assertEquals(case["text"], format.render(turns, case["open"] as Boolean), "${template["name"]}: $turns")
            }
        }
    }

    @Test
    fun `orders and roles that the template was not proven for are refused`() {
        val format = ChatFormat(Prompts("", mapOf("user" to Speaker("u", "."), "assistant" to Speaker("a", ".")), "a", "", null, false, emptySet(), true, null))
        for (roles in listOf(listOf(), listOf("assistant"), listOf("user", "user"), listOf("system", "user"), listOf("user", "tool"))) {
            assertFailsWith<LimeError.Invalid>("$roles") { format.render(roles.map { Turn(it, "x") }) }
        }
        assertEquals("ux.ax.ux.a", format.render(listOf("user", "assistant", "user").map { Turn(it, "x") }))
    }
}
