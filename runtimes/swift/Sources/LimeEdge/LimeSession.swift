import Foundation

/// An opened language model on one target.
///
/// A cache belongs to the expert that filled it. ``use(_:keepCache:)`` starts a new cache when the selection changes, unless
/// `keepCache` is true; ``cache`` tells who filled what. Where the adapter acts from the generation prompt on
/// (`manifest.activationTokens`), the original model reads what lies before it, and that part stays over a switch.
///
/// Calls of several tasks wait for each other. One generation at a time: whatever changes cache or expert under a running one ends it
/// with ``LimeError/misused(_:)`` at its next token, never with an answer that is half another's. Sessions share nothing but
/// mapped weights.
public actor LimeSession {
    /// The bundle that was opened.
    public nonisolated let bundle: LimeBundle
    /// What the model runs on, as the engine names it.
    public nonisolated let provider: String
    /// Whether the graph's functions run as compiled operators; nil where the engine knows none.
    public nonisolated let operators: Bool?
    /// Tokens that the cache holds.
    public nonisolated let maxLength: Int
    nonisolated let facts: TargetFacts
    private let queue: SessionQueue
    private var loaded: Loaded?
    private let givenTokenizer: (any TextTokenizer)?
    private var ownTokenizer: Tokenizer?
    private let header: Int // the expert acts on a prompt's last tokens, so many; 0: on all
    private var turn = 0
    private var disturber = ""

    /// Why the last generation ended; nil before the first and where one was left before its end.
    public private(set) var finishReason: FinishReason?

    static let chunk = 512 // prompt tokens fed at once: bounds the memory of a long prompt

    /// What there is until the session is closed.
    struct Loaded {
        let engine: any DecoderEngine
        let experts: ExpertSwitch
        let held: SequenceCache
    }

    public nonisolated var unownedExecutor: UnownedSerialExecutor { queue.asUnownedSerialExecutor() }

    /// Load a language model.
    ///
    /// - Parameters:
    ///   - bundle: an opened bundle.
    ///   - engines: `ONNXEngines()` or another factory.
    ///   - options: threads and length of the cache.
    ///   - tokenizer: in place of the bundle's own.
    /// - Throws: ``LimeError/missing(_:)`` the bundle was not exported for that engine; ``LimeError/invalid(_:)`` it holds an encoder.
    public static func open(
        _ bundle: LimeBundle, with engines: any EngineFactory, options: SessionOptions = SessionOptions(), tokenizer: (any TextTokenizer)? = nil
    ) async throws -> LimeSession {
        let queue = SessionQueue()
        return try await queue.run { try LimeSession(bundle, engines, options, tokenizer, queue) }
    }

    /// Open a bundle's folder and load its language model; see ``open(_:with:options:tokenizer:)-(LimeBundle,_,_,_)``.
    public static func open(
        _ folder: URL, with engines: any EngineFactory, options: SessionOptions = SessionOptions(), tokenizer: (any TextTokenizer)? = nil
    ) async throws -> LimeSession {
        let queue = SessionQueue()
        return try await queue.run { try LimeSession(LimeBundle.open(folder), engines, options, tokenizer, queue) }
    }

    private init(
        _ bundle: LimeBundle, _ engines: any EngineFactory, _ options: SessionOptions, _ tokenizer: (any TextTokenizer)?, _ queue: SessionQueue
    ) throws {
        try options.check()
        if bundle.manifest.decoder == nil {
            throw LimeError.invalid(.init(bundle.folder.path, "holds an encoder: it answers no prompts", "open it with EncoderSession.open"))
        }
        let facts = try findTarget(bundle, engines)
        let engine = try engines.openDecoder(bundle, options)
        loaded = Loaded(engine: engine, experts: try ExpertSwitch(bundle, engine, facts), held: SequenceCache(engine))
        self.bundle = bundle
        self.facts = facts
        self.queue = queue
        provider = engine.provider
        operators = engine.operators
        maxLength = engine.capacity
        header = bundle.manifest.activationTokens
        givenTokenizer = tokenizer
    }

    // MARK: experts

    /// What is in use.
    public var selection: Selection { loaded?.experts.selection ?? .none }

    /// Names of the installed experts.
    public var experts: [String] { loaded?.experts.experts ?? [] }

    /// Switch the expert; nothing is reloaded (`.routed` loads its graph once).
    ///
    /// - Parameters:
    ///   - selection: an expert, a blend, `.none` or `.routed`.
    ///   - keepCache: keep what another expert wrote into the cache (then it is a mixture, and ``cache`` says so).
    /// - Throws: ``LimeError/invalid(_:)`` unknown name, bad weights, a bundle of a single expert, one without routing, or `.none` for
    ///   a variant that cannot be switched off; ``LimeError/damaged(_:)`` the expert's file.
    public func use(_ selection: Selection, keepCache: Bool = false) throws {
        let experts = try open.experts
        let before = experts.selection
        try experts.apply(selection)
        if selection != before { disturb("use") }
        guard !keepCache, let held = loaded?.held, !held.isFilled(by: "\(selection)") else { return }
        disturb("use")
        try loaded?.held.rewind(held.common)
    }

    /// Switch to a selection as typed: NAME, none, routed, NAME=WEIGHT,NAME=WEIGHT.
    public func use(_ selection: String, keepCache: Bool = false) throws { try use(Selection(parsing: selection), keepCache: keepCache) }

    /// Add an expert file while running. Nothing is written; routing does not know it.
    ///
    /// - Parameters:
    ///   - file: anywhere.
    ///   - name: another name than the file's.
    /// - Returns: its name.
    /// - Throws: ``LimeError/damaged(_:)`` the file; ``LimeError/foreign(_:)`` made for another shared adapter;
    ///   ``LimeError/invalid(_:)`` a bad name, or a bundle of a single expert.
    @discardableResult
    public func install(_ file: URL, name: String? = nil) throws -> String { try open.experts.install(file, name: name) { try change("install") } }

    /// Forget an installed expert. Throws ``LimeError/invalid(_:)`` where it is unknown, or in use.
    public func remove(_ name: String) throws { try open.experts.remove(name) }

    /// Release the engine; a closed session refuses every call.
    public func close() { loaded = nil }

    var open: Loaded {
        get throws {
            guard let loaded else { throw LimeError.misused(closedReport) }
            return loaded
        }
    }

    // MARK: the cache

    /// Who filled the cache, in order.
    public var cache: [Segment] { loaded?.held.segments ?? [] }

    /// Start a new cache.
    public func reset() throws { try change("reset") }

    private func change(_ by: String) throws {
        _ = try open
        disturb(by)
        try loaded?.held.rewind(0)
    }

    /// Logits of a sequence of its own (a new cache).
    ///
    /// - Parameters:
    ///   - ids: (S,) token ids.
    ///   - keep: only the last `keep` positions, 0 for all.
    /// - Returns: a row of (V,) logits for every position kept.
    /// - Throws: ``LimeError/invalid(_:)`` ids out of range; ``LimeError/full(_:)`` no room; ``LimeError/engine(_:)`` the engine.
    public func logits(_ ids: [Int], keep: Int = 0) throws -> [[Float]] {
        try change("logits")
        let ids = try check(ids)
        try checkRoom(ids.count, keep)
        return try pieces(ids, from: 0).flatMap { try feed(ids, $0, keep: keep == 0 ? ids.count : keep, nil) }
    }

    /// Logits of tokens appended to what the cache holds; see ``logits(_:keep:)``.
    public func extend(_ ids: [Int], keep: Int = 1) throws -> [[Float]] {
        _ = try open
        disturb("extend")
        return try append(check(ids), keep: keep)
    }

    // MARK: generation

    /// The bundle's tokenizer, read when first needed, or the one that was given. Throws ``LimeError/unsupported(_:)`` a kind that this
    /// library does not know.
    public var tokenizer: any TextTokenizer {
        get throws {
            if let known: any TextTokenizer = givenTokenizer ?? ownTokenizer { return known }
            let read = try TokenizerReader.read(bundle)
            ownTokenizer = read
            return read
        }
    }

    /// Stream the answer to a complete prompt (chat template applied), piece by piece.
    ///
    /// Nothing runs ahead: the model runs when the next piece is asked for. Cancelling the task stops it at once, in the middle of a
    /// prompt too, and leaves a usable session; so does leaving the loop.
    ///
    /// - Parameters:
    ///   - prompt: complete.
    ///   - options: how tokens are picked.
    ///   - keepCache: keep the longest prefix that the cache already holds.
    /// - Returns: pieces of text. It throws as ``logits(_:keep:)``, and ``LimeError/misused(_:)`` where another call disturbed it.
    public nonisolated func generate(
        _ prompt: String, options: GenerationOptions = GenerationOptions(), keepCache: Bool = false
    ) -> AsyncThrowingStream<String, any Error> {
        let run = Generation(.text(prompt), options, keepCache)
        return AsyncThrowingStream { try await self.nextPiece(run) }
    }

    /// As ``generate(_:options:keepCache:)``, from token ids (S,) to token ids: needs no tokenizer.
    public nonisolated func generateIDs(
        _ prompt: [Int], options: GenerationOptions = GenerationOptions(), keepCache: Bool = false
    ) -> AsyncThrowingStream<Int, any Error> {
        let run = Generation(.ids(prompt), options, keepCache)
        return AsyncThrowingStream { try await self.nextToken(run) }
    }

    private func nextPiece(_ run: Generation) async throws -> String? {
        while !run.flushed {
            let token = try await nextToken(run)
            let piece: String
            if let token {
                piece = run.stream?.push(token) ?? ""
            } else {
                run.flushed = true
                piece = run.stream?.finish() ?? ""
            }
            if !piece.isEmpty { return piece }
        }
        return nil
    }

    /// The next token of a generation, nil at its end.
    private func nextToken(_ run: Generation) async throws -> Int? {
        if run.ended { return nil }
        do {
            let token = try await advance(run)
            if token == nil { run.ended = true }
            return token
        } catch {
            run.ended = true
            run.flushed = true
            throw error
        }
    }

    private func advance(_ run: Generation) async throws -> Int? {
        let token: Int
        if let plan = run.plan {
            try checkTurn(plan.turn)
            if run.stream?.stopped == true { return finish(.stop) }
            if run.count == plan.limit { return finish(plan.limit < run.options.maxNewTokens ? .cache : .length) }
            let last = Int64(run.last)
            token = try await interruptibly { interruption in
                try checkTurn(plan.turn)
                let logits = try call([last], wanted: 1, filler: "\(selection)", interruption)
                return try run.sampler.pick(logits)
            }
        } else {
            let plan = try begin(run)
            run.plan = plan
            token = try await readPrompt(plan, run)
        }
        if !run.options.ignoreEOS, bundle.manifest.decoder?.eos.contains(token) == true { return finish(.stop) }
        run.count += 1
        run.last = token
        return token
    }

    private func begin(_ run: Generation) throws -> Generation.Plan {
        _ = try open
        run.sampler = try Sampler(run.options)
        let ids: [Int64]
        switch run.prompt {
        case .text(let text):
            let tokenizer = try tokenizer
            run.stream = TextStream(tokenizer, stop: run.options.stop)
            ids = try check(tokenizer.encode(text))
        case .ids(let given): ids = try check(given)
        }
        let room = maxLength - ids.count
        if room < 1 { throw full("the prompt has \(ids.count)") }
        disturb("another generation")
        finishReason = nil
        try loaded?.held.rewind(countKept(ids, run.keepCache))
        return Generation.Plan(ids: ids, turn: turn, limit: min(run.options.maxNewTokens, room))
    }

    /// Feed what the cache lacks of a prompt, piece by piece; the token that its last logits give.
    private func readPrompt(_ plan: Generation.Plan, _ run: Generation) async throws -> Int {
        var token = 0
        for piece in pieces(plan.ids, from: loaded?.held.count ?? 0) {
            token = try await interruptibly { interruption in
                try checkTurn(plan.turn)
                guard let row = try feed(plan.ids, piece, keep: 1, interruption).last else { return token }
                return try row.withUnsafeBufferPointer { try run.sampler.pick($0) }
            }
            await Task.yield() // whoever waits for the session may disturb it between two pieces
        }
        return token
    }

    /// One call of the engine, which ends soon where its task is cancelled.
    func interruptibly<Value>(_ call: (Interruption) throws -> Value) async throws -> Value {
        try Task.checkCancellation()
        let interruption = Interruption()
        return try await withTaskCancellationHandler {
            do {
                return try call(interruption)
            } catch LimeError.engine where Task.isCancelled {
                throw CancellationError()
            }
        } onCancel: {
            interruption.interrupt()
        }
    }

    private func finish(_ reason: FinishReason) -> Int? {
        finishReason = reason
        return nil
    }

    private func disturb(_ by: String) {
        disturber = by
        turn += 1
    }

    private func checkTurn(_ mine: Int) throws {
        if turn == mine { return }
        let hint = "let it end, or cancel it, before the session is used otherwise; a second session runs beside it"
        throw LimeError.misused(.init("generation", "disturbed by \(disturber): cache or expert are no longer its own", hint))
    }

    // MARK: prompts

    /// Tokens of a prompt that the original model reads: all but the last ones where the expert acts from there on.
    func countSilent(_ count: Int) -> Int { header > 0 ? max(0, count - header) : 0 }

    /// Tokens of a prompt that need not be read again.
    ///
    /// What the original model read is kept without being asked for: it is the same for every expert. Two tokens at least are left to
    /// read, for a call of one may round otherwise; and routing must see all of its own in one call.
    private func countKept(_ prompt: [Int64], _ keepCache: Bool) -> Int {
        guard let held = loaded?.held else { return 0 }
        let silent = countSilent(prompt.count)
        let own = "\(selection)"
        var kept = held.countKept(prompt) { $0 < silent ? "none" : own }
        if !keepCache { kept = min(kept, silent, held.common) } else if selection == .routed { kept = min(kept, silent) }
        kept = min(kept, max(silent, prompt.count - 2))
        return kept >= 1 && kept < silent && kept == silent - 1 ? kept - 1 : kept
    }

    /// A stretch of a prompt that is one call, and whether the original model reads it.
    private struct Piece {
        let range: Range<Int>
        let isSilent: Bool
    }

    private func pieces(_ prompt: [Int64], from start: Int) -> [Piece] {
        let silent = countSilent(prompt.count)
        let own = max(start, silent)
        let beginning = start < silent ? cut(start, silent, whole: false).map { Piece(range: $0, isSilent: true) } : []
        return beginning + cut(own, prompt.count, whole: selection == .routed).map { Piece(range: $0, isSilent: false) }
    }

    private func cut(_ start: Int, _ end: Int, whole: Bool) -> [Range<Int>] {
        let stops = whole ? [end - start] : planChunks(held: start, count: end - start, chunk: longestCall)
        return zip([0] + stops.dropLast(), stops).map { start + $0..<start + $1 }
    }

    private var longestCall: Int { min(Self.chunk, facts.promptLength ?? Self.chunk) }

    /// One piece of a prompt; rows of the prompt's last `keep` positions that lie in it.
    private func feed(_ prompt: [Int64], _ piece: Piece, keep: Int, _ interruption: Interruption?) throws -> [[Float]] {
        let wanted = piece.range.upperBound - max(piece.range.lowerBound, prompt.count - keep)
        let ids = Array(prompt[piece.range])
        let experts = try open.experts
        if !piece.isSilent { return rows(try call(ids, wanted: wanted, filler: "\(selection)", interruption), wanted) }
        let chosen = experts.selection
        try experts.apply(.none)
        let found: [[Float]]
        do {
            found = rows(try call(ids, wanted: wanted, filler: "none", interruption), wanted)
            loaded?.held.share(piece.range)
        } catch {
            try experts.apply(chosen)
            throw error
        }
        try experts.apply(chosen)
        return found
    }

    /// Append tokens under the selection; logits of the last `keep` positions of this call (0: all).
    private func append(_ ids: [Int64], keep: Int) throws -> [[Float]] {
        try checkRoom(ids.count, keep)
        let held = loaded?.held.count ?? 0
        if selection == .routed, held > 0, ids.count > 1, header == 0 {
            throw LimeError.invalid(.init("routed", "\(ids.count) tokens after a cache of \(held)", "a routed prompt is run in one call, then token by token"))
        }
        let first = keep == 0 ? 0 : max(0, ids.count - keep)
        let stops = selection == .routed ? [ids.count] : planChunks(held: held, count: ids.count, chunk: longestCall)
        return try zip([0] + stops.dropLast(), stops).flatMap { start, stop in
            let wanted = stop - max(start, first)
            return rows(try call(Array(ids[start..<stop]), wanted: wanted, filler: "\(selection)", nil), wanted)
        }
    }

    /// One call of the engine: logits of its last `wanted` positions, of one where that is not positive.
    private func call(_ ids: [Int64], wanted: Int, filler: String, _ interruption: Interruption?) throws -> UnsafeBufferPointer<Float> {
        let experts = try open.experts
        return try experts.guardEngine {
            guard let logits = try loaded?.held.feed(ids, keep: max(wanted, 1), filler: filler, interruption) else { throw LimeError.misused(closedReport) }
            return logits
        }
    }

    private func rows(_ logits: UnsafeBufferPointer<Float>, _ count: Int) -> [[Float]] {
        if count < 1 { return [] }
        let width = logits.count / count
        return (0..<count).map { Array(logits[$0 * width..<($0 + 1) * width]) }
    }

    private func checkRoom(_ count: Int, _ keep: Int) throws {
        if keep < 0 { throw LimeError.invalid(.init("keep", Fault("positions", expected: "0 or more", found: "\(keep)"), "0 keeps the logits of every position")) }
        let held = loaded?.held.count ?? 0
        if count > maxLength - held { throw full("\(count + held) are needed") }
    }

    func check(_ given: [Int]) throws -> [Int64] {
        guard let least = given.min(), let most = given.max() else { throw LimeError.invalid(.init("token ids", "none", "give at least one")) }
        let vocab = bundle.manifest.vocab
        if least < 0 || most >= vocab {
            throw LimeError.invalid(.init("token ids", Fault("range", expected: "0..\(vocab - 1)", found: "\(least)..\(most)"), "they come from another tokenizer?"))
        }
        return given.map(Int64.init)
    }

    func full(_ needed: String) -> LimeError {
        let hint = "shorten the prompt, or open the session with a larger maxLength"
        return .full(.init(bundle.folder.path, "the cache holds \(maxLength) tokens, \(needed)", hint))
    }
}
