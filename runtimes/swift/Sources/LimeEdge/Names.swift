/// Which names and paths there may be in a bundle; it is copied between systems, so one must mean one file on all of them.
enum Names {
    static let reserved: Set<String> = ["none", "routed"]
    private static let devices: Set<String> = Set(["con", "prn", "aux", "nul"] + (0...9).flatMap { ["com\($0)", "lpt\($0)"] })

    /// What is wrong with an expert name, or nil.
    static func checkExpert(_ name: String?) -> String? {
        guard let name, fits(name, longest: 64, underscoreFirst: false) else {
            return "'\((name ?? "").shortened(80))' is not a valid expert name (letters, digits, '.', '_', '-'; at most 64)"
        }
        if reserved.contains(lower(name)) { return "'\(name)' is reserved" }
        if isDevice(name) || name.hasSuffix(".") { return "'\(name)' is no file name on Windows" }
        return nil
    }

    /// What is wrong with a path inside a bundle, or nil.
    static func checkPath(_ path: String) -> String? {
        let parts = split(path)
        if parts.count > 8 || !parts.allSatisfy({ fits($0, longest: 128, underscoreFirst: true) }) {
            return "'\(path.shortened(80))' is not a path inside a bundle"
        }
        if parts.contains(where: { isDevice($0) || $0.hasSuffix(".") }) { return "'\(path)' is no file name on Windows" }
        return nil
    }

    /// What cannot be there together: equal but for letter case, or a file where another needs a folder.
    static func findClashes(_ paths: [String]) -> [String] {
        var seen: [String: String] = [:]
        var clashes: [String] = []
        for path in paths {
            if let other = seen.updateValue(path, forKey: lower(path)) { clashes.append("'\(other)' and '\(path)' are one on some file systems") }
        }
        for (folded, path) in seen {
            let parts = split(folded)
            for count in 1..<max(parts.count, 1) {
                if let file = seen[parts.prefix(count).joined(separator: "/")] { clashes.append("'\(file)' is a file and '\(path)' needs a folder there") }
            }
        }
        return clashes
    }

    /// Lower case, of ASCII letters alone: names hold no others.
    static func lower(_ text: String) -> String {
        String(decoding: text.utf8.map { $0 >= 0x41 && $0 <= 0x5A ? $0 + 0x20 : $0 }, as: UTF8.self)
    }

    static func split(_ path: String) -> [String] {
        path.utf8.split(separator: UInt8(ascii: "/"), omittingEmptySubsequences: false).map { String(decoding: $0, as: UTF8.self) }
    }

    private static func fits(_ name: String, longest: Int, underscoreFirst: Bool) -> Bool {
        guard let first = name.utf8.first, name.utf8.count <= longest else { return false }
        func isPlain(_ byte: UInt8) -> Bool { (byte >= 0x30 && byte <= 0x39) || (byte | 0x20 >= 0x61 && byte | 0x20 <= 0x7A) }
        guard isPlain(first) || (underscoreFirst && first == UInt8(ascii: "_")) else { return false }
        return name.utf8.allSatisfy { isPlain($0) || $0 == UInt8(ascii: ".") || $0 == UInt8(ascii: "_") || $0 == UInt8(ascii: "-") }
    }

    private static func isDevice(_ part: String) -> Bool {
        devices.contains(lower(String(decoding: part.utf8.prefix { $0 != UInt8(ascii: ".") }, as: UTF8.self)))
    }
}
