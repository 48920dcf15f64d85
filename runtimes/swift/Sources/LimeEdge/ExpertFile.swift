import Foundation

/// One expert: its full vector p (sum_H,), gamma * p_shared included, as float16 or float32.
struct Expert: Sendable {
    /// As it is stored: bits of float16, or float32.
    enum Vector: Sendable {
        case halves([UInt16])
        case floats([Float])
    }

    var name: String
    let adapterID: String
    let vector: Vector

    var count: Int {
        switch vector {
        case .halves(let values): values.count
        case .floats(let values): values.count
        }
    }

    private static let longestHeader: UInt64 = 64 << 10
    private static let hint = "copy the file again: it may be truncated"
    private static let packHint = "write it anew with lime-edge experts pack"

    /// Read an expert file that lies anywhere. Throws as ``init(_:_:)``.
    init(file: URL) throws {
        var isFolder: ObjCBool = false
        guard FileManager.default.fileExists(atPath: file.path, isDirectory: &isFolder), !isFolder.boolValue else {
            throw LimeError.missing(.init(file.path, "no such expert file", "an expert is one .safetensors file"))
        }
        try self.init(try readFile(file.path, Self.hint), file.path)
    }

    /// Read the bytes of an expert file.
    ///
    /// - Throws: ``LimeError/damaged(_:)`` truncated, no expert file, wrong dtype or shape, NaN or infinite values, a bad name;
    ///   ``LimeError/unsupported(_:)`` another schema.
    init(_ bytes: [UInt8], _ place: String) throws {
        let file: Safetensors
        do {
            if let length = Safetensors.headerLength(bytes), length > Self.longestHeader { throw Json.Malformed(description: "header longer than 64 KiB") }
            file = try Safetensors(bytes)
        } catch let error as Json.Malformed {
            throw LimeError.damaged(.init(place, "not a readable expert file: \(error)", Self.hint))
        }
        let header = file.metadata
        guard header["format"] == "lime-edge-expert" else {
            throw LimeError.damaged(.init(place, "not a LiME expert file", "make one with lime-edge experts pack"))
        }
        guard header["schema"] == "2" else {
            throw LimeError.unsupported(.init(place, Fault("schema", expected: "2", found: (header["schema"] ?? "none").shortened(20)), Self.packHint))
        }
        var faults = Faults()
        let found = Self.readVector(file.tensors, &faults)
        if let fault = Names.checkExpert(header["name"]) { faults.add("name: \(fault)") }
        let adapter = header["adapter_id"] ?? ""
        if adapter.utf8.count != 64 || !adapter.utf8.allSatisfy({ ($0 >= 0x30 && $0 <= 0x39) || ($0 >= 0x61 && $0 <= 0x66) }) {
            faults.add("adapter_id", "64 hex digits", adapter.isEmpty ? "none" : adapter.shortened(70))
        }
        try faults.throwAny(LimeError.damaged, at: place, hint: Self.packHint)
        guard let found, let name = header["name"] else { throw LimeError.damaged(.init(place, "no vector", Self.packHint)) }
        let finite = switch found {
        case .halves(let values): values.allSatisfy(Half.isFinite)
        case .floats(let values): values.allSatisfy(\.isFinite)
        }
        if !finite { throw LimeError.damaged(.init(place, "the vector holds NaN or infinite values", Self.packHint)) }
        self.name = name
        adapterID = adapter
        vector = found
    }

    private static func readVector(_ tensors: [String: StoredTensor], _ faults: inout Faults) -> Vector? {
        guard tensors.count == 1, let tensor = tensors["expert"] else {
            faults.add("tensors", "expert alone", tensors.keys.sorted().joined(separator: ", ").shortened(80))
            return nil
        }
        if tensor.shape.count != 1 { faults.add("shape", "one axis", tensor.shape) }
        if let halves = tensor.halves() { return .halves(halves) }
        if tensor.dtype == "F32", let floats = tensor.floats() { return .floats(floats) }
        faults.add("dtype", "float16 or float32", tensor.dtype)
        return nil
    }
}

/// All bytes of a file. Throws ``LimeError/damaged(_:)``.
func readFile(_ path: String, _ hint: String) throws -> [UInt8] {
    guard let data = FileManager.default.contents(atPath: path) else { throw LimeError.damaged(.init(path, "cannot be read", hint)) }
    return Array(data)
}
