import Foundation

/// A bundle as one file, as `lime-edge pack` writes it: an uncompressed tar (POSIX ustar), lime.json first.
///
/// ``unpack(_:to:progress:)`` writes beside the bundle and renames once at the end: a bundle is there whole or not at all. A run that
/// was killed is taken up again: files that are whole already are not written anew.
public enum BundleArchive {
    /// Unpack an archive; every file is compared with its hash before the bundle appears.
    ///
    /// - Parameters:
    ///   - archive: the whole archive, a file.
    ///   - folder: the bundle to appear; it must not be there.
    ///   - progress: bytes read so far.
    /// - Throws: ``LimeError/damaged(_:)`` a truncated or foreign archive, files that lime.json does not list, hashes that differ;
    ///   ``LimeError/invalid(_:)`` the folder is there already; ``LimeError/missing(_:)`` no archive.
    public static func unpack(_ archive: URL, to folder: URL, progress: (Int64) -> Void = { _ in }) throws -> LimeBundle {
        guard let file = fopen(archive.path, "rb") else { throw LimeError.missing(.init(archive.path, "no such archive", "lime-edge pack writes one")) }
        defer { fclose(file) }
        return try unpack(archive.path, to: folder, progress: progress) { fread($0.baseAddress, 1, $0.count, file) }
    }

    /// As ``unpack(_:to:progress:)``, from bytes as they come.
    ///
    /// - Parameters:
    ///   - name: of the archive, for errors.
    ///   - read: fills the beginning of a buffer and says how many bytes it wrote; 0 at the end.
    public static func unpack(
        _ name: String, to folder: URL, progress: (Int64) -> Void = { _ in }, reading read: (UnsafeMutableRawBufferPointer) throws -> Int
    ) throws -> LimeBundle {
        if FileFacts(folder.path) != nil {
            throw LimeError.invalid(.init(folder.path, "is there already", "delete it first, or unpack under another name"))
        }
        let stage = folder.deletingLastPathComponent().appendingPathComponent(".\(folder.lastPathComponent).partial", isDirectory: true)
        do {
            try FileManager.default.createDirectory(at: stage, withIntermediateDirectories: true)
            try withoutActuallyEscaping(read) { read in
                try withoutActuallyEscaping(progress) { progress in
                    var reader = ArchiveReader(place: name, stage: stage, progress: progress, source: read)
                    try reader.run()
                }
            }
            _ = try LimeBundle.open(stage)
            try FileManager.default.moveItem(at: stage, to: folder)
        } catch let error as CocoaError {
            throw LimeError.invalid(.init(folder.path, "cannot be written: \(error.localizedDescription)", "look for room and rights there"))
        }
        return try LimeBundle.open(folder)
    }
}

private struct ArchiveReader {
    let place: String
    let stage: URL
    let progress: (Int64) -> Void
    let source: (UnsafeMutableRawBufferPointer) throws -> Int
    private var read: Int64 = 0
    private static let block = 512
    private static let largest: Int64 = 8 << 30

    init(place: String, stage: URL, progress: @escaping (Int64) -> Void, source: @escaping (UnsafeMutableRawBufferPointer) throws -> Int) {
        self.place = place
        self.stage = stage
        self.progress = progress
        self.source = source
    }

    mutating func run() throws {
        guard let first = try readHeader() else { throw damaged("is empty") }
        if first.name != ManifestReader.file || first.size > ManifestReader.largest { throw damaged("does not begin with lime.json") }
        let text = try take(Int(first.size))
        try skipPadding(first.size)
        let manifest = try ManifestReader.read(text, "\(place): lime.json")
        var missing = manifest.files
        while let header = try readHeader() {
            guard let entry = missing.removeValue(forKey: header.name) else { throw damaged("'\(header.name.shortened(80))' is not in lime.json, or comes twice") }
            if header.size != entry.size { throw damaged("\(header.name): \(entry.size) bytes expected, \(header.size) found") }
            try takeFile(header.name, entry)
            try skipPadding(header.size)
        }
        if let one = missing.keys.sorted().first { throw damaged("\(missing.count) files are missing, \(one) among them") }
        try Data(text).write(to: stage.appendingPathComponent(ManifestReader.file))
    }

    /// One file: into its place, hashed on the way; left alone where it is there and whole.
    private mutating func takeFile(_ name: String, _ entry: FileEntry) throws {
        let target = stage.appendingPathComponent(name)
        let facts = FileFacts(target.path)
        let known = facts?.isFile == true && facts?.size == entry.size && (try? hashFile(target.path)) == entry.sha256
        try FileManager.default.createDirectory(at: target.deletingLastPathComponent(), withIntermediateDirectories: true)
        if facts != nil, !known { try FileManager.default.removeItem(at: target) } // a link, maybe: never written through
        let output = known ? nil : fopen(target.path, "wbx")
        if !known, output == nil { throw LimeError.invalid(.init(target.path, "cannot be written", "look for room and rights there")) }
        defer { if let output { fclose(output) } }
        var hash = Sha256()
        var left = entry.size
        while left > 0 {
            let piece = try take(Int(min(left, 1 << 16)))
            hash.update(piece)
            if let output, fwrite(piece, 1, piece.count, output) != piece.count {
                throw LimeError.invalid(.init(target.path, "cannot be written", "look for room there"))
            }
            left -= Int64(piece.count)
            progress(read)
        }
        if let output {
            fflush(output)
            fsync(fileno(output))
        }
        if hash.finish() != entry.sha256 {
            try? FileManager.default.removeItem(at: target)
            throw damaged("\(name): its sha256 is not lime.json's")
        }
    }

    /// Name and size of the next file; nil at the end.
    private mutating func readHeader() throws -> (name: String, size: Int64)? {
        let block = try take(Self.block)
        if block.allSatisfy({ $0 == 0 }) { return nil }
        let sum = block.enumerated().reduce(Int64(0)) { $0 + ((148..<156).contains($1.offset) ? 0x20 : Int64($1.element)) }
        if try octal(block, 148, 8) != sum { throw damaged("a header's checksum differs") }
        if block[156] != UInt8(ascii: "0"), block[156] != 0 { throw damaged("holds something that is no plain file") }
        let prefix = text(block, 345, 155)
        let name = (prefix.isEmpty ? "" : "\(prefix)/") + text(block, 0, 100)
        if let fault = Names.checkPath(name) { throw damaged(fault) } // no path leads out of the bundle
        let size = try octal(block, 124, 12)
        if size < 0 || size >= Self.largest { throw damaged("\(name): a size of \(size)") }
        return (name, size)
    }

    private func text(_ block: [UInt8], _ start: Int, _ length: Int) -> String {
        String(decoding: block[start..<start + length].prefix { $0 != 0 }, as: UTF8.self)
    }

    private func octal(_ block: [UInt8], _ start: Int, _ length: Int) throws -> Int64 {
        let digits = text(block, start, length).trimmingCharacters(in: .whitespaces)
        guard let number = Int64(digits.isEmpty ? "0" : digits, radix: 8) else { throw damaged("a header's number") }
        return number
    }

    private mutating func skipPadding(_ size: Int64) throws {
        let rest = (Self.block - Int(size % Int64(Self.block))) % Self.block
        if rest > 0 { _ = try take(rest) }
    }

    private mutating func take(_ count: Int) throws -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: count)
        var done = 0
        while done < count {
            let more = try bytes.withUnsafeMutableBytes { try source(UnsafeMutableRawBufferPointer(rebasing: $0[done...])) }
            if more <= 0 { throw damaged("ends early, after \(read) bytes") }
            done += more
            read += Int64(more)
        }
        return bytes
    }

    private func damaged(_ what: String) -> LimeError { .damaged(.init(place, what, "download it again")) }
}
