import Foundation

/// A value of a JSON text (RFC 8259).
///
/// A number without point and exponent that fits is an `integer`. Names of an object keep their order and are told apart by
/// their bytes: Swift's own strings count two spellings of an "é" as one.
enum Json: Sendable {
    case null
    case bool(Bool)
    case integer(Int64)
    case number(Double)
    case string(String)
    case array([Json])
    case object(JsonObject)

    /// A text is no JSON.
    struct Malformed: Error, CustomStringConvertible {
        let description: String
    }

    /// Read a whole text. Files come from outside: nesting is bounded, a name may come once, nothing may follow the value.
    static func parse(_ bytes: [UInt8]) throws -> Json {
        try bytes.withUnsafeBufferPointer { buffer in
            var reader = JsonReader(bytes: buffer)
            return try reader.readDocument()
        }
    }

    static func parse(_ text: String) throws -> Json { try parse(Array(text.utf8)) }

    subscript(name: String) -> Json? { object?[name] }

    var object: JsonObject? { if case .object(let value) = self { value } else { nil } }
    var array: [Json]? { if case .array(let value) = self { value } else { nil } }
    var string: String? { if case .string(let value) = self { value } else { nil } }
    var integer: Int64? { if case .integer(let value) = self { value } else { nil } }
    var int: Int? { integer.map { Int(clamping: $0) } }
    var bool: Bool? { if case .bool(let value) = self { value } else { nil } }
    var isNull: Bool { if case .null = self { true } else { false } }
    var double: Double? {
        switch self {
        case .integer(let value): Double(value)
        case .number(let value): value
        default: nil
        }
    }
}

/// Bytes as a key: equal where every byte is.
struct ByteKey: Hashable, Sendable {
    let bytes: [UInt8]

    init(_ bytes: [UInt8]) { self.bytes = bytes }

    init(_ text: String) { bytes = Array(text.utf8) }
}

/// Members of a JSON object, in order.
struct JsonObject: Sendable {
    private(set) var members: [(name: String, value: Json)] = []
    private var places: [ByteKey: Int] = [:]

    var names: [String] { members.map(\.name) }

    subscript(name: String) -> Json? { places[ByteKey(name)].map { members[$0].value } }

    /// Add a member; false where the name is there already.
    mutating func add(_ name: String, _ value: Json) -> Bool {
        if places.updateValue(members.count, forKey: ByteKey(name)) != nil { return false }
        members.append((name, value))
        return true
    }
}

/// Compares values as JSON does: by kind, numbers by value.
func areEqual(_ one: Json, _ other: Json) -> Bool {
    switch (one, other) {
    case (.null, .null): true
    case (.bool(let one), .bool(let other)): one == other
    case (.integer(let one), .integer(let other)): one == other
    case (.string(let one), .string(let other)): ByteKey(one) == ByteKey(other)
    default: false
    }
}

private struct JsonReader {
    let bytes: UnsafeBufferPointer<UInt8>
    var at = 0
    var depth = 0
    static let deepest = 100

    init(bytes: UnsafeBufferPointer<UInt8>) { self.bytes = bytes }

    mutating func readDocument() throws -> Json {
        if String(validating: bytes, as: UTF8.self) == nil { throw Json.Malformed(description: "not UTF-8") }
        let value = try readValue()
        skipSpace()
        if at != bytes.count { throw fail("something follows the value") }
        return value
    }

    func fail(_ why: String) -> Json.Malformed { Json.Malformed(description: "\(why), at byte \(at)") }

    private var next: UInt8? { at < bytes.count ? bytes[at] : nil }

    private mutating func skipSpace() {
        while let byte = next, byte == 0x20 || byte == 0x0A || byte == 0x0D || byte == 0x09 { at += 1 }
    }

    private mutating func readValue() throws -> Json {
        skipSpace()
        guard let first = next else { throw fail("the text ends early") }
        switch first {
        case UInt8(ascii: "{"): return try nested { try $0.readObject() }
        case UInt8(ascii: "["): return try nested { try $0.readArray() }
        case UInt8(ascii: "\""): return .string(try readString())
        case UInt8(ascii: "t"): return try readWord("true", .bool(true))
        case UInt8(ascii: "f"): return try readWord("false", .bool(false))
        case UInt8(ascii: "n"): return try readWord("null", .null)
        case UInt8(ascii: "-"), UInt8(ascii: "0")...UInt8(ascii: "9"): return try readNumber()
        default: throw fail("unexpected character")
        }
    }

    private mutating func nested(_ read: (inout JsonReader) throws -> Json) throws -> Json {
        depth += 1
        if depth > Self.deepest { throw fail("nested deeper than \(Self.deepest)") }
        defer { depth -= 1 }
        return try read(&self)
    }

    private mutating func readWord(_ word: StaticString, _ value: Json) throws -> Json {
        let end = at + word.utf8CodeUnitCount
        guard end <= bytes.count, (0..<word.utf8CodeUnitCount).allSatisfy({ bytes[at + $0] == word.utf8Start[$0] }) else {
            throw fail("unexpected word")
        }
        at = end
        return value
    }

    private mutating func readObject() throws -> Json {
        var object = JsonObject()
        at += 1
        if closes("}") { return .object(object) }
        repeat {
            skipSpace()
            guard next == UInt8(ascii: "\"") else { throw fail("expected a name") }
            let name = try readString()
            skipSpace()
            guard next == UInt8(ascii: ":") else { throw fail("expected ':'") }
            at += 1
            let value = try readValue()
            if !object.add(name, value) { throw fail("\"\(name.shortened(80))\" comes twice") }
        } while try continues("}")
        return .object(object)
    }

    private mutating func readArray() throws -> Json {
        var items: [Json] = []
        at += 1
        if closes("]") { return .array(items) }
        repeat { items.append(try readValue()) } while try continues("]")
        return .array(items)
    }

    private mutating func closes(_ end: Unicode.Scalar) -> Bool {
        skipSpace()
        guard next == UInt8(ascii: end) else { return false }
        at += 1
        return true
    }

    private mutating func continues(_ end: Unicode.Scalar) throws -> Bool {
        skipSpace()
        guard let byte = next else { throw fail("the text ends early") }
        guard byte == UInt8(ascii: ",") || byte == UInt8(ascii: end) else { throw fail("expected ',' or '\(end)'") }
        at += 1
        return byte == UInt8(ascii: ",")
    }

    private mutating func readString() throws -> String {
        at += 1
        let start = at
        while let byte = next, byte != UInt8(ascii: "\""), byte != UInt8(ascii: "\\"), byte >= 0x20 { at += 1 }
        if next == UInt8(ascii: "\"") {
            at += 1
            return String(decoding: bytes[start..<at - 1], as: UTF8.self)
        }
        var built = Array(bytes[start..<at])
        while let byte = next {
            at += 1
            switch byte {
            case UInt8(ascii: "\""): return String(decoding: built, as: UTF8.self)
            case UInt8(ascii: "\\"): built += try readEscape()
            case 0..<0x20: throw fail("a control character in a string")
            default: built.append(byte)
            }
        }
        throw fail("a string does not end")
    }

    private mutating func readEscape() throws -> [UInt8] {
        guard let byte = next else { throw fail("a string does not end") }
        at += 1
        switch byte {
        case UInt8(ascii: "\""), UInt8(ascii: "\\"), UInt8(ascii: "/"): return [byte]
        case UInt8(ascii: "b"): return [0x08]
        case UInt8(ascii: "f"): return [0x0C]
        case UInt8(ascii: "n"): return [0x0A]
        case UInt8(ascii: "r"): return [0x0D]
        case UInt8(ascii: "t"): return [0x09]
        case UInt8(ascii: "u"): return Array(String(try readCodePoint()).utf8)
        default: throw fail("bad escape")
        }
    }

    /// What `\u` begins: one unit, or a surrogate pair.
    private mutating func readCodePoint() throws -> Character {
        var point = try readUnit()
        if point & 0xFC00 == 0xD800 {
            guard next == UInt8(ascii: "\\"), at + 1 < bytes.count, bytes[at + 1] == UInt8(ascii: "u") else { throw fail("half a surrogate pair") }
            at += 2
            let low = try readUnit()
            guard low & 0xFC00 == 0xDC00 else { throw fail("half a surrogate pair") }
            point = 0x10000 + (point & 0x3FF) << 10 + (low & 0x3FF)
        }
        guard let scalar = Unicode.Scalar(point) else { throw fail("half a surrogate pair") }
        return Character(scalar)
    }

    private mutating func readUnit() throws -> UInt32 {
        guard at + 4 <= bytes.count else { throw fail("a string does not end") }
        var unit: UInt32 = 0
        for byte in bytes[at..<at + 4] {
            guard let digit = Character(Unicode.Scalar(byte)).hexDigitValue, byte < 0x80 else { throw fail("bad \\u escape") }
            unit = unit << 4 | UInt32(digit)
        }
        at += 4
        return unit
    }

    private mutating func readNumber() throws -> Json {
        let start = at
        if next == UInt8(ascii: "-") { at += 1 }
        let whole = try readDigits()
        if whole > 1, bytes[at - whole] == UInt8(ascii: "0") { throw fail("a number with leading zeros") }
        var exact = true
        if next == UInt8(ascii: ".") {
            at += 1
            _ = try readDigits()
            exact = false
        }
        if next == UInt8(ascii: "e") || next == UInt8(ascii: "E") {
            at += 1
            if next == UInt8(ascii: "+") || next == UInt8(ascii: "-") { at += 1 }
            _ = try readDigits()
            exact = false
        }
        let text = String(decoding: bytes[start..<at], as: UTF8.self)
        if exact, let integer = Int64(text) { return .integer(integer) }
        guard let number = Double(text) else { throw fail("a number that is none") }
        return .number(number)
    }

    private mutating func readDigits() throws -> Int {
        let start = at
        while let byte = next, byte >= UInt8(ascii: "0"), byte <= UInt8(ascii: "9") { at += 1 }
        if at == start { throw fail("expected a digit") }
        return at - start
    }
}

extension Json {
    /// The text, as short as JSON allows; members in their order. Numbers that are none (NaN, infinity) become null.
    var text: String {
        switch self {
        case .null: "null"
        case .bool(let value): value ? "true" : "false"
        case .integer(let value): "\(value)"
        case .number(let value): value.isFinite ? "\(value)" : "null"
        case .string(let value): Self.quote(value)
        case .array(let items): "[" + items.map(\.text).joined(separator: ",") + "]"
        case .object(let object): "{" + object.members.map { Self.quote($0.name) + ":" + $0.value.text }.joined(separator: ",") + "}"
        }
    }

    private static func quote(_ text: String) -> String {
        var out = "\""
        for scalar in text.unicodeScalars {
            switch scalar {
            case "\"", "\\": out += "\\\(scalar)"
            case "\n": out += "\\n"
            case "\u{0}"..<" ", "\u{7F}": out += "\\u" + String(repeating: "0", count: scalar.value < 16 ? 3 : 2) + String(scalar.value, radix: 16)
            default: out.unicodeScalars.append(scalar)
            }
        }
        return out + "\""
    }
}

extension Json: ExpressibleByStringLiteral, ExpressibleByDictionaryLiteral, ExpressibleByArrayLiteral, ExpressibleByNilLiteral {
    init(stringLiteral value: String) { self = .string(value) }

    init(nilLiteral: ()) { self = .null }

    init(arrayLiteral elements: Json...) { self = .array(elements) }

    init(dictionaryLiteral elements: (String, Json)...) {
        var object = JsonObject()
        for (name, value) in elements { _ = object.add(name, value) }
        self = .object(object)
    }

    init(_ value: Int?) { self = value.map { .integer(Int64($0)) } ?? .null }

    init(_ value: Double?) { self = value.map { .number($0) } ?? .null }

    init(_ value: String?) { self = value.map { .string($0) } ?? .null }

    init(_ value: Bool?) { self = value.map { .bool($0) } ?? .null }
}
