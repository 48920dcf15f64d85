import LimeEdge
import LimeEdgeONNX
import SwiftUI

/// ONNX Runtime as the app links it; project.yml keeps the linker from leaving it out.
let engines = ONNXEngines()

@main
struct LimeChatApp: App {
    private let store = BundleStore(folder: .documentsDirectory)

    var body: some Scene {
        WindowGroup {
            TabView {
                Tab("Chat", systemImage: "bubble") { ChatTab(store: store) }
                Tab("Benchmark", systemImage: "speedometer") { BenchmarkScreen(store: store) }
            }
        }
    }
}
