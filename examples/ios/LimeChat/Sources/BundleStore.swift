import Foundation
import LimeEdge

/// Bundles in the app's documents: folders, and archives (`lime-edge pack`) that are unpacked when they are first seen.
struct BundleStore: Sendable {
    let folder: URL

    /// Names of the bundles that are there, archives unpacked before.
    func list() throws -> [String] {
        let files = try FileManager.default.contentsOfDirectory(at: folder, includingPropertiesForKeys: nil)
        for archive in files where archive.pathExtension == "tar" {
            let target = folder.appendingPathComponent(archive.deletingPathExtension().lastPathComponent + ".lime")
            if !FileManager.default.fileExists(atPath: target.path) { _ = try BundleArchive.unpack(archive, to: target) }
            try FileManager.default.removeItem(at: archive)
        }
        return try FileManager.default.contentsOfDirectory(atPath: folder.path).filter { $0.hasSuffix(".lime") }.sorted()
    }

    func bundle(_ name: String) -> URL { folder.appendingPathComponent(name) }
}
