import Foundation
import LimeEdge

/// A language model: one buffer for past and present (attention writes in place), outputs in place, the expert an input.
///
/// A routed bundle has a second graph over the same weight file: it is loaded at the first ``setRouted()`` and shares the cache's
/// buffers.
final class ONNXDecoder: DecoderEngine {
    let capacity: Int
    private(set) var length = 0
    private let loader: Loader
    private let sizes: Sizes
    private let expertRank: Int // 0: the graph takes none
    private let pinned: Graph
    private var routed: Graph?
    private var isRouted = false
    private let call = Arguments()
    private var expert: TensorHandle?
    private let keep = Memory<Int64>(1, 0)
    private let mask: Memory<Int64>
    private var logits: Memory<Float>
    private let row: Memory<Float>
    private let rowTensor: TensorHandle

    var provider: String { loader.providers.joined(separator: "+") }
    var operators: Bool? { loader.usesOperators }

    init(_ bundle: LimeBundle, _ options: SessionOptions, _ loader: Loader) throws {
        let facts = loader.facts
        guard let decoder = bundle.manifest.decoder else { throw LimeError.invalid(.init(bundle.folder.path, "holds no decoder", "open it with EncoderSession")) }
        self.loader = loader
        capacity = try Self.chooseCapacity(bundle, options, facts)
        sizes = Sizes(
            layers: facts.layers, heads: decoder.kvHeads, tokens: capacity + facts.virtualTokens, width: decoder.headDim, vocab: bundle.manifest.vocab,
            virtual: facts.virtualTokens, total: bundle.manifest.sumH)
        pinned = try loader.load(facts.file)
        try GraphCheck(bundle: bundle, graph: pinned, facts: facts, decoder: decoder).run()
        expertRank = facts.expertInput ? pinned.inputs["expert"]?.count ?? 0 : 0
        mask = Memory(sizes.tokens, 1)
        row = Memory(sizes.vocab, 0)
        logits = row
        rowTensor = try TensorHandle(row.values, [1, 1, sizes.vocab])
        for name in sizes.caches {
            let memory = Memory<Float>(sizes.row, 0)
            let tensor = try TensorHandle(memory.values, [1, sizes.heads, sizes.tokens, sizes.width], keeping: memory)
            call.setInput("past_key_values.\(name)", tensor)
            call.setOutput("present.\(name)", tensor)
        }
        call.setInput("logits_to_keep", try TensorHandle(keep.values, [1]))
    }

    func setExpert(_ residual: UnsafeBufferPointer<Float>) throws {
        isRouted = false
        if expertRank == 0 { return }
        let shape = expertRank == 2 ? [1, residual.count] : [residual.count]
        let tensor = try TensorHandle(UnsafeMutableBufferPointer(mutating: residual), shape)
        expert = tensor
        call.setInput("expert", tensor)
    }

    func setRouted() throws {
        _ = try findRouted()
        isRouted = true
        call.removeInput("expert")
    }

    private func findRouted() throws -> Graph {
        if let routed { return routed }
        guard let file = loader.facts.routed else { throw Refusal(description: "no routed graph") }
        let graph = try loader.load(file)
        routed = graph
        return graph
    }

    func rewind(_ length: Int) { self.length = min(self.length, length) } // the buffers are overwritten later

    func rowBytes(_ capacity: Int) -> Int { 8 * sizes.layers * sizes.heads * sizes.width * (capacity + sizes.virtual) }

    func openRows(_ count: Int, capacity: Int) throws -> any EngineRows {
        var own = sizes
        own.tokens = capacity + sizes.virtual
        return try ONNXRows(pinned, takesExpert: expertRank > 0, own, count: count) { try self.findRouted() }
    }

    func feed(_ ids: [Int64], keep: Int, interruption: Interruption?) throws -> UnsafeBufferPointer<Float> {
        let total = length + ids.count
        precondition(total <= capacity && keep >= 1 && keep <= ids.count)
        self.keep.values[0] = Int64(keep)
        let given = Memory(ids, 0)
        call.setInput("attention_mask", try TensorHandle(mask.part(0, total + sizes.virtual), [1, total + sizes.virtual]))
        call.setInput("input_ids", try TensorHandle(given.values, [1, ids.count], keeping: given))
        if sizes.virtual > 0 { // virtual tokens go before the first call's
            let own = Memory(length == 0 ? (0..<Int64(sizes.virtual)).map { $0 } : [], 0)
            call.setInput("virtual_ids", try TensorHandle(own.values, [1, own.values.count], keeping: own))
        }
        logits = keep == 1 ? row : Memory(keep * sizes.vocab, 0)
        call.setOutput("logits", keep == 1 ? rowTensor : try TensorHandle(logits.values, [1, keep, sizes.vocab]))
        try (isRouted ? findRouted() : pinned).run(call, interruption)
        length = total
        return UnsafeBufferPointer(logits.values)
    }

    private static func chooseCapacity(_ bundle: LimeBundle, _ options: SessionOptions, _ facts: TargetFacts) throws -> Int {
        let context = bundle.manifest.context
        let wanted = options.maxLength ?? min(context, 2048)
        if wanted > context || facts.virtualTokens >= context {
            let fault = Fault("maxLength", expected: "1..\(context - facts.virtualTokens)", found: "\(wanted)")
            throw LimeError.invalid(.init(bundle.folder.path, fault, "the model has seen no longer sequences"))
        }
        return min(wanted, context - facts.virtualTokens)
    }
}

/// The graph is what the manifest says: else sizes would be wrong where nothing checks them.
private struct GraphCheck {
    let bundle: LimeBundle
    let graph: Graph
    let facts: TargetFacts
    let decoder: DecoderFacts

    func run() throws {
        var faults: [Fault] = []
        let caches = (0..<facts.layers).flatMap { ["past_key_values.\($0).key", "past_key_values.\($0).value"] }
        let others = ["input_ids", "attention_mask", "logits_to_keep"] + (facts.expertInput ? ["expert"] : []) + (facts.virtualTokens > 0 ? ["virtual_ids"] : [])
        let wanted = Set(caches + others)
        if Set(graph.inputs.keys) != wanted {
            let odd = Set(graph.inputs.keys).symmetricDifference(wanted).sorted().prefix(3).joined(separator: ", ")
            faults.append(Fault("inputs", expected: "\(wanted.count)", found: "\(graph.inputs.count), \(odd)"))
        } else {
            for name in caches { compare(name, graph.inputs[name] ?? [], [1: decoder.kvHeads, 3: decoder.headDim], &faults) }
            if let shape = graph.inputs["expert"] { compare("expert", shape, [shape.count - 1: bundle.manifest.sumH], &faults) }
        }
        if let logits = graph.outputs["logits"] {
            compare("logits", logits, [2: bundle.manifest.vocab], &faults)
        } else {
            faults.append(Fault("outputs", expected: "logits", found: graph.outputs.keys.sorted().prefix(3).joined(separator: ", ")))
        }
        for cache in caches.map({ $0.replacingOccurrences(of: "past_key_values", with: "present") }) where graph.outputs[cache] == nil {
            faults.append(Fault("outputs: \(cache) is missing"))
        }
        if !faults.isEmpty { throw LimeError.damaged(.init(place: bundle.file(facts.file).path, faults: faults, hint: graphHint)) }
    }

    private func compare(_ name: String, _ shape: [Int], _ axes: [Int: Int], _ faults: inout [Fault]) {
        for (axis, size) in axes {
            let found = shape.indices.contains(axis) ? shape[axis] : 0
            if found != size, found != -1 { faults.append(Fault("\(name): axis \(axis)", expected: "\(size)", found: "\(found)")) }
        }
    }
}

/// Sizes of a decoder's buffers.
struct Sizes {
    let layers: Int
    let heads: Int
    /// That a row's cache holds, virtual ones included.
    var tokens: Int
    let width: Int
    let vocab: Int
    let virtual: Int
    /// sum_H.
    let total: Int

    /// Floats of one row of one buffer of keys or values.
    var row: Int { heads * tokens * width }

    /// Names of the buffers, less what tells past from present.
    var caches: [String] { (0..<layers).flatMap { ["\($0).key", "\($0).value"] } }
}
