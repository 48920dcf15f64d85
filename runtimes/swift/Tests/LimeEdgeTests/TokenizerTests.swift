import Foundation
import Testing

@testable import LimeEdge

private let names = ["gpt2", "smollm2", "llama3", "qwen2"]

@Suite struct TokenizerTests {
    private func folder(_ name: String) -> URL { Vectors.folder.appendingPathComponent("tokenizers/\(name)") }

    private func classes(_ name: String) throws -> CharacterClasses {
        try CharacterClasses(reading: Array(Data(contentsOf: folder(name).appendingPathComponent("classes.json"))), "classes")
    }

    private func open(_ name: String) throws -> Tokenizer {
        let facts = try Vectors.read(folder(name).appendingPathComponent("facts.json"))
        #expect(facts.text("kind") == "byte-bpe")
        let bytes = try Array(Data(contentsOf: folder(name).appendingPathComponent("tokenizer.json")))
        return try Tokenizer(bytes, "tokenizer", split: #require(Split(rawValue: facts.text("split"))), classes: classes(name))
    }

    @Test("2,000 strings have the library's ids, and ids its text", arguments: names)
    func strings(_ name: String) throws {
        let tokenizer = try open(name)
        let cases = try Vectors.read(folder(name).appendingPathComponent("cases.json"))
        #expect(cases["strings"]?.items.count == 2000)
        for item in cases["strings"]?.items ?? [] {
            let found = tokenizer.encode(item.items[0].string ?? "")
            if found != item.items[1].ints { Issue.record("\(name): \(item.items[0].text): \(found), expected \(item.items[1].ints)") }
        }
        for item in cases["decoded"]?.items ?? [] {
            let found = tokenizer.decode(item.items[0].ints)
            if ByteKey(found) != ByteKey(item.items[1].string ?? "") { Issue.record("\(name): \(item.items[0].text): \(Json(found).text)") }
        }
    }

    @Test("every code point has the library's ids", arguments: names)
    func codePoints(_ name: String) throws {
        let tokenizer = try open(name)
        let cases = try Vectors.read(folder(name).appendingPathComponent("cases.json"))
        let points = (UInt32(0)...0x10FFFF).compactMap(Unicode.Scalar.init)
        let block = cases["block"]?.int ?? 1
        let text = cases["text"]?.int ?? 1
        var odd: [Int] = []
        for (index, expected) in (cases["hashes"]?.texts ?? []).enumerated() {
            let stretch = points[index * block..<min((index + 1) * block, points.count)]
            var hash = Sha256()
            for start in stride(from: stretch.startIndex, to: stretch.endIndex, by: text) {
                let ids = tokenizer.encode(spread(stretch[start..<min(start + text, stretch.endIndex)]))
                hash.update(ids.flatMap { id in withUnsafeBytes(of: Int32(id).littleEndian) { Array($0) } })
            }
            if hash.finish().prefix(16) != expected { odd.append(index) }
        }
        #expect(odd == [], "\(name): blocks of code points that differ")
    }

    private func spread(_ points: ArraySlice<Unicode.Scalar>) -> String {
        var out = String.UnicodeScalarView()
        for point in points { for scalar in "a\(point)b \(point)\(point) 1\(point)'\(point)\n".unicodeScalars { out.append(scalar) } }
        return String(out)
    }

    @Test("what the tokenizer does not know is refused by name")
    func refusals() throws {
        let text = try Vectors.read(folder("gpt2").appendingPathComponent("tokenizer.json")).text
        let table = try classes("gpt2")
        for (from, to, what) in [
            (#""dropout":null"#, #""dropout":0.1"#, "dropout"), (#""normalizer":null"#, #""normalizer":{"type":"Lowercase"}"#, "normalizer"),
            (#""byte_fallback":false"#, #""byte_fallback":true"#, "byte_fallback"), (#""type":"BPE""#, #""type":"Unigram""#, "model"),
            (#""lstrip":false"#, #""lstrip":true"#, "lstrip"),
        ] {
            let place = try #require(text.range(of: from), "\(from)")
            let changed = text.replacingCharacters(in: place, with: to)
            do {
                _ = try Tokenizer(Array(changed.utf8), "x", split: .gpt2, classes: table)
                Issue.record("\(what) was taken")
            } catch let error as LimeError {
                #expect(error.kind == "unsupported" && error.description.contains(what))
            }
        }
        for broken in ["", "{}", #"{"model":{}}"#, String(text.dropLast(9))] {
            #expect(throws: LimeError.self) { try Tokenizer(Array(broken.utf8), "x", split: .gpt2, classes: table) }
        }
    }
}
