import LimeEdge

/// A language model with its cache as state.
///
/// Prompts are cut into the lengths that the package enumerates; what is left over is padded, and the padding is neither stored nor seen.
final class CoreMLDecoder: DecoderEngine {
    let capacity: Int
    private(set) var length = 0
    private let package: SwitchedPackage
    private let vocab: Int
    private let virtual: Int // tokens in the cache before everything else
    private let lengths: [Int]
    private var view: UnsafeMutableBufferPointer<Float>

    var provider: String { package.package.provider }
    var operators: Bool? { nil }

    init(_ bundle: LimeBundle, _ options: SessionOptions, _ package: SwitchedPackage) throws {
        let facts = package.facts
        self.package = package
        virtual = facts.virtualTokens
        vocab = bundle.manifest.vocab
        lengths = facts.lengths.sorted()
        let most = min(facts.maxLength ?? 0, bundle.manifest.context) - virtual
        capacity = options.maxLength ?? most
        if capacity < 1 || capacity > most || lengths.isEmpty {
            let fault = Fault("maxLength", expected: "1..\(most)", found: "\(capacity)")
            throw LimeError.invalid(.init(bundle.folder.path, fault, "`max_seq_len` at export sets the cache of this target"))
        }
        view = UnsafeMutableBufferPointer(start: nil, count: 0)
    }

    deinit { view.deallocate() }

    func setExpert(_ residual: UnsafeBufferPointer<Float>) { package.setExpert(residual) }

    func setRouted() throws { try package.setRouted() }

    func rewind(_ length: Int) { self.length = min(self.length, length) } // the cache is overwritten later

    func feed(_ given: [Int64], keep: Int, interruption: Interruption?) throws -> UnsafeBufferPointer<Float> {
        let fed = length + (length > 0 ? virtual : 0)
        let ids = (length == 0 ? (0..<virtual).map { Int32(vocab + $0) } : []) + given.map { Int32($0) }
        var rows: [Float] = []
        var start = 0
        for width in try cut(ids.count) {
            if Task.isCancelled, interruption != nil { throw CancellationError() } // a call cannot be stopped, what follows can
            let piece = ids[start..<min(start + width, ids.count)]
            let found = try call(piece, width, at: fed + start)
            let end = start + piece.count
            if end > ids.count - keep { // rows are wanted from here on
                let first = max(0, ids.count - keep - start)
                rows += found[first * vocab..<piece.count * vocab]
            }
            start = end
        }
        length = fed + ids.count - virtual
        view.deallocate()
        view = .allocate(capacity: rows.count)
        _ = view.initialize(from: rows)
        return UnsafeBufferPointer(view)
    }

    /// Lengths of the calls for a prompt; routing must see all of it in one.
    private func cut(_ count: Int) throws -> [Int] {
        if !package.isRouted { return planCalls(count, lengths) }
        if let fitting = lengths.first(where: { $0 >= count }) { return [fitting] }
        let fault = Fault("routed: tokens of a prompt", expected: "at most \(max(0, lengths[lengths.count - 1] - virtual))", found: "\(count - virtual)")
        throw LimeError.invalid(.init("coreml", fault, "export it with longer `prompt_lengths`"))
    }

    /// One call: logits of all its rows, padding included.
    private func call(_ piece: ArraySlice<Int32>, _ width: Int, at position: Int) throws -> [Float] {
        let ids = Array(piece) + Array(repeating: 0, count: width - piece.count)
        let found = try package.run([
            "input_ids": .integers(ids, shape: [1, width]), "position": .integers([Int32(position)], shape: [1]),
            "length": .integers([Int32(piece.count)], shape: [1]),
        ])
        guard let logits = found["logits"]?.floats, logits.count == width * vocab else {
            throw LimeError.engine(.init("coreml", Fault("logits", expected: "(1, \(width), \(vocab))", found: "\(found["logits"]?.shape ?? [])"), "export the bundle again"))
        }
        return logits
    }
}

/// An encoder or a vision model: one call in, one call out.
///
/// Pinned, every row of a batch is a call of its own, padded to an enumerated length. Routed, the batch is one call as it is: routing
/// weighs over everything it is given.
final class CoreMLEncoder: EncoderEngine {
    private let package: SwitchedPackage

    var provider: String { package.package.provider }
    var operators: Bool? { nil }

    init(_ package: SwitchedPackage) { self.package = package }

    func setExpert(_ residual: UnsafeBufferPointer<Float>) { package.setExpert(residual) }

    func setRouted() throws { try package.setRouted() }

    func run(_ inputs: [String: Tensor]) throws -> [String: Tensor] {
        if package.isRouted { return try package.run(inputs.mapValues { convert($0, padded: 0) }) }
        let count = inputs.values.first?.shape.first ?? 0
        let rows = try (0..<count).map { row in try runRow(inputs.mapValues { try pick($0, row) }) }
        var found: [String: Tensor] = [:]
        for name in package.facts.outputs {
            let parts = rows.compactMap { $0[name] }
            guard let first = parts.first, parts.count == count else { throw LimeError.engine(.init("coreml", "output \(name) is missing", "export the bundle again")) }
            found[name] = try Tensor(.floats(parts.flatMap { $0.floats ?? [] }), [count] + first.shape.dropFirst())
        }
        return found
    }

    /// One text or image; outputs that have a row per token lose those of the padding.
    private func runRow(_ inputs: [String: Tensor]) throws -> [String: Tensor] {
        let tokens = inputs["input_ids"]?.shape[1] ?? 0
        let length = package.facts.lengths.sorted().first { $0 >= tokens } ?? tokens
        let found = try package.run(inputs.mapValues { convert($0, padded: length - tokens) }) // the mask's zeros tell the padding
        return try found.mapValues { output in
            guard length > tokens, output.shape.count == 3, let values = output.floats else { return output }
            return try Tensor(.floats(Array(values[..<(tokens * output.shape[2])])), [1, tokens, output.shape[2]])
        }
    }

    private func pick(_ tensor: Tensor, _ row: Int) throws -> Tensor {
        let size = tensor.count / max(tensor.shape.first ?? 1, 1)
        let shape = [1] + tensor.shape.dropFirst()
        switch tensor.values {
        case .integers(let values): return try Tensor(.integers(Array(values[row * size..<(row + 1) * size])), shape)
        case .floats(let values): return try Tensor(.floats(Array(values[row * size..<(row + 1) * size])), shape)
        }
    }

    /// As the program takes it; `padded`: zeros behind each row of a text.
    private func convert(_ tensor: Tensor, padded: Int) -> PackageArray {
        switch tensor.values {
        case .integers(let values) where padded > 0: .integers(values.map { Int32(clamping: $0) } + Array(repeating: 0, count: padded), shape: [1, values.count + padded])
        case .integers(let values): .integers(values.map { Int32(clamping: $0) }, shape: tensor.shape)
        case .floats(let values): .floats(values, shape: tensor.shape)
        }
    }
}
