/// How to pick tokens and when to stop (docs/sampling.md).
public struct GenerationOptions: Sendable, Equatable {
    /// At most this many.
    public var maxNewTokens: Int
    /// 0 is greedy.
    public var temperature: Double
    /// Keep the k likeliest; 0 keeps all.
    public var topK: Int
    /// Of those, the fewest that hold this share of the weight, in (0, 1].
    public var topP: Double
    /// Of the generator; nil for one that nobody knows.
    public var seed: UInt64?
    /// Strings that end the text and are not part of it.
    public var stop: [String]
    /// Generate on past the end token.
    public var ignoreEOS: Bool

    /// Options; leave one out for its default. They are checked where they are used.
    public init(
        maxNewTokens: Int = 128, temperature: Double = 0, topK: Int = 0, topP: Double = 1, seed: UInt64? = nil, stop: [String] = [],
        ignoreEOS: Bool = false
    ) {
        self.maxNewTokens = maxNewTokens
        self.temperature = temperature
        self.topK = topK
        self.topP = topP
        self.seed = seed
        self.stop = stop
        self.ignoreEOS = ignoreEOS
    }

    /// - Throws: ``LimeError/invalid(_:)`` options out of range, all of them.
    func check() throws {
        var faults = Faults()
        if maxNewTokens < 1 { faults.add("maxNewTokens", "at least 1", maxNewTokens) }
        if !(temperature >= 0 && temperature.isFinite) { faults.add("temperature", "finite, 0 or more", temperature) }
        if topK < 0 { faults.add("topK", "0 or more", topK) }
        if !(topP > 0 && topP <= 1) { faults.add("topP", "in (0, 1]", topP) }
        if stop.contains(where: \.isEmpty) { faults.add("stop strings may not be empty") }
        try faults.throwAny(LimeError.invalid, at: "generation options", hint: "leave an option out for its default")
    }
}

/// Why a generation ended.
public enum FinishReason: String, Sendable {
    /// The end token, or a stop string.
    case stop
    /// As many tokens as were asked for.
    case length
    /// The cache is full.
    case cache
    /// Its logits were no numbers (only where many are asked at once: alone it is thrown).
    case failed
}
