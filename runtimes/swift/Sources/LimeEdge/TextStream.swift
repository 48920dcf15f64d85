/// Turns token ids into pieces of text that are safe to show, and watches for stop strings.
///
/// A piece is held back while it may still change: bytes of an unfinished character, or the beginning of a stop string.
struct TextStream {
    private let decode: ([Int]) -> String
    private let stop: [[UInt8]]
    private var ids: [Int] = []
    private var given = 0 // bytes
    private static let replacement: [UInt8] = [0xEF, 0xBF, 0xBD] // U+FFFD

    /// Whether a stop string was found.
    private(set) var stopped = false

    init(_ tokenizer: any TextTokenizer, stop: [String]) {
        decode = tokenizer.decode
        self.stop = stop.map { Array($0.utf8) }
    }

    /// Take one token; the text that became certain, maybe empty.
    mutating func push(_ token: Int) -> String {
        ids.append(token)
        let text = Array(decode(ids).utf8)
        if let found = stop.compactMap({ find($0, in: text) }).min() {
            stopped = true
            return give(text[..<found])
        }
        var safe = text.count
        while safe >= 3, Array(text[safe - 3..<safe]) == Self.replacement { safe -= 3 }
        return give(text[..<min(safe, stopBegins(text))])
    }

    /// The text still held back when generation ends without a stop string.
    mutating func finish() -> String { stopped ? "" : give(ArraySlice(decode(ids).utf8)) }

    /// Where the longest tail of `text` starts that a stop string begins with.
    private func stopBegins(_ text: [UInt8]) -> Int {
        let longest = (stop.map(\.count).max() ?? 1) - 1
        for length in stride(from: min(text.count, longest), to: 0, by: -1) where stop.contains(where: { $0.starts(with: text.suffix(length)) }) {
            return text.count - length
        }
        return text.count
    }

    private mutating func give(_ text: ArraySlice<UInt8>) -> String {
        let piece = text.count > given ? String(decoding: text[given...], as: UTF8.self) : ""
        given = max(given, text.count)
        return piece
    }
}
