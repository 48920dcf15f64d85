/// One generation under way; its session alone touches it.
final class Generation: @unchecked Sendable {
    enum Prompt { case text(String), ids([Int]) }

    /// What it is to do: its prompt, its number among what changes the session, its tokens at most.
    struct Plan {
        let ids: [Int64]
        let turn: Int
        let limit: Int
    }

    let prompt: Prompt
    let options: GenerationOptions
    let keepCache: Bool
    var sampler: Sampler! // made when the first token is asked for
    var plan: Plan?
    var stream: TextStream?
    var count = 0
    var last = 0
    var ended = false
    var flushed = false

    init(_ prompt: Prompt, _ options: GenerationOptions, _ keepCache: Bool) {
        self.prompt = prompt
        self.options = options
        self.keepCache = keepCache
    }
}
