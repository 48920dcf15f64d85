// What LimeEdgeExecuTorch uses of ExecuTorch's Swift API, declared after its documentation ("Using ExecuTorch on iOS", 1.0) for
// Linux: the compiler checks our calls against it, and nothing here runs. Whether the real one agrees is unknown.

public protocol Scalar {}
extension Float: Scalar {}
extension Int64: Scalar {}

public protocol ValueConvertible {}

public final class Tensor<T: Scalar>: ValueConvertible {
    public init(_ scalars: [T], shape: [Int]) { fatalError("a declaration") }

    public var count: Int { fatalError("a declaration") }
    public func scalars() -> [T] { fatalError("a declaration") }
}

public final class Value {
    public func tensor<T: Scalar>() -> Tensor<T>? { fatalError("a declaration") }
}

public final class Module {
    public init(filePath: String) { fatalError("a declaration") }

    public func load(_ method: String) throws { fatalError("a declaration") }
    public func execute(_ method: String, _ inputs: [ValueConvertible]) throws -> [Value] { fatalError("a declaration") }
}
