import ExecuTorch
import Foundation
import LimeEdge

/// ExecuTorch's `Module`, on a bundle's `executorch/model.pte`.
///
/// **Compiled against declarations from its documentation, never run**: docs/bundle-format.md ("The ExecuTorch program") says what each
/// method takes, and the Python runtime does the same through the same runtime library. ExecuTorch calls its Swift API experimental.
public struct ExecuTorchEngines: EngineFactory {
    /// Engines for the ExecuTorch target.
    public init() {}

    /// The bundle's folder that is read.
    public var target: String { "executorch" }

    /// Load a language model.
    public func openDecoder(_ bundle: LimeBundle, _ options: SessionOptions) throws -> any DecoderEngine { try ExecuTorchDecoder(bundle, options) }

    /// Not yet: throws ``LimeError/unsupported(_:)``.
    public func openEncoder(_ bundle: LimeBundle, _ options: SessionOptions) throws -> any EncoderEngine {
        throw LimeError.unsupported(.init(bundle.folder.path, "encoders on ExecuTorch", "use the ONNX target"))
    }
}

/// The program holds its cache; a sequence goes back by a smaller position. ExecuTorch checks no position: this does.
final class ExecuTorchDecoder: DecoderEngine {
    let capacity: Int
    private(set) var length = 0
    private let facts: TargetFacts
    private let vocab: Int
    private let module: Module
    private var expert: ExecuTorch.Tensor<Float>?
    private var isRouted = false
    private var view = UnsafeMutableBufferPointer<Float>(start: nil, count: 0)

    var provider: String { "XNNPACK" }
    var operators: Bool? { nil }

    init(_ bundle: LimeBundle, _ options: SessionOptions) throws {
        guard let facts = bundle.manifest.target("executorch"), let most = facts.maxLength else {
            throw LimeError.missing(.init(bundle.folder.path, "holds no executorch artifact", "export it with --target executorch"))
        }
        if let wanted = options.maxLength, wanted > most {
            let fault = Fault("maxLength", expected: "at most \(most)", found: "\(wanted)")
            throw LimeError.invalid(.init(bundle.folder.path, fault, "the cache is static: export with a larger --max-seq-len"))
        }
        self.facts = facts
        vocab = bundle.manifest.vocab
        capacity = options.maxLength ?? most
        module = Module(filePath: bundle.file(facts.file).path)
        try module.load("forward")
    }

    deinit { view.deallocate() }

    func setExpert(_ residual: UnsafeBufferPointer<Float>) throws {
        isRouted = false
        expert = facts.expertInput ? ExecuTorch.Tensor<Float>(Array(residual), shape: [residual.count]) : nil
    }

    func setRouted() throws {
        try module.load("routed")
        isRouted = true
    }

    func rewind(_ length: Int) { self.length = min(self.length, length) }

    func feed(_ ids: [Int64], keep: Int, interruption: Interruption?) throws -> UnsafeBufferPointer<Float> {
        precondition(length + ids.count <= capacity && keep >= 1 && keep <= ids.count)
        // a sequence begins with the virtual tokens, whose ids follow the vocabulary
        let tokens = (length == 0 ? (0..<facts.virtualTokens).map { Int64(vocab + $0) } : []) + ids
        if let most = facts.promptLength, tokens.count > most {
            throw LimeError.full(.init("executorch", Fault("tokens of a call", expected: "at most \(most)", found: "\(tokens.count)"), "export with a larger --prompt-length"))
        }
        let position = Int64(length == 0 ? 0 : length + facts.virtualTokens)
        let rows = (0..<keep).map { Int64(tokens.count - keep + $0) }
        var inputs: [any ValueConvertible] = [
            ExecuTorch.Tensor<Int64>(tokens, shape: [1, tokens.count]), ExecuTorch.Tensor<Int64>([position], shape: [1]),
            ExecuTorch.Tensor<Int64>(rows, shape: [keep]),
        ]
        if let expert, !isRouted { inputs.append(expert) }
        let outputs = try module.execute(isRouted ? "routed" : "forward", inputs)
        guard let found: ExecuTorch.Tensor<Float> = outputs.first?.tensor(), found.count == keep * vocab else {
            throw LimeError.engine(.init("executorch", "no logits of (\(keep), \(vocab))", "export the bundle again"))
        }
        length += ids.count
        view.deallocate()
        view = .allocate(capacity: found.count)
        _ = view.initialize(from: found.scalars())
        return UnsafeBufferPointer(view)
    }
}
