package limeedge

import java.io.Closeable
import java.io.File
import java.nio.FloatBuffer
import java.util.concurrent.locks.ReentrantLock

/**
 * The experts of an opened bundle on one target, and which of them is in use.
 *
 * "routed" mixes the experts of the checkpoint: that bank is frozen in the artifact, and experts installed later are pinned
 * or blended, never routed to. One call at a time: a second thread that comes while a call runs is refused.
 */
public sealed class ExpertSwitch(
    /** The bundle that was opened. */
    public val bundle: LimeBundle,
    private val engine: SwitchableEngine,
    internal val facts: TargetFacts,
) : Closeable {
    private val bank = ExpertBank(bundle)
    private val lock = ReentrantLock()
    private var closed = false

    /** What is in use. */
    public var selection: Selection = Selection.None
        private set

    /** Names of the installed experts. */
    public val experts: List<String> get() = bank.names

    /** What the model runs on, as the engine names it. */
    public val provider: String get() = engine.provider

    /** Whether the graph's functions run as compiled operators; null where the engine knows none. */
    public val operators: Boolean? get() = engine.operators

    /** Apply what the bundle opens with; called once by each session. */
    internal fun begin() {
        try {
            val single = bundle.manifest.single
            apply(if (single != null) Selection.Expert(single) else Selection.parse(bundle.manifest.default))
        } catch (error: LimeError) {
            engine.close()
            throw error
        }
    }

    /**
     * Switch the expert; nothing is reloaded ("routed" loads its graph once).
     *
     * @throws LimeError.Invalid unknown name, bad weights, a bundle of a single expert, one without routing, or `None` for a
     *   variant that cannot be switched off. @throws LimeError.Damaged the expert's file.
     */
    public open fun use(selection: Selection): Unit = exclusively { apply(selection) }

    /** Switch to an expert by its name; also `none` and `routed`, and a blend as typed. */
    public fun use(selection: String): Unit = use(Selection.parse(selection))

    /** Switch to a blend: weights that sum to 1. */
    public fun use(weights: Map<String, Double>): Unit = use(Selection.Blend(LinkedHashMap(weights)))

    internal fun apply(wanted: Selection) {
        val residual = find(wanted)
        if (bundle.manifest.single == null) guardEngine { if (residual == null) engine.setRouted() else engine.setExpert(residual) }
        selection = wanted
    }

    /**
     * d = p - p_ref of a selection, (sum_H,) float32, until other selections are asked for; null for routing, empty in a
     * bundle of a single expert.
     *
     * @throws LimeError.Invalid the bundle cannot run it. @throws LimeError.Damaged an expert's file.
     */
    internal fun find(wanted: Selection): FloatBuffer? {
        val manifest = bundle.manifest
        val where = bundle.folder.path
        return when {
            manifest.single != null -> {
                if (wanted == Selection.Expert(manifest.single)) return directFloats(0)
                throw LimeError.Invalid(where, "holds '${manifest.single}' alone (--single), asked for '$wanted'", "export it without --single")
            }
            wanted == Selection.Routed -> {
                if (facts.routed != null) return null
                throw LimeError.Invalid(where, "has no routed graph", "pick an expert, a blend or none")
            }
            wanted == Selection.None && manifest.alwaysOn -> throw LimeError.Invalid(
                where, "a ${manifest.variant} adapter cannot be switched off: no expert vector gives the original model", "pick an expert or a blend",
            )
            else -> bank.residual(wanted)
        }
    }

    /**
     * Add an expert file while running. Nothing is written; routing does not know it.
     *
     * @param name another name than the file's. @return its name.
     * @throws LimeError.Damaged the file. @throws LimeError.Foreign made for another shared adapter.
     * @throws LimeError.Invalid a bad name, or a bundle of a single expert.
     */
    public fun install(file: File, name: String? = null): String = exclusively {
        var expert = Expert.read(file)
        if (name != null) {
            Names.checkExpert(name)?.let { throw LimeError.Invalid("name", it, "pick another one") }
            expert = expert.renamed(name)
        }
        val clash = experts.firstOrNull { it != expert.name && it.equals(expert.name, ignoreCase = true) }
        if (clash != null) throw LimeError.Invalid(file.path, "'${expert.name}' and '$clash' differ by letter case only", "pick another name")
        bundle.manifest.single?.let { throw LimeError.Invalid(bundle.folder.path, "holds '$it' alone (--single)", "export it without --single") }
        bank.install(expert, file.path)
        if (uses(expert.name)) {
            changed("install")
            apply(selection)
        }
        expert.name
    }

    /** Forget an installed expert. @throws LimeError.Invalid unknown, or in use. */
    public fun remove(name: String): Unit = exclusively {
        if (uses(name)) throw LimeError.Invalid(bundle.folder.path, "expert '$name' is in use", "switch to another one first")
        bank.remove(name)
    }

    private fun uses(name: String) = when (val used = selection) {
        is Selection.Expert -> used.name == name
        is Selection.Blend -> name in used.weights
        else -> false
    }

    /** The expert in use is about to be another one: forget what the old one left behind. */
    internal open fun changed(by: String) {}

    /** Release the engine; a closed session refuses every call. Waits for no one: close what is running first. */
    override fun close() {
        if (closed) return
        exclusively {
            closed = true
            engine.close()
        }
    }

    /** Run one call alone. @throws LimeError.Misused another thread's call is running, or the session is closed. */
    internal fun <T> exclusively(call: () -> T): T {
        if (!lock.tryLock()) {
            throw LimeError.Misused("session", "another thread is in a call", "one call at a time; open a session per thread (the weights are mapped once)")
        }
        try {
            if (closed) throw LimeError.Misused("session", "it is closed", "open another one")
            return call()
        } finally {
            lock.unlock()
        }
    }

    /** What an engine throws becomes a [LimeError]; memory that is not there too. */
    internal fun <T> guardEngine(call: () -> T): T = try {
        call()
    } catch (error: LimeError) {
        throw error
    } catch (error: Exception) {
        throw LimeError.Engine(facts.name, "${error.message ?: error.javaClass.simpleName}".lines().first().take(500), "verify() tells whether the bundle runs here", error)
    } catch (error: OutOfMemoryError) {
        throw LimeError.Engine(facts.name, "no memory left: ${error.message}", "open the session with a smaller maxLength", error)
    }
}
