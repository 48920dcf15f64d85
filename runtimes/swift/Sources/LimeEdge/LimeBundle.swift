import Foundation

/// An opened bundle: the folder that `lime-edge export` writes, checked as docs/bundle-format.md says ("Reading a bundle").
public final class LimeBundle: Sendable {
    /// Where it is.
    public let folder: URL
    /// What lime.json says.
    public let manifest: Manifest
    /// p_ref (sum_H,).
    let reference: [Float]
    private let root: BundleFolder
    private let seen: SeenFiles
    private static let ahead: Int64 = 64 << 20
    private static let tries = 50

    /// Open a bundle.
    ///
    /// Sizes of all files and hashes of the small ones are compared every time; graph and weights when a session is opened, if
    /// they are new or have changed; an expert's when it is used.
    ///
    /// - Parameters:
    ///   - folder: the bundle.
    ///   - verify: compare the hash of every file now.
    ///   - cache: where to note which large files were seen; nil for the user's (on Apple's systems the app's) cache folder. A folder
    ///     that cannot be written to notes nothing.
    /// - Throws: ``LimeError/missing(_:)`` no bundle; ``LimeError/damaged(_:)`` every damaged file is named;
    ///   ``LimeError/unsupported(_:)`` another schema, or a vision-language bundle.
    public static func open(_ folder: URL, verify: Bool = false, cache: URL? = nil) throws -> LimeBundle {
        let root = BundleFolder(folder.resolvingSymlinksInPath().path) // the bundle's directory itself may be a link
        var manifest = try root.readManifest()
        for _ in 1..<tries {
            do {
                let bundle = try LimeBundle(root, manifest, cache)
                if verify { try bundle.verifyFiles() }
                return bundle
            } catch LimeError.damaged(let report) {
                let again = try root.readManifest()
                if again.seal == manifest.seal { throw LimeError.damaged(report) } // else it changed while it was read
                manifest = again
            }
        }
        throw LimeError.damaged(.init(root.path, "changes all the time", "wait until it has been written"))
    }

    private init(_ root: BundleFolder, _ manifest: Manifest, _ cache: URL?) throws {
        var faults = Faults()
        let late = Set(manifest.experts.map(\.file)) // hashed when they are used
        for path in manifest.paths {
            guard let entry = manifest.files[path], let file = root.locate(path, entry, &faults) else { continue }
            if !late.contains(path), !entry.isLarge { try root.compare(path, file, entry, &faults) }
        }
        try faults.throwAny(LimeError.damaged, at: root.path, hint: copyAgain)
        if manifest.kind == "vision-language" {
            throw LimeError.unsupported(.init(root.path, "a vision-language bundle: this library does not see pictures yet", "open a text bundle"))
        }
        self.root = root
        self.manifest = manifest
        folder = URL(fileURLWithPath: root.path, isDirectory: true)
        reference = try root.readReference(manifest)
        seen = SeenFiles(folder: cache ?? SeenFiles.defaultFolder(), bundle: root.path)
    }

    /// Size of every file listed, in bytes.
    public var totalBytes: Int64 { manifest.files.values.reduce(0) { $0 + $1.size } }

    /// A file of the bundle that lime.json lists.
    public func file(_ path: String) -> URL { folder.appendingPathComponent(path) }

    /// What tells one package (a folder of files) from another: over the paths and hashes of its files, hex.
    package func packageIdentity(_ path: String) -> String {
        let files = manifest.files.filter { $0.key == path || $0.key.hasPrefix("\(path)/") }.sorted { $0.key < $1.key }
        return Sha256.digest(Array(files.map { "\($0.key) \($0.value.sha256)\n" }.joined().utf8))
    }

    /// Compare what an engine or a tokenizer is about to read with its hashes: every large file below `prefix` that was not seen
    /// before or has changed since.
    ///
    /// - Throws: ``LimeError/damaged(_:)`` a file is not what lime.json says.
    public func checkLarge(_ prefix: String) throws {
        var faults = Faults()
        for path in manifest.paths where path.hasPrefix(prefix) {
            guard let entry = manifest.files[path], entry.isLarge, let file = root.locate(path, entry, &faults) else { continue }
            guard let facts = FileFacts(file).map({ SeenFiles.describe(entry.sha256, $0) }), !seen.knows(path, facts) else { continue }
            if try root.compare(path, file, entry, &faults) { seen.remember(path, facts) }
        }
        try faults.throwAny(LimeError.damaged, at: root.path, hint: copyAgain)
    }

    /// The hash of every file, companions included.
    ///
    /// - Throws: ``LimeError/damaged(_:)`` naming all that differ.
    public func verifyFiles() throws {
        var faults = Faults()
        for path in manifest.paths {
            if let entry = manifest.files[path], let file = root.locate(path, entry, &faults) { try root.compare(path, file, entry, &faults) }
        }
        try faults.throwAny(LimeError.damaged, at: root.path, hint: copyAgain)
    }

    /// Read a listed file and compare its hash, in the bytes that are given back.
    func readChecked(_ path: String) throws -> [UInt8] { try root.readChecked(path, manifest) }

    /// The bytes of all expert files as they are now, unchecked, if they are not too many: a session keeps them, whatever becomes
    /// of the bundle.
    func readExpertsAhead() -> [String: [UInt8]] {
        let entries = manifest.experts.compactMap { expert in manifest.files[expert.file].map { (expert.file, $0) } }
        if entries.reduce(0, { $0 + $1.1.size }) > Self.ahead { return [:] }
        var found: [String: [UInt8]] = [:]
        for (path, entry) in entries {
            var faults = Faults()
            if let file = root.locate(path, entry, &faults) { found[path] = try? readFile(file, copyAgain) }
        }
        return found
    }

    /// An expert file's bytes, checked; `ahead` where they were read before.
    func readExpert(_ path: String, ahead: [UInt8]?) throws -> [UInt8] {
        guard let ahead else { return try readChecked(path) }
        return try root.check(path, ahead, manifest)
    }
}

extension FileEntry {
    /// Larger than what is hashed at every open: 1 MiB.
    fileprivate var isLarge: Bool { size > 1 << 20 }
}

/// Files of a bundle, by their paths in it.
private struct BundleFolder: Sendable {
    let path: String

    init(_ path: String) { self.path = path }

    func readManifest() throws -> Manifest {
        guard FileFacts(path)?.isFolder == true else {
            throw LimeError.missing(.init(path, "no such bundle", "a bundle is a folder written by lime-edge export"))
        }
        let file = "\(path)/\(ManifestReader.file)"
        guard let facts = FileFacts(file) else {
            throw LimeError.missing(.init(path, "not a bundle: lime.json is missing", "write one with lime-edge export"))
        }
        if !facts.isFile { throw LimeError.damaged(.init(file, "a link or no file", copyAgain)) }
        if facts.size > ManifestReader.largest {
            throw LimeError.damaged(.init(file, Fault("bytes", expected: "at most \(ManifestReader.largest)", found: "\(facts.size)"), copyAgain))
        }
        return try ManifestReader.read(readFile(file, copyAgain), file)
    }

    func readReference(_ manifest: Manifest) throws -> [Float] {
        let place = "\(path)/\(ManifestReader.reference)"
        let tensor: StoredTensor?
        do {
            tensor = try Safetensors(readChecked(ManifestReader.reference, manifest)).tensors["reference"]
        } catch let error as Json.Malformed {
            throw LimeError.damaged(.init(place, "\(error)", copyAgain))
        }
        guard let tensor, tensor.dtype == "F32", tensor.shape == [manifest.sumH], let values = tensor.floats() else {
            let found = tensor.map { "\($0.dtype) \($0.shape)" } ?? "none"
            throw LimeError.damaged(.init(place, Fault("reference", expected: "F32 (\(manifest.sumH),)", found: found), copyAgain))
        }
        if !values.allSatisfy(\.isFinite) { throw LimeError.damaged(.init(place, "holds NaN or infinite values", copyAgain)) }
        return values
    }

    func readChecked(_ path: String, _ manifest: Manifest) throws -> [UInt8] {
        guard let entry = manifest.files[path] else { throw LimeError.damaged(.init(self.path, "\(path) is not in lime.json", copyAgain)) }
        var faults = Faults()
        let file = locate(path, entry, &faults)
        try faults.throwAny(LimeError.damaged, at: self.path, hint: copyAgain)
        if entry.size > Int32.max { throw LimeError.damaged(.init(self.path, Fault(path, expected: "at most 2 GiB", found: "\(entry.size)"), copyAgain)) }
        return try check(path, readFile(file ?? path, copyAgain), manifest)
    }

    func check(_ path: String, _ bytes: [UInt8], _ manifest: Manifest) throws -> [UInt8] {
        let found = Sha256.digest(bytes)
        guard let entry = manifest.files[path], entry.sha256 == found else {
            let wanted = manifest.files[path]?.sha256 ?? ""
            throw LimeError.damaged(.init(self.path, Fault("\(path): sha256", expected: wanted.shortened(16), found: found.shortened(16)), copyAgain))
        }
        return bytes
    }

    /// Whether a file's hash is its entry's; else a fault.
    @discardableResult
    func compare(_ path: String, _ file: String, _ entry: FileEntry, _ faults: inout Faults) throws -> Bool {
        let found = try hashFile(file)
        if found != entry.sha256 { faults.add("\(path): sha256", entry.sha256.shortened(16), found.shortened(16)) }
        return found == entry.sha256
    }

    /// The file of a path in the bundle if it is plain, of its size, and no link is on the way; else a fault.
    func locate(_ path: String, _ entry: FileEntry, _ faults: inout Faults) -> String? {
        var file = self.path
        let parts = Names.split(path)
        for (index, part) in parts.enumerated() {
            file += "/" + part
            let last = index == parts.count - 1
            guard let facts = FileFacts(file) else {
                faults.add("\(path) is missing")
                return nil
            }
            if facts.isLink {
                faults.add("\(path): a link")
            } else if last ? !facts.isFile : !facts.isFolder {
                faults.add("\(path): no plain file")
            } else if last, facts.size != entry.size {
                faults.add("\(path): size in bytes", entry.size, facts.size)
            } else {
                continue
            }
            return nil
        }
        return file
    }
}

/// sha256 of a file, read piece by piece. Throws ``LimeError/damaged(_:)``.
func hashFile(_ path: String) throws -> String {
    guard let file = fopen(path, "rb") else { throw LimeError.damaged(.init(path, "cannot be read", copyAgain)) }
    defer { fclose(file) }
    var hash = Sha256()
    return try withUnsafeTemporaryAllocation(byteCount: 1 << 20, alignment: 16) { buffer in
        while true {
            let count = fread(buffer.baseAddress, 1, buffer.count, file)
            if count > 0 { hash.update(UnsafeRawBufferPointer(rebasing: buffer[..<count])) }
            if count < buffer.count { break }
        }
        if ferror(file) != 0 { throw LimeError.damaged(.init(path, "cannot be read", copyAgain)) }
        return hash.finish()
    }
}
