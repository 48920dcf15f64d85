/// Who reads tokens: d (sum_H,) float32 copied, nil for routing; `selection` tells it from others in a cache.
struct Reader {
    let residual: [Float]?
    let selection: Selection
}

/// A request, checked.
struct Order {
    /// The caller's.
    let number: Int
    /// (S,) of the prompt.
    let ids: [Int64]
    /// Reads them and answers, `silent` first ones left out.
    let expert: Reader
    var sampler: Sampler
    /// Tokens to generate.
    let most: Int
    /// Why it ends there.
    let limit: FinishReason
    let eos: Set<Int>
    let silent: Int
    /// Reads the silent ones: the original model, where an expert acts from the generation prompt on.
    let before: Reader?

    /// Who reads the prompt's beginning.
    var first: Reader { before ?? expert }

    /// Tokens at the beginning that others may have read: all of what the original model reads; else all but two, whose logits are
    /// wanted (a call of one may round otherwise); none where routing must see it in one call.
    var shareable: Int { silent > 0 ? silent : expert.residual == nil ? 0 : max(0, ids.count - 2) }

    /// With how many of the same shareable tokens both begin, under the same expert.
    func countCommon(_ other: Order) -> Int {
        first.selection == other.first.selection ? LimeEdge.countCommon(ids, shareable, other.ids, other.shareable) : 0
    }
}

/// What came of a request: a token, or its end (`token` is nil then), and what went wrong.
struct Event {
    let number: Int
    let token: Int?
    var end: FinishReason?
    var error: LimeError?
}

/// Requests under way together: rows start, end and are refilled while others go on (continuous batching).
///
/// All rows that have a token to go on with step in one pass; the prompts of new ones are read in pieces between two steps, so that
/// nobody waits long for somebody else's prompt. A beginning that requests share under the same expert is read once. Row for
/// row the answers are those of a session of its own. The rules are lime_edge/session/batch.py's, call by call.
final class Batch {
    private let rows: any EngineRows
    private let prefixes = PrefixCache()
    private var queue: [Order]
    private var jobs: [Job] = [] // in the order they started
    private static let slice = 64 // prompt tokens that are read between two steps

    /// An order under way: its row, the prompt tokens that were read, the tokens it gave, and the one to go on with.
    private final class Job {
        var order: Order
        let row: Int
        var read: Int
        var given = 0
        var token: Int?

        init(_ order: Order, row: Int, read: Int) {
            self.order = order
            self.row = row
            self.read = read
        }

        var reads: Bool { read < order.ids.count }
    }

    init(_ rows: any EngineRows, _ orders: [Order]) {
        self.rows = rows
        queue = orders
    }

    /// Whether there is anything to advance.
    var isBusy: Bool { !queue.isEmpty || !jobs.isEmpty }

    /// End an order that runs or waits; one that has ended already is nothing to stop.
    func stop(_ number: Int) {
        if let place = jobs.firstIndex(where: { $0.order.number == number }) {
            rows.stop(jobs.remove(at: place).row)
        } else {
            queue.removeAll { $0.number == number }
        }
    }

    /// Start what fits, read a piece of the prompts that wait, and one step of all rows that answer.
    func advance(_ interruption: Interruption?) throws -> [Event] {
        try start()
        var events: [Event] = []
        try readPrompts(&events, interruption)
        let stepping = jobs.compactMap { job in job.token.map { (job, Int64($0)) } }
        if stepping.isEmpty { return events }
        let logits = try rows.step(stepping.map(\.0.row), stepping.map(\.1), interruption: interruption)
        for ((job, _), row) in zip(stepping, logits) { take(job, row, &events) }
        return events
    }

    /// Give free rows to the orders that waited longest, those left out that a prompt being read will spare work.
    private func start() throws {
        var waiting: [Order] = []
        while !queue.isEmpty, jobs.count < rows.count {
            let order = queue.removeFirst()
            if isWorthWaiting(order) { waiting.append(order) } else { jobs.append(try begin(order)) }
        }
        queue = waiting + queue
    }

    /// Take a row, its cache beginning with what is kept of the prompt.
    private func begin(_ order: Order) throws -> Job {
        let prefix = prefixes.find(order)
        var count = prefix.map { countCommon($0.ids, $0.ids.count, order.ids, order.shareable) } ?? 0
        if count > 0, count == order.silent - 1 { count -= 1 } // no single token is left to be read
        let row = try rows.start(order.first.residual, prefix: prefix?.saved)
        rows.rewind(row, count)
        if order.silent > 0, count == order.silent { try rows.setExpert(row, order.expert.residual) }
        return Job(order, row: row, read: count)
    }

    /// Whether a prompt that is being read now will give the order a longer beginning than there is.
    private func isWorthWaiting(_ order: Order) -> Bool {
        let found = prefixes.find(order).map { countCommon($0.ids, $0.ids.count, order.ids, order.shareable) } ?? 0
        return jobs.contains { $0.read < $0.order.shareable && $0.order.countCommon(order) >= found + PrefixCache.shortest }
    }

    /// About `slice` tokens of prompts, first come first; a session's chunk where nobody answers yet.
    private func readPrompts(_ events: inout [Event], _ interruption: Interruption?) throws {
        let size = jobs.contains { $0.token != nil } ? Self.slice : LimeSession.chunk
        var budget = size
        for job in jobs.filter(\.reads) {
            while budget > 0, job.reads {
                let before = job.read
                let logits = try read(job, size, interruption)
                budget -= job.read - before
                if !job.reads { take(job, logits, &events) }
            }
        }
    }

    /// The next piece of a prompt: after `size` tokens or so, where the reader changes, routed at its end. Its last logits (V,).
    private func read(_ job: Job, _ size: Int, _ interruption: Interruption?) throws -> UnsafeBufferPointer<Float> {
        let order = job.order
        let end = job.read < order.silent ? order.silent : order.ids.count
        let whole = job.read >= order.silent && order.expert.residual == nil
        let stop = whole ? end : job.read + planChunks(held: job.read, count: end - job.read, chunk: size)[0]
        let logits = try rows.feed(job.row, Array(order.ids[job.read..<stop]), interruption: interruption)
        job.read = stop
        if stop == order.silent {
            try rows.setExpert(job.row, order.expert.residual)
            share(job, stop)
        } else if stop == order.ids.count, order.silent == 0 {
            share(job, 0)
        }
        return logits
    }

    /// Keep the beginning of a prompt that was read, as far as orders that wait have it too; `least` in any case.
    private func share(_ job: Job, _ least: Int) {
        let count = max(least, queue.map { job.order.countCommon($0) }.max() ?? 0)
        if count < PrefixCache.shortest || count <= prefixes.countKept(job.order, count) { return }
        prefixes.keep(job.order.first.selection, Array(job.order.ids[..<count]), rows.save(job.row, count))
    }

    /// Pick a token; what comes of it.
    private func take(_ job: Job, _ logits: UnsafeBufferPointer<Float>, _ events: inout [Event]) {
        let token: Int
        do {
            token = try job.order.sampler.pick(logits)
        } catch {
            return end(job, .failed, &events, error as? LimeError)
        }
        if job.order.eos.contains(token) { return end(job, .stop, &events) }
        job.given += 1
        job.token = token
        events.append(Event(number: job.order.number, token: token))
        if job.given == job.order.most { end(job, job.order.limit, &events) }
    }

    private func end(_ job: Job, _ reason: FinishReason, _ events: inout [Event], _ error: LimeError? = nil) {
        stop(job.order.number)
        events.append(Event(number: job.order.number, token: nil, end: reason, error: error))
    }
}

/// Beginnings of sequences that were read once, for other sequences of the same call to begin with.
final class PrefixCache {
    /// Tokens of a beginning, who read them, and the engine's copy of its cache.
    struct Kept {
        let reader: Selection
        let ids: [Int64]
        let saved: any SavedPrefix
    }

    private var kept: [Kept] = [] // oldest use first
    static let shortest = 8 // tokens worth a copy
    private static let limit = 256 << 20

    /// The beginning with most tokens in common with what an order may take; nil where it is not worth a copy.
    func find(_ order: Order) -> Kept? {
        var best: (place: Int, count: Int)?
        for (place, one) in kept.enumerated() where one.reader == order.first.selection {
            let count = countCommon(one.ids, one.ids.count, order.ids, order.shareable)
            if count > best?.count ?? -1 { best = (place, count) }
        }
        guard let best, best.count >= Self.shortest else { return nil }
        let found = kept.remove(at: best.place)
        kept.append(found)
        return found
    }

    /// How many of the first `count` tokens of an order are kept.
    func countKept(_ order: Order, _ count: Int) -> Int {
        kept.filter { $0.reader == order.first.selection }.map { countCommon($0.ids, $0.ids.count, order.ids, count) }.max() ?? 0
    }

    /// Keep a beginning, and no shorter one that it begins with; what no longer fits goes.
    func keep(_ reader: Selection, _ ids: [Int64], _ saved: any SavedPrefix) {
        kept.removeAll { $0.reader == reader && countCommon($0.ids, $0.ids.count, ids, ids.count) == $0.ids.count }
        kept.append(Kept(reader: reader, ids: ids, saved: saved))
        while kept.reduce(0, { $0 + $1.saved.bytes }) > Self.limit { kept.removeFirst() }
    }
}

/// With how many of the same both begin, of the first `most` and `otherMost` of each.
func countCommon(_ ids: [Int64], _ most: Int, _ other: [Int64], _ otherMost: Int) -> Int {
    let least = min(most, otherMost)
    return (0..<least).first { ids[$0] != other[$0] } ?? least
}
