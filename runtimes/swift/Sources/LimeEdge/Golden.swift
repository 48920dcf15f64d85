/// One output's rows, condensed: a language model's less their mean, which no softmax sees. N counts calls, then rows of a call.
struct Rows {
    /// (N, C) at the kept columns.
    let values: [[Float]]
    /// (N,) the largest value's column.
    let best: [Int]
    /// (N,) that value.
    let peak: [Float]
    /// (N,) how far the second lies below it.
    let margin: [Float]

    init(values: [[Float]], best: [Int], peak: [Float], margin: [Float]) {
        self.values = values
        self.best = best
        self.peak = peak
        self.margin = margin
    }

    /// Keep of full rows (N, V) what is compared; `centre`: take every row's mean off first.
    init(_ rows: [[Float]], _ columns: [Int], centre: Bool) {
        var best: [Int] = []
        var peak: [Float] = []
        var margin: [Float] = []
        values = rows.map { row in
            let mean = centre ? Float(row.reduce(0.0) { $0 + Double($1) } / Double(max(row.count, 1))) : 0
            var first = 0
            var second = -Float.infinity
            for at in row.indices.dropFirst() {
                if row[at] > row[first] {
                    second = row[first]
                    first = at
                } else if row[at] > second {
                    second = row[at]
                }
            }
            best.append(first)
            peak.append(row[first] - mean)
            margin.append(row.count > 1 ? row[first] - second : 0)
            return columns.map { row[$0] - mean }
        }
        self.best = best
        self.peak = peak
        self.margin = margin
    }
}

/// One output: which rows of a call and which columns of a row are kept, and what they hold for every selection.
struct GoldenOutput {
    let rows: [Int]
    let columns: [Int]
    let expected: [Rows]
    /// What errors are measured in: the standard deviation of everything kept.
    let scale: Double

    init(rows: [Int], columns: [Int], expected: [Rows]) {
        self.rows = rows
        self.columns = columns
        self.expected = expected
        let all = expected.flatMap { $0.values.flatMap { $0.map(Double.init) } }
        let mean = all.reduce(0, +) / Double(max(all.count, 1))
        let squares = all.reduce(0) { $0 + ($1 - mean) * ($1 - mean) }
        scale = max((squares / Double(max(all.count, 1))).squareRoot(), 1e-6)
    }
}

/// What the export knows about the right answers (docs/bundle-format.md, "Golden outputs").
struct Golden {
    /// As typed.
    let selections: [String]
    /// Inputs by name, one tensor per call.
    let calls: [[String: Tensor]]
    /// Of a language model: the prompt and steps - 1 tokens; encoders: 0.
    let steps: Int
    let outputs: [String: GoldenOutput]

    static let file = "verify/golden.safetensors"
    private static let pixel: Float = 1 / 32

    /// The bundle's golden outputs, nil where it was exported without. Throws ``LimeError/damaged(_:)``.
    static func read(_ bundle: LimeBundle) throws -> Golden? {
        if bundle.manifest.files[file] == nil { return nil }
        let place = bundle.file(file).path
        do {
            let found = try Safetensors(bundle.readChecked(file))
            if found.metadata["format"] != "lime-edge-golden" { throw Json.Malformed(description: "holds no golden outputs") }
            if found.metadata["schema"] != "1" {
                let schema = Fault("schema", expected: "1", found: (found.metadata["schema"] ?? "none").shortened(20))
                throw LimeError.unsupported(.init(place, schema, "use a newer version of this library"))
            }
            return try Golden(found)
        } catch let error as Json.Malformed {
            throw LimeError.damaged(.init(place, "damaged: \(error)", copyAgain))
        }
    }

    private init(_ file: Safetensors) throws {
        selections = try Json.parse(Self.need(file.metadata["selections"], "selections")).array?.compactMap(\.string) ?? []
        steps = try Self.need(Int(file.metadata["steps"] ?? ""), "steps")
        let inputs = file.tensors.filter { $0.key.hasPrefix("inputs/") }
        let count = try Self.need(inputs.values.first?.shape.first, "inputs")
        calls = try (0..<count).map { call in
            var given: [String: Tensor] = [:]
            for (name, tensor) in inputs { given[String(name.dropFirst("inputs/".count))] = try Self.pickCall(tensor, call, count) }
            return given
        }
        var outputs: [String: GoldenOutput] = [:]
        for key in file.tensors.keys where key.hasSuffix("/columns") {
            let name = String(key.dropLast("/columns".count))
            outputs[name] = try Self.readOutput(file.tensors, name, selections.count, count)
        }
        self.outputs = outputs
        if calls.isEmpty || outputs.isEmpty || selections.isEmpty { throw Json.Malformed(description: "no inputs or outputs") }
    }

    private static func need<Value>(_ value: Value?, _ name: String) throws -> Value {
        guard let value else { throw Json.Malformed(description: "\(name) is missing or of another type") }
        return value
    }

    private static func pickCall(_ tensor: StoredTensor, _ call: Int, _ count: Int) throws -> Tensor {
        let size = tensor.size / max(count, 1)
        let shape = Array(tensor.shape.dropFirst())
        if tensor.shape.first != count { throw Json.Malformed(description: "inputs of different numbers of calls") }
        if let ints = tensor.ints() { return try Tensor(.integers(ints[call * size..<(call + 1) * size].map(Int64.init)), shape) }
        if tensor.dtype != "I8" { throw Json.Malformed(description: "inputs of \(tensor.dtype)") }
        let start = tensor.data.startIndex + call * size
        return try Tensor(.floats(tensor.data[start..<start + size].map { Float(Int8(bitPattern: $0)) * pixel }), shape)
    }

    private static func readOutput(_ tensors: [String: StoredTensor], _ name: String, _ selections: Int, _ calls: Int) throws -> GoldenOutput {
        let rows = try need(tensors["\(name)/rows"]?.ints(), "\(name)/rows").map(Int.init)
        let columns = try need(tensors["\(name)/columns"]?.ints(), "\(name)/columns").map(Int.init)
        let values = try need(tensors["\(name)/values"], "\(name)/values")
        let all = try need(values.floats(), "\(name)/values")
        let best = try need(tensors["\(name)/best"]?.ints(), "\(name)/best").map(Int.init)
        let peak = try need(tensors["\(name)/peak"]?.floats(), "\(name)/peak")
        let margin = try need(tensors["\(name)/margin"]?.floats(), "\(name)/margin")
        let each = calls * rows.count
        if values.shape != [selections, calls, rows.count, columns.count] || ![best.count, peak.count, margin.count].allSatisfy({ $0 == selections * each }) {
            throw Json.Malformed(description: "\(name): shapes")
        }
        let width = columns.count
        return GoldenOutput(rows: rows, columns: columns, expected: (0..<selections).map { index in
            let range = index * each..<(index + 1) * each
            return Rows(
                values: range.map { Array(all[$0 * width..<($0 + 1) * width]) }, best: Array(best[range]), peak: Array(peak[range]),
                margin: Array(margin[range]))
        })
    }
}
