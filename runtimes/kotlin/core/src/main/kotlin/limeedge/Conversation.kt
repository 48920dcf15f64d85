package limeedge

import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.flow

/** One turn of a conversation: who speaks (system, user, assistant), and what. */
public data class Turn(val role: String, val text: String)

/** Writes conversations as the model was taught them: the bundle's chat template, reduced to what stands around each turn. */
public class ChatFormat internal constructor(private val prompts: Prompts) {
    /** Roles that may speak. */
    public val roles: Set<String> get() = prompts.roles.keys

    /**
     * The text of a conversation.
     *
     * @param open begin the assistant's turn.
     * @throws LimeError.Invalid a role that the template does not know, or an order that it was not proven for.
     */
    public fun render(turns: List<Turn>, open: Boolean = true): String {
        check(turns)
        val system = prompts.defaultSystem
        val all = if (system != null && turns[0].role != SYSTEM) listOf(Turn(SYSTEM, system)) + turns else turns
        var merged = false
        return buildString {
            append(prompts.begin)
            for (turn in all) {
                val speaker = prompts.roles.getValue(turn.role)
                if (!merged) append(speaker.prefix)
                append(if (turn.role in prompts.strip) strip(turn.text) else turn.text).append(speaker.suffix)
                merged = prompts.systemOpensUser && turn.role == SYSTEM
            }
            append(if (open) prompts.opening else prompts.closing)
        }
    }

    private fun check(turns: List<Turn>) {
        val hint = "the model's chat template knows no other; give a complete prompt to generate()"
        turns.firstOrNull { it.role !in prompts.roles }?.let {
            throw LimeError.Invalid("conversation", listOf(Fault("role", prompts.roles.keys.joinToString(" or "), it.role)), hint)
        }
        val spoken = if (turns.firstOrNull()?.role == SYSTEM) turns.drop(1) else turns
        val inTurn = spoken.indices.all { spoken[it].role == if (it % 2 == 0) "user" else "assistant" }
        if (turns.isEmpty() || prompts.alternating && (spoken.isEmpty() || !inTurn)) {
            val found = turns.joinToString(", ") { it.role }.ifEmpty { "nothing" }
            throw LimeError.Invalid("conversation", listOf(Fault("order", "a system turn or none, then user and assistant in turn", found)), hint)
        }
    }

    /** As Python's str.strip does. */
    private fun strip(text: String) = text.trim { it in STRIPPED }

    public companion object {
        private const val SYSTEM = "system"
        private val STRIPPED = "\t\n\u000B\u000C\r\u001C\u001D\u001E\u001F \u0085\u00A0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200A\u2028\u2029\u202F\u205F\u3000".toSet()

        /** @throws LimeError.Unsupported the template could not be reduced, or there is none: give complete prompts. */
        public fun of(bundle: LimeBundle): ChatFormat {
            val prompts = bundle.manifest.prompts
            if (prompts == null || prompts.roles.isEmpty()) {
                throw LimeError.Unsupported(bundle.folder.path, "no chat: ${prompts?.reason ?: "the model has no chat template"}", "give complete prompts to generate()")
            }
            return ChatFormat(prompts)
        }
    }
}

/**
 * A conversation with its history.
 *
 * What the cache already holds of it is not computed again. When it grows beyond the cache, the oldest turns are left out
 * (a system turn stays): [forgotten] counts them.
 *
 * @property session switch its expert between two turns as you like.
 */
public class Conversation(public val session: LimeSession, system: String? = null) {
    private val format = ChatFormat.of(session.bundle)
    private val history = ArrayList<Turn>().apply { if (system != null) add(Turn("system", system)) }

    /** Everything said so far. */
    public val turns: List<Turn> get() = history.toList()

    /** Turns that the last prompt left out because the cache is full. */
    public var forgotten: Int = 0
        private set

    /**
     * Say something and stream the answer; both join the history when the answer has ended, also where its collector was
     * cancelled (then what was given of it).
     *
     * @throws LimeError.Full not even this turn fits. @throws LimeError as [LimeSession.generate].
     */
    public fun say(text: String, options: GenerationOptions = GenerationOptions()): Flow<String> = flow {
        val said = Turn("user", text)
        val prompt = fit(history + said, options.maxNewTokens)
        val answer = StringBuilder()
        try {
            session.generate(prompt, options, keepCache = true).collect { piece ->
                answer.append(piece)
                emit(piece)
            }
        } finally {
            if (answer.isNotEmpty()) history += listOf(said, Turn("assistant", answer.toString()))
        }
    }

    /** Forget everything but the system turn. */
    public fun clear() {
        history.removeAll { it.role != "system" }
        forgotten = 0
    }

    /** The prompt of as many of the last turns as fit, with room for an answer. */
    private fun fit(turns: List<Turn>, room: Int): String {
        val system = turns.takeWhile { it.role == "system" }
        var rest = turns.drop(system.size)
        forgotten = 0
        while (true) {
            val prompt = format.render(system + rest)
            val tokens = session.tokenizer.encode(prompt).size
            if (tokens + minOf(room, session.maxLength / 2) <= session.maxLength || rest.size <= 1) return prompt
            val dropped = if (rest[1].role == "assistant") 2 else 1
            forgotten += dropped
            rest = rest.drop(dropped)
        }
    }
}
