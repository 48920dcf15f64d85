// What LimeEdgeCoreML uses of Apple's Core ML, declared for Linux: the compiler checks our calls against it, and nothing here runs.
// tests/test_swift_coreml.py compares every name with what pyobjc and NativeScript say of Core ML.
import Foundation

public enum MLComputeUnits: Int, Sendable {
    case cpuOnly = 0
    case cpuAndGPU = 1
    case all = 2
    case cpuAndNeuralEngine = 3
}

public enum MLMultiArrayDataType: Int, Sendable {
    case float16 = 0x10010
    case float32 = 0x10020
    case int32 = 0x20020
    case double = 0x10040
}

open class MLModelConfiguration: NSObject {
    open var computeUnits: MLComputeUnits = .all
    open var functionName: String?
}

open class MLMultiArray: NSObject {
    public init(shape: [NSNumber], dataType: MLMultiArrayDataType) throws { fatalError("a declaration") }

    open var dataType: MLMultiArrayDataType { fatalError("a declaration") }
    open var shape: [NSNumber] { fatalError("a declaration") }
    open var strides: [NSNumber] { fatalError("a declaration") }

    public func withUnsafeBytes<R>(_ body: (UnsafeRawBufferPointer) throws -> R) rethrows -> R { fatalError("a declaration") }

    public func withUnsafeMutableBytes<R>(_ body: (UnsafeMutableRawBufferPointer, [Int]) throws -> R) rethrows -> R { fatalError("a declaration") }
}

open class MLFeatureValue: NSObject {
    public convenience init(multiArray value: MLMultiArray) { fatalError("a declaration") }

    open var multiArrayValue: MLMultiArray? { fatalError("a declaration") }
}

public protocol MLFeatureProvider: AnyObject {
    var featureNames: Set<String> { get }
    func featureValue(for featureName: String) -> MLFeatureValue?
}

open class MLDictionaryFeatureProvider: NSObject, MLFeatureProvider {
    public init(dictionary: [String: Any]) throws { fatalError("a declaration") }

    open var featureNames: Set<String> { fatalError("a declaration") }
    open func featureValue(for featureName: String) -> MLFeatureValue? { fatalError("a declaration") }
}

open class MLFeatureDescription: NSObject {}

open class MLModelDescription: NSObject {
    open var stateDescriptionsByName: [String: MLFeatureDescription] { fatalError("a declaration") }
}

open class MLState: NSObject {
    public func withMultiArray<R>(for stateName: String, _ body: (MLMultiArray) throws -> R) rethrows -> R { fatalError("a declaration") }
}

open class MLModel: NSObject {
    public convenience init(contentsOf url: URL, configuration: MLModelConfiguration) throws { fatalError("a declaration") }

    open class func compileModel(at modelURL: URL) async throws -> URL { fatalError("a declaration") }

    open var modelDescription: MLModelDescription { fatalError("a declaration") }
    open func makeState() -> MLState { fatalError("a declaration") }
    open func prediction(from input: any MLFeatureProvider) throws -> any MLFeatureProvider { fatalError("a declaration") }
    open func prediction(from inputFeatures: any MLFeatureProvider, using state: MLState) throws -> any MLFeatureProvider { fatalError("a declaration") }
}
