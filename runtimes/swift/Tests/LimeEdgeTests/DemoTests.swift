import Foundation
import Testing

@testable import LimeEdge

/// The real demo bundle (make demo-swift names it): every skill's greedy answers, token by token Python's, and speed beside Python.
@Suite(.serialized, .enabled(if: Vectors.environment("LIME_EDGE_DEMO") != nil))
struct DemoTests {
    private let folder = URL(fileURLWithPath: Vectors.environment("LIME_EDGE_DEMO") ?? "/nowhere")

    @Test("every skill answers as in Python")
    func answers() async throws {
        let bundle = try LimeBundle.open(folder)
        let cases = try Vectors.made("demo.json").items
        #expect(cases.count > 40)
        let session = try await LimeSession.open(bundle, with: engines, options: SessionOptions(threads: 1))
        print("demo: \(cases.count) answers, operators: \(session.operators == true)")
        for item in cases {
            try await session.use(item.text("selection"))
            let prompt = try ChatFormat(bundle).render([Turn("user", item.text("text"))])
            let tokenizer = try await session.tokenizer
            let ids = try tokenizer.encode(prompt)
            #expect(ids == item["ids"]?.ints)
            let found = try await collect(session.generateIDs(ids, options: GenerationOptions(maxNewTokens: 16)))
            #expect(found == item["tokens"]?.ints, "\(item.text("selection")): \(item.text("text"))")
            print("demo: \(item.text("selection")): \(item.text("text")) -> \(tokenizer.decode(found))")
        }
    }

    /// It measures and asserts no times: a round of decoding, then of switches, for every line of the input; tools/phone_vectors/in_turn.py
    /// asks Python and this test in turn.
    @Test("decoding and switching")
    func speed() async throws {
        let prompt = (0..<32).map { 50 + 37 * $0 % 1000 }
        let session = try await LimeSession.open(folder, with: engines, options: SessionOptions(threads: 1))
        let names = await session.experts
        let new = 65
        while let line = readLine() {
            try await session.use(.expert(names[0]))
            var stamps: [Double] = []
            for try await _ in session.generateIDs(prompt, options: GenerationOptions(maxNewTokens: new, ignoreEOS: true)) { stamps.append(Bench.now()) }
            try await session.reset()
            var random = SplitMix64(UInt64(line) ?? 0)
            var switches: [Double] = []
            for _ in 0..<200 {
                let name = names[Int(random.next() % UInt64(names.count))]
                let begin = Bench.now()
                try await session.use(.expert(name))
                switches.append((Bench.now() - begin) * 1e6)
            }
            let milliseconds = ((stamps.last ?? 0) - (stamps.first ?? 0)) * 1e3 / Double(new - 1)
            let document: Json = ["decode_ms": .number(milliseconds), "switch_us": .array(switches.map { .number($0) })]
            print("round: \(document.text)")
            fflush(nil)
        }
    }
}
