import Foundation
import Testing

@testable import LimeEdge
@testable import LimeEdgeONNX

/// Test data that Python writes: in the repository, and what `tools/write_phone_vectors.py` made for this run.
enum Vectors {
    static let repository = URL(fileURLWithPath: #filePath).deletingLastPathComponent().appendingPathComponent("../../../..").standardized

    /// The folder of `LIME_EDGE_VECTORS`: make test-swift writes the vectors and names their folder.
    static let folder = URL(fileURLWithPath: environment("LIME_EDGE_VECTORS") ?? "/nowhere")

    static func environment(_ name: String) -> String? { ProcessInfo.processInfo.environment[name].flatMap { $0.isEmpty ? nil : $0 } }

    /// A file of tests/vectors.
    static func kept(_ name: String) throws -> Json { try read(repository.appendingPathComponent("tests/vectors/\(name)")) }

    /// A document of the folder.
    static func made(_ name: String) throws -> Json { try read(folder.appendingPathComponent(name)) }

    static func read(_ file: URL) throws -> Json { try Json.parse(Array(Data(contentsOf: file))) }

    static func bundle(_ name: String) -> URL { folder.appendingPathComponent("bundles/\(name).lime") }
}

/// The library that Python used, and our operators, as Python's session had them.
let engines = ONNXEngines(Vectors.environment("LIME_EDGE_ONNXRUNTIME").map { .file($0) } ?? .linked)

func openSession(_ name: String, _ options: SessionOptions = SessionOptions(threads: 1)) async throws -> LimeSession {
    try await LimeSession.open(LimeBundle.open(Vectors.bundle(name)), with: engines, options: options)
}

func makeFolder() throws -> URL {
    let folder = FileManager.default.temporaryDirectory.appendingPathComponent("lime-edge-\(UUID().uuidString)")
    try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    return folder
}

extension Json {
    /// A list's items; an empty list where it is none.
    var items: [Json] { array ?? [] }
    var members: [(name: String, value: Json)] { object?.members ?? [] }
    var ints: [Int] { items.compactMap(\.int) }
    var texts: [String] { items.compactMap(\.string) }
    var rows: [[Float]] { items.map { $0.items.compactMap { $0.double.map(Float.init) } } }

    func text(_ name: String) -> String { self[name]?.string ?? "" }

    /// As the vectors write options.
    var options: GenerationOptions {
        GenerationOptions(
            maxNewTokens: self["max_new_tokens"]?.int ?? 128, temperature: self["temperature"]?.double ?? 0, topK: self["top_k"]?.int ?? 0,
            topP: self["top_p"]?.double ?? 1, seed: self["seed"]?.string.flatMap(UInt64.init), stop: self["stop"]?.texts ?? [],
            ignoreEOS: self["ignore_eos"]?.bool ?? false)
    }
}

/// The largest difference, and where.
func expectClose(_ expected: [Float], _ found: [Float], _ limit: Float, _ message: @autoclosure () -> String) {
    guard expected.count == found.count else {
        Issue.record("\(message()): \(expected.count) values expected, \(found.count) found")
        return
    }
    guard let worst = expected.indices.max(by: { abs(expected[$0] - found[$0]) < abs(expected[$1] - found[$1]) }) else { return }
    let off = abs(expected[worst] - found[worst])
    if !(off <= limit) { Issue.record("\(message()): at \(worst) expected \(expected[worst]), found \(found[worst]), \(off) apart") }
}

/// Everything a stream gives.
func collect<Value: Sendable>(_ stream: AsyncThrowingStream<Value, any Error>) async throws -> [Value] {
    var found: [Value] = []
    for try await value in stream { found.append(value) }
    return found
}

/// The error of a call, of that kind; else a failure.
func expectError(_ kind: String, _ message: String = "", _ call: () async throws -> Void) async -> LimeError? {
    do {
        try await call()
        Issue.record("\(message): nothing was thrown, \(kind) was expected")
    } catch let error as LimeError {
        #expect(error.kind == kind, "\(message): \(error)")
        return error
    } catch {
        Issue.record("\(message): \(error)")
    }
    return nil
}
