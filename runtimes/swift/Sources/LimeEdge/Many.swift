/// What one row of ``LimeSession/generateMany(_:options:rows:memory:)`` is asked.
public struct Request: Sendable {
    /// A complete prompt (chat template applied), or token ids (S,).
    public enum Prompt: Sendable {
        /// Complete.
        case text(String)
        /// (S,)
        case ids([Int])
    }

    /// What is asked.
    public let prompt: Prompt
    /// Who answers.
    public let selection: Selection
    /// Its own, or nil for those that the call gives to all.
    public let options: GenerationOptions?

    /// A complete prompt.
    public init(_ prompt: String, _ selection: Selection, options: GenerationOptions? = nil) {
        self.prompt = .text(prompt)
        self.selection = selection
        self.options = options
    }

    /// Token ids (S,): needs no tokenizer to be read.
    public init(_ ids: [Int], _ selection: Selection, options: GenerationOptions? = nil) {
        prompt = .ids(ids)
        self.selection = selection
        self.options = options
    }
}

/// What came of a request.
public struct Answer: Sendable, CustomStringConvertible {
    /// Which request, by its place in the list.
    public let row: Int
    /// Text that became certain, may be empty where `end` is there.
    public let piece: String
    /// Ids behind it, in ``LimeSession/generateManyIDs(_:options:rows:memory:)``; else empty.
    public let tokens: [Int]
    /// Why the request has ended, nil while it goes on.
    public let end: FinishReason?
    /// What went wrong where `end` is `.failed`; the others go on.
    public let error: LimeError?

    /// For people.
    public var description: String {
        "\(row): \(piece)\(tokens.map(String.init).joined(separator: " "))\(end.map { " (\($0.rawValue))" } ?? "")"
    }
}
