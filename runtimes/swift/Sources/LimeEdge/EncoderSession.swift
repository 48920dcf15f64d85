import Foundation

/// An opened encoder or vision bundle on one target. ``use(_:)-(Selection)`` switches the expert of the calls that follow; nothing is
/// kept between calls.
public actor EncoderSession {
    /// The bundle that was opened.
    public nonisolated let bundle: LimeBundle
    /// What the model runs on, as the engine names it.
    public nonisolated let provider: String
    /// Whether the graph's functions run as compiled operators; nil where the engine knows none.
    public nonisolated let operators: Bool?
    nonisolated let facts: TargetFacts
    private let queue: SessionQueue
    private var loaded: (engine: any EncoderEngine, experts: ExpertSwitch)?

    public nonisolated var unownedExecutor: UnownedSerialExecutor { queue.asUnownedSerialExecutor() }

    /// Load an encoder or a vision model.
    ///
    /// - Throws: ``LimeError/missing(_:)`` not exported for that engine; ``LimeError/invalid(_:)`` it holds a decoder.
    public static func open(
        _ bundle: LimeBundle, with engines: any EngineFactory, options: SessionOptions = SessionOptions()
    ) async throws -> EncoderSession {
        let queue = SessionQueue()
        return try await queue.run { try EncoderSession(bundle, engines, options, queue) }
    }

    private init(_ bundle: LimeBundle, _ engines: any EngineFactory, _ options: SessionOptions, _ queue: SessionQueue) throws {
        try options.check()
        if bundle.manifest.kind != "encoder" {
            throw LimeError.invalid(.init(bundle.folder.path, Fault("kind", expected: "encoder", found: bundle.manifest.kind), "open it with LimeSession.open"))
        }
        let facts = try findTarget(bundle, engines)
        let engine = try engines.openEncoder(bundle, options)
        loaded = (engine, try ExpertSwitch(bundle, engine, facts))
        self.bundle = bundle
        self.facts = facts
        self.queue = queue
        provider = engine.provider
        operators = engine.operators
    }

    /// Names of the inputs that ``run(_:)`` takes.
    public nonisolated var inputs: [String] { facts.inputs.map(\.name) }

    /// Names of the outputs that ``run(_:)`` gives.
    public nonisolated var outputs: [String] { facts.outputs }

    /// What is in use.
    public var selection: Selection { loaded?.experts.selection ?? .none }

    /// Names of the installed experts.
    public var experts: [String] { loaded?.experts.experts ?? [] }

    /// Switch the expert; nothing is reloaded. Throws as ``LimeSession/use(_:keepCache:)-(Selection,_)``.
    public func use(_ selection: Selection) throws { try open.experts.apply(selection) }

    /// Switch to a selection as typed: NAME, none, routed, NAME=WEIGHT,NAME=WEIGHT.
    public func use(_ selection: String) throws { try use(Selection(parsing: selection)) }

    /// Add an expert file while running; see ``LimeSession/install(_:name:)``.
    @discardableResult
    public func install(_ file: URL, name: String? = nil) throws -> String { try open.experts.install(file, name: name) {} }

    /// Forget an installed expert. Throws ``LimeError/invalid(_:)`` where it is unknown, or in use.
    public func remove(_ name: String) throws { try open.experts.remove(name) }

    /// Release the engine; a closed session refuses every call.
    public func close() { loaded = nil }

    private var open: (engine: any EncoderEngine, experts: ExpertSwitch) {
        get throws {
            guard let loaded else { throw LimeError.misused(closedReport) }
            return loaded
        }
    }

    /// Run the model once.
    ///
    /// - Parameter inputs: by name: token ids (B, T) as integers, or pixels (B, C, H, W) as float. An attention mask that is left out is
    ///   ones, token types are zeros.
    /// - Returns: every output by name, float32: `logits`, or `last_hidden_state`, `sentence_embedding` (B, H), ...
    /// - Throws: ``LimeError/invalid(_:)`` an input is missing, unknown, of the wrong shape, or holds ids out of range, NaN or infinity.
    public func run(_ inputs: [String: Tensor]) throws -> [String: Tensor] {
        let complete = try check(inputs)
        let engine = try open.engine
        return try open.experts.guardEngine { try engine.run(complete) }
    }

    /// Complete inputs in the types of the graph; all faults at once.
    private func check(_ given: [String: Tensor]) throws -> [String: Tensor] {
        var faults = Faults()
        var axes: [String: Int] = [:]
        var checked: [String: Tensor] = [:]
        for name in given.keys.sorted() where !inputs.contains(name) { faults.add("unknown input '\(name.shortened(80))'") }
        for entry in facts.inputs {
            if let values = given[entry.name] {
                if fits(entry, values, &axes, &faults) { checked[entry.name] = values }
            } else if entry.fill.isEmpty {
                faults.add("input '\(entry.name)' is missing")
            }
        }
        let context = bundle.manifest.context
        if let tokens = axes["sequence"], tokens > context { faults.add("tokens", "at most \(context)", tokens) }
        try faults.throwAny(LimeError.invalid, at: "run", hint: "this model takes \(inputs.joined(separator: ", "))")
        for entry in facts.inputs where checked[entry.name] == nil { checked[entry.name] = try fill(entry, axes) }
        return checked
    }

    private func fits(_ entry: InputFacts, _ values: Tensor, _ axes: inout [String: Int], _ faults: inout Faults) -> Bool {
        let wanted = entry.shape.map { axis in if case .name(let name) = axis, let size = axes[name] { Axis.size(size) } else { axis } }
        let shown = "(" + wanted.map { if case .name(let name) = $0 { name } else if case .size(let size) = $0 { "\(size)" } else { "" } }.joined(separator: ", ") + ")"
        let odd = wanted.count != values.shape.count || zip(wanted, values.shape).contains { if case .size(let size) = $0 { size != $1 } else { false } }
        if (values.integers != nil) != entry.isLong {
            faults.add("\(entry.name): type", entry.isLong ? "integers" : "floats", entry.isLong ? "floats" : "integers")
        } else if odd {
            faults.add("\(entry.name): shape", shown, values.shape)
        } else if values.count == 0 {
            faults.add("\(entry.name): shape", "\(shown), nothing empty", values.shape)
        } else if entry.limit > 0, let least = values.integers?.min(), let most = values.integers?.max(), least < 0 || most >= entry.limit {
            faults.add(entry.name, "0..\(entry.limit - 1)", "\(least)..\(most)")
        } else if let floats = values.floats, !floats.allSatisfy(\.isFinite) {
            faults.add("\(entry.name) holds NaN or infinite values")
        } else {
            for (axis, size) in zip(wanted, values.shape) { if case .name(let name) = axis { axes[name] = size } }
            return true
        }
        return false
    }

    private func fill(_ entry: InputFacts, _ axes: [String: Int]) throws -> Tensor {
        let shape = entry.shape.map { axis in
            switch axis {
            case .size(let size): size
            case .name(let name): axes[name] ?? 1
            }
        }
        let count = shape.reduce(1, *)
        let value = entry.fill == "ones" ? 1 : 0
        return try Tensor(entry.isLong ? .integers(Array(repeating: Int64(value), count: count)) : .floats(Array(repeating: Float(value), count: count)), shape)
    }
}
