package limeedge

import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.CoroutineDispatcher
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.async
import kotlinx.coroutines.coroutineScope
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.flow
import java.nio.FloatBuffer

/** A stretch of the cache: which selection filled it, and its number of tokens. */
public data class Segment(val selection: String, val tokens: Int)

/**
 * An opened language model on one target.
 *
 * A cache belongs to the expert that filled it. [use] starts a new cache when the selection changes, unless
 * `keepCache` is true; [cache] tells who filled what. Where the adapter acts from the generation prompt on
 * (`manifest.activation`), the original model reads what lies before it, and that part stays over a switch.
 *
 * One generation at a time: whatever changes cache or expert under a running one ends it with [LimeError.Misused] at its next
 * token, never with an answer that is half another's. One call at a time; sessions share nothing but mapped weights.
 */
public class LimeSession private constructor(
    bundle: LimeBundle,
    private val engine: DecoderEngine,
    facts: TargetFacts,
    private val dispatcher: CoroutineDispatcher,
) : ExpertSwitch(bundle, engine, facts) {
    private val ids = ArrayList<Long>()
    private val segments = ArrayList<Segment>()
    private var turn = 0
    private var disturber = ""

    /** Why the last generation ended; null before the first and where one was left before its end. */
    @Volatile
    public var finishReason: FinishReason? = null
        private set

    /** Tokens that the cache holds. */
    public val maxLength: Int get() = engine.capacity

    /** Who filled the cache, in order. */
    public val cache: List<Segment> get() = segments.toList()

    /** The bundle's tokenizer, read when first needed. @throws LimeError.Unsupported a kind that this library does not know. */
    public val tokenizer: Tokenizer by lazy { TokenizerReader.read(bundle) }

    override fun use(selection: Selection): Unit = use(selection, keepCache = false)

    /**
     * Switch the expert; nothing is reloaded ("routed" loads its graph once).
     *
     * @param keepCache keep what another expert wrote into the cache (then it is a mixture, and [cache] says so).
     * @throws LimeError as [ExpertSwitch.use].
     */
    public fun use(selection: Selection, keepCache: Boolean): Unit = exclusively {
        val before = this.selection
        apply(selection)
        if (this.selection != before) disturb("use")
        if (!keepCache && segments.any { it.selection != "${this.selection}" }) changed("use")
    }

    override fun changed(by: String) {
        disturb(by)
        rewind(0)
    }

    /** Start a new cache. */
    public fun reset(): Unit = exclusively { changed("reset") }

    /**
     * Logits of a sequence of its own (a new cache).
     *
     * @param ids (S,) token ids. @param keep only the last [keep] positions, 0 for all.
     * @return a row of (V,) logits for every position kept.
     * @throws LimeError.Invalid ids out of range. @throws LimeError.Full no room. @throws LimeError.Engine the engine.
     */
    public fun logits(ids: IntArray, keep: Int = 0): List<FloatArray> = exclusively {
        changed("logits")
        feedBlocking(checkIds(ids), keep)
    }

    /** Logits of tokens appended to what the cache holds; see [logits]. */
    public fun extend(ids: IntArray, keep: Int = 1): List<FloatArray> = exclusively {
        disturb("extend")
        feedBlocking(checkIds(ids), keep)
    }

    /**
     * Stream the answer to a complete prompt (chat template applied), piece by piece.
     *
     * The flow is cold and never runs ahead: the model runs on the session's dispatcher when the collector asks for the next
     * piece. Cancelling the collector stops it at once, and when its job has completed, the session is free.
     *
     * @param keepCache keep the longest prefix that the cache already holds.
     * @throws LimeError while collecting: see [logits]; [LimeError.Misused] where another call disturbed it.
     */
    public fun generate(prompt: String, options: GenerationOptions = GenerationOptions(), keepCache: Boolean = false): Flow<String> = flow {
        val stream = TextStream(tokenizer::decode, options.stop)
        run(tokenizer.encode(prompt), options, keepCache, { stream.stopped }) { token ->
            stream.push(token).let { if (it.isNotEmpty()) emit(it) }
        }
        stream.finish().let { if (it.isNotEmpty()) emit(it) }
    }

    /** As [generate], from token ids to token ids: needs no tokenizer. */
    public fun generateIds(prompt: IntArray, options: GenerationOptions = GenerationOptions(), keepCache: Boolean = false): Flow<Int> = flow {
        run(prompt, options, keepCache, { false }) { emit(it) }
    }

    /** One generation. */
    private suspend fun run(
        prompt: IntArray, options: GenerationOptions, keepCache: Boolean, stopped: () -> Boolean, give: suspend (Int) -> Unit,
    ) {
        val sampler = Sampler(options)
        val plan = exclusively { plan(prompt, options, keepCache) }
        var logits = feedPrompt(plan)
        var count = 0
        while (true) {
            val token = sampler.pick(logits)
            if (!options.ignoreEos && token in bundle.manifest.decoder!!.eos) return finish(FinishReason.STOP)
            count++
            give(token)
            exclusively { checkTurn(plan.turn) }
            if (stopped()) return finish(FinishReason.STOP)
            if (count == plan.limit) return finish(if (plan.limit < options.maxNewTokens) FinishReason.CACHE else FinishReason.LENGTH)
            logits = step {
                checkTurn(plan.turn)
                feedBlocking(longArrayOf(token.toLong()), 1)[0]
            }
        }
    }

    /** What a generation is to do: its prompt, its number among what changes the session, its tokens at most. */
    private class Plan(val prompt: LongArray, val turn: Int, val limit: Int)

    private fun plan(prompt: IntArray, options: GenerationOptions, keepCache: Boolean): Plan {
        val array = checkIds(prompt)
        val room = engine.capacity - array.size
        if (room < 1) throw full("the prompt has ${array.size}")
        val turn = disturb("another generation")
        finishReason = null
        rewind(if (keepCache && selection != Selection.Routed) sharedPrefix(array) else 0)
        return Plan(array, turn, minOf(options.maxNewTokens, room))
    }

    private fun finish(reason: FinishReason) {
        finishReason = reason
    }

    /** Feed what the cache lacks of a prompt, piece by piece; the last position's logits. */
    private suspend fun feedPrompt(plan: Plan): FloatArray {
        val prompt = plan.prompt
        var last = FloatArray(0)
        while (ids.size < prompt.size) {
            last = step { interruption ->
                checkTurn(plan.turn)
                val stop = planChunks(ids.size, prompt.size - ids.size).first()
                copyRows(feedPiece(prompt.copyOfRange(ids.size, ids.size + stop), 1, interruption), 1)[0]
            }
        }
        return last
    }

    /**
     * One call of the engine on the session's dispatcher. A cancelled caller waits until the call has ended, which
     * [Interruption] makes soon: so a session is free as soon as its generation's job has completed.
     */
    private suspend fun step(call: (Interruption) -> FloatArray): FloatArray = coroutineScope {
        val interruption = Interruption()
        val work = async(dispatcher) { exclusively { call(interruption) } }
        try {
            work.await()
        } catch (error: CancellationException) {
            interruption.interrupt()
            throw error
        }
    }

    // the cache

    private fun disturb(by: String): Int {
        disturber = by
        return ++turn
    }

    private fun checkTurn(mine: Int) {
        if (turn != mine) {
            throw LimeError.Misused(
                "generation", "disturbed by $disturber: cache or expert are no longer its own",
                "let it end, or cancel it, before the session is used otherwise; a second session runs beside it",
            )
        }
    }

    private fun rewind(length: Int) {
        engine.rewind(length)
        while (ids.size > length) ids.removeAt(ids.size - 1)
        var left = length
        val kept = segments.mapNotNull { segment ->
            val tokens = minOf(segment.tokens, left)
            left -= tokens
            if (tokens > 0) Segment(segment.selection, tokens) else null
        }
        segments.clear()
        segments += kept
    }

    /** Tokens that the cache already holds; at least two are left to feed, for a call of one may round otherwise. */
    private fun sharedPrefix(prompt: LongArray): Int {
        val most = minOf(ids.size, maxOf(prompt.size - 2, 0))
        return (0 until most).firstOrNull { ids[it] != prompt[it] } ?: most
    }

    /** Append tokens; logits of the last [keep] positions of this call (0: all). */
    private fun feedBlocking(array: LongArray, keep: Int): List<FloatArray> {
        if (keep < 0) throw LimeError.Invalid("keep", listOf(Fault("positions", "0 or more", "$keep")), "0 keeps the logits of every position")
        if (array.size > engine.capacity - ids.size) throw full("${array.size + ids.size} are needed")
        val first = if (keep == 0) 0 else maxOf(0, array.size - keep)
        val rows = ArrayList<FloatArray>()
        var start = 0
        for (stop in planChunks(ids.size, array.size)) {
            val wanted = stop - maxOf(start, first)
            val logits = feedPiece(array.copyOfRange(start, stop), maxOf(wanted, 1), null)
            if (wanted > 0) rows += copyRows(logits, wanted)
            start = stop
        }
        return rows
    }

    /** One call of the engine; what the session knows of the cache changes with it, or not at all. */
    private fun feedPiece(piece: LongArray, keep: Int, interruption: Interruption?): FloatBuffer {
        if (selection == Selection.Routed && ids.isNotEmpty() && piece.size > 1) {
            throw LimeError.Invalid("routed", "${piece.size} tokens after a cache of ${ids.size}", "a routed prompt is run in one call, then token by token")
        }
        val logits = try {
            guardEngine { engine.feed(piece, keep, interruption) }
        } catch (error: LimeError) {
            engine.rewind(ids.size)
            throw error
        }
        piece.forEach { ids.add(it) }
        note(piece.size)
        return logits
    }

    private fun copyRows(logits: FloatBuffer, count: Int): List<FloatArray> {
        val view = logits.duplicate()
        val width = view.remaining() / count
        return List(count) { FloatArray(width).also { row -> view.get(row) } }
    }

    private fun note(tokens: Int) {
        val name = "$selection"
        val last = segments.lastOrNull()
        if (last?.selection == name) segments[segments.size - 1] = Segment(name, last.tokens + tokens) else segments += Segment(name, tokens)
    }

    private fun checkIds(given: IntArray): LongArray {
        val vocab = bundle.manifest.vocab
        if (given.isEmpty()) throw LimeError.Invalid("token ids", "none", "give at least one")
        if (given.any { it < 0 || it >= vocab }) {
            throw LimeError.Invalid("token ids", listOf(Fault("range", "0..${vocab - 1}", "${given.min()}..${given.max()}")), "they come from another tokenizer?")
        }
        return LongArray(given.size) { given[it].toLong() }
    }

    private fun full(needed: String) =
        LimeError.Full(bundle.folder.path, "the cache holds ${engine.capacity} tokens, $needed", "shorten the prompt, or open the session with a larger maxLength")

    /** Where to cut tokens that follow [held]: see [limeedge.planChunks]; a routed prompt is one piece. */
    private fun planChunks(held: Int, count: Int): List<Int> =
        if (selection == Selection.Routed) listOf(count) else limeedge.planChunks(held, count, minOf(CHUNK, facts.promptLength ?: CHUNK))

    public companion object {
        private const val CHUNK = 512

        /**
         * Load a language model.
         *
         * @param engines `OnnxEngines()` or another factory. @param dispatcher where generations run.
         * @throws LimeError.Missing the bundle was not exported for that engine. @throws LimeError.Invalid it holds an encoder.
         */
        public fun open(
            bundle: LimeBundle, engines: EngineFactory, options: SessionOptions = SessionOptions(), dispatcher: CoroutineDispatcher = Dispatchers.Default,
        ): LimeSession {
            if (bundle.manifest.decoder == null) {
                throw LimeError.Invalid(bundle.folder.path, "holds an encoder: it answers no prompts", "open it with EncoderSession.open")
            }
            if (bundle.manifest.activation.tokens > 0) {
                throw LimeError.Unsupported(bundle.folder.path, "an adapter that acts from the generation prompt on", "export one that acts always")
            }
            val facts = findTarget(bundle, engines)
            return LimeSession(bundle, engines.openDecoder(bundle, options), facts, dispatcher).also { it.begin() }
        }
    }
}

/** The target of an engine in a bundle, its large files checked. */
internal fun findTarget(bundle: LimeBundle, engines: EngineFactory): TargetFacts {
    val facts = bundle.manifest.targets.firstOrNull { it.name == engines.target } ?: throw LimeError.Missing(
        bundle.folder.path, "holds no ${engines.target} artifact", "it holds ${bundle.manifest.targets.joinToString(", ") { it.name }}",
    )
    bundle.checkLarge("${engines.target}/")
    return facts
}

/**
 * Where to cut [count] tokens that follow [held]: at multiples of [chunk] in the cache, whatever is held already.
 *
 * So a prompt is cut alike whether or not its beginning was kept. No piece is a single token where there are two: engines
 * run one row in other products than many, and in a quantized bundle the two round differently.
 *
 * @return the end of each piece, the last one [count].
 */
internal fun planChunks(held: Int, count: Int, chunk: Int): List<Int> {
    val stops = ArrayList<Int>()
    var start = 0
    while (start < count) {
        var stop = minOf(count, (held + start) / chunk * chunk + chunk - held)
        while (stop < count && (stop - start == 1 || count - stop == 1)) stop++
        stops += stop
        start = stop
    }
    return stops
}
