/// A stretch of the cache: which selection filled it, and its number of tokens.
public struct Segment: Sendable, Equatable {
    /// As typed.
    public let selection: String
    /// How many.
    public let tokens: Int
}

/// The tokens of one sequence, in step with the engine: after every call both hold the same, or neither changed.
final class SequenceCache {
    private let engine: any DecoderEngine
    private var ids: [Int64] = []
    /// Who filled it, in order.
    private(set) var segments: [Segment] = []
    /// Tokens at its beginning that the original model read for whichever expert is to act after them.
    private(set) var common = 0

    init(_ engine: any DecoderEngine) { self.engine = engine }

    var count: Int { ids.count }

    /// Whether all of it is one selection's.
    func isFilled(by selection: String) -> Bool { segments.allSatisfy { $0.selection == selection } }

    /// Tokens at its beginning that are those of a sequence, each filled by whom it should be.
    func countKept(_ sequence: [Int64], _ filler: (Int) -> String) -> Int {
        var kept = 0
        for segment in segments {
            for _ in 0..<segment.tokens {
                if kept == sequence.count || ids[kept] != sequence[kept] || filler(kept) != segment.selection { return kept }
                kept += 1
            }
        }
        return kept
    }

    /// Forget everything after the first `length` tokens.
    func rewind(_ length: Int) throws {
        try engine.rewind(length)
        ids.removeLast(max(0, ids.count - length))
        common = min(common, length)
        var left = length
        segments = segments.compactMap { segment in
            let tokens = min(segment.tokens, left)
            left -= tokens
            return tokens > 0 ? Segment(selection: segment.selection, tokens: tokens) : nil
        }
    }

    /// One call of the engine: append tokens that `filler` fills; logits of the last `keep`.
    func feed(_ piece: [Int64], keep: Int, filler: String, _ interruption: Interruption?) throws -> UnsafeBufferPointer<Float> {
        let logits: UnsafeBufferPointer<Float>
        do {
            logits = try engine.feed(piece, keep: keep, interruption: interruption)
        } catch {
            try engine.rewind(ids.count)
            throw error
        }
        ids += piece
        if let last = segments.last, last.selection == filler {
            segments[segments.count - 1] = Segment(selection: filler, tokens: last.tokens + piece.count)
        } else {
            segments.append(Segment(selection: filler, tokens: piece.count))
        }
        return logits
    }

    /// The original model has read the tokens of `range`.
    func share(_ range: Range<Int>) {
        if range.lowerBound <= common { common = max(common, range.upperBound) }
    }
}

/// Where to cut `count` tokens that follow `held`: at multiples of `chunk` in the cache, whatever is held already. The end of each
/// piece is given back, the last one `count`.
///
/// So a prompt is cut alike whether or not its beginning was kept. No piece is a single token where there are two: engines run one
/// row in other products than many, and in a quantized bundle the two round differently.
func planChunks(held: Int, count: Int, chunk: Int) -> [Int] {
    var stops: [Int] = []
    var start = 0
    while start < count {
        var stop = min(count, (held + start) / chunk * chunk + chunk - held)
        while stop < count, stop - start == 1 || count - stop == 1 { stop += 1 }
        stops.append(stop)
        start = stop
    }
    return stops
}
