package limeedge

import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.flow

/** One turn of a conversation: who speaks (system, user, assistant), and what. */
public data class Turn(val role: String, val text: String)

/** Writes conversations as the model was taught them: the bundle's chat template, reduced to what stands around each turn. */
public class ChatFormat private constructor(private val prompts: Prompts) {
    /** Roles that may speak. */
    public val roles: Set<String> get() = prompts.roles.keys

    /**
     * The text of a conversation, with the assistant's turn opened.
     *
     * @throws LimeError.Invalid a role that the template does not know.
     */
    public fun render(turns: List<Turn>): String = buildString {
        append(prompts.begin)
        val system = prompts.defaultSystem
        val all = if (system != null && turns.firstOrNull()?.role != "system") listOf(Turn("system", system)) + turns else turns
        for (turn in all) {
            val speaker = prompts.roles[turn.role]
                ?: throw LimeError.Invalid("conversation", listOf(Fault("role", prompts.roles.keys.joinToString(" or "), turn.role)), "the model's chat template knows no other")
            append(speaker.prefix).append(if (turn.role in prompts.strip) strip(turn.text) else turn.text).append(speaker.suffix)
        }
        append(prompts.opening)
    }

    /** As Python's str.strip: all that Unicode calls white space, and the four separators of ASCII. */
    private fun strip(text: String) = text.trim { it.isWhitespace() || it in '\u001C'..'\u001F' || it == '\u0085' }

    public companion object {
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
