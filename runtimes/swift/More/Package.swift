// swift-tools-version: 6.0
// What needs packages from elsewhere: SwiftPM fetches a root's dependencies on every platform, so it is a package of its own.
import PackageDescription

let package = Package(
    name: "lime-edge-more",
    platforms: [.iOS(.v18), .macOS(.v15)],
    products: [
        .library(name: "LimeEdgeExecuTorch", targets: ["LimeEdgeExecuTorch"]),
        .library(name: "LimeEdgeTransformers", targets: ["LimeEdgeTransformers"]),
    ],
    dependencies: [
        .package(name: "lime-edge", path: "../../.."),
        .package(url: "https://github.com/pytorch/executorch", branch: "swiftpm-1.1.0"),
        .package(url: "https://github.com/huggingface/swift-transformers", from: "1.0.0"),
    ],
    targets: [
        .target(
            name: "LimeEdgeExecuTorch",
            dependencies: [
                .product(name: "LimeEdge", package: "lime-edge"), .product(name: "executorch", package: "executorch"),
                .product(name: "backend_xnnpack", package: "executorch"), .product(name: "kernels_llm", package: "executorch"),
                .product(name: "kernels_optimized", package: "executorch"), .product(name: "kernels_quantized", package: "executorch"),
            ]),
        .target(
            name: "LimeEdgeTransformers",
            dependencies: [.product(name: "LimeEdge", package: "lime-edge"), .product(name: "Tokenizers", package: "swift-transformers")]),
    ],
    swiftLanguageModes: [.v6]
)
