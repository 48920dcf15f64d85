import Foundation
import Testing

@testable import LimeEdge

/// What Python refuses is refused, at the same call, and as the same kind of error.
@Suite struct RefusalsTests {
    private func open(_ folder: URL, _ cache: URL) async throws -> LimeSession {
        try await LimeSession.open(LimeBundle.open(folder, cache: cache), with: engines, options: SessionOptions(threads: 1))
    }

    @Test("every fault that Python finds")
    func refusals() async throws {
        let cache = try makeFolder()
        let cases = try Vectors.made("refusals.json").items
        #expect(cases.count > 30)
        for item in cases {
            let folder = Vectors.folder.appendingPathComponent("refused/\(item.text("name")).lime")
            let error = await expectError(Names.lower(item.text("kind")), "\(item.text("name")); Python: \(item.text("python"))") {
                let session = try await open(folder, cache)
                if item.text("call") == "open" { return }
                if item.text("call") == "install" {
                    try await session.install(folder.appendingPathComponent("new.safetensors"))
                } else {
                    try await session.use("expert1")
                }
            }
            #expect(error?.hint.isEmpty == false && error?.place.isEmpty == false && error?.what.isEmpty == false, "\(item.text("name"))")
        }
    }

    @Test("1,000 mutated bundles are refused or give the same answers")
    func mutatedBundles() async throws {
        var random = SplitMix64(4)
        let sound = Vectors.bundle("lora")
        let cache = try makeFolder()
        let work = try makeFolder().appendingPathComponent("b.lime")
        try FileManager.default.copyItem(at: sound, to: work)
        let expected = try await answer(openSession("lora"))
        let files = try LimeBundle.open(sound).manifest.files.keys.sorted() + ["lime.json"]
        var refused = 0
        for _ in 0..<1000 {
            let name = files[Int(random.next() % UInt64(files.count))]
            let bytes = try Array(Data(contentsOf: sound.appendingPathComponent(name)))
            try Data(mutate(bytes, &random)).write(to: work.appendingPathComponent(name))
            do {
                let found = try await answer(open(work, cache))
                #expect(found == expected, "\(name) was mutated")
            } catch is LimeError {
                refused += 1
            }
            try Data(bytes).write(to: work.appendingPathComponent(name))
        }
        #expect(refused > 800, "of 1,000")
    }

    private func mutate(_ bytes: [UInt8], _ random: inout SplitMix64) -> [UInt8] {
        var mutated = bytes
        switch random.next() % 4 {
        case 0: mutated = Array(bytes.prefix(Int(random.next() % UInt64(bytes.count + 1))))
        case 1: mutated += Array(repeating: 0, count: 1 + Int(random.next() % 8))
        default: break
        }
        for _ in 0...random.next() % 5 where !mutated.isEmpty {
            mutated[Int(random.next() % UInt64(mutated.count))] = UInt8(truncatingIfNeeded: random.next())
        }
        return mutated
    }

    private func answer(_ session: LimeSession) async throws -> [[Float]] {
        var found: [[Float]] = []
        for name in await session.experts {
            try await session.use(.expert(name))
            found += try await session.logits([5, 17, 200, 31], keep: 1)
        }
        return found
    }
}
