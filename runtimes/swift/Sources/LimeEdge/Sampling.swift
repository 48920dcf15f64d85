import Foundation

/// 64 random bits a call, from a 64-bit seed.
///
/// Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, figure 17.
struct SplitMix64 {
    private var state: UInt64

    init(_ seed: UInt64) { state = seed }

    /// The next number, all 64 bits.
    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var mixed = state
        mixed = (mixed ^ (mixed >> 30)) &* 0xBF58_476D_1CE4_E5B9
        mixed = (mixed ^ (mixed >> 27)) &* 0x94D0_49BB_1331_11EB
        return mixed ^ (mixed >> 31)
    }

    /// A multiple of 2^-53 in [0, 1): the upper 53 bits of one number.
    mutating func uniform() -> Double { Double(next() >> 11) * 0x1p-53 }
}

/// From logits (V,) float32 to a token id: the same one in every language; docs/sampling.md says each step.
struct Sampler {
    private let options: GenerationOptions
    private var random: SplitMix64
    private static let candidates = 64

    /// - Throws: ``LimeError/invalid(_:)`` options out of range.
    init(_ options: GenerationOptions) throws {
        try options.check()
        self.options = options
        random = SplitMix64(options.seed ?? UInt64.random(in: .min ... .max))
    }

    /// Pick a token.
    ///
    /// - Throws: ``LimeError/engine(_:)`` the logits hold NaN or +inf, or nothing finite.
    mutating func pick(_ logits: UnsafeBufferPointer<Float>) throws -> Int {
        if options.temperature == 0 { return try Self.pickBest(logits) }
        let largest = Double(logits[try Self.pickBest(logits)])
        var ids = Array(logits.indices)
        if options.topK > 0 { ids = Self.chooseLikeliest({ logits[$0] }, ids, options.topK) }
        var weights = ids.map { exp((Double(logits[$0]) - largest) / options.temperature) }
        if options.topP < 1 {
            let kept = Self.chooseMass(weights, { logits[ids[$0]] }, options.topP)
            ids = kept.map { ids[$0] }
            weights = kept.map { weights[$0] }
        }
        return ids[Self.draw(weights, random.uniform())]
    }

    /// The likeliest token, of several the one with the lowest id.
    static func pickBest(_ logits: UnsafeBufferPointer<Float>) throws -> Int {
        var best = 0
        var sum: Float = 0 // NaN where one of them is
        for at in logits.indices {
            if logits[at] > logits[best] { best = at }
            sum += logits[at] == -.infinity ? 0 : logits[at] * 0
        }
        if !sum.isNaN, logits[best].isFinite { return best }
        let found = logits.first { $0.isNaN } ?? logits[best]
        throw LimeError.engine(.init("logits", "they hold \(found): no token can be picked", "Verify tells whether the bundle computes here what PyTorch did"))
    }

    /// Of `ids` (rising) those with the `count` largest values, rising; of equal ones the first.
    private static func chooseLikeliest(_ value: (Int) -> Float, _ ids: [Int], _ count: Int) -> [Int] {
        if count >= ids.count { return ids }
        var values = ids.map(value)
        let least = findLargest(&values, count)
        var ties = count - ids.count { value($0) > least }
        return ids.filter { id in
            if value(id) > least { return true }
            if value(id) < least { return false }
            ties -= 1
            return ties >= 0
        }
    }

    /// Places of the fewest weights that hold `share` of all, rising: likeliest first, of equal ones the first.
    private static func chooseMass(_ weights: [Double], _ value: (Int) -> Float, _ share: Double) -> [Int] {
        let all = Array(weights.indices)
        let goal = share * weights.reduce(0, +)
        var count = candidates
        while true {
            let places = chooseLikeliest(value, all, count).sorted { (value($0), $1) > (value($1), $0) }
            var held = 0.0
            for (taken, place) in places.enumerated() {
                held += weights[place]
                if held >= goal { return places[...taken].sorted() }
            }
            if places.count == weights.count { return all }
            count *= 8
        }
    }

    /// The first place where the running sum of the weights exceeds `uniform` of their sum.
    private static func draw(_ weights: [Double], _ uniform: Double) -> Int {
        let goal = uniform * weights.reduce(0, +)
        var sum = 0.0
        for at in weights.indices {
            sum += weights[at]
            if sum > goal { return at }
        }
        return weights.count - 1
    }

    /// The k-th largest value; `values` is reordered (Hoare's selection).
    private static func findLargest(_ values: inout [Float], _ k: Int) -> Float {
        var low = 0
        var high = values.count - 1
        let wanted = k - 1
        while low < high {
            let pivot = values[(low + high) / 2]
            var left = low
            var right = high
            while left <= right {
                while values[left] > pivot { left += 1 }
                while values[right] < pivot { right -= 1 }
                if left <= right {
                    values.swapAt(left, right)
                    left += 1
                    right -= 1
                }
            }
            if wanted <= right { high = right } else if wanted >= left { low = left } else { return values[wanted] }
        }
        return values[wanted]
    }
}
