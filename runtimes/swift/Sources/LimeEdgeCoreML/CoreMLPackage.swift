import LimeEdge

/// An array as a Core ML program takes it.
enum PackageArray: Sendable, Equatable {
    /// Row by row.
    case integers([Int32], shape: [Int])
    /// Row by row, bits of float16.
    case halves([UInt16], shape: [Int])
    /// Row by row.
    case floats([Float], shape: [Int])

    var shape: [Int] {
        switch self {
        case .integers(_, let shape), .halves(_, let shape), .floats(_, let shape): shape
        }
    }
}

/// One loaded package: runs its functions on one state, Core ML's or, in tests, a recording.
protocol CoreMLPackage: AnyObject {
    /// What it runs on: CoreML and the compute units.
    var provider: String { get }

    /// Have a function ready.
    func load(_ function: String) throws

    /// All outputs by name, float32.
    func run(_ function: String, _ inputs: [String: PackageArray]) throws -> [String: Tensor]
}

/// What language models and encoders share: which function runs, and under which expert.
final class SwitchedPackage {
    let facts: TargetFacts
    let package: any CoreMLPackage
    private(set) var isRouted = false
    private var residual: [UInt16] = []

    init(_ bundle: LimeBundle, _ package: any CoreMLPackage) throws {
        guard let facts = bundle.manifest.target("coreml") else {
            throw LimeError.missing(.init(bundle.folder.path, "holds no coreml artifact", "export it with --target coreml"))
        }
        self.facts = facts
        self.package = package
        try package.load("main")
    }

    /// Use d (sum_H,), rounded to float16, from the next call on.
    func setExpert(_ values: UnsafeBufferPointer<Float>) {
        isRouted = false
        residual = values.map(Half.fromFloat)
    }

    /// Weigh the frozen bank per token from now on.
    func setRouted() throws {
        if let function = facts.routed { try package.load(function) }
        isRouted = true
    }

    var function: String { isRouted ? facts.routed ?? "main" : "main" }

    /// The expert joins the inputs where the function takes one.
    func run(_ inputs: [String: PackageArray]) throws -> [String: Tensor] {
        var inputs = inputs
        if facts.expertInput, !isRouted { inputs["expert"] = .halves(residual, shape: [residual.count]) }
        return try package.run(function, inputs)
    }
}

/// Cut a prompt into enumerated lengths (rising): one padded call where at most half of it is padding.
func planCalls(_ count: Int, _ lengths: [Int]) -> [Int] {
    var plan: [Int] = []
    var left = count
    while left > 0 {
        let above = lengths.first { $0 >= left }
        let below = lengths.last { $0 > 1 && $0 <= left }
        let covers = above.map { below == nil || $0 <= 2 * left } ?? false
        let chosen = (covers ? above : below) ?? lengths[lengths.count - 1]
        plan.append(chosen)
        left -= chosen
    }
    return plan
}
