import Foundation

/// Turns text into token ids and back. A bundle's own is ``Tokenizer``; give another one to a session where its kind is unknown here.
public protocol TextTokenizer: Sendable {
    /// Token ids of a text; special tokens in it are recognised, none are added.
    func encode(_ text: String) throws -> [Int]

    /// Text of token ids, special tokens left out; bytes that are no UTF-8 become U+FFFD.
    func decode(_ ids: [Int]) -> String
}

/// A byte-level BPE tokenizer, as tokenizer.json of the Hugging Face tokenizers library describes it: the same ids.
///
/// It knows the splits of GPT-2, SmolLM2, Llama 3 (SmolLM3 too) and Qwen; anything else in the file is refused by name.
public struct Tokenizer: TextTokenizer {
    private let split: Split
    private let classes: CharacterClasses
    private let normalizes: Bool
    private let added: AddedTokens
    private let pairs: BytePairs
    private let whole: [ByteKey: Int]? // words that are tokens, whatever the merges say
    private let pieces: Pieces

    /// Number of ids, those that no token has included.
    public var size: Int { pieces.count }

    /// Token ids of a text; special tokens in it are recognised, none are added. Each is below ``size``.
    public func encode(_ text: String) -> [Int] {
        var out: [Int] = []
        added.forEachPart(ArraySlice(text.utf8), normalizes: normalizes) { part, id in
            if let id { out.append(id) } else { encodePlain(part, &out) }
        }
        return out
    }

    /// Text of token ids, special tokens left out; bytes that are no UTF-8 become U+FFFD. Unknown ids are left out.
    public func decode(_ ids: [Int]) -> String {
        var bytes: [UInt8] = []
        for id in ids where !added.special.contains(id) { bytes += pieces[id] }
        return decodeLossy(bytes)
    }

    /// The id of a special or added token by its own spelling, or nil.
    public func find(_ spelling: String) -> Int? { added.tokens[ByteKey(spelling)] }

    private func encodePlain(_ text: ArraySlice<UInt8>, _ out: inout [Int]) {
        var points: [UInt32] = []
        var starts: [Int] = [] // of each code point, in bytes
        points.reserveCapacity(text.count)
        starts.reserveCapacity(text.count + 1)
        var at = text.startIndex
        for scalar in String(decoding: text, as: UTF8.self).unicodeScalars {
            points.append(scalar.value)
            starts.append(at)
            at += UTF8.width(scalar)
        }
        starts.append(at)
        split.cut(points, classes) { word in
            let bytes = text[starts[word.lowerBound]..<starts[word.upperBound]]
            if let id = whole?[ByteKey(Array(bytes))] { out.append(id) } else { pairs.encode(bytes, &out) }
        }
    }

    /// Bytes of every token, one after another.
    private struct Pieces: Sendable {
        private var bytes: [UInt8] = []
        private var starts: [Int] = [0]

        init(_ spellings: [[UInt8]?]) {
            for spelling in spellings {
                if let spelling { bytes += readSpelling(spelling) ?? spelling }
                starts.append(bytes.count)
            }
        }

        var count: Int { starts.count - 1 }

        subscript(id: Int) -> ArraySlice<UInt8> { id >= 0 && id < count ? bytes[starts[id]..<starts[id + 1]] : [] }
    }

    private static let largestVocabulary: Int64 = 1 << 22
    private static let hint = "give token ids instead of text, or a tokenizer of your own"

    /// Build from a tokenizer.json.
    ///
    /// - Parameters:
    ///   - bytes: of the file.
    ///   - place: what errors name.
    ///   - split: how it cuts, as the bundle's manifest names it.
    /// - Throws: ``LimeError/unsupported(_:)`` something in it that this tokenizer does not know; ``LimeError/damaged(_:)`` no
    ///   tokenizer.json.
    init(_ bytes: [UInt8], _ place: String, split: Split, classes: CharacterClasses) throws {
        let document: Json
        do {
            document = try Json.parse(bytes)
        } catch let error as Json.Malformed {
            throw LimeError.damaged(.init(place, "not JSON: \(error)", copyAgain))
        }
        guard let model = document["model"], model.object != nil else { throw LimeError.damaged(.init(place, "no model", copyAgain)) }
        try Self.refuseUnknown(document, model, place)
        let vocabulary = try Self.readVocabulary(model, place)
        added = try AddedTokens(document["added_tokens"], place)
        var spellings = [[UInt8]?](repeating: nil, count: max(vocabulary.values.max() ?? -1, added.tokens.values.max() ?? -1) + 1)
        for (spelling, id) in vocabulary { spellings[id] = spelling.bytes }
        for (spelling, id) in added.tokens { spellings[id] = spelling.bytes }
        pieces = Pieces(spellings)
        pairs = try Self.readMerges(model, vocabulary, place)
        whole = model["ignore_merges"]?.bool == true ? Self.unspell(vocabulary) : nil
        normalizes = !Self.normalizerKinds(document["normalizer"]).isEmpty
        self.split = split
        self.classes = classes
    }

    private static func refuseUnknown(_ document: Json, _ model: Json, _ place: String) throws {
        var faults = Faults()
        if model["type"]?.string != "BPE" { faults.add("model", "BPE", model["type"]?.text ?? "none") }
        if let dropout = model["dropout"], !dropout.isNull { faults.add("dropout", "none", dropout.text) }
        for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
            if let text = model[key]?.string, !text.isEmpty { faults.add(key, "none", text) }
        }
        for key in ["fuse_unk", "byte_fallback"] where model[key]?.bool == true { faults.add(key, false, true) }
        for kind in normalizerKinds(document["normalizer"]) where kind != "NFC" { faults.add("normalizer", "NFC or none", kind) }
        if document["decoder"]?["type"]?.string != "ByteLevel" { faults.add("decoder", "ByteLevel", (document["decoder"]?.text ?? "none").shortened(80)) }
        try faults.throwAny(LimeError.unsupported, at: place, hint: hint)
    }

    private static func normalizerKinds(_ normalizer: Json?) -> [String] {
        guard let normalizer, normalizer.object != nil else { return [] }
        let kind = normalizer["type"]?.string ?? "none"
        return kind == "Sequence" ? (normalizer["normalizers"]?.array ?? []).map { $0["type"]?.string ?? "none" } : [kind]
    }

    private static func readVocabulary(_ model: Json, _ place: String) throws -> [ByteKey: Int] {
        var vocabulary: [ByteKey: Int] = [:]
        for (spelling, id) in model["vocab"]?.object?.members ?? [] {
            guard let id = id.integer, id >= 0, id < largestVocabulary else {
                throw LimeError.damaged(.init(place, "vocab: an id is \(id.text.shortened(20))", copyAgain))
            }
            vocabulary[ByteKey(spelling)] = Int(id)
        }
        return vocabulary
    }

    private static func readMerges(_ model: Json, _ vocabulary: [ByteKey: Int], _ place: String) throws -> BytePairs {
        guard let merges = model["merges"]?.array else { throw LimeError.damaged(.init(place, "no merges", copyAgain)) }
        let unknown = model["unk_token"]?.string.flatMap { vocabulary[ByteKey($0)] } ?? -1
        let bytes = (0..<256).map { Int32(vocabulary[ByteKey(String(Character(spelled[$0])))] ?? unknown) }
        var pairs = BytePairs(ids: bytes, merges: merges.count)
        for (rank, merge) in merges.enumerated() {
            let sides = merge.string.map { Array($0.utf8).split(separator: 0x20, omittingEmptySubsequences: false).map(Array.init) }
                ?? (merge.array ?? []).map { Array(($0.string ?? "").utf8) }
            guard sides.count == 2 else { throw LimeError.damaged(.init(place, "merge \(rank) is no pair", copyAgain)) }
            guard let left = vocabulary[ByteKey(sides[0])], let right = vocabulary[ByteKey(sides[1])],
                let merged = vocabulary[ByteKey(sides[0] + sides[1])]
            else { throw LimeError.damaged(.init(place, "merge \(rank) makes no token", copyAgain)) }
            pairs.add(Int32(left), Int32(right), rank: Int32(rank), merged: Int32(merged))
        }
        return pairs
    }

    private static func unspell(_ vocabulary: [ByteKey: Int]) -> [ByteKey: Int] {
        var found: [ByteKey: Int] = [:]
        for (spelling, id) in vocabulary { if let bytes = readSpelling(spelling.bytes) { found[ByteKey(bytes)] = id } }
        return found
    }
}

/// The printable character that stands for a byte in a vocabulary (GPT-2's table).
private let spelled: [Unicode.Scalar] = {
    let printable = Set(Array(0x21...0x7E) + Array(0xA1...0xAC) + Array(0xAE...0xFF))
    var others: UInt32 = 256
    return (0..<256).map { byte in
        if printable.contains(byte) { return Unicode.Scalar(UInt8(byte)) }
        defer { others += 1 }
        return Unicode.Scalar(others) ?? "\u{FFFD}"
    }
}()

private let byteOf: [UInt32: UInt8] = Dictionary(uniqueKeysWithValues: spelled.enumerated().map { ($1.value, UInt8($0)) })

/// The bytes that a spelling stands for; nil where it holds other characters.
private func readSpelling(_ spelling: [UInt8]) -> [UInt8]? {
    var bytes: [UInt8] = []
    for scalar in String(decoding: spelling, as: UTF8.self).unicodeScalars {
        guard let byte = byteOf[scalar.value] else { return nil }
        bytes.append(byte)
    }
    return bytes
}

/// Tokens that are found in a text before anything else: of those that begin earliest, the longest.
private struct AddedTokens: Sendable {
    private(set) var tokens: [ByteKey: Int] = [:]
    private(set) var special: Set<Int> = []
    private var raw: Set<ByteKey> = [] // searched before the text is normalized
    private var starts: [UInt8: [ByteKey]] = [:] // by first byte, the longest first

    init(_ list: Json?, _ place: String) throws {
        for entry in list?.array ?? [] {
            guard let content = entry["content"]?.string, !content.isEmpty, let id = entry["id"]?.integer, id >= 0, id < 1 << 22 else {
                throw LimeError.damaged(.init(place, "an added token without content or id", copyAgain))
            }
            for option in ["single_word", "lstrip", "rstrip"] where entry[option]?.bool == true {
                let what = "added token '\(content.shortened(40))': \(option)"
                throw LimeError.unsupported(.init(place, what, "give token ids instead of text, or a tokenizer of your own"))
            }
            let key = ByteKey(content)
            tokens[key] = Int(id)
            if entry["special"]?.bool == true { special.insert(Int(id)) }
            if entry["normalized"]?.bool != true { raw.insert(key) }
        }
        starts = Dictionary(grouping: tokens.keys) { $0.bytes[0] }.mapValues { $0.sorted { $0.bytes.count > $1.bytes.count } }
    }

    /// Calls `part` with every stretch of plain text and nil, or with a token and its id, in order.
    func forEachPart(_ text: ArraySlice<UInt8>, normalizes: Bool, _ part: (ArraySlice<UInt8>, Int?) -> Void) {
        if !normalizes { return cut(text, { _ in true }, part) }
        cut(text, raw.contains) { piece, id in
            if id != nil { return part(piece, id) }
            let text = String(decoding: piece, as: UTF8.self)
            // in two steps: Foundation on Linux, asked for the composed text at once, leaves doubled Tibetan vowel signs out of order
            let composed = text.decomposedStringWithCanonicalMapping.precomposedStringWithCanonicalMapping
            cut(ArraySlice(composed.utf8), { !raw.contains($0) }, part)
        }
    }

    private func cut(_ text: ArraySlice<UInt8>, _ takes: (ByteKey) -> Bool, _ part: (ArraySlice<UInt8>, Int?) -> Void) {
        var begin = text.startIndex
        var at = begin
        while at < text.endIndex {
            guard let token = starts[text[at]]?.first(where: { text[at...].starts(with: $0.bytes) && takes($0) }), let id = tokens[token] else {
                at += 1
                continue
            }
            if at > begin { part(text[begin..<at], nil) }
            part(text[at..<at + token.bytes.count], id)
            at += token.bytes.count
            begin = at
        }
        if begin < text.endIndex { part(text[begin...], nil) }
    }
}

/// UTF-8 in which each maximal part of a malformed sequence becomes one U+FFFD, as the tokenizer library has it.
///
/// Source: The Unicode Standard, 3.9, "U+FFFD Substitution of Maximal Subparts"; Swift's own decoder does this.
func decodeLossy(_ bytes: [UInt8]) -> String { String(decoding: bytes, as: UTF8.self) }

/// Finds a bundle's tokenizer: kind and split as its manifest names them, character classes from its file.
enum TokenizerReader {
    private static let hint = "give token ids instead of text, or open the session with a tokenizer of your own"

    static func read(_ bundle: LimeBundle) throws -> Tokenizer {
        let place = bundle.folder.path
        guard let facts = bundle.manifest.tokenizer else { throw LimeError.missing(.init(place, "holds no tokenizer", hint)) }
        if facts.kind != "byte-bpe" { throw LimeError.unsupported(.init(place, Fault("tokenizer", expected: "byte-bpe", found: facts.kind), hint)) }
        guard let split = facts.split.flatMap(Split.init(rawValue:)) else {
            let known = Split.allCases.map(\.rawValue).joined(separator: ", ")
            throw LimeError.unsupported(.init(place, Fault("tokenizer's split", expected: known, found: facts.split ?? "none"), hint))
        }
        guard let classes = facts.classes else { throw LimeError.unsupported(.init(place, "the tokenizer has no character classes", hint)) }
        let table = try CharacterClasses(reading: bundle.readChecked(classes), bundle.file(classes).path)
        return try Tokenizer(bundle.readChecked(facts.file), bundle.file(facts.file).path, split: split, classes: table)
    }
}
