import CLimeONNX
import Foundation
import LimeEdge

/// Why ONNX Runtime refused something, in its own words.
struct Refusal: Error, CustomStringConvertible {
    let description: String

    /// Throws what a call of the shim says; nothing where it says nothing.
    static func check(_ fault: UnsafeMutablePointer<CChar>?) throws {
        guard let fault else { return }
        defer { free(fault) }
        throw Refusal(description: String(cString: fault))
    }
}

/// A loaded graph.
final class Graph {
    private let handle: OpaquePointer
    /// Names and shapes (-1: an axis varies).
    let inputs: [String: [Int]]
    /// Names and shapes (-1: an axis varies).
    let outputs: [String: [Int]]

    init(_ file: String, threads: Int, xnnpack: Bool, operators: Bool) throws {
        var graph: OpaquePointer?
        try Refusal.check(lime_graph_load(file, Int32(clamping: threads), xnnpack ? 1 : 0, operators ? 1 : 0, &graph))
        guard let graph else { throw Refusal(description: "no graph") }
        handle = graph
        inputs = Self.describe(graph, outputs: 0)
        outputs = Self.describe(graph, outputs: 1)
    }

    deinit { lime_graph_free(handle) }

    private static func describe(_ graph: OpaquePointer, outputs: Int32) -> [String: [Int]] {
        var found: [String: [Int]] = [:]
        for index in 0..<lime_graph_count(graph, outputs) {
            var axes = [Int64](repeating: 0, count: Int(LIME_MOST_AXES))
            let rank = lime_graph_shape(graph, outputs, index, &axes)
            found[String(cString: lime_graph_name(graph, outputs, index))] = axes.prefix(rank).map { Int($0) }
        }
        return found
    }

    /// Run it; every output is written in place.
    func run(_ call: Arguments, _ interruption: Interruption?) throws {
        try call.withPointers { names, values, outputNames, outputs in
            var outputs = outputs
            try run(names, values, outputNames, &outputs, interruption)
        }
    }

    /// Run it; outputs are made and given back, in the order of their names.
    func run(_ call: Arguments, making outputs: [String]) throws -> [TensorHandle] {
        let names = outputs.map { CName($0) }
        return try call.withPointers { inputNames, values, _, _ in
            var made = [OpaquePointer?](repeating: nil, count: outputs.count)
            try run(inputNames, values, names.map { UnsafePointer($0.pointer) }, &made, nil)
            return made.compactMap { $0.map(TensorHandle.init) }
        }
    }

    private func run(
        _ names: [UnsafePointer<CChar>?], _ values: [OpaquePointer?], _ outputNames: [UnsafePointer<CChar>?], _ outputs: inout [OpaquePointer?],
        _ interruption: Interruption?
    ) throws {
        guard let interruption else {
            return try Refusal.check(lime_graph_run(handle, nil, names, values, names.count, outputNames, outputNames.count, &outputs))
        }
        var stop: OpaquePointer?
        try Refusal.check(lime_stop_make(&stop))
        guard let stop else { throw Refusal(description: "no memory left") }
        defer { lime_stop_free(stop) }
        try interruption.whileRunning(stop: { lime_stop_now(stop) }) {
            try Refusal.check(lime_graph_run(handle, stop, names, values, names.count, outputNames, outputNames.count, &outputs))
        }
    }
}

/// A name as C wants it.
final class CName {
    let pointer: UnsafeMutablePointer<CChar>

    init(_ name: String) { pointer = strdup(name) }

    deinit { free(pointer) }
}

/// ONNX Runtime's tensor over memory of ours, or its own.
final class TensorHandle {
    let pointer: OpaquePointer
    private let memory: AnyObject? // kept as long as the tensor

    init(_ pointer: OpaquePointer) {
        self.pointer = pointer
        memory = nil
    }

    /// float32 numbers that stay where they are while `memory` does.
    init(_ values: UnsafeMutableBufferPointer<Float>, _ shape: [Int], keeping memory: AnyObject? = nil) throws {
        pointer = try Self.wrap(UnsafeMutableRawBufferPointer(values), shape, LIME_FLOAT)
        self.memory = memory
    }

    /// Integers that stay where they are while `memory` does.
    init(_ values: UnsafeMutableBufferPointer<Int64>, _ shape: [Int], keeping memory: AnyObject? = nil) throws {
        pointer = try Self.wrap(UnsafeMutableRawBufferPointer(values), shape, LIME_INT64)
        self.memory = memory
    }

    deinit { lime_tensor_free(pointer) }

    private static func wrap(_ bytes: UnsafeMutableRawBufferPointer, _ shape: [Int], _ type: LimeElement) throws -> OpaquePointer {
        var tensor: OpaquePointer?
        try Refusal.check(lime_tensor_wrap(bytes.baseAddress, bytes.count, shape.map(Int64.init), shape.count, Int32(type.rawValue), &tensor))
        guard let tensor else { throw Refusal(description: "no tensor") }
        return tensor
    }

    /// A copy of a float32 tensor.
    func read() throws -> Tensor {
        var values: UnsafeMutablePointer<Float>?
        var axes = [Int64](repeating: 0, count: Int(LIME_MOST_AXES))
        var rank = 0
        try Refusal.check(lime_tensor_floats(pointer, &values, &axes, &rank))
        let shape = axes.prefix(rank).map { Int($0) }
        return try Tensor(.floats(Array(UnsafeBufferPointer(start: values, count: shape.reduce(1, *)))), shape)
    }
}

/// Numbers of one type in memory that stays where it is.
final class Memory<Element> {
    let values: UnsafeMutableBufferPointer<Element>

    /// Zeros.
    init(_ count: Int, _ zero: Element) {
        let raw = UnsafeMutableRawBufferPointer.allocate(byteCount: max(count, 1) * MemoryLayout<Element>.stride, alignment: 64)
        values = UnsafeMutableBufferPointer(start: raw.bindMemory(to: Element.self).baseAddress, count: count)
        values.initialize(repeating: zero)
    }

    /// A copy.
    convenience init(_ given: [Element], _ zero: Element) {
        self.init(given.count, zero)
        _ = values.update(from: given)
    }

    deinit { UnsafeMutableRawPointer(values.baseAddress)?.deallocate() }

    /// A view of `count` values.
    func part(_ start: Int, _ count: Int) -> UnsafeMutableBufferPointer<Element> {
        UnsafeMutableBufferPointer(rebasing: values[start..<start + count])
    }
}

/// Inputs and outputs of a call, by name; those that never change are set once.
final class Arguments {
    private var inputs: [(name: CName, text: String, value: TensorHandle)] = []
    private var outputs: [(name: CName, text: String, value: TensorHandle)] = []

    func setInput(_ name: String, _ value: TensorHandle) { Self.set(&inputs, name, value) }

    func setOutput(_ name: String, _ value: TensorHandle) { Self.set(&outputs, name, value) }

    func removeInput(_ name: String) { inputs.removeAll { $0.text == name } }

    private static func set(_ list: inout [(name: CName, text: String, value: TensorHandle)], _ name: String, _ value: TensorHandle) {
        if let place = list.lastIndex(where: { $0.text == name }) {
            list[place].value = value
        } else {
            list.append((CName(name), name, value))
        }
    }

    func withPointers<Value>(
        _ call: ([UnsafePointer<CChar>?], [OpaquePointer?], [UnsafePointer<CChar>?], [OpaquePointer?]) throws -> Value
    ) rethrows -> Value {
        try withExtendedLifetime((inputs, outputs)) {
            try call(
                inputs.map { UnsafePointer($0.name.pointer) }, inputs.map(\.value.pointer), outputs.map { UnsafePointer($0.name.pointer) },
                outputs.map(\.value.pointer))
        }
    }
}
