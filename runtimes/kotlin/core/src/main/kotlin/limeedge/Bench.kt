package limeedge

import java.io.File
import kotlin.random.Random

/**
 * What to measure.
 *
 * @property promptTokens length of the prompt. @property genTokens decoded per round. @property repeat rounds counted. @property
 *   warmup rounds thrown away first. @property switches per round.
 */
public data class BenchOptions(
    val promptTokens: Int = 128, val genTokens: Int = 64, val repeat: Int = 5, val warmup: Int = 1, val switches: Int = 100,
) {
    init {
        val faults = Faults()
        for ((name, value) in listOf("promptTokens" to promptTokens, "genTokens" to genTokens, "repeat" to repeat, "switches" to switches)) {
            if (value < 1) faults.add(name, "at least 1", value)
        }
        faults.throwAny { LimeError.Invalid("bench options", it, "leave an option out for its default") }
    }
}

/** Times a language model's bundle on this machine and writes the document of `lime-edge bench` (docs/bench-schema.md). */
public object Bench {
    private const val SCHEMA = 2
    private const val LOADS = 5

    /**
     * Measure.
     *
     * @param machine facts that only the caller knows: on Android board, memory; joined to what /proc tells.
     * @param progress called with rounds done and in all. @return the document, JSON; what does not apply is null.
     */
    public fun run(
        folder: File, engines: EngineFactory, selection: Selection? = null, session: SessionOptions = SessionOptions(), options: BenchOptions = BenchOptions(),
        machine: Map<String, Any?> = emptyMap(), cache: File? = null, progress: (Int, Int) -> Unit = { _, _ -> },
    ): String {
        val needed = session.copy(maxLength = session.maxLength ?: (options.promptTokens + options.genTokens))
        val loads = ArrayList<Double>()
        repeat(minOf(options.repeat, LOADS) + 1) {
            val begin = System.nanoTime()
            LimeSession.open(LimeBundle.open(folder, cache = cache), engines, needed).use { loads += (System.nanoTime() - begin) / 1e6 }
        }
        loads.removeAt(0) // the first one warms up
        val bundle = LimeBundle.open(folder, cache = cache)
        return LimeSession.open(bundle, engines, needed).use { opened ->
            if (selection != null) opened.use(selection)
            val memory = LinkedHashMap<String, Any?>()
            memory["opened"] = readMemory()
            val series = Series()
            for (round in 0 until options.warmup + options.repeat) {
                progress(round, options.warmup + options.repeat)
                timeRound(opened, options, round, if (round < options.warmup) Series() else series)
                memory["prompt"] = memory["prompt"] ?: readMemory()
            }
            memory["switches"] = readMemory()
            progress(options.warmup + options.repeat, options.warmup + options.repeat)
            val run = describeRun(opened, needed, options, loads, series, memory)
            Json.write(describe(bundle, run, machine))
        }
    }

    /** What the rounds gave: milliseconds, switches in microseconds. */
    private class Series {
        val first = ArrayList<Double>()
        val decode = ArrayList<Double>()
        val tokens = ArrayList<Double>()
        val switchMedians = ArrayList<Double>()
        val switches = ArrayList<Double>()
        val switchToFirst = ArrayList<Double>()
    }

    private fun timeRound(session: LimeSession, options: BenchOptions, round: Int, series: Series) {
        val random = Random(0)
        val prompt = IntArray(options.promptTokens) { random.nextInt(session.bundle.manifest.vocab) }
        var begin = System.nanoTime()
        var row = session.logits(prompt, keep = 1)[0]
        series.first += (System.nanoTime() - begin) / 1e6
        val steps = List(options.genTokens) {
            val token = Sampler.pickBest(row)
            begin = System.nanoTime()
            row = session.extend(intArrayOf(token))[0]
            (System.nanoTime() - begin) / 1e6
        }
        series.tokens += steps
        series.decode += percentile(steps, 50.0)
        if (session.experts.size < 2) return
        val before = session.selection
        session.reset()
        val pick = Random(round)
        val times = List(options.switches) {
            val name = session.experts[pick.nextInt(session.experts.size)]
            begin = System.nanoTime()
            session.use(Selection.Expert(name))
            (System.nanoTime() - begin) / 1e3
        }
        series.switches += times
        series.switchMedians += percentile(times, 50.0)
        session.use(before)
        session.logits(prompt.copyOf(1), keep = 1) // a cache for the switch to throw away
        val other = session.experts.filter { "$before" != it }.let { it[round % it.size] }
        begin = System.nanoTime()
        session.use(Selection.Expert(other))
        session.logits(prompt, keep = 1)
        series.switchToFirst += (System.nanoTime() - begin) / 1e6
        session.use(before)
    }

    private fun describeRun(session: LimeSession, settings: SessionOptions, options: BenchOptions, loads: List<Double>, series: Series, stages: Map<String, Any?>): Map<String, Any?> {
        val manifest = session.bundle.manifest
        val prefill = series.first.map { options.promptTokens * 1e3 / it }
        val decode = series.decode.map { 1e3 / it }
        val entry = manifest.experts.firstOrNull()
        val artifact = manifest.files.filterKeys { it.startsWith("${session.facts.name}/") }.values.fold(0L) { sum, file -> sum + file.size }
        val spreads = mapOf(
            "load_ms" to loads, "load_cold_ms" to emptyList(), "ttft_ms" to series.first, "prefill_tokens_per_s" to prefill, "decode_tokens_per_s" to decode,
            "run_ms" to emptyList(), "switch_us" to series.switchMedians, "switch_to_first_token_ms" to series.switchToFirst,
        )
        return linkedMapOf(
            "kind" to "decoder", "target" to session.facts.name, "provider" to session.provider, "operators" to session.operators,
            "expert" to "${session.selection}", "quant" to manifest.quant, "threads" to (settings.threads ?: session.facts.threads),
            "prompt_tokens" to options.promptTokens, "gen_tokens" to options.genTokens, "depth" to options.promptTokens,
            "repeat" to options.repeat, "warmup" to options.warmup,
            "load_ms" to median(loads), "load_cold_ms" to null, "cache_dropped" to null, "ttft_ms" to median(series.first),
            "prefill_tokens_per_s" to median(prefill), "decode_tokens_per_s" to median(decode),
            "token_ms" to percentiles(series.tokens), "run_ms" to null, "switch_us" to percentiles(series.switches),
            "switch_to_first_token_ms" to percentiles(series.switchToFirst),
            "peak_rss_bytes" to readMemory()["peak_bytes"],
            "memory" to mapOf("net_peak_bytes" to null, "artifact_bytes" to artifact, "stages" to listOf("python", "imports", "opened", "prompt", "switches").associateWith { stages[it] ?: NO_MEMORY }, "experts" to null),
            "expert_bytes" to entry?.let { mapOf("file" to manifest.files.getValue(it.file).size, "vector" to manifest.sumH * 2, "ready" to manifest.sumH * 4) },
            "bundle_bytes" to session.bundle.totalBytes, "energy" to null, "temperature_c" to null, "bandwidth" to null, "baseline" to null,
            "spread" to spreads.mapValues { (_, values) -> if (values.isEmpty()) null else mapOf("p5" to percentile(values, 5.0), "p95" to percentile(values, 95.0)) },
            "rounds" to mapOf(
                "load_ms" to loads, "load_cold_ms" to emptyList<Double>(), "ttft_ms" to series.first, "switch_to_first_token_ms" to series.switchToFirst,
                "decode_ms" to series.decode, "run_ms" to emptyList<Double>(), "switch_us" to series.switchMedians,
                "baseline_ttft_ms" to emptyList<Double>(), "baseline_decode_ms" to emptyList<Double>(), "baseline_run_ms" to emptyList<Double>(),
            ),
        )
    }

    private fun describe(bundle: LimeBundle, run: Map<String, Any?>, machine: Map<String, Any?>): Map<String, Any?> {
        val facts = linkedMapOf<String, Any?>(
            "cpu" to readFirst("/proc/cpuinfo", "model name", "Hardware"), "arch" to System.getProperty("os.arch"),
            "system" to "${System.getProperty("os.name")} ${System.getProperty("os.version")}",
            "python" to "none: ${System.getProperty("java.vm.name")} ${System.getProperty("java.version")}", "lime_edge" to VERSION, "board" to null,
            "cores" to Runtime.getRuntime().availableProcessors(), "memory_bytes" to readFirst("/proc/meminfo", "MemTotal")?.let(::kilobytes),
            "governor" to null, "max_mhz" to null, "load_1min" to null, "packages" to emptyList<String>(),
        )
        val created = java.text.SimpleDateFormat("yyyy-MM-dd'T'HH:mm:ss'+00:00'", java.util.Locale.ROOT).apply { timeZone = java.util.TimeZone.getTimeZone("UTC") }
        return linkedMapOf<String, Any?>(
            "schema" to SCHEMA, "lime_edge" to VERSION, "created" to created.format(java.util.Date()), "bundle" to bundle.folder.path,
            "model" to bundle.manifest.modelName, "fingerprint" to bundle.manifest.fingerprint,
        ) + run + mapOf("machine" to facts + machine, "runs" to listOf(run))
    }

    private val NO_MEMORY = mapOf("rss_bytes" to null, "anonymous_bytes" to null, "peak_bytes" to null)

    private fun readMemory(): Map<String, Long?> = mapOf("rss_bytes" to "VmRSS", "anonymous_bytes" to "RssAnon", "peak_bytes" to "VmHWM")
        .mapValues { (_, key) -> readFirst("/proc/self/status", key)?.let(::kilobytes) }

    private fun kilobytes(text: String) = text.removeSuffix(" kB").trim().toLongOrNull()?.times(1024)

    private fun readFirst(file: String, vararg keys: String): String? = try {
        File(file).useLines { lines -> lines.map { it.split(':', limit = 2) }.firstOrNull { it[0].trim() in keys }?.getOrNull(1)?.trim() }
    } catch (_: java.io.IOException) {
        null
    }

    private fun median(values: List<Double>) = if (values.isEmpty()) null else percentile(values, 50.0)

    private fun percentiles(values: List<Double>) = if (values.isEmpty()) null else mapOf("p50" to percentile(values, 50.0), "p95" to percentile(values, 95.0), "p99" to percentile(values, 99.0))

    /** Linearly interpolated. */
    internal fun percentile(values: List<Double>, share: Double): Double {
        val sorted = values.sorted()
        val place = share / 100 * (sorted.size - 1)
        val low = place.toInt()
        return sorted[low] + (sorted[minOf(low + 1, sorted.size - 1)] - sorted[low]) * (place - low)
    }

    private const val VERSION = "0.1.0 (Kotlin)"
}
