#if canImport(CoreML)
import CoreML
import Foundation
import LimeEdge

/// Core ML: the Neural Engine, the GPU or the processor of Apple's systems.
///
/// **Nobody has run it yet**: it is type-checked against declarations of Core ML's, and what it feeds is compared with what Python's
/// runtime feeds.
@available(iOS 18, macOS 15, *)
public struct CoreMLEngines: EngineFactory {
    private let compiled: URL
    private let units: MLComputeUnits

    /// The bundle's folder that is read.
    public var target: String { "coreml" }

    /// Compile a bundle's package, once: what came of it is kept in the app's cache folder until the package is another one.
    ///
    /// - Parameters:
    ///   - bundle: with the Core ML target.
    ///   - units: what may run it.
    ///   - cache: where compiled packages are kept; nil for the app's cache folder.
    /// - Throws: ``LimeError/missing(_:)`` no Core ML target; ``LimeError/damaged(_:)`` its files; ``LimeError/engine(_:)`` Core ML
    ///   refuses it.
    public static func prepare(_ bundle: LimeBundle, units: MLComputeUnits = .all, cache: URL? = nil) async throws -> CoreMLEngines {
        guard let facts = bundle.manifest.target("coreml") else {
            throw LimeError.missing(.init(bundle.folder.path, "holds no coreml artifact", "export it with --target coreml"))
        }
        try bundle.checkLarge("coreml/")
        let place = bundle.file(facts.file)
        let folder = cache ?? FileManager.default.urls(for: .cachesDirectory, in: .userDomainMask)[0]
        let kept = folder.appendingPathComponent("lime-edge/\(bundle.packageIdentity(facts.file)).mlmodelc", isDirectory: true)
        if !FileManager.default.fileExists(atPath: kept.path) {
            do {
                let made = try await MLModel.compileModel(at: place)
                try FileManager.default.createDirectory(at: kept.deletingLastPathComponent(), withIntermediateDirectories: true)
                _ = try FileManager.default.replaceItemAt(kept, withItemAt: made)
            } catch {
                throw LimeError.engine(.init(place.path, "Core ML cannot compile it: \(error.localizedDescription)", "export the bundle again"))
            }
        }
        return CoreMLEngines(compiled: kept, units: units)
    }

    /// Load a language model.
    public func openDecoder(_ bundle: LimeBundle, _ options: SessionOptions) throws -> any DecoderEngine {
        try CoreMLDecoder(bundle, options, SwitchedPackage(bundle, LoadedPackage(compiled, units, isMultifunction: isMultifunction(bundle))))
    }

    /// Load an encoder or a vision model.
    public func openEncoder(_ bundle: LimeBundle, _ options: SessionOptions) throws -> any EncoderEngine {
        try CoreMLEncoder(SwitchedPackage(bundle, LoadedPackage(compiled, units, isMultifunction: isMultifunction(bundle))))
    }

    private func isMultifunction(_ bundle: LimeBundle) -> Bool { bundle.manifest.target("coreml")?.routed != nil }
}

/// A package in Core ML. A function is loaded when it is first needed, for its name is fixed at load. Each has a state of its own: what
/// one wrote is copied when the other takes over.
@available(iOS 18, macOS 15, *)
private final class LoadedPackage: CoreMLPackage {
    private let compiled: URL
    private let units: MLComputeUnits
    private let isMultifunction: Bool
    private var models: [String: MLModel] = [:]
    private var states: [String: MLState] = [:]
    private var active = ""

    init(_ compiled: URL, _ units: MLComputeUnits, isMultifunction: Bool) {
        self.compiled = compiled
        self.units = units
        self.isMultifunction = isMultifunction
    }

    var provider: String {
        switch units {
        case .cpuOnly: "CoreML:cpu_only"
        case .cpuAndGPU: "CoreML:cpu_and_gpu"
        case .cpuAndNeuralEngine: "CoreML:cpu_and_ne"
        default: "CoreML"
        }
    }

    func load(_ function: String) throws {
        if models[function] != nil { return }
        let configuration = MLModelConfiguration()
        configuration.computeUnits = units
        if isMultifunction { configuration.functionName = function }
        do {
            let model = try MLModel(contentsOf: compiled, configuration: configuration)
            models[function] = model
            if !model.modelDescription.stateDescriptionsByName.isEmpty { states[function] = model.makeState() }
        } catch {
            throw LimeError.engine(.init(compiled.path, "Core ML cannot load it: \(error.localizedDescription)", "export the bundle again"))
        }
    }

    func run(_ function: String, _ inputs: [String: PackageArray]) throws -> [String: Tensor] {
        try load(function)
        takeOver(function)
        guard let model = models[function] else { return [:] }
        let features = try MLDictionaryFeatureProvider(dictionary: inputs.mapValues { MLFeatureValue(multiArray: try makeArray($0)) })
        let found = if let state = states[function] {
            try model.prediction(from: features, using: state)
        } else {
            try model.prediction(from: features)
        }
        var outputs: [String: Tensor] = [:]
        for name in found.featureNames {
            if let array = found.featureValue(for: name)?.multiArrayValue { outputs[name] = try readArray(array) }
        }
        return outputs
    }

    /// What the other function wrote into its state.
    private func takeOver(_ function: String) {
        defer { active = function }
        guard active != function, let old = states[active], let new = states[function], let model = models[function] else { return }
        for name in model.modelDescription.stateDescriptionsByName.keys {
            old.withMultiArray(for: name) { source in
                new.withMultiArray(for: name) { target in
                    source.withUnsafeBytes { from in target.withUnsafeMutableBytes { to, _ in to.copyMemory(from: from) } }
                }
            }
        }
    }

    private func makeArray(_ values: PackageArray) throws -> MLMultiArray {
        switch values {
        case .integers(let values, let shape): try fill(values, shape, .int32)
        case .halves(let values, let shape): try fill(values, shape, .float16)
        case .floats(let values, let shape): try fill(values, shape, .float32)
        }
    }

    private func fill<Element>(_ values: [Element], _ shape: [Int], _ type: MLMultiArrayDataType) throws -> MLMultiArray {
        let array = try MLMultiArray(shape: shape.map { NSNumber(value: $0) }, dataType: type)
        array.withUnsafeMutableBytes { bytes, strides in
            values.withUnsafeBytes { source in
                let width = shape.last ?? 1
                let step = strides.count > 1 ? strides[strides.count - 2] : width
                let size = MemoryLayout<Element>.stride
                if step == width || shape.count < 2 {
                    bytes.copyMemory(from: source)
                } else { // rows with room behind each: shapes of more axes are always dense here
                    for row in 0..<values.count / max(width, 1) {
                        UnsafeMutableRawBufferPointer(rebasing: bytes[row * step * size..<(row * step + width) * size])
                            .copyMemory(from: UnsafeRawBufferPointer(rebasing: source[row * width * size..<(row + 1) * width * size]))
                    }
                }
            }
        }
        return array
    }

    /// float16 or float32, rows maybe with room behind each.
    private func readArray(_ array: MLMultiArray) throws -> Tensor {
        let shape = array.shape.map(\.intValue)
        let strides = array.strides.map(\.intValue)
        let isHalf = array.dataType == .float16
        var values: [Float] = []
        values.reserveCapacity(shape.reduce(1, *))
        try array.withUnsafeBytes { bytes in
            guard isHalf || array.dataType == .float32 else { throw LimeError.engine(.init("coreml", "an output is neither float16 nor float32", "export the bundle again")) }
            var index = [Int](repeating: 0, count: shape.count)
            for _ in 0..<shape.reduce(1, *) {
                let at = zip(index, strides).reduce(0) { $0 + $1.0 * $1.1 }
                values.append(isHalf ? Half.toFloat(bytes.load(fromByteOffset: 2 * at, as: UInt16.self)) : bytes.load(fromByteOffset: 4 * at, as: Float.self))
                for axis in shape.indices.reversed() { // the next place, the last axis fastest
                    index[axis] += 1
                    if index[axis] < shape[axis] { break }
                    index[axis] = 0
                }
            }
        }
        return try Tensor(.floats(values), shape)
    }
}
#endif
