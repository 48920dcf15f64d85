import Foundation

/// What every engine is: a loaded model that takes an expert residual. A session calls it from one thread at a time.
public protocol SwitchableEngine: AnyObject {
    /// What the model runs on, as the engine names it.
    var provider: String { get }

    /// Whether the graph's functions run as compiled operators; nil where the engine knows none.
    var operators: Bool? { get }

    /// Use d = p - p_ref from the next call on: (sum_H,) float32; it is there, and does not change, while it is in use.
    func setExpert(_ residual: UnsafeBufferPointer<Float>) throws

    /// Weigh the bundle's own experts per token from the next call on.
    func setRouted() throws
}

/// A language model with a cache.
public protocol DecoderEngine: SwitchableEngine {
    /// Tokens in the cache.
    var length: Int { get }

    /// Tokens that the cache holds.
    var capacity: Int { get }

    /// Append tokens to the cache.
    ///
    /// - Parameters:
    ///   - ids: (S,) each below the vocabulary's size, S at least 1 and at most `capacity - length`.
    ///   - keep: of how many of the last positions logits are wanted, 1...S.
    ///   - interruption: told when nobody waits for the answer any more; the call may then fail, the cache stays as it was.
    /// - Returns: logits (keep, V) float32; overwritten by the next call.
    func feed(_ ids: [Int64], keep: Int, interruption: Interruption?) throws -> UnsafeBufferPointer<Float>

    /// Forget the cache after its first `length` tokens.
    func rewind(_ length: Int) throws

    /// Memory of one row of ``openRows(_:capacity:)``, in bytes; 0 where the engine runs one sequence at a time.
    func rowBytes(_ capacity: Int) -> Int

    /// `count` sequences at most beside the engine's own, on the same weights; `capacity` tokens each.
    func openRows(_ count: Int, capacity: Int) throws -> any EngineRows
}

extension DecoderEngine {
    /// One sequence at a time.
    public func rowBytes(_ capacity: Int) -> Int { 0 }

    /// One sequence at a time: never called.
    public func openRows(_ count: Int, capacity: Int) throws -> any EngineRows {
        throw LimeError.unsupported(.init(provider, "one sequence at a time", "ask one after another"))
    }
}

/// Several sequences over one loaded model, each with a cache and an expert of its own, decoded in one pass.
public protocol EngineRows: AnyObject {
    /// Most rows at once.
    var count: Int { get }

    /// Take a free row for d (sum_H,) float32, copied (nil: routed); its cache begins with `prefix`. Its number is given back.
    func start(_ residual: [Float]?, prefix: (any SavedPrefix)?) throws -> Int

    /// Give a row back.
    func stop(_ row: Int)

    /// Another expert, or routing (nil), from the row's next token on; its cache stays.
    func setExpert(_ row: Int, _ residual: [Float]?) throws

    /// Forget a row's tokens after the first `length`.
    func rewind(_ row: Int, _ length: Int)

    /// A copy of a row's first `length` tokens.
    func save(_ row: Int, _ length: Int) -> any SavedPrefix

    /// Append ids (S,) to one row; its last logits (V,) float32, overwritten by the next call.
    func feed(_ row: Int, _ ids: [Int64], interruption: Interruption?) throws -> UnsafeBufferPointer<Float>

    /// Append one token to each of some rows, in one pass: (V,) float32 of each, overwritten by the next call.
    func step(_ rows: [Int], _ tokens: [Int64], interruption: Interruption?) throws -> [UnsafeBufferPointer<Float>]
}

/// An engine's copy of a sequence's first tokens in a cache.
public protocol SavedPrefix: AnyObject {
    /// Of memory.
    var bytes: Int { get }
}

/// A model without a cache.
public protocol EncoderEngine: SwitchableEngine {
    /// All outputs by name, for checked and complete inputs.
    func run(_ inputs: [String: Tensor]) throws -> [String: Tensor]
}

/// Loads a bundle's artifact for one target.
public protocol EngineFactory: Sendable {
    /// The bundle's folder that the engine reads: onnx, executorch, coreml.
    var target: String { get }

    /// Load a language model. Throws ``LimeError`` where the engine is missing or refuses the artifact.
    func openDecoder(_ bundle: LimeBundle, _ options: SessionOptions) throws -> any DecoderEngine

    /// Load an encoder or a vision model. Throws ``LimeError`` where the engine is missing or refuses the artifact.
    func openEncoder(_ bundle: LimeBundle, _ options: SessionOptions) throws -> any EncoderEngine
}

/// How to load.
public struct SessionOptions: Sendable {
    /// Of the engine; nil for the bundle's default.
    public var threads: Int?
    /// Tokens that the cache holds; nil for the model's context or 2048, whichever is less.
    public var maxLength: Int?

    /// Options; leave one out for its default.
    public init(threads: Int? = nil, maxLength: Int? = nil) {
        self.threads = threads
        self.maxLength = maxLength
    }

    func check() throws {
        var faults = Faults()
        if let threads, !(1...1024).contains(threads) { faults.add("threads", "1..1024", threads) }
        if let maxLength, maxLength < 1 { faults.add("maxLength", "at least 1", maxLength) }
        try faults.throwAny(LimeError.invalid, at: "session", hint: "leave it out for the bundle's own default")
    }
}

/// Says to a running call that nobody waits for it any more.
public final class Interruption: @unchecked Sendable { // everything is guarded by the lock
    private let lock = NSLock()
    private var stop: (() -> Void)?
    private var interrupted = false

    init() {}

    /// Interrupt the call that is running under this.
    public func interrupt() {
        lock.withLock {
            interrupted = true
            stop?()
        }
    }

    /// Run `call`; `stop` is called when it is interrupted, never before or after it.
    public func whileRunning<Value>(stop: @escaping () -> Void, _ call: () throws -> Value) rethrows -> Value {
        lock.withLock {
            self.stop = stop
            if interrupted { stop() }
        }
        defer { lock.withLock { self.stop = nil } }
        return try call()
    }
}

/// Numbers with a shape: token ids as integers, anything else as float32, in row-major order.
public struct Tensor: Sendable, Equatable {
    /// One of the two kinds.
    public enum Values: Sendable, Equatable {
        /// Integers, such as token ids.
        case integers([Int64])
        /// Floats, such as pixels.
        case floats([Float])
    }

    /// Sizes of the axes, outermost first.
    public let shape: [Int]
    /// Row by row.
    public let values: Values

    /// Integers, such as token ids. Throws ``LimeError/invalid(_:)`` where they are not as many as the shape says.
    public init(_ values: [Int64], _ shape: Int...) throws { try self.init(.integers(values), shape) }

    /// Floats, such as pixels. Throws ``LimeError/invalid(_:)`` where they are not as many as the shape says.
    public init(_ values: [Float], _ shape: Int...) throws { try self.init(.floats(values), shape) }

    /// Values of either kind. Throws ``LimeError/invalid(_:)`` where they are not as many as the shape says.
    public init(_ values: Values, _ shape: [Int]) throws {
        self.values = values
        self.shape = shape
        var size: Int? = shape.allSatisfy { $0 >= 0 } ? 1 : nil
        for axis in shape {
            let product = size?.multipliedReportingOverflow(by: axis)
            size = product.flatMap { $0.overflow ? nil : $0.partialValue }
        }
        if size != self.count {
            let shown = "(\(shape.map(String.init).joined(separator: ", ")))"
            throw LimeError.invalid(.init("array", Fault("values", expected: "as many as \(shown) holds", found: "\(count)"), "give them row by row"))
        }
    }

    /// Number of values.
    public var count: Int {
        switch values {
        case .integers(let values): values.count
        case .floats(let values): values.count
        }
    }

    /// The integers, or nil.
    public var integers: [Int64]? { if case .integers(let values) = values { values } else { nil } }

    /// The floats, or nil.
    public var floats: [Float]? { if case .floats(let values) = values { values } else { nil } }
}
