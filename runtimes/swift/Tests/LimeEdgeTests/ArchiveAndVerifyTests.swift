import Foundation
import Testing

@testable import LimeEdge

@Suite struct ArchiveTests {
    private let archive = Vectors.folder.appendingPathComponent("lora-int4.tar")

    @Test("an unpacked bundle answers as the packed one")
    func unpacks() async throws {
        let work = try makeFolder()
        let folder = work.appendingPathComponent("b.lime")
        let bundle = try BundleArchive.unpack(archive, to: folder)
        let expected = try await openSession("lora-int4").logits([5, 17, 200, 31], keep: 1)
        let session = try await LimeSession.open(bundle, with: engines, options: SessionOptions(threads: 1))
        #expect(try await session.logits([5, 17, 200, 31], keep: 1) == expected)
        #expect(try FileManager.default.contentsOfDirectory(atPath: work.path) == ["b.lime"])
        #expect(throws: LimeError.self) { try BundleArchive.unpack(archive, to: folder) }
    }

    private func unpack(_ bytes: ArraySlice<UInt8>, _ folder: URL) throws -> LimeBundle {
        var left = bytes
        return try BundleArchive.unpack("archive", to: folder) { buffer in
            let piece = left.prefix(min(buffer.count, 10_000))
            buffer.copyBytes(from: piece)
            left = left.dropFirst(piece.count)
            return piece.count
        }
    }

    @Test("an interrupted run is taken up again, and nothing is there before")
    func resumes() throws {
        let work = try makeFolder()
        let folder = work.appendingPathComponent("b.lime")
        let bytes = try Array(Data(contentsOf: archive))
        for cut in [100, 5000, bytes.count / 2, bytes.count - 12_000] {
            #expect(throws: LimeError.self) { try unpack(bytes[..<cut], folder) }
            #expect(FileFacts(folder.path) == nil)
        }
        let partial = work.appendingPathComponent(".b.lime.partial/onnx/model.onnx")
        let before = try #require(FileFacts(partial.path))
        _ = try unpack(bytes[...], folder)
        #expect(FileFacts(folder.appendingPathComponent("onnx/model.onnx").path)?.inode == before.inode, "written anew")
    }

    @Test("150 mutated archives are refused or give the bundle")
    func mutated() throws {
        let bytes = try Array(Data(contentsOf: archive))
        var random = SplitMix64(5)
        var refused = 0
        for count in 0..<150 {
            let work = try makeFolder()
            var mutated = bytes
            for _ in 0...random.next() % 3 { mutated[Int(random.next() % UInt64(mutated.count))] = UInt8(truncatingIfNeeded: random.next()) }
            do {
                _ = try unpack(mutated[...], work.appendingPathComponent("b.lime"))
            } catch is LimeError {
                refused += 1
                #expect(FileFacts(work.appendingPathComponent("b.lime").path) == nil, "\(count)")
            }
            try FileManager.default.removeItem(at: work)
        }
        #expect(refused > 110)
    }
}

@Suite struct VerifyTests {
    @Test("every tiny bundle verifies", arguments: ["lora", "lora-int4", "lora-int8", "lora-single", "dora", "slicefine", "soft", "auto", "bert", "vit", "qwen3"])
    func verifies(_ name: String) async throws {
        let checks = try await Verify.run(LimeBundle.open(Vectors.bundle(name)), with: engines, options: SessionOptions(threads: 1))
        #expect(checks.contains { $0.result == .ok } && !checks.contains { $0.result == .missed }, "\(checks)")
    }

    @Test("answers that are another expert's are found out")
    func wrongExpert() async throws {
        let bundle = try LimeBundle.open(Vectors.bundle("lora"))
        let golden = try #require(try Golden.read(bundle))
        let session = try await openSession("lora")
        let index = try #require(golden.selections.firstIndex(of: "expert1"))
        let best = try #require(golden.outputs["logits"]).expected[index].best
        try await session.use("expert2")
        var rows: [[Float]] = []
        for (call, inputs) in golden.calls.enumerated() {
            rows += try await session.logits((inputs["input_ids"]?.integers ?? []).map(Int.init), keep: 1)
            for step in 0..<golden.steps - 1 { rows += try await session.extend([best[call * golden.steps + step]]) }
        }
        let check = Judge(golden: golden, compute: "float32", label: "expert1").judge("onnx", ["logits": rows])
        #expect(check.result == .missed && check.why.contains("answers like expert2"), "\(check)")
    }

    @Test("the benchmark writes the document of lime-edge bench")
    func bench() async throws {
        let options = BenchOptions(promptTokens: 8, genTokens: 8, rounds: 3, warmup: 1, switches: 20)
        let text = try await Bench.run(
            Vectors.bundle("lora-int4"), with: engines, selection: .expert("expert1"), session: SessionOptions(threads: 1), options: options)
        let document = try Json.parse(text)
        #expect(document["schema"]?.integer == 2 && document["runs"]?.items.count == 1)
        #expect(document["decode_tokens_per_s"]?.double ?? 0 > 0 && document["switch_us"]?["p95"]?.double ?? 0 > 0)
        try text.write(to: Vectors.folder.appendingPathComponent("swift-bench.json"), atomically: true, encoding: .utf8)
    }
}
