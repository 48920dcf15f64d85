import LimeEdge

/// Several sequences in one pass, each with a cache and an expert of its own, over the graphs of one engine.
///
/// A step runs the first places of the buffers, because a batch is a view of them: who steps is kept there, and moving a cache is the
/// price of a row that ends in the middle. A prompt is a call for its row alone: ONNX Runtime's GroupQueryAttention takes several
/// tokens after a past for one row only. Routed rows step one by one: routing's scales are those of the whole call.
final class ONNXRows: EngineRows {
    let count: Int
    private let pinned: Graph
    private let routed: () throws -> Graph
    private let takesExpert: Bool
    private let sizes: Sizes
    private let buffers: [Memory<Float>] // (count, heads, tokens, width) each
    private let experts: Memory<Float> // by place, as the caches are
    private let logits: Memory<Float>
    private var places: [Int?] // who is there
    private var rows: [Int: Row] = [:]
    private var calls: [Place: RowsCall] = [:]
    private var next = 0

    private struct Row {
        var place: Int
        var length = 0
        var isRouted = false
    }

    private struct Place: Hashable {
        let first: Int
        let count: Int
    }

    private final class Saved: SavedPrefix {
        let length: Int
        let parts: [[Float]]

        init(_ length: Int, _ parts: [[Float]]) {
            self.length = length
            self.parts = parts
        }

        var bytes: Int { parts.reduce(0) { $0 + 4 * $1.count } }
    }

    init(_ pinned: Graph, takesExpert: Bool, _ sizes: Sizes, count: Int, routed: @escaping () throws -> Graph) throws {
        self.pinned = pinned
        self.routed = routed
        self.takesExpert = takesExpert
        self.sizes = sizes
        self.count = count
        buffers = sizes.caches.map { _ in Memory(count * sizes.row, 0) }
        experts = Memory(count * sizes.total, 0)
        logits = Memory(count * sizes.vocab, 0)
        places = Array(repeating: nil, count: count)
    }

    func start(_ residual: [Float]?, prefix: (any SavedPrefix)?) throws -> Int {
        let free = places.indices.filter { places[$0] == nil }
        // who never steps with others stays out of their way
        guard let place = residual == nil ? free.last : free.first else { throw Refusal(description: "no free row") }
        let number = next
        next += 1
        rows[number] = Row(place: place)
        places[place] = number
        setExpert(number, residual)
        if let saved = prefix as? Saved {
            restore(place, saved.parts)
            rows[number]?.length = saved.length
        }
        return number
    }

    func stop(_ row: Int) { if let own = rows.removeValue(forKey: row) { places[own.place] = nil } }

    func setExpert(_ row: Int, _ residual: [Float]?) {
        guard let place = rows[row]?.place else { return }
        rows[row]?.isRouted = residual == nil
        if let residual { _ = experts.part(place * sizes.total, min(residual.count, sizes.total)).update(from: residual) }
    }

    func rewind(_ row: Int, _ length: Int) {
        let kept = min(lengthOf(row), length)
        rows[row]?.length = kept
    }

    func save(_ row: Int, _ length: Int) -> any SavedPrefix { Saved(length, copy(placeOf(row), length + sizes.virtual)) }

    func feed(_ row: Int, _ ids: [Int64], interruption: Interruption?) throws -> UnsafeBufferPointer<Float> {
        let own = rows[row] ?? Row(place: 0)
        let graph = own.isRouted ? try routed() : pinned
        try call(own.place, 1).run(graph, ids, [own.length], takesExpert: takesExpert && !own.isRouted, interruption)
        rows[row]?.length += ids.count
        return logitsOf(own.place)
    }

    func step(_ rows: [Int], _ tokens: [Int64], interruption: Interruption?) throws -> [UnsafeBufferPointer<Float>] {
        let given = Dictionary(uniqueKeysWithValues: zip(rows, tokens))
        let together = rows.filter { self.rows[$0]?.isRouted == false }
        if !together.isEmpty {
            gather(together)
            let order = places.prefix(together.count).compactMap { $0 }
            try call(0, order.count).run(
                pinned, order.map { given[$0] ?? 0 }, order.map(lengthOf), takesExpert: takesExpert, interruption)
            for row in order { self.rows[row]?.length += 1 }
        }
        return try rows.map { row in
            if self.rows[row]?.isRouted == true { return try feed(row, [given[row] ?? 0], interruption: interruption) }
            return logitsOf(placeOf(row))
        }
    }

    private func placeOf(_ row: Int) -> Int { rows[row]?.place ?? 0 }

    private func lengthOf(_ row: Int) -> Int { rows[row]?.length ?? 0 }

    private func logitsOf(_ place: Int) -> UnsafeBufferPointer<Float> { UnsafeBufferPointer(logits.part(place * sizes.vocab, sizes.vocab)) }

    private func call(_ first: Int, _ count: Int) throws -> RowsCall {
        let place = Place(first: first, count: count)
        if let known = calls[place] { return known }
        let made = try RowsCall(buffers: buffers, experts: experts, logits: logits, sizes: sizes, first: first, count: count)
        calls[place] = made
        return made
    }

    // MARK: places

    /// Bring these rows into the first places.
    private func gather(_ stepping: [Int]) {
        var strangers = stepping.indices.filter { place in places[place].map { !stepping.contains($0) } ?? true }
        for row in stepping where placeOf(row) >= stepping.count { exchange(placeOf(row), strangers.removeLast()) }
    }

    /// Swap two places, of which the first is taken.
    private func exchange(_ source: Int, _ target: Int) {
        let moving = places[source]
        let waiting = places[target]
        let moved = copy(source, moving.map { lengthOf($0) + sizes.virtual } ?? 0)
        if let waiting { restore(source, copy(target, lengthOf(waiting) + sizes.virtual)) }
        restore(target, moved)
        for at in 0..<sizes.total { experts.values.swapAt(source * sizes.total + at, target * sizes.total + at) }
        for (number, place) in [(moving, target), (waiting, source)] {
            places[place] = number
            if let number { rows[number]?.place = place }
        }
    }

    /// A copy of a place's first `tokens` in every buffer, (heads, tokens, width) each.
    private func copy(_ place: Int, _ tokens: Int) -> [[Float]] {
        buffers.map { buffer in (0..<sizes.heads).flatMap { buffer.part(start(place, $0), tokens * sizes.width) } }
    }

    /// Write what ``copy(_:_:)`` gave into a place.
    private func restore(_ place: Int, _ parts: [[Float]]) {
        for (buffer, values) in zip(buffers, parts) {
            let size = values.count / sizes.heads
            for head in 0..<sizes.heads { _ = buffer.part(start(place, head), size).update(from: values[head * size..<(head + 1) * size]) }
        }
    }

    private func start(_ place: Int, _ head: Int) -> Int { place * sizes.row + head * sizes.tokens * sizes.width }
}

/// The graphs with the caches of `count` places bound, as past and as present: attention writes in place.
private final class RowsCall {
    private let arguments = Arguments()
    private let expert: TensorHandle
    private let keep = Memory<Int64>([1], 0)
    private let sizes: Sizes
    private let count: Int

    init(buffers: [Memory<Float>], experts: Memory<Float>, logits: Memory<Float>, sizes: Sizes, first: Int, count: Int) throws {
        self.sizes = sizes
        self.count = count
        expert = try TensorHandle(experts.part(first * sizes.total, count * sizes.total), [count, sizes.total], keeping: experts)
        for (name, buffer) in zip(sizes.caches, buffers) {
            let shape = [count, sizes.heads, sizes.tokens, sizes.width]
            let cache = try TensorHandle(buffer.part(first * sizes.row, count * sizes.row), shape, keeping: buffer)
            arguments.setInput("past_key_values.\(name)", cache)
            arguments.setOutput("present.\(name)", cache)
        }
        arguments.setInput("logits_to_keep", try TensorHandle(keep.values, [1], keeping: keep))
        let rows = logits.part(first * sizes.vocab, count * sizes.vocab)
        arguments.setOutput("logits", try TensorHandle(rows, [count, 1, sizes.vocab], keeping: logits))
    }

    /// Append (count, S) `ids` to caches that hold `lengths` tokens; the last position's logits go where they belong.
    func run(_ graph: Graph, _ ids: [Int64], _ lengths: [Int], takesExpert: Bool, _ interruption: Interruption?) throws {
        let each = ids.count / count
        let width = (lengths.max() ?? 0) + each + sizes.virtual
        var mask = [Int64](repeating: 0, count: count * width)
        for (row, length) in lengths.enumerated() { // padding is on the right: a row's tokens come first
            for at in 0..<length + each + sizes.virtual { mask[row * width + at] = 1 }
        }
        try give("attention_mask", mask, width)
        try give("input_ids", ids, each)
        if sizes.virtual > 0 { // virtual tokens go before the first call's
            let own = lengths.allSatisfy { $0 == 0 } ? sizes.virtual : 0
            try give("virtual_ids", (0..<count * own).map { Int64($0 % own) }, own)
        }
        if takesExpert { arguments.setInput("expert", expert) } else { arguments.removeInput("expert") }
        try graph.run(arguments, interruption)
    }

    private func give(_ name: String, _ values: [Int64], _ width: Int) throws {
        let memory = Memory(values, 0)
        arguments.setInput(name, try TensorHandle(memory.values, [count, width], keeping: memory))
    }
}
