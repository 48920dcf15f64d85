import Foundation
import Testing

@testable import LimeEdge
@testable import LimeEdgeCoreML

/// Stands in for Core ML: compares what it is fed with what Python's runtime fed, call by call, and answers what the interpreter did.
private final class Recording: CoreMLPackage {
    private let calls: [Json]
    private var next = 0
    let provider = "recording"

    init(_ calls: [Json]) { self.calls = calls }

    var isOver: Bool { next == calls.count }

    func load(_ function: String) throws {}

    func run(_ function: String, _ inputs: [String: PackageArray]) throws -> [String: Tensor] {
        let call = try #require(next < calls.count ? calls[next] : nil, "more calls than Python's \(calls.count)")
        next += 1
        #expect(function == call.text("function"), "call \(next)")
        let expected = call["inputs"]?.members ?? []
        #expect(Set(inputs.keys) == Set(expected.map(\.name)), "call \(next)")
        for (name, facts) in expected { #expect(inputs[name] == read(facts), "call \(next): \(name)") }
        var outputs: [String: Tensor] = [:]
        for (name, facts) in call["outputs"]?.members ?? [] {
            outputs[name] = try Tensor(.floats((facts["values"]?.items ?? []).map { Float($0.double ?? .nan) }), facts["shape"]?.ints ?? [])
        }
        return outputs
    }

    private func read(_ facts: Json) -> PackageArray {
        let shape = facts["shape"]?.ints ?? []
        let values = facts["values"]?.items ?? []
        switch facts.text("dtype") {
        case "float16": return .halves(values.compactMap { $0.integer.map(UInt16.init) }, shape: shape)
        case "int32": return .integers(values.compactMap { $0.integer.map(Int32.init) }, shape: shape)
        default: return .floats(values.map { Float($0.double ?? .nan) }, shape: shape)
        }
    }
}

private struct RecordedEngines: EngineFactory {
    let calls: [Json]
    let target = "coreml"

    func openDecoder(_ bundle: LimeBundle, _ options: SessionOptions) throws -> any DecoderEngine {
        try CoreMLDecoder(bundle, options, SwitchedPackage(bundle, Recording(calls)))
    }

    func openEncoder(_ bundle: LimeBundle, _ options: SessionOptions) throws -> any EncoderEngine {
        CoreMLEncoder(try SwitchedPackage(bundle, Recording(calls)))
    }
}

@Suite(.enabled(if: FileManager.default.fileExists(atPath: Vectors.folder.appendingPathComponent("coreml.json").path)))
struct CoreMLTests {
    @Test("what is fed is what Python's runtime feeds, call by call", arguments: ["coreml", "coreml-soft", "coreml-activated", "coreml-prompt"])
    func feeding(_ name: String) async throws {
        let document = try #require(try Vectors.made("coreml.json")[name])
        let bundle = try LimeBundle.open(Vectors.bundle(name))
        let session = try await LimeSession.open(bundle, with: RecordedEngines(calls: document["calls"]?.items ?? []))
        let steps = document["steps"]?.items ?? []
        #expect(steps.count > 10)
        for step in steps {
            try await session.use(step.text("selection"))
            let ids = step["ids"]?.ints ?? []
            if step.text("do") == "logits" {
                let rows = try await session.logits(ids, keep: ids.count > 1 ? 2 : 1)
                for (at, row) in (step["logits"]?.rows ?? []).enumerated() { expectClose(row, rows[at], 0, "\(name) \(step.text("selection")) \(ids.count), row \(at)") }
            } else {
                let options = GenerationOptions(maxNewTokens: 5, ignoreEOS: true)
                #expect(try await collect(session.generateIDs(ids, options: options)) == step["tokens"]?.ints)
            }
        }
    }

    @Test("prompts are cut into enumerated lengths")
    func plans() {
        for (count, plan) in [(1, [1]), (2, [4]), (4, [4]), (5, [4, 1]), (9, [16]), (16, [16]), (17, [16, 1]), (22, [16, 4, 4]), (40, [16, 16, 16])] {
            let found = planCalls(count, [1, 4, 16])
            #expect(found.reduce(0, +) >= count && (count > 20 || found == plan), "\(count): \(found)")
        }
        #expect(planCalls(3, [1]) == [1, 1, 1])
    }

    @Test("float16: the nearest, of two equally near ones the even")
    func halves() {
        for bits in UInt16.min ... .max where Half.isFinite(bits) {
            let value = Half.toFloat(bits)
            if Half.fromFloat(value) != bits { Issue.record("\(bits)") }
            guard bits & 0x7FFF < 0x7BFF else { continue }
            let above = Half.toFloat(bits + 1) // away from zero
            let middle = (value + above) / 2
            if Half.fromFloat(middle) != (bits & 1 == 0 ? bits : bits + 1) { Issue.record("between \(value) and \(above)") }
        }
        #expect(Half.fromFloat(65_519.9) == 0x7BFF && Half.fromFloat(65_520) == 0x7C00 && Half.fromFloat(-.infinity) == 0xFC00)
    }
}
