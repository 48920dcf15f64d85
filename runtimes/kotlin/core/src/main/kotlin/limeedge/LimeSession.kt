package limeedge

import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.CoroutineDispatcher
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.async
import kotlinx.coroutines.coroutineScope
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.flow
import java.nio.FloatBuffer

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
    private val held = SequenceCache(engine)
    private val header = bundle.manifest.activation.tokens // the expert acts on a prompt's last ones; 0: on all
    private var turn = 0
    private var disturber = ""

    /** Why the last generation ended; null before the first and where one was left before its end. */
    @Volatile
    public var finishReason: FinishReason? = null
        private set

    /** Tokens that the cache holds. */
    public val maxLength: Int get() = engine.capacity

    /** Who filled the cache, in order. */
    public val cache: List<Segment> get() = held.segments

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
        if (!keepCache && !held.isFilledBy("${this.selection}")) {
            disturb("use")
            held.rewind(held.common)
        }
    }

    override fun changed(by: String) {
        disturb(by)
        held.rewind(0)
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
        val array = checkIds(ids)
        checkRoom(array.size, keep)
        pieces(array, 0).flatMap { feed(array, it, if (keep == 0) array.size else keep, null) }
    }

    /** Logits of tokens appended to what the cache holds; see [logits]. */
    public fun extend(ids: IntArray, keep: Int = 1): List<FloatArray> = exclusively {
        disturb("extend")
        append(checkIds(ids), keep)
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

    /**
     * Answer many requests in one pass, each under an expert of its own.
     *
     * Rows start, end and are refilled while others go on; a long prompt is read in pieces between their steps; a beginning that
     * requests share under the same expert is read once. Row for row the answers are those of a session of its own (in a
     * quantized bundle the number of rows may tip a token that is about as likely as another). The session's own cache and
     * selection play no part: a row keeps the expert it began with. The flow is cold, as [generate]'s.
     *
     * @param options for all that have none of their own. @param rows at most this many run at once, the others wait. @param
     *   memory bytes that the caches of all rows may take, or null.
     * @throws LimeError while collecting, before anything is computed: a request that is wrong or does not fit, by its number.
     *   @throws LimeError.Unsupported an engine that runs one sequence at a time.
     */
    public fun generateMany(
        requests: List<Request>, options: GenerationOptions = GenerationOptions(), rows: Int = MOST_ROWS, memory: Long? = null,
    ): Flow<Answer> = flow {
        val streams = requests.map { TextStream(tokenizer::decode, (it.options ?: options).stop) }
        runMany(requests, options, rows, memory) { event ->
            val stream = streams[event.number]
            val piece = if (event.token == null) stream.finish() else stream.push(event.token)
            val end = if (stream.stopped) FinishReason.STOP else event.end
            if (piece.isNotEmpty() || end != null) emit(Answer(event.number, piece, emptyList(), end, event.error))
            stream.stopped
        }
    }

    /** As [generateMany], but token ids, stop strings left out of account; needs no tokenizer for ids. */
    public fun generateManyIds(
        requests: List<Request>, options: GenerationOptions = GenerationOptions(), rows: Int = MOST_ROWS, memory: Long? = null,
    ): Flow<Answer> = flow {
        runMany(requests, options, rows, memory) { event ->
            emit(Answer(event.number, "", listOfNotNull(event.token), event.end, event.error))
            false
        }
    }

    /** @param give takes an event; true where its request has ended early. */
    private suspend fun runMany(
        requests: List<Request>, options: GenerationOptions, rows: Int, memory: Long?, give: suspend (Event) -> Boolean,
    ) {
        exclusively { openBatch(requests, options, rows, memory) }.use { batch ->
            val stopped = HashSet<Int>()
            while (batch.isBusy) {
                for (event in step { interruption -> guardEngine { batch.advance(interruption) } }) {
                    if (event.number in stopped || !give(event)) continue // what came of it in the same pass is not its answer any more
                    stopped += event.number
                    batch.stop(event.number)
                }
            }
        }
    }

    private fun openBatch(requests: List<Request>, options: GenerationOptions, rows: Int, memory: Long?): Batch {
        if (requests.isEmpty()) throw LimeError.Invalid("generateMany", "no requests", "give at least one")
        if (rows < 1) throw LimeError.Invalid("generateMany", listOf(Fault("rows", "at least 1", "$rows")), "leave it out for $MOST_ROWS")
        val orders = requests.mapIndexed { number, request -> makeOrder(request, number, request.options ?: options) }
        val needed = orders.maxOf { it.ids.size + it.most - 1 }
        val each = engine.rowBytes(needed)
        if (each == 0L) throw LimeError.Unsupported(facts.name, "this engine runs one sequence at a time", "ask one after another")
        if (memory != null && each > memory) {
            throw LimeError.Invalid("generateMany", listOf(Fault("memory: bytes for one row of $needed tokens", "at least $each", "$memory")), "allow more")
        }
        val count = minOf(rows.toLong(), requests.size.toLong(), if (memory == null) Long.MAX_VALUE else memory / each).toInt()
        return Batch(guardEngine { engine.openRows(count, needed) }, orders)
    }

    private fun makeOrder(request: Request, number: Int, options: GenerationOptions): Order {
        try {
            val ids = checkIds(request.ids ?: tokenizer.encode(request.text!!))
            val silent = countSilent(ids.size)
            val room = engine.capacity - ids.size
            if (room < 1) throw full("the prompt has ${ids.size}")
            return Order(
                number, ids, read(request.selection), Sampler(options), minOf(options.maxNewTokens, room),
                if (options.maxNewTokens <= room) FinishReason.LENGTH else FinishReason.CACHE,
                if (options.ignoreEos) emptySet() else bundle.manifest.decoder!!.eos, silent, if (silent > 0) read(Selection.None) else null,
            )
        } catch (error: LimeError) {
            throw LimeError.Invalid("request $number: ${error.where}", error.faults, error.hint)
        }
    }

    private fun read(selection: Selection) =
        Reader(find(selection)?.let { residual -> FloatArray(residual.remaining()).also { residual.duplicate().get(it) } }, selection)

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
                append(longArrayOf(token.toLong()), 1)[0]
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
        held.rewind(countKept(array, keepCache))
        return Plan(array, turn, minOf(options.maxNewTokens, room))
    }

    private fun finish(reason: FinishReason) {
        finishReason = reason
    }

    /** Feed what the cache lacks of a prompt, piece by piece; the last position's logits. */
    private suspend fun feedPrompt(plan: Plan): FloatArray {
        var last = FloatArray(0)
        for (piece in pieces(plan.prompt, held.size)) {
            last = step { interruption ->
                checkTurn(plan.turn)
                feed(plan.prompt, piece, 1, interruption).lastOrNull() ?: last
            }
        }
        return last
    }

    /**
     * One call of the engine on the session's dispatcher. A cancelled caller waits until the call has ended, which
     * [Interruption] makes soon: so a session is free as soon as its generation's job has completed.
     */
    private suspend fun <T> step(call: (Interruption) -> T): T = coroutineScope {
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

    /** Tokens of a prompt that the original model reads: all but the last ones where the expert acts from there on. */
    private fun countSilent(count: Int) = if (header > 0) maxOf(0, count - header) else 0

    /**
     * Tokens of a prompt that need not be read again.
     *
     * What the original model read is kept without being asked for: it is the same for every expert. Two tokens at least
     * are left to read, for a call of one may round otherwise; and routing must see all of its own in one call.
     */
    private fun countKept(prompt: LongArray, keepCache: Boolean): Int {
        val silent = countSilent(prompt.size)
        var kept = held.countKept(prompt) { if (it < silent) NONE else "$selection" }
        if (!keepCache) kept = minOf(kept, silent, held.common) else if (selection == Selection.Routed) kept = minOf(kept, silent)
        kept = minOf(kept, maxOf(silent, prompt.size - 2))
        return if (kept in 1 until silent && kept == silent - 1) kept - 1 else kept
    }

    /** A stretch of a prompt that is one call, and whether the original model reads it. */
    private class Piece(val start: Int, val stop: Int, val isSilent: Boolean)

    private fun pieces(prompt: LongArray, start: Int): List<Piece> {
        val silent = countSilent(prompt.size)
        val chunk = minOf(CHUNK, facts.promptLength ?: CHUNK)
        fun cut(from: Int, to: Int, isSilent: Boolean): List<Piece> {
            val stops = if (!isSilent && selection == Selection.Routed) listOf(to - from) else planChunks(from, to - from, chunk)
            return stops.mapIndexed { index, stop -> Piece(from + (if (index == 0) 0 else stops[index - 1]), from + stop, isSilent) }
        }
        return (if (start < silent) cut(start, silent, true) else emptyList()) + cut(maxOf(start, silent), prompt.size, false)
    }

    /** One piece of a prompt; rows of the prompt's last [keep] positions that lie in it. */
    private fun feed(prompt: LongArray, piece: Piece, keep: Int, interruption: Interruption?): List<FloatArray> {
        val wanted = piece.stop - maxOf(piece.start, prompt.size - keep)
        val ids = prompt.copyOfRange(piece.start, piece.stop)
        if (!piece.isSilent) return call(ids, wanted, "$selection", interruption)
        val chosen = selection
        try {
            apply(Selection.None)
            return call(ids, wanted, NONE, interruption).also { held.share(piece.start, piece.stop) }
        } finally {
            apply(chosen)
        }
    }

    /** Append tokens under the selection; logits of the last [keep] positions of this call (0: all). */
    private fun append(array: LongArray, keep: Int): List<FloatArray> {
        checkRoom(array.size, keep)
        if (selection == Selection.Routed && held.size > 0 && array.size > 1 && header == 0) {
            throw LimeError.Invalid("routed", "${array.size} tokens after a cache of ${held.size}", "a routed prompt is run in one call, then token by token")
        }
        val first = if (keep == 0) 0 else maxOf(0, array.size - keep)
        val stops = if (selection == Selection.Routed) listOf(array.size) else planChunks(held.size, array.size, minOf(CHUNK, facts.promptLength ?: CHUNK))
        var start = 0
        return stops.flatMap { stop ->
            call(array.copyOfRange(start, stop), stop - maxOf(start, first), "$selection", null).also { start = stop }
        }
    }

    /** One call of the engine; its last [wanted] rows, none where that is not positive. */
    private fun call(piece: LongArray, wanted: Int, filler: String, interruption: Interruption?): List<FloatArray> {
        val logits = guardEngine { held.feed(piece, maxOf(wanted, 1), filler, interruption) }
        return if (wanted > 0) copyRows(logits, wanted) else emptyList()
    }

    private fun checkRoom(count: Int, keep: Int) {
        if (keep < 0) throw LimeError.Invalid("keep", listOf(Fault("positions", "0 or more", "$keep")), "0 keeps the logits of every position")
        if (count > engine.capacity - held.size) throw full("${count + held.size} are needed")
    }

    private fun copyRows(logits: FloatBuffer, count: Int): List<FloatArray> {
        val view = logits.duplicate()
        val width = view.remaining() / count
        return List(count) { FloatArray(width).also { row -> view.get(row) } }
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

    public companion object {
        internal const val CHUNK: Int = 512 // prompt tokens fed at once: bounds the memory of a long prompt
        private const val MOST_ROWS = 16
        private const val NONE = "none"

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
