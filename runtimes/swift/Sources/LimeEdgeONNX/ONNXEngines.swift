import CLimeONNX
import Foundation
import LimeEdge

/// ONNX Runtime through its C interface.
///
/// On iOS and macOS the app links the `onnxruntime` framework. Our operators, which make the adapter's branch one node each, are part of
/// this package and are used on the processor unless told otherwise.
public struct ONNXEngines: EngineFactory {
    /// Where ONNX Runtime is.
    public enum Library: Sendable {
        /// In the program, which links it.
        case linked
        /// In a file that is loaded when it is first needed.
        case file(String)
        /// What `OrtGetApiBase()` gives, where the linker would leave out what nobody mentions: `.base(UInt(bitPattern: OrtGetApiBase()))`.
        case base(UInt)
    }

    private let library: Library
    private let operators: Bool

    /// - Parameters:
    ///   - library: where ONNX Runtime is; the first session decides for the whole program.
    ///   - operators: false: the graph runs its functions' own nodes, slower and with the same answers up to rounding.
    public init(_ library: Library = .linked, operators: Bool = true) {
        self.library = library
        self.operators = operators
    }

    /// The bundle's folder that is read.
    public var target: String { "onnx" }

    /// Load a language model.
    public func openDecoder(_ bundle: LimeBundle, _ options: SessionOptions) throws -> any DecoderEngine {
        try ONNXDecoder(bundle, options, Loader(bundle, options, library, operators))
    }

    /// Load an encoder or a vision model.
    public func openEncoder(_ bundle: LimeBundle, _ options: SessionOptions) throws -> any EncoderEngine {
        try ONNXEncoder(bundle, Loader(bundle, options, library, operators))
    }

    /// The version of ONNX Runtime in use; empty before the first session.
    public static var version: String { String(cString: lime_onnx_version()) }
}

/// Loads the graphs of one bundle, all with the same threads, providers and operators.
final class Loader {
    let facts: TargetFacts
    let providers: [String]
    /// The operators are the processor's: beside an accelerator, which runs the nodes itself, they would only make it wait. False too
    /// where this ONNX Runtime or this processor refused a graph with them.
    private(set) var usesOperators: Bool
    private let bundle: LimeBundle
    private let threads: Int

    init(_ bundle: LimeBundle, _ options: SessionOptions, _ library: ONNXEngines.Library, _ operators: Bool) throws {
        guard let facts = bundle.manifest.target("onnx") else {
            throw LimeError.missing(.init(bundle.folder.path, "holds no onnx artifact", "export it with --target onnx"))
        }
        do {
            switch library {
            case .linked: try Refusal.check(lime_onnx_begin(nil, nil))
            case .file(let path): try Refusal.check(lime_onnx_begin(nil, path))
            case .base(let base): try Refusal.check(lime_onnx_begin(UnsafeRawPointer(bitPattern: base), nil))
            }
        } catch let refusal as Refusal {
            throw LimeError.missing(.init("ONNX Runtime", "\(refusal)", "link the onnxruntime framework, or give ONNXEngines(.file(PATH))"))
        }
        providers = facts.providers.filter { ["CPUExecutionProvider", "XnnpackExecutionProvider"].contains($0) && lime_onnx_has_provider($0) != 0 }
        if providers.isEmpty {
            let wanted = facts.providers.joined(separator: ", ")
            throw LimeError.missing(.init(bundle.folder.path, "none of \(wanted) is available", "export it for the processor: --device cpu"))
        }
        usesOperators = operators && providers == ["CPUExecutionProvider"] && facts.functions.contains { !$0.hasPrefix("Large") }
        self.facts = facts
        self.bundle = bundle
        threads = options.threads ?? facts.threads ?? 0
    }

    /// Load a graph of the bundle. Throws ``LimeError/engine(_:)`` where ONNX Runtime refuses it.
    func load(_ path: String) throws -> Graph {
        let file = bundle.file(path).path
        if usesOperators {
            if let graph = try? open(file, operators: true) { return graph }
            usesOperators = false // 1.29 does, where a model's heads are together wider than its hidden states
        }
        do {
            return try open(file, operators: false)
        } catch {
            let what = String("\(error)".prefix { !$0.isNewline }.prefix(500))
            throw LimeError.engine(.init(file, "ONNX Runtime cannot load it: \(what)", "export the bundle again, or try a newer ONNX Runtime"))
        }
    }

    private func open(_ file: String, operators: Bool) throws -> Graph {
        try Graph(file, threads: threads, xnnpack: providers.contains("XnnpackExecutionProvider"), operators: operators)
    }
}

let graphHint = "the graph is not the manifest's: export the bundle again"

extension LimeSession {
    /// Open a bundle's folder on ONNX Runtime; see ``LimeSession/open(_:with:options:tokenizer:)-(URL,_,_,_)``.
    public static func open(_ folder: URL, options: SessionOptions = SessionOptions()) async throws -> LimeSession {
        try await open(folder, with: ONNXEngines(), options: options)
    }
}
