import Foundation
import Testing

@testable import LimeEdge

@Suite struct CoreTests {
    @Test("JSON: what RFC 8259 allows is read")
    func readsJson() throws {
        let value = try Json.parse(#" {"a" : [1, -2.5e1, true, false, null, "\u00e9\n\ud83d\ude00é"], "b": {}, "c": 12345678901234567890} "#)
        #expect(value.text == #"{"a":[1,-25.0,true,false,null,"é\n😀é"],"b":{},"c":1.2345678901234567e+19}"#)
        #expect(try Json.parse(value.text).text == value.text)
        _ = try Json.parse(String(repeating: "[", count: 100) + String(repeating: "]", count: 100))
        #expect(try Json.parse("{\"e\u{301}\":1,\"\u{e9}\":2}").object?.members.count == 2, "two spellings are two names")
    }

    @Test("JSON: what it does not allow is refused")
    func refusesJson() {
        let bad = [
            "", "{", "[1,]", "{\"a\":1,}", "{\"a\" 1}", "{a:1}", "01", "1.", ".5", "+1", "1e", "nul", "NaN", "Infinity", "\"\\x\"", "\"\\u12\"",
            "\"\\u+123\"", "\"a", "\"a\nb\"", "[1] 2", "{\"a\":1,\"a\":2}", "'a'", String(repeating: "[", count: 101) + String(repeating: "]", count: 101),
            "\u{a0}1", "\"\\ud800\"", "\"\\udc00\\ud800\"",
        ]
        for text in bad { #expect(throws: Json.Malformed.self, "\(text)") { try Json.parse(text) } }
        #expect(throws: Json.Malformed.self) { try Json.parse([0x22, 0xFF, 0x22]) }
    }

    @Test("halves: every finite one is the number that its bits say")
    func halves() {
        for bits in UInt16.min ... .max {
            let mantissa = Double(bits & 0x3FF)
            let exponent = Int(bits >> 10) & 0x1F
            #expect(Half.isFinite(bits) == (exponent != 0x1F))
            if exponent == 0x1F { continue }
            let sign = bits & 0x8000 == 0 ? 1.0 : -1.0
            let expected = sign * (exponent == 0 ? mantissa * 0x1p-24 : (1024 + mantissa) * pow(2, Double(exponent - 25)))
            if Half.toFloat(bits).bitPattern != Float(expected).bitPattern { Issue.record("bits \(bits): \(expected), \(Half.toFloat(bits))") }
        }
    }

    @Test("sha256: the standard's examples, whatever pieces it is fed in")
    func sha256() {
        #expect(Sha256.digest(Array("abc".utf8)) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
        #expect(Sha256.digest([]) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
        let million = [UInt8](repeating: UInt8(ascii: "a"), count: 1_000_000)
        for step in [1_000_000, 63, 64, 65, 7777] {
            var hash = Sha256()
            for start in stride(from: 0, to: million.count, by: step) { hash.update(Array(million[start..<min(start + step, million.count)])) }
            #expect(hash.finish() == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0", "pieces of \(step)")
        }
    }

    @Test("manifests: mutated ones are taken and refused as Python does")
    func manifests() throws {
        for (index, item) in try Vectors.made("manifests.json").items.enumerated() {
            var fault = ""
            do { _ = try ManifestReader.read(Array(item.text("text").utf8), "lime.json") } catch { fault = "\(error)" }
            let taken = item["taken"]?.bool == true
            if fault.isEmpty != taken { Issue.record("manifest \(index): Python \(taken ? "takes" : "refuses") it, here: \(fault)") }
        }
    }

    @Test("the library's schema is that of the docs")
    func schema() throws {
        let ours = try Json.parse(bundleSchema)["$defs"]?.members.map(\.name)
        let docs = try Vectors.read(Vectors.repository.appendingPathComponent("docs/bundle.schema.json"))["$defs"]?.members.map(\.name)
        #expect(ours == docs)
    }

    private func file(_ header: String, _ data: [UInt8] = Array(repeating: 0, count: 8)) -> [UInt8] {
        let text = Array(header.utf8)
        return withUnsafeBytes(of: UInt64(text.count).littleEndian) { Array($0) } + text + data
    }

    private let good = #"{"__metadata__":{"a":"b"},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#

    @Test("safetensors: tensors and metadata")
    func readsSafetensors() throws {
        let data = [Float(1.5), -2].flatMap { value in withUnsafeBytes(of: value.bitPattern.littleEndian) { Array($0) } }
        let found = try Safetensors(file(good, data))
        #expect(found.metadata == ["a": "b"])
        #expect(found.tensors["x"]?.floats() == [1.5, -2])
    }

    @Test("safetensors: headers that do not fit their bytes are refused")
    func refusesSafetensors() {
        let bad = [
            #"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, #"{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
            #"{"x":{"dtype":"F32","shape":[4294967297],"data_offsets":[0,8]}}"#, #"{"x":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}"#,
            #"{"x":{"dtype":"Z","shape":[2],"data_offsets":[0,8]}}"#, #"{"x":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#,
            #"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"y":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#, "[]", "{}", "nonsense",
            #"{"__metadata__":{"a":1},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#,
        ]
        for header in bad { #expect(throws: Json.Malformed.self, "\(header)") { try Safetensors(file(header)) } }
    }

    @Test("safetensors: 20,000 mutations never do anything but refuse")
    func mutatedSafetensors() {
        var random = SplitMix64(1)
        for _ in 0..<20_000 {
            var mutated = file(good)
            if random.next() % 4 == 0 { mutated.removeLast(Int(random.next() % UInt64(mutated.count))) }
            for _ in 0...random.next() % 3 where !mutated.isEmpty {
                mutated[Int(random.next() % UInt64(mutated.count))] = UInt8(truncatingIfNeeded: random.next())
            }
            do {
                _ = try Safetensors(mutated)
            } catch is Json.Malformed {
            } catch {
                Issue.record("\(error)")
            }
        }
    }

    @Test("chat: conversations are written as Python writes them")
    func chats() throws {
        let templates = try Vectors.kept("prompts.json").items
        #expect(templates.count > 3)
        for template in templates {
            let format = ChatFormat(try Manifest.readPrompts(Fields(template["prompts"] ?? .null)))
            for item in template["cases"]?.items ?? [] {
                let turns = (item["turns"]?.items ?? []).map { Turn($0.texts[0], $0.texts[1]) }
                let found = try format.render(turns, open: item["open"]?.bool == true)
                #expect(ByteKey(found) == ByteKey(item.text("text")), "\(template.text("name")): \(turns)")
            }
        }
    }

    @Test("chat: orders and roles that the template was not proven for are refused")
    func refusesChats() throws {
        let roles = [("user", Speaker(prefix: "u", suffix: ".")), ("assistant", Speaker(prefix: "a", suffix: "."))]
        let format = ChatFormat(Prompts(
            begin: "", roles: roles.map { (name: $0.0, speaker: $0.1) }, opening: "a", closing: "", defaultSystem: nil, systemOpensUser: false, strip: [],
            alternating: true, reason: nil))
        for roles in [[], ["assistant"], ["user", "user"], ["system", "user"], ["user", "tool"]] {
            #expect(throws: LimeError.self, "\(roles)") { try format.render(roles.map { Turn($0, "x") }) }
        }
        #expect(try format.render(["user", "assistant", "user"].map { Turn($0, "x") }) == "ux.ax.ux.a")
    }

    @Test("errors: what, where, expected, found and a hint, all faults of one input at once")
    func errors() {
        do {
            try GenerationOptions(maxNewTokens: 0, temperature: .nan, topK: -1, topP: 0, stop: [""]).check()
            Issue.record("taken")
        } catch let error as LimeError {
            #expect(error.faults.count == 5)
            #expect(error.kind == "invalid" && error.expected == "at least 1" && error.found == "0")
            #expect(error.localizedDescription.contains("5 faults") && error.recoverySuggestion == "leave an option out for its default")
        } catch {
            Issue.record("\(error)")
        }
    }

    @Test("selections are read and written as typed")
    func selections() throws {
        for text in ["a", "none", "routed", "a=0.7,b=0.3", "a=1e-07,b=-2.5"] { #expect(try Selection(parsing: text).description == text) }
        #expect(try Selection(parsing: "a=0.5,a=0.25, b = 0.25") == .blend(["a": 0.75, "b": 0.25]))
        #expect(throws: LimeError.self) { try Selection(parsing: "a=x") }
    }
}
