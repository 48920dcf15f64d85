/// A tensor of a safetensors file; `data` is little endian and holds exactly the tensor.
struct StoredTensor: Sendable {
    let dtype: String
    let shape: [Int]
    let data: ArraySlice<UInt8>

    /// Number of values.
    var size: Int { shape.reduce(1, *) }

    /// F16 or F32 values as float; nil for other types.
    func floats() -> [Float]? {
        switch dtype {
        case "F32": read { Float(bitPattern: UInt32(littleEndian: $0)) }
        case "F16": halves()?.map(Half.toFloat)
        default: nil
        }
    }

    /// The bits of F16 values.
    func halves() -> [UInt16]? { dtype == "F16" ? read { UInt16(littleEndian: $0) } : nil }

    /// I32 values.
    func ints() -> [Int32]? { dtype == "I32" ? read { Int32(littleEndian: $0) } : nil }

    private func read<Stored: FixedWidthInteger, Value>(_ convert: (Stored) -> Value) -> [Value] {
        data.withUnsafeBytes { bytes in
            (0..<size).map { convert(bytes.loadUnaligned(fromByteOffset: $0 * MemoryLayout<Stored>.size, as: Stored.self)) }
        }
    }
}

/// A safetensors file: 8 bytes length of the header, the header (JSON), then the tensors' bytes.
///
/// Refused as the reference reader does: a header that is not JSON or too long, offsets that overlap, leave gaps or point
/// outside, sizes that are not the shape's.
///
/// Source: the format's description in the safetensors project's README.
struct Safetensors: Sendable {
    let metadata: [String: String]
    let tensors: [String: StoredTensor]

    private static let longestHeader: UInt64 = 100_000_000
    private static let marker = "__metadata__"
    private static let widths: [String: Int64] = [
        "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4,
        "F64": 8, "I64": 8, "U64": 8,
    ]

    /// Length of a file's header in bytes, or nil where it is shorter than that.
    static func headerLength(_ bytes: [UInt8]) -> UInt64? {
        bytes.count < 8 ? nil : bytes.withUnsafeBytes { UInt64(littleEndian: $0.loadUnaligned(as: UInt64.self)) }
    }

    /// Read a whole file that is in memory.
    ///
    /// - Throws: ``Json/Malformed``
    init(_ bytes: [UInt8]) throws {
        guard let length = Self.headerLength(bytes) else { throw Json.Malformed(description: "shorter than its header's length") }
        if length < 2 || length > Self.longestHeader || length > UInt64(bytes.count - 8) { throw Json.Malformed(description: "header length \(length)") }
        let start = 8 + Int(length)
        guard let header = try Json.parse(Array(bytes[8..<start])).object else { throw Json.Malformed(description: "header: not an object") }
        metadata = try Self.readMetadata(header[Self.marker])
        tensors = try Self.readTensors(header, bytes[start...])
    }

    private static func readMetadata(_ value: Json?) throws -> [String: String] {
        guard let value, !value.isNull else { return [:] }
        guard let object = value.object else { throw Json.Malformed(description: "header: \(marker)") }
        var found: [String: String] = [:]
        for (name, text) in object.members {
            guard let text = text.string else { throw Json.Malformed(description: "header: \(marker)") }
            found[name] = text
        }
        return found
    }

    private static func readTensors(_ header: JsonObject, _ data: ArraySlice<UInt8>) throws -> [String: StoredTensor] {
        var entries: [Entry] = []
        for (name, value) in header.members where name != marker { entries.append(try Entry(name, value)) }
        var end: Int64 = 0
        for entry in entries.sorted(by: { ($0.begin, $0.end) < ($1.begin, $1.end) }) {
            if entry.begin != end { throw Json.Malformed(description: "\(entry.name): offsets overlap or leave a gap") }
            end = entry.end
        }
        if end != data.count { throw Json.Malformed(description: "holds \(data.count) bytes, tensors need \(end)") }
        var found: [String: StoredTensor] = [:]
        for entry in entries {
            let stretch = data[data.startIndex + Int(entry.begin)..<data.startIndex + Int(entry.end)]
            found[entry.name] = StoredTensor(dtype: entry.dtype, shape: entry.shape, data: stretch)
        }
        return found
    }

    private struct Entry {
        let name: String
        let dtype: String
        let shape: [Int]
        let begin: Int64
        let end: Int64

        init(_ name: String, _ value: Json) throws {
            let most = Int64(Int32.max)
            guard let dtype = value["dtype"]?.string else { throw Json.Malformed(description: "\(name): no dtype") }
            guard var size = Safetensors.widths[dtype] else { throw Json.Malformed(description: "\(name): unknown dtype \(dtype.shortened(20))") }
            let offsets = (value["data_offsets"]?.array ?? []).map { $0.integer ?? -1 }
            guard offsets.count == 2, offsets.allSatisfy({ $0 >= 0 && $0 <= most }) else { throw Json.Malformed(description: "\(name): data_offsets") }
            guard let axes = value["shape"]?.array else { throw Json.Malformed(description: "\(name): no shape") }
            var shape: [Int] = []
            for axis in axes {
                guard let axis = axis.integer, axis >= 0, axis <= most else { throw Json.Malformed(description: "\(name): shape") }
                size *= axis
                if size > most { throw Json.Malformed(description: "\(name): shape") }
                shape.append(Int(axis))
            }
            if offsets[1] - offsets[0] != size { throw Json.Malformed(description: "\(name): \(offsets[1] - offsets[0]) bytes, its shape needs \(size)") }
            self.name = name
            self.dtype = dtype
            self.shape = shape
            begin = offsets[0]
            end = offsets[1]
        }
    }
}
