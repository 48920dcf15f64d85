import LimeEdge
import SwiftUI

/// Measures a bundle and shares the document of `lime-edge bench`.
struct BenchmarkScreen: View {
    let store: BundleStore
    @State private var names: [String] = []
    @State private var progress = 0.0
    @State private var isRunning = false
    @State private var document: URL?
    @State private var fault: String?

    var body: some View {
        NavigationStack {
            List {
                ForEach(names, id: \.self) { name in
                    Button(name) { Task { await measure(name) } }.disabled(isRunning)
                }
                if isRunning { ProgressView(value: progress) }
                if let document { ShareLink("Share \(document.lastPathComponent)", item: document) }
                if let fault { Text(fault).foregroundStyle(.red) }
            }
            .navigationTitle("Benchmark")
            .task { names = (try? store.list()) ?? [] }
        }
    }

    private func measure(_ name: String) async {
        isRunning = true
        defer { isRunning = false }
        let (steps, step) = AsyncStream.makeStream(of: Double.self)
        let shown = Task { for await part in steps { progress = part } }
        do {
            let text = try await Bench.run(store.bundle(name), with: engines, machine: ["board": UIDevice.current.model]) { done, all in
                step.yield(Double(done) / Double(all))
            }
            let file = store.folder.appendingPathComponent("bench.json")
            try text.write(to: file, atomically: true, encoding: .utf8)
            document = file
            fault = nil
        } catch {
            fault = "\(error)"
        }
        step.finish()
        await shown.value
    }
}
