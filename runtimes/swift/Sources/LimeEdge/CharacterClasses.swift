/// What is a letter, a number and white space, by ranges of code points.
///
/// Swift's own classes follow the Unicode version of the machine at hand and differ from the tokenizer library's in thousands of
/// places, so a bundle brings the library's.
struct CharacterClasses: Sendable {
    /// The kinds that the splits tell apart.
    enum Kind: Sendable { case letter, number, space, other }

    private let starts: [UInt32]
    private let ends: [UInt32]
    private let kinds: [Kind]
    private let digits: [UInt32]
    private var ascii: [Kind] = []

    init(letters: [UInt32], numbers: [UInt32], spaces: [UInt32], digits: [UInt32] = []) {
        let ranges = [(letters, Kind.letter), (numbers, .number), (spaces, .space)]
            .flatMap { bounds, kind in stride(from: 0, to: bounds.count - 1, by: 2).map { (bounds[$0], bounds[$0 + 1], kind) } }
            .sorted { $0.0 < $1.0 }
        starts = ranges.map(\.0)
        ends = ranges.map(\.1)
        kinds = ranges.map(\.2)
        self.digits = digits
        ascii = (0..<128).map { search($0) }
    }

    /// The kind of a code point.
    func kind(_ point: UInt32) -> Kind { point < 128 ? ascii[Int(point)] : search(point) }

    /// Whether the library's digit splitter cuts here: not quite the numbers.
    func isDigit(_ point: UInt32) -> Bool {
        let at = Self.place(of: point, in: digits)
        return at >= 0 && (at % 2 == 0 || digits[at] == point)
    }

    private func search(_ point: UInt32) -> Kind {
        let at = Self.place(of: point, in: starts)
        return at >= 0 && point <= ends[at] ? kinds[at] : .other
    }

    /// The last place whose value is not above `point`; -1 where there is none.
    private static func place(of point: UInt32, in sorted: [UInt32]) -> Int {
        var low = 0
        var high = sorted.count
        while low < high {
            let middle = (low + high) / 2
            if sorted[middle] <= point { low = middle + 1 } else { high = middle }
        }
        return low - 1
    }

    /// Read a bundle's table: JSON, per class a flat list of first and last code points.
    init(reading bytes: [UInt8], _ place: String) throws {
        let table: Json
        do {
            table = try Json.parse(bytes)
        } catch let error as Json.Malformed {
            throw LimeError.damaged(.init(place, "not JSON: \(error)", copyAgain))
        }
        if table["format"]?.string != "lime-edge-classes" || table["schema"]?.integer != 1 {
            let found = table["schema"]?.text ?? "none"
            throw LimeError.unsupported(.init(place, Fault("schema", expected: "1", found: found.shortened(20)), "use a newer version of this library"))
        }
        let ranges = try ["letters", "numbers", "spaces"].map { try Self.readRanges(table[$0], "\(place): \($0)") }
        let digits = try table["digits"].map { try Self.readRanges($0, "\(place): digits") } ?? []
        self.init(letters: ranges[0], numbers: ranges[1], spaces: ranges[2], digits: digits)
    }

    private static func readRanges(_ value: Json?, _ place: String) throws -> [UInt32] {
        let bounds = (value?.array ?? []).map { $0.integer ?? -1 }
        let rising = value?.array != nil && bounds.count % 2 == 0 && bounds.allSatisfy { $0 >= 0 && $0 <= 0x10FFFF }
            && bounds.indices.dropFirst().allSatisfy { bounds[$0] > bounds[$0 - 1] || ($0 % 2 == 1 && bounds[$0] == bounds[$0 - 1]) }
        if !rising { throw LimeError.damaged(.init(place, "no rising ranges of code points", copyAgain)) }
        return bounds.map { UInt32($0) }
    }
}
