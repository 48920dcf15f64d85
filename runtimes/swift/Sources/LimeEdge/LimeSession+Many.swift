extension LimeSession {
    /// Answer many requests in one pass, each under an expert of its own.
    ///
    /// Rows start, end and are refilled while others go on; a long prompt is read in pieces between their steps; a beginning that
    /// requests share under the same expert is read once. Row for row the answers are those of a session of its own (in a
    /// quantized bundle the number of rows may tip a token that is about as likely as another). The session's own cache and
    /// selection play no part: a row keeps the expert it began with.
    ///
    /// - Parameters:
    ///   - requests: a prompt and a selection each.
    ///   - options: for all that have none of their own.
    ///   - rows: at most this many run at once, the others wait.
    ///   - memory: bytes that the caches of all rows may take, or nil.
    /// - Returns: what comes of them, in the order it comes. Before anything is computed it throws ``LimeError/invalid(_:)`` for a request
    ///   that is wrong or does not fit, by its number, and ``LimeError/unsupported(_:)`` on an engine that runs one sequence at a time.
    public nonisolated func generateMany(
        _ requests: [Request], options: GenerationOptions = GenerationOptions(), rows: Int = 16, memory: Int? = nil
    ) -> AsyncThrowingStream<Answer, any Error> {
        let run = ManyRun(requests, options, rows, memory, asText: true)
        return AsyncThrowingStream { try await self.nextAnswer(run) }
    }

    /// As ``generateMany(_:options:rows:memory:)``, but token ids, stop strings left out of account; needs no tokenizer for ids.
    public nonisolated func generateManyIDs(
        _ requests: [Request], options: GenerationOptions = GenerationOptions(), rows: Int = 16, memory: Int? = nil
    ) -> AsyncThrowingStream<Answer, any Error> {
        let run = ManyRun(requests, options, rows, memory, asText: false)
        return AsyncThrowingStream { try await self.nextAnswer(run) }
    }

    private func nextAnswer(_ run: ManyRun) async throws -> Answer? {
        let experts = try open.experts
        if run.batch == nil { run.batch = try openBatch(run) }
        while run.answers.isEmpty, let batch = run.batch, batch.isBusy {
            let events = try await interruptibly { interruption in try experts.guardEngine { try batch.advance(interruption) } }
            run.take(events)
            await Task.yield()
        }
        return run.answers.isEmpty ? nil : run.answers.removeFirst()
    }

    private func openBatch(_ run: ManyRun) throws -> Batch {
        let place = "generateMany"
        if run.requests.isEmpty { throw LimeError.invalid(.init(place, "no requests", "give at least one")) }
        if run.rows < 1 { throw LimeError.invalid(.init(place, Fault("rows", expected: "at least 1", found: "\(run.rows)"), "leave it out for 16")) }
        let orders = try run.requests.enumerated().map { number, request in try makeOrder(request, number, request.options ?? run.options) }
        if run.asText { run.streams = try run.requests.map { TextStream(try tokenizer, stop: ($0.options ?? run.options).stop) } }
        let needed = orders.map { $0.ids.count + $0.most - 1 }.max() ?? 1
        let engine = try open.engine
        let each = engine.rowBytes(needed)
        if each == 0 { throw LimeError.unsupported(.init(facts.name, "this engine runs one sequence at a time", "ask one after another")) }
        if let memory = run.memory, each > memory {
            let fault = Fault("memory: bytes for one row of \(needed) tokens", expected: "at least \(each)", found: "\(memory)")
            throw LimeError.invalid(.init(place, fault, "allow more"))
        }
        let count = min(run.rows, run.requests.count, run.memory.map { $0 / each } ?? .max)
        return Batch(try open.experts.guardEngine { try engine.openRows(count, capacity: needed) }, orders)
    }

    private func makeOrder(_ request: Request, _ number: Int, _ options: GenerationOptions) throws -> Order {
        do {
            let ids: [Int64]
            switch request.prompt {
            case .text(let text): ids = try check(tokenizer.encode(text))
            case .ids(let given): ids = try check(given)
            }
            let silent = countSilent(ids.count)
            let room = maxLength - ids.count
            if room < 1 { throw full("the prompt has \(ids.count)") }
            return Order(
                number: number, ids: ids, expert: try reader(request.selection), sampler: try Sampler(options), most: min(options.maxNewTokens, room),
                limit: options.maxNewTokens <= room ? .length : .cache, eos: options.ignoreEOS ? [] : bundle.manifest.decoder?.eos ?? [],
                silent: silent, before: silent > 0 ? try reader(.none) : nil)
        } catch let error as LimeError {
            throw LimeError.invalid(.init(place: "request \(number): \(error.place)", faults: error.faults, hint: error.hint))
        }
    }

    private func reader(_ selection: Selection) throws -> Reader {
        Reader(residual: try open.experts.find(selection).map { Array($0.view) }, selection: selection)
    }
}

/// Many requests under way; their session alone touches it.
final class ManyRun: @unchecked Sendable {
    let requests: [Request]
    let options: GenerationOptions
    let rows: Int
    let memory: Int?
    let asText: Bool
    var batch: Batch?
    var streams: [TextStream] = []
    var answers: [Answer] = []
    private var stopped: Set<Int> = []

    init(_ requests: [Request], _ options: GenerationOptions, _ rows: Int, _ memory: Int?, asText: Bool) {
        self.requests = requests
        self.options = options
        self.rows = rows
        self.memory = memory
        self.asText = asText
    }

    /// Turn what a pass gave into answers.
    func take(_ events: [Event]) {
        for event in events where !stopped.contains(event.number) { // what came of it in the same pass is not its answer any more
            if !asText {
                answers.append(Answer(row: event.number, piece: "", tokens: event.token.map { [$0] } ?? [], end: event.end, error: event.error))
                continue
            }
            let piece = event.token.map { streams[event.number].push($0) } ?? streams[event.number].finish()
            let isStopped = streams[event.number].stopped
            let end = isStopped ? .stop : event.end
            if !piece.isEmpty || end != nil { answers.append(Answer(row: event.number, piece: piece, tokens: [], end: end, error: event.error)) }
            if isStopped {
                stopped.insert(event.number)
                batch?.stop(event.number)
            }
        }
    }
}
