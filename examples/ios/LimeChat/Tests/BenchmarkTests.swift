import LimeEdge
import XCTest

@testable import LimeChat

/// On a phone: every bundle in the app's documents verifies, and its benchmark is attached as `lime-edge bench` writes it.
final class BenchmarkTests: XCTestCase {
    func testBundles() async throws {
        let store = BundleStore(folder: .documentsDirectory)
        let names = try store.list()
        try XCTSkipIf(names.isEmpty, "put a bundle into the app's folder")
        for name in names {
            let checks = try await Verify.run(LimeBundle.open(store.bundle(name)), with: engines)
            XCTAssertFalse(checks.contains { $0.result == .missed }, "\(name): \(checks)")
            let attachment = XCTAttachment(string: try await Bench.run(store.bundle(name), with: engines))
            attachment.name = "bench-\(name).json"
            attachment.lifetime = .keepAlways
            add(attachment)
        }
    }
}
