import Foundation

/// What to measure.
public struct BenchOptions: Sendable {
    /// Length of the prompt.
    public var promptTokens: Int
    /// Decoded per round.
    public var genTokens: Int
    /// Rounds counted.
    public var rounds: Int
    /// Rounds thrown away first.
    public var warmup: Int
    /// Per round.
    public var switches: Int

    /// Options; leave one out for its default.
    public init(promptTokens: Int = 128, genTokens: Int = 64, rounds: Int = 5, warmup: Int = 1, switches: Int = 100) {
        self.promptTokens = promptTokens
        self.genTokens = genTokens
        self.rounds = rounds
        self.warmup = warmup
        self.switches = switches
    }

    func check() throws {
        var faults = Faults()
        for (name, value) in [("promptTokens", promptTokens), ("genTokens", genTokens), ("rounds", rounds), ("switches", switches)] where value < 1 {
            faults.add(name, "at least 1", value)
        }
        if warmup < 0 { faults.add("warmup", "0 or more", warmup) }
        try faults.throwAny(LimeError.invalid, at: "bench options", hint: "leave an option out for its default")
    }
}

/// Times a language model's bundle on this machine and writes the document of `lime-edge bench` (docs/bench-schema.md).
public enum Bench {
    private static let loads = 5

    /// Measure.
    ///
    /// - Parameters:
    ///   - folder: the bundle.
    ///   - selection: nil for what the bundle opens with.
    ///   - machine: facts that only the caller knows, by their key of the schema: `board`, `cpu`.
    ///   - progress: called with rounds done and in all.
    /// - Returns: the document, JSON; what does not apply is null.
    public static func run(
        _ folder: URL, with engines: any EngineFactory, selection: Selection? = nil, session: SessionOptions = SessionOptions(),
        options: BenchOptions = BenchOptions(), machine: [String: String] = [:], progress: @Sendable (Int, Int) -> Void = { _, _ in }
    ) async throws -> String {
        try options.check()
        var needed = session
        needed.maxLength = session.maxLength ?? options.promptTokens + options.genTokens
        var series = Series()
        for _ in 0...min(options.rounds, loads) {
            let begin = now()
            let opened = try await LimeSession.open(LimeBundle.open(folder), with: engines, options: needed)
            series.loads.append((now() - begin) * 1e3)
            await opened.close()
        }
        series.loads.removeFirst() // the first one warms up
        let opened = try await LimeSession.open(LimeBundle.open(folder), with: engines, options: needed)
        if let selection { try await opened.use(selection) }
        var stages: [String: Json] = ["opened": readMemory()]
        for round in 0..<options.warmup + options.rounds {
            progress(round, options.warmup + options.rounds)
            let found = try await time(opened, options, round)
            if round >= options.warmup { series.append(found) }
            if stages["prompt"] == nil { stages["prompt"] = readMemory() }
        }
        stages["switches"] = readMemory()
        progress(options.warmup + options.rounds, options.warmup + options.rounds)
        let run = await describe(opened, needed, options, series, stages)
        return document(opened.bundle, run, machine).text
    }

    /// What rounds gave: milliseconds, switches in microseconds.
    struct Series {
        var loads: [Double] = []
        var first: [Double] = []
        var decode: [Double] = []
        var tokens: [Double] = []
        var switchMedians: [Double] = []
        var switches: [Double] = []
        var switchToFirst: [Double] = []

        mutating func append(_ other: Series) {
            first += other.first
            decode += other.decode
            tokens += other.tokens
            switchMedians += other.switchMedians
            switches += other.switches
            switchToFirst += other.switchToFirst
        }
    }

    /// Seconds since some moment.
    static func now() -> Double { Double(DispatchTime.now().uptimeNanoseconds) / 1e9 }

    private static func time(_ session: LimeSession, _ options: BenchOptions, _ round: Int) async throws -> Series {
        var series = Series()
        var random = SplitMix64(0)
        let vocab = UInt64(session.bundle.manifest.vocab)
        let prompt = (0..<options.promptTokens).map { _ in Int(random.next() % vocab) }
        var begin = now()
        var row = try await session.logits(prompt, keep: 1)[0]
        series.first.append((now() - begin) * 1e3)
        for _ in 0..<options.genTokens {
            let token = try row.withUnsafeBufferPointer { try Sampler.pickBest($0) }
            begin = now()
            row = try await session.extend([token])[0]
            series.tokens.append((now() - begin) * 1e3)
        }
        series.decode.append(percentile(series.tokens, 50))
        let names = await session.experts
        if names.count < 2 { return series }
        let before = await session.selection
        try await session.reset()
        for _ in 0..<options.switches {
            let name = names[Int(random.next() % UInt64(names.count))]
            begin = now()
            try await session.use(.expert(name))
            series.switches.append((now() - begin) * 1e6)
        }
        series.switchMedians.append(percentile(series.switches, 50))
        try await session.use(before)
        _ = try await session.logits([prompt[0]], keep: 1) // a cache for the switch to throw away
        let others = names.filter { $0 != "\(before)" }
        begin = now()
        try await session.use(.expert(others[round % others.count]))
        _ = try await session.logits(prompt, keep: 1)
        series.switchToFirst.append((now() - begin) * 1e3)
        try await session.use(before)
        return series
    }

    private static func describe(_ session: LimeSession, _ settings: SessionOptions, _ options: BenchOptions, _ series: Series, _ stages: [String: Json]) async -> Json {
        let manifest = session.bundle.manifest
        let prefill = series.first.map { Double(options.promptTokens) * 1e3 / $0 }
        let decode = series.decode.map { 1e3 / $0 }
        let artifact = manifest.files.filter { $0.key.hasPrefix("\(session.facts.name)/") }.values.reduce(0) { $0 + $1.size }
        let expert = manifest.experts.first.map { entry -> Json in
            ["file": Json(manifest.files[entry.file].map { Int($0.size) }), "vector": Json(manifest.sumH * 2), "ready": Json(manifest.sumH * 4)]
        }
        let nothing: Json = ["rss_bytes": nil, "anonymous_bytes": nil, "peak_bytes": nil]
        let memory: Json = [
            "net_peak_bytes": nil, "artifact_bytes": .integer(artifact),
            "stages": object(["python", "imports", "opened", "prompt", "switches"].map { ($0, stages[$0] ?? nothing) }), "experts": nil,
        ]
        let spread: [(String, [Double])] = [
            ("load_ms", series.loads), ("load_cold_ms", []), ("ttft_ms", series.first), ("prefill_tokens_per_s", prefill), ("decode_tokens_per_s", decode),
            ("run_ms", []), ("switch_us", series.switchMedians), ("switch_to_first_token_ms", series.switchToFirst),
        ]
        let rounds: [(String, [Double])] = [
            ("load_ms", series.loads), ("load_cold_ms", []), ("ttft_ms", series.first), ("switch_to_first_token_ms", series.switchToFirst),
            ("decode_ms", series.decode), ("run_ms", []), ("switch_us", series.switchMedians), ("baseline_ttft_ms", []), ("baseline_decode_ms", []),
            ("baseline_run_ms", []),
        ]
        return [
            "kind": "decoder", "target": .string(session.facts.name), "provider": .string(session.provider), "operators": Json(session.operators),
            "expert": .string("\(await session.selection)"), "quant": .string(manifest.quant), "threads": Json(settings.threads ?? session.facts.threads),
            "prompt_tokens": Json(options.promptTokens), "gen_tokens": Json(options.genTokens), "depth": Json(options.promptTokens),
            "repeat": Json(options.rounds), "warmup": Json(options.warmup), "load_ms": Json(median(series.loads)), "load_cold_ms": nil,
            "cache_dropped": nil, "ttft_ms": Json(median(series.first)), "prefill_tokens_per_s": Json(median(prefill)),
            "decode_tokens_per_s": Json(median(decode)), "token_ms": percentiles(series.tokens), "run_ms": nil, "switch_us": percentiles(series.switches),
            "switch_to_first_token_ms": percentiles(series.switchToFirst), "peak_rss_bytes": readMemory()["peak_bytes"] ?? nil, "memory": memory,
            "expert_bytes": expert ?? nil, "bundle_bytes": .integer(session.bundle.totalBytes), "energy": nil, "temperature_c": nil, "bandwidth": nil,
            "baseline": nil, "spread": object(spread.map { ($0.0, $0.1.isEmpty ? nil : ["p5": .number(percentile($0.1, 5)), "p95": .number(percentile($0.1, 95))]) }),
            "rounds": object(rounds.map { ($0.0, .array($0.1.map { .number($0) })) }),
        ]
    }

    private static func document(_ bundle: LimeBundle, _ run: Json, _ machine: [String: String]) -> Json {
        let process = ProcessInfo.processInfo
        let version = "0.1.0 (Swift)"
        var facts: [(String, Json)] = [
            ("cpu", Json(readFirst("/proc/cpuinfo", "model name"))), ("arch", .string(architecture)),
            ("system", .string(process.operatingSystemVersionString)), ("python", "none: Swift"), ("lime_edge", .string(version)), ("board", nil),
            ("cores", Json(process.activeProcessorCount)), ("memory_bytes", Json(Int(clamping: process.physicalMemory))), ("governor", nil), ("max_mhz", nil),
            ("load_1min", nil), ("packages", []),
        ]
        for (name, value) in machine.sorted(by: { $0.key < $1.key }) {
            facts.removeAll { $0.0 == name }
            facts.append((name, .string(value)))
        }
        let created = String(ISO8601DateFormatter().string(from: Date()).dropLast()) + "+00:00"
        let head: [(String, Json)] = [
            ("schema", .integer(2)), ("lime_edge", .string(version)), ("created", .string(created)), ("bundle", .string(bundle.folder.path)),
            ("model", .string(bundle.manifest.modelName)), ("fingerprint", .string(bundle.manifest.fingerprint)),
        ]
        return object(head + (run.object?.members.map { ($0.name, $0.value) } ?? []) + [("state", nil), ("throttled", nil), ("machine", object(facts)), ("runs", .array([run]))])
    }

    private static func object(_ members: [(String, Json)]) -> Json {
        var object = JsonObject()
        for (name, value) in members { _ = object.add(name, value) }
        return .object(object)
    }

    private static var architecture: String {
        #if arch(arm64)
        "aarch64"
        #elseif arch(x86_64)
        "x86_64"
        #else
        "unknown"
        #endif
    }

    /// What the system says about this process; null where it says nothing.
    private static func readMemory() -> Json {
        func bytes(_ key: String) -> Json { Json(readFirst("/proc/self/status", key).flatMap { Int($0.split(separator: " ")[0]) }.map { $0 * 1024 }) }
        return ["rss_bytes": bytes("VmRSS"), "anonymous_bytes": bytes("RssAnon"), "peak_bytes": bytes("VmHWM")]
    }

    private static func readFirst(_ file: String, _ key: String) -> String? {
        guard let text = try? String(contentsOfFile: file, encoding: .utf8) else { return nil }
        for line in text.split(separator: "\n") {
            let halves = line.split(separator: ":", maxSplits: 1).map { $0.trimmingCharacters(in: .whitespaces) }
            if halves.count == 2, halves[0] == key, !halves[1].isEmpty { return halves[1] }
        }
        return nil
    }

    private static func median(_ values: [Double]) -> Double? { values.isEmpty ? nil : percentile(values, 50) }

    private static func percentiles(_ values: [Double]) -> Json {
        values.isEmpty ? nil : ["p50": .number(percentile(values, 50)), "p95": .number(percentile(values, 95)), "p99": .number(percentile(values, 99))]
    }

    /// Linearly interpolated.
    static func percentile(_ values: [Double], _ share: Double) -> Double {
        let sorted = values.sorted()
        let place = share / 100 * Double(sorted.count - 1)
        let low = Int(place)
        return sorted[low] + (sorted[min(low + 1, sorted.count - 1)] - sorted[low]) * (place - Double(low))
    }
}
