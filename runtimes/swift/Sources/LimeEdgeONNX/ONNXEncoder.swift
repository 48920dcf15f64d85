import LimeEdge

/// An encoder or a vision model: one call in, one call out; the expert is an input. The routed graph loads on first use.
final class ONNXEncoder: EncoderEngine {
    private let loader: Loader
    private let pinned: Graph
    private var routed: Graph?
    private var isRouted = false
    private var expert: TensorHandle?

    var provider: String { loader.providers.joined(separator: "+") }
    var operators: Bool? { loader.usesOperators }

    init(_ bundle: LimeBundle, _ loader: Loader) throws {
        self.loader = loader
        let facts = loader.facts
        pinned = try loader.load(facts.file)
        let wanted = Set(facts.inputs.map(\.name) + (facts.expertInput ? ["expert"] : []))
        var faults: [Fault] = []
        if Set(pinned.inputs.keys) != wanted {
            faults.append(Fault("inputs", expected: wanted.sorted().joined(separator: ", "), found: pinned.inputs.keys.sorted().joined(separator: ", ")))
        }
        if !Set(facts.outputs).isSubset(of: pinned.outputs.keys) {
            faults.append(Fault("outputs", expected: facts.outputs.joined(separator: ", "), found: pinned.outputs.keys.sorted().joined(separator: ", ")))
        }
        if let last = pinned.inputs["expert"]?.last, last != bundle.manifest.sumH {
            faults.append(Fault("expert", expected: "\(bundle.manifest.sumH)", found: "\(last)"))
        }
        if !faults.isEmpty { throw LimeError.damaged(.init(place: bundle.file(facts.file).path, faults: faults, hint: graphHint)) }
    }

    func setExpert(_ residual: UnsafeBufferPointer<Float>) throws {
        isRouted = false
        guard loader.facts.expertInput else { return }
        let shape = pinned.inputs["expert"]?.count == 2 ? [1, residual.count] : [residual.count]
        expert = try TensorHandle(UnsafeMutableBufferPointer(mutating: residual), shape)
    }

    func setRouted() throws {
        if routed == nil, let file = loader.facts.routed { routed = try loader.load(file) }
        isRouted = true
    }

    func run(_ inputs: [String: Tensor]) throws -> [String: Tensor] {
        let call = Arguments()
        for (name, values) in inputs { call.setInput(name, try wrap(values)) }
        if !isRouted, let expert { call.setInput("expert", expert) }
        guard let graph = isRouted ? routed : pinned else { throw Refusal(description: "no routed graph") }
        let names = loader.facts.outputs
        let made = try graph.run(call, making: names)
        return Dictionary(uniqueKeysWithValues: zip(names, try made.map { try $0.read() }))
    }

    private func wrap(_ tensor: Tensor) throws -> TensorHandle {
        switch tensor.values {
        case .integers(let values):
            let memory = Memory(values, 0)
            return try TensorHandle(memory.values, tensor.shape, keeping: memory)
        case .floats(let values):
            let memory = Memory(values, 0)
            return try TensorHandle(memory.values, tensor.shape, keeping: memory)
        }
    }
}
