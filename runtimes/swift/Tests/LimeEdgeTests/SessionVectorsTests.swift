import Foundation
import Testing

@testable import LimeEdge

private let bundles: [String] = (try? Vectors.made("sessions.json")["bundles"]?.object?.names) ?? []

/// Every answer that Python wrote down, asked again: the same tokens, logits within 1e-5 on the same library.
@Suite struct SessionVectorsTests {
    private static let document: Json? = try? Vectors.made("sessions.json")["bundles"]
    private let limit: Float = 1e-5

    private func cases(_ name: String) throws -> Json { try #require(Self.document?[name]) }

    @Test func thereAreBundles() { #expect(bundles.count > 8) }

    @Test("what a bundle opens with, holds, takes and refuses", arguments: bundles)
    func selections(_ name: String) async throws {
        let cases = try cases(name)
        let session = try await openSession(name)
        #expect(await session.experts == cases["experts"]?.texts)
        #expect(await session.selection.description == cases.text("opens_with"))
        for text in cases["refused"]?.texts ?? [] {
            let before = await session.selection
            _ = await expectError("invalid", "\(name): \(text)") { try await session.use(text) }
            #expect(await session.selection == before)
        }
        for text in cases["allowed"]?.texts ?? [] {
            try await session.use(text)
            #expect(try await session.selection == Selection(parsing: text))
        }
    }

    @Test("logits of every position", arguments: bundles)
    func logits(_ name: String) async throws {
        let session = try await openSession(name)
        for item in try cases(name)["logits"]?.items ?? [] {
            try await session.use(item.text("selection"))
            let rows = try await session.logits(item["ids"]?.ints ?? [])
            for (at, row) in (item["logits"]?.rows ?? []).enumerated() { expectClose(row, rows[at], limit, "\(name), \(item.text("selection")), position \(at)") }
        }
    }

    @Test("generations draw the same tokens and end for the same reason", arguments: bundles)
    func generations(_ name: String) async throws {
        let session = try await openSession(name)
        for item in try cases(name)["generations"]?.items ?? [] {
            try await session.use(item.text("selection"))
            let options = item["options"]?.options ?? GenerationOptions()
            if let tokens = item["tokens"]?.ints {
                #expect(try await collect(session.generateIDs(item["ids"]?.ints ?? [], options: options)) == tokens, "\(name): \(item.text)")
            } else {
                let ids = try await session.tokenizer.encode(item.text("prompt"))
                #expect(ids == item["ids"]?.ints)
                #expect(try await collect(session.generate(item.text("prompt"), options: options)) == item["pieces"]?.texts, "\(name): \(item.text)")
            }
            #expect(await session.finishReason?.rawValue == item.text("finish"), "\(name): \(item.text)")
        }
    }

    @Test("scripts of calls leave the same cache behind", arguments: bundles)
    func scripts(_ name: String) async throws {
        let session = try await openSession(name)
        for (number, step) in try (cases(name)["script"]?.items ?? []).enumerated() {
            let message = "\(name), step \(number): \(step.text.prefix(200))"
            let ids = step["ids"]?.ints ?? []
            let keep = step["keep_cache"]?.bool == true
            switch step.text("do") {
            case "reset": try await session.reset()
            case "use": try await session.use(step.text("selection"), keepCache: keep)
            case "extend":
                let rows = try await session.extend(ids)
                expectClose(step["last"]?.items.map { Float($0.double ?? .nan) } ?? [], rows.last ?? [], limit, message)
            case "generate":
                let options = GenerationOptions(maxNewTokens: 4, ignoreEOS: true)
                #expect(try await collect(session.generateIDs(ids, options: options, keepCache: keep)) == step["tokens"]?.ints, "\(message)")
            case "fill":
                let options = GenerationOptions(maxNewTokens: 1000, ignoreEOS: true)
                #expect(try await collect(session.generateIDs(ids, options: options)) == step["tokens"]?.ints, "\(message)")
                #expect(await session.finishReason == .cache)
            default: Issue.record("\(message)")
            }
            let expected = (step["cache"]?.items ?? []).map { Segment(selection: $0.items[0].string ?? "", tokens: $0.items[1].int ?? 0) }
            #expect(await session.cache == expected, "\(message)")
        }
    }

    @Test("many at once: every token in the order of Python's, and why each row ended", arguments: bundles)
    func many(_ name: String) async throws {
        let session = try await openSession(name)
        for item in try cases(name)["many"]?.items ?? [] {
            let asked = item["requests"]?.items ?? []
            let asText = asked[0]["prompt"]?.string != nil
            let requests = try asked.map { one in
                let selection = try Selection(parsing: one.text("selection"))
                let options = one["options"]?.options
                return asText ? Request(one.text("prompt"), selection, options: options) : Request(one["prompt"]?.ints ?? [], selection, options: options)
            }
            let before = await session.selection
            let rows = item["rows"]?.int ?? 1
            let stream = asText ? session.generateMany(requests, rows: rows) : session.generateManyIDs(requests, rows: rows)
            let answers = try await collect(stream)
            #expect(await session.selection == before, "the session's own selection plays no part")
            let reasons = Dictionary(answers.compactMap { one in one.end.map { (one.row, $0.rawValue) } }, uniquingKeysWith: { first, _ in first })
            #expect(requests.indices.map { reasons[$0] ?? "none" } == item["reasons"]?.texts, "\(name)")
            let found = answers.flatMap { one in asText ? (one.piece.isEmpty ? [] : ["\(one.row): \(one.piece)"]) : one.tokens.map { "\(one.row): \($0)" } }
            let expected = (item["events"]?.items ?? []).filter { $0.items[1].string != "" }.map { "\($0.items[0].int ?? -1): \($0.items[1].string ?? $0.items[1].text)" }
            #expect(found == expected, "\(name)")
        }
    }

    @Test("encoders: outputs are Python's", arguments: ["bert", "vit"])
    func encoders(_ name: String) async throws {
        let document = try #require(try Vectors.made("encoders.json")[name])
        let session = try await EncoderSession.open(LimeBundle.open(Vectors.bundle(name)), with: engines, options: SessionOptions(threads: 1))
        #expect(await session.experts == document["experts"]?.texts)
        for item in document["cases"]?.items ?? [] {
            try await session.use(item.text("selection"))
            var inputs: [String: Tensor] = [:]
            for (input, facts) in item["inputs"]?.members ?? [] { inputs[input] = try tensor(facts) }
            let found = try await session.run(inputs)
            #expect(Set(found.keys) == Set(item["outputs"]?.object?.names ?? []))
            for (output, facts) in item["outputs"]?.members ?? [] {
                #expect(found[output]?.shape == facts["shape"]?.ints)
                expectClose(facts["values"]?.items.map { Float($0.double ?? .nan) } ?? [], found[output]?.floats ?? [], limit, "\(name) \(output) \(item.text("selection"))")
            }
        }
    }

    private func tensor(_ facts: Json) throws -> Tensor {
        let values = facts["values"]?.items ?? []
        let shape = facts["shape"]?.ints ?? []
        if facts.text("dtype") == "int64" { return try Tensor(.integers(values.compactMap(\.integer)), shape) }
        return try Tensor(.floats(values.map { Float($0.double ?? .nan) }), shape)
    }

    @Test("encoders: inputs that do not fit are refused, all faults at once")
    func encoderRefusals() async throws {
        let session = try await EncoderSession.open(LimeBundle.open(Vectors.bundle("bert")), with: engines, options: SessionOptions(threads: 1))
        let ids = try Tensor([Int64](repeating: 5, count: 8), 1, 8)
        _ = try await session.run(["input_ids": ids])
        let odd: [([String: Tensor], Int)] = [
            ([:], 1), (["nothing": ids], 2), (["input_ids": try Tensor([Float](repeating: 0, count: 8), 1, 8)], 1),
            (["input_ids": try Tensor([Int64](repeating: 1 << 40, count: 8), 1, 8)], 1), (["input_ids": try Tensor([Int64](repeating: 0, count: 8), 8)], 1),
            (["input_ids": try Tensor([Int64](), 1, 0)], 1), (["input_ids": ids, "attention_mask": try Tensor([Int64](repeating: 1, count: 4), 1, 4)], 1),
            (["input_ids": try Tensor([Int64](repeating: 0, count: 100_000), 1, 100_000)], 1),
        ]
        for (inputs, count) in odd {
            let error = await expectError("invalid", "\(inputs)") { _ = try await session.run(inputs) }
            #expect(error?.faults.count == count)
        }
        _ = await expectError("invalid") { _ = try await openSession("bert") }
        _ = await expectError("invalid") { _ = try await EncoderSession.open(LimeBundle.open(Vectors.bundle("lora")), with: engines) }
    }
}
