/// How a text is cut into words before bytes are merged: the regular expressions of four tokenizers, by hand.
///
/// Expressions are matched one after another, the first alternative that fits wins (as in Oniguruma, which the tokenizer library
/// uses); every character belongs to exactly one word.
enum Split: String, CaseIterable, Sendable {
    /// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
    case gpt2
    /// Every digit is a word of its own, the rest is cut as GPT-2 does.
    case smollm2
    /// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`
    case llama3
    /// As llama3, but a number is a single digit.
    case qwen2

    /// Cut code points: calls `word` with every word's range, in order.
    func cut(_ points: [UInt32], _ classes: CharacterClasses, _ word: (Range<Int>) -> Void) {
        guard self == .smollm2 else { return cutRange(Scan(points: points, end: points.count, classes: classes), from: 0, word) }
        var start = 0
        for at in points.indices where classes.isDigit(points[at]) {
            if at > start { cutRange(Scan(points: points, end: at, classes: classes), from: start, word) }
            word(at..<at + 1)
            start = at + 1
        }
        if start < points.count { cutRange(Scan(points: points, end: points.count, classes: classes), from: start, word) }
    }

    private func cutRange(_ scan: Scan, from start: Int, _ word: (Range<Int>) -> Void) {
        var at = start
        while at < scan.end {
            let next = self == .gpt2 || self == .smollm2 ? nextGpt2(scan, at) : nextLlama3(scan, at)
            word(at..<next)
            at = next
        }
    }

    private func nextGpt2(_ scan: Scan, _ at: Int) -> Int {
        let contracted = scan.contraction(at, anyCase: false)
        if contracted > at { return contracted }
        let first = scan.points[at] == 0x20 ? at + 1 : at
        let kind = first < scan.end ? scan.kind(first) : .space
        return kind == .space ? scan.spaces(at) : scan.run(first, kind)
    }

    private func nextLlama3(_ scan: Scan, _ at: Int) -> Int {
        let contracted = scan.contraction(at, anyCase: true)
        if contracted > at { return contracted }
        let point = scan.points[at]
        let isBreak = point == 0x0D || point == 0x0A
        switch scan.kind(at) {
        case .letter: return scan.run(at, .letter)
        case .number: return scan.run(at, .number, most: self == .llama3 ? 3 : 1)
        case .space, .other: break
        }
        if !isBreak, scan.isAt(at + 1, .letter) { return scan.run(at + 1, .letter) }
        let first = point == 0x20 ? at + 1 : at
        if scan.isAt(first, .other) { return scan.breaks(scan.run(first, .other)) }
        let broken = scan.lastBreak(at)
        return broken > at ? broken : scan.spaces(at)
    }
}

/// The code points of one stretch and the small steps that the expressions are made of.
private struct Scan {
    let points: [UInt32]
    let end: Int
    let classes: CharacterClasses

    func kind(_ at: Int) -> CharacterClasses.Kind { classes.kind(points[at]) }

    func isAt(_ at: Int, _ kind: CharacterClasses.Kind) -> Bool { at < end && self.kind(at) == kind }

    /// Where a run of one kind ends, after `most` at the latest.
    func run(_ at: Int, _ kind: CharacterClasses.Kind, most: Int = .max) -> Int {
        var next = at
        while next < end, next - at < most, self.kind(next) == kind { next += 1 }
        return next
    }

    /// `[\r\n]*`
    func breaks(_ at: Int) -> Int {
        var next = at
        while next < end, points[next] == 0x0D || points[next] == 0x0A { next += 1 }
        return next
    }

    /// `\s*[\r\n]+`: behind the last break of the white space, or `at` where there is none.
    func lastBreak(_ at: Int) -> Int {
        var next = run(at, .space)
        while next > at, points[next - 1] != 0x0D, points[next - 1] != 0x0A { next -= 1 }
        return next
    }

    /// `\s+(?!\S)|\s+`: white space, less the last of several where something follows.
    func spaces(_ at: Int) -> Int {
        let next = run(at, .space)
        return next < end && next - at > 1 ? next - 1 : next
    }

    private static let contractions: [[UInt32]] = ["s", "t", "re", "ve", "m", "ll", "d"].map { $0.unicodeScalars.map(\.value) }
    private static let longS: UInt32 = 0x17F // its upper case is S

    /// `'s|'t|'re|'ve|'m|'ll|'d`: behind it, or `at`.
    func contraction(_ at: Int, anyCase: Bool) -> Int {
        if points[at] != 0x27 { return at }
        for tail in Self.contractions where at + tail.count < end {
            if tail.indices.allSatisfy({ isSame(points[at + 1 + $0], tail[$0], anyCase) }) { return at + 1 + tail.count }
        }
        return at
    }

    private func isSame(_ point: UInt32, _ letter: UInt32, _ anyCase: Bool) -> Bool {
        point == letter || (anyCase && (point == letter - 32 || (letter == 0x73 && point == Self.longS)))
    }
}
