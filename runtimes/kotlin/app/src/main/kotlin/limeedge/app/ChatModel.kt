package limeedge.app

import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.Job
import kotlinx.coroutines.cancelAndJoin
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import kotlinx.coroutines.flow.update
import kotlinx.coroutines.launch
import kotlinx.coroutines.sync.Mutex
import kotlinx.coroutines.sync.withLock
import limeedge.ChatFormat
import limeedge.Conversation
import limeedge.FinishReason
import limeedge.GenerationOptions
import limeedge.LimeError
import limeedge.LimeSession
import limeedge.Request
import limeedge.Selection
import limeedge.Turn
import java.io.File

/** A line of the chat: who said it, under which skill, and whether it is still being written. */
public data class Line(val fromUser: Boolean, val text: String, val skill: String = "", val isOpen: Boolean = false)

/**
 * What the chat's screen shows.
 *
 * @property skills chips, in order: experts, then none and routed where the bundle has them. @property selected the chip in use.
 * @property notice an error or a note, to be shown until the next action.
 */
public data class ChatState(
    val skills: List<String> = emptyList(),
    val selected: String = "",
    val lines: List<Line> = emptyList(),
    val isBusy: Boolean = false,
    val notice: String? = null,
)

/** The chat without its screen: one session, its conversation, skills as chips. Every call returns at once; [state] tells the rest. */
public class ChatModel(private val session: LimeSession, private val scope: CoroutineScope, private val options: GenerationOptions = GenerationOptions()) {
    private val conversation = Conversation(session)
    private val mutable = MutableStateFlow(ChatState(listSkills(), "${session.selection}"))
    private val turn = Mutex() // the session takes one call at a time
    private var job: Job? = null

    /** What to show. */
    public val state: StateFlow<ChatState> = mutable.asStateFlow()

    private fun listSkills(): List<String> {
        val manifest = session.bundle.manifest
        val canBeOff = !manifest.alwaysOn && manifest.single == null
        return session.experts + listOfNotNull("none".takeIf { canBeOff }, "routed".takeIf { manifest.targets.any { it.routed != null } })
    }

    /** Switch to a chip; an answer that is being written ends first. */
    public fun select(skill: String): Job = act {
        session.use(skill)
        mutable.update { it.copy(selected = "${session.selection}") }
    }

    /** Say something; the answer grows in [state]. */
    public fun say(text: String): Job = act {
        if (text.isBlank()) return@act
        mutable.update { it.copy(lines = it.lines + Line(true, text) + Line(false, "", "${session.selection}", isOpen = true)) }
        val answer = state.value.lines.size - 1
        try {
            conversation.say(text, options).collect { piece -> change(answer) { it.copy(text = it.text + piece) } }
            val cut = session.finishReason.takeIf { it != FinishReason.STOP }?.let { if (it == FinishReason.LENGTH) "cut after ${options.maxNewTokens} tokens" else "the cache is full" }
            val forgot = conversation.forgotten.takeIf { it > 0 }?.let { "the oldest $it turns were left out" }
            mutable.update { it.copy(notice = listOfNotNull(cut, forgot).joinToString("; ").ifEmpty { null }) }
        } finally {
            change(answer) { it.copy(isOpen = false) }
        }
    }

    /** One text to every skill, all in one pass; the conversation is not touched. */
    public fun askAll(text: String): Job = act {
        val prompt = ChatFormat.of(session.bundle).render(listOf(Turn("user", text)))
        val skills = session.experts
        val first = state.value.lines.size
        mutable.update { it.copy(lines = it.lines + skills.map { skill -> Line(false, "", skill, isOpen = true) }) }
        try {
            session.generateMany(skills.map { Request(prompt, Selection.Expert(it)) }, options, memory = ROWS_BYTES).collect { answer ->
                change(first + answer.row) { it.copy(text = it.text + answer.piece, isOpen = answer.end == null) }
            }
        } finally {
            for (row in skills.indices) change(first + row) { it.copy(isOpen = false) }
        }
    }

    /** Add a skill file; its chip appears. */
    public fun install(file: File): Job = act {
        val name = session.install(file)
        mutable.update { it.copy(skills = listSkills(), notice = "$name was added") }
    }

    /** End the answer that is being written. */
    public fun stop() {
        job?.cancel()
    }

    /** Forget the conversation. */
    public fun clear(): Job = act {
        conversation.clear()
        session.reset()
        mutable.update { it.copy(lines = emptyList()) }
    }

    /** One action after another: a new one ends the one that runs. */
    private fun act(action: suspend () -> Unit): Job {
        val before = job
        return scope.launch {
            before?.cancelAndJoin()
            turn.withLock {
                mutable.update { it.copy(isBusy = true, notice = null) }
                try {
                    action()
                } catch (error: CancellationException) {
                    throw error
                } catch (error: LimeError) {
                    mutable.update { it.copy(notice = error.message) }
                } finally {
                    mutable.update { it.copy(isBusy = false) }
                }
            }
        }.also { job = it }
    }

    /** Change one line, if it is still there. */
    private fun change(at: Int, edit: (Line) -> Line) = mutable.update { state ->
        state.copy(lines = state.lines.mapIndexed { place, line -> if (place == at) edit(line) else line })
    }

    private companion object {
        private const val ROWS_BYTES = 512L shl 20 // of the caches of all skills that answer at once; the others wait
    }
}
