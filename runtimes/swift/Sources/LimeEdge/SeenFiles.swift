import Foundation

/// Remembers which large files had the right hash, so that opening a bundle again does not read gigabytes.
///
/// One JSON file per bundle in a folder of the user's or the app's cache; a file is known by its path in the bundle, its hash,
/// and what the file system says about it (size, times, inode). Without a folder nothing is remembered.
final class SeenFiles: @unchecked Sendable { // `seen` is guarded by the lock
    private let folder: URL?
    private let note: URL?
    private let lock = NSLock()
    private var seen: [String: String] = [:]

    init(folder: URL?, bundle: String) {
        self.folder = folder
        note = folder?.appendingPathComponent(String(Sha256.digest(Array(bundle.utf8)).prefix(32)) + ".json")
        guard let note, let data = FileManager.default.contents(atPath: note.path), let known = try? Json.parse(Array(data)) else { return }
        for (path, value) in known.object?.members ?? [] { seen[path] = value.string }
    }

    /// Whether the file was found to have that hash and looks untouched since.
    func knows(_ path: String, _ facts: String) -> Bool { lock.withLock { folder != nil && seen[path] == facts } }

    /// Note that the file has its hash; `facts` are what ``describe(_:_:)`` said before it was read.
    func remember(_ path: String, _ facts: String) {
        guard let folder, let note else { return }
        lock.withLock {
            seen[path] = facts
            var object = JsonObject()
            for (path, facts) in seen.sorted(by: { $0.key < $1.key }) { _ = object.add(path, .string(facts)) }
            // a full disk costs time at the next open, nothing else
            try? FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
            try? Data(Json.object(object).text.utf8).write(to: note, options: .atomic)
        }
    }

    /// What tells a file from a changed one.
    static func describe(_ sha256: String, _ facts: FileFacts) -> String {
        "\(sha256) \(facts.inode) \(facts.changed) \(facts.modified) \(facts.size)"
    }

    /// The user's cache folder, on Apple's systems the app's; nil where there is none.
    static func defaultFolder() -> URL? {
        FileManager.default.urls(for: .cachesDirectory, in: .userDomainMask).first?.appendingPathComponent("lime-edge/seen-swift")
    }
}

/// What the file system says about a path, links not followed.
struct FileFacts {
    let size: Int64
    let inode: UInt64
    let modified: String
    let changed: String
    let isFile: Bool
    let isFolder: Bool
    let isLink: Bool

    /// Nil where nothing is there.
    init?(_ path: String) {
        var found = stat()
        guard lstat(path, &found) == 0 else { return nil }
        size = Int64(found.st_size)
        inode = UInt64(found.st_ino)
        let kind = found.st_mode & S_IFMT
        isFile = kind == S_IFREG
        isFolder = kind == S_IFDIR
        isLink = kind == S_IFLNK
        #if canImport(Darwin)
        modified = "\(found.st_mtimespec.tv_sec).\(found.st_mtimespec.tv_nsec)"
        changed = "\(found.st_ctimespec.tv_sec).\(found.st_ctimespec.tv_nsec)"
        #else
        modified = "\(found.st_mtim.tv_sec).\(found.st_mtim.tv_nsec)"
        changed = "\(found.st_ctim.tv_sec).\(found.st_ctim.tv_nsec)"
        #endif
    }
}
