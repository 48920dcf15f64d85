import Foundation
import Testing

@testable import LimeEdge

@Suite struct SamplingTests {
    @Test("the generator gives Python's numbers")
    func generator() throws {
        for item in try Vectors.kept("sampling.json")["generator"]?.items ?? [] {
            let seed = try #require(UInt64(item.text("seed")))
            var numbers = SplitMix64(seed)
            #expect((0..<8).map { _ in "\(numbers.next())" } == item["numbers"]?.texts)
            var uniform = SplitMix64(seed)
            #expect((0..<8).map { _ in uniform.uniform() } == item["uniform"]?.items.map { $0.double ?? .nan })
        }
    }

    @Test("every case draws Python's tokens")
    func cases() throws {
        let vectors = try Vectors.kept("sampling.json")
        let items = vectors["cases"]?.items ?? []
        #expect(items.count > 15)
        for item in items {
            var options = item.options
            options.seed = UInt64(item.text("seed"))
            let logits = try logits(item.text("logits"), vectors)
            var sampler = try Sampler(options)
            let expected = item["tokens"]?.ints ?? []
            let found = try expected.map { _ in try logits.withUnsafeBufferPointer { try sampler.pick($0) } }
            #expect(found == expected, "\(item.text)")
        }
    }

    private func logits(_ name: String, _ vectors: Json) throws -> [Float] {
        if name != "long" { return vectors["logits"]?[name]?.items.map { $0.double.map(Float.init) ?? -.infinity } ?? [] }
        var random = SplitMix64(try #require(UInt64(vectors["long"]?.text("seed") ?? "")))
        return (0..<(vectors["long"]?["count"]?.int ?? 0)).map { _ in Float(Double(random.next() >> 40) * 0x1p-20) }
    }

    @Test("logits that are no numbers are an error and never token 0")
    func noNumbers() throws {
        for bad in [Float.nan, .infinity] {
            for place in 0..<3 {
                for temperature in [0.0, 1] {
                    var logits: [Float] = [1, 2, 3]
                    logits[place] = bad
                    var sampler = try Sampler(GenerationOptions(temperature: temperature))
                    #expect(throws: LimeError.self) { try logits.withUnsafeBufferPointer { try sampler.pick($0) } }
                }
            }
        }
        let nothing = [Float](repeating: -.infinity, count: 3)
        #expect(throws: LimeError.self) { try nothing.withUnsafeBufferPointer { try Sampler.pickBest($0) } }
    }
}
