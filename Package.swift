// swift-tools-version: 6.0
// lime_edge for Swift: sources, tests and what ran where are in runtimes/swift.
import PackageDescription

let package = Package(
    name: "lime-edge",
    platforms: [.iOS(.v18), .macOS(.v15)],
    products: [
        .library(name: "LimeEdge", targets: ["LimeEdge"]),
        .library(name: "LimeEdgeONNX", targets: ["LimeEdgeONNX"]),
        .library(name: "LimeEdgeCoreML", targets: ["LimeEdgeCoreML"]),
    ],
    targets: [
        .target(name: "LimeEdge", path: "runtimes/swift/Sources/LimeEdge"),
        .target(name: "LimeEdgeONNX", dependencies: ["LimeEdge", "CLimeONNX"], path: "runtimes/swift/Sources/LimeEdgeONNX"),
        .target(name: "LimeEdgeCoreML", dependencies: ["LimeEdge"], path: "runtimes/swift/Sources/LimeEdgeCoreML"),
        .target(name: "CLimeONNX", dependencies: ["CLimeOperators"], path: "runtimes/swift/Sources/CLimeONNX"),
        .target( // the processor's operators, as Python builds them
            name: "CLimeOperators", path: "runtimes/onnx/operators",
            sources: [
                "registration.c", "attributes.c", "operators.c", "read_pinned.c", "compute_pinned.c", "compute_routed.c", "branch.c", "routing.c",
                "activation.c", "residual.c",
            ]),
        .testTarget(name: "LimeEdgeTests", dependencies: ["LimeEdge", "LimeEdgeONNX", "LimeEdgeCoreML"], path: "runtimes/swift/Tests/LimeEdgeTests"),
    ],
    swiftLanguageModes: [.v6],
    cLanguageStandard: .gnu11
)
