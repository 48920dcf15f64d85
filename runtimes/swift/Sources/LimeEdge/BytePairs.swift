/// Byte-pair encoding of one word: the pair of lowest rank is merged first, the leftmost of equals.
///
/// Source: Sennrich et al., arXiv 1508.07909; byte-level as in GPT-2.
struct BytePairs: Sendable {
    private let ids: [Int32]
    private var table: PairTable
    private static let gone: Int32 = -1

    /// - Parameters:
    ///   - ids: of the 256 bytes; -1: the vocabulary lacks it, and it is left out.
    ///   - merges: how many will be added.
    init(ids: [Int32], merges: Int) {
        self.ids = ids
        table = PairTable(merges)
    }

    /// Add a merge; rank by order of addition.
    mutating func add(_ left: Int32, _ right: Int32, rank: Int32, merged: Int32) { table.put(left, right, rank, merged) }

    /// Append the ids of a word's bytes to `out`.
    func encode(_ bytes: ArraySlice<UInt8>, _ out: inout [Int]) {
        var symbols = bytes.map { ids[Int($0)] }
        if symbols.contains(where: { $0 < 0 }) { symbols.removeAll { $0 < 0 } }
        if symbols.count > 1 { merge(&symbols) }
        for symbol in symbols where symbol != Self.gone { out.append(Int(symbol)) }
    }

    private func merge(_ symbols: inout [Int32]) {
        let count = symbols.count
        var next = (0..<count).map { $0 + 1 }
        var previous = (0..<count).map { $0 - 1 }
        var queue = Heap() // rank in the high half, place in the low one
        func offer(_ at: Int, _ symbols: [Int32], _ next: [Int]) {
            if at < 0 || next[at] >= count { return }
            if let found = table.find(symbols[at], symbols[next[at]]) { queue.push(UInt64(found.rank) << 32 | UInt64(at)) }
        }
        for at in 0..<count - 1 { offer(at, symbols, next) }
        while let best = queue.pop() {
            let at = Int(best & 0xFFFF_FFFF)
            if symbols[at] == Self.gone || next[at] >= count { continue }
            let right = next[at]
            guard let found = table.find(symbols[at], symbols[right]), UInt64(found.rank) == best >> 32 else { continue } // one has changed
            symbols[at] = found.merged
            symbols[right] = Self.gone
            next[at] = next[right]
            if next[at] < count { previous[next[at]] = at }
            offer(previous[at], symbols, next)
            offer(at, symbols, next)
        }
    }
}

/// (left, right) -> (rank, merged), open addressing: hundreds of thousands of entries of a dictionary would be too much for a phone.
private struct PairTable: Sendable {
    private let mask: Int
    private var keys: [UInt64]
    private var values: [UInt64]

    init(_ count: Int) {
        var size = 32
        while size < count * 2 { size *= 2 }
        mask = size - 1
        keys = [UInt64](repeating: .max, count: size)
        values = [UInt64](repeating: 0, count: size)
    }

    mutating func put(_ left: Int32, _ right: Int32, _ rank: Int32, _ merged: Int32) {
        let key = Self.key(left, right)
        let at = place(key)
        keys[at] = key
        values[at] = UInt64(UInt32(rank)) << 32 | UInt64(UInt32(merged))
    }

    func find(_ left: Int32, _ right: Int32) -> (rank: UInt32, merged: Int32)? {
        let at = place(Self.key(left, right))
        return keys[at] == .max ? nil : (UInt32(values[at] >> 32), Int32(truncatingIfNeeded: values[at]))
    }

    private static func key(_ left: Int32, _ right: Int32) -> UInt64 { UInt64(UInt32(left)) << 32 | UInt64(UInt32(right)) }

    private func place(_ key: UInt64) -> Int {
        let mixed = key &* 0x9E37_79B9_7F4A_7C15 // 2^64 / golden ratio
        var at = Int(truncatingIfNeeded: mixed ^ (mixed >> 32)) & mask
        while keys[at] != .max, keys[at] != key { at = (at + 1) & mask }
        return at
    }
}

/// The smallest first.
private struct Heap {
    private var items: [UInt64] = []

    mutating func push(_ item: UInt64) {
        items.append(item)
        var at = items.count - 1
        while at > 0, items[(at - 1) / 2] > items[at] {
            items.swapAt(at, (at - 1) / 2)
            at = (at - 1) / 2
        }
    }

    mutating func pop() -> UInt64? {
        guard let first = items.first, let last = items.popLast() else { return nil }
        if items.isEmpty { return first }
        items[0] = last
        var at = 0
        while true {
            var least = at
            for child in [2 * at + 1, 2 * at + 2] where child < items.count && items[child] < items[least] { least = child }
            if least == at { return first }
            items.swapAt(at, least)
            at = least
        }
    }
}
