/// A conversation with its history.
///
/// What the cache already holds of it is not computed again. When it grows beyond the cache, the oldest turns are left out (a system
/// turn stays): ``forgotten`` counts them. Switch the session's expert between two turns as you like.
public actor Conversation {
    /// Who answers.
    public nonisolated let session: LimeSession
    private let format: ChatFormat

    /// Everything said so far.
    public private(set) var turns: [Turn] = []

    /// Turns that the last prompt left out because the cache is full.
    public private(set) var forgotten = 0

    /// A conversation that begins with a system turn, or without.
    public init(_ session: LimeSession, system: String? = nil) throws {
        self.session = session
        format = try ChatFormat(session.bundle)
        if let system { turns = [Turn("system", system)] }
    }

    /// Say something and stream the answer; both join the history when the answer has ended, also where its task was cancelled or
    /// left the loop and says something else (then what was given of it).
    ///
    /// - Returns: pieces of text. It throws ``LimeError/full(_:)`` where not even this turn fits, else as
    ///   ``LimeSession/generate(_:options:keepCache:)``.
    public nonisolated func say(_ text: String, options: GenerationOptions = GenerationOptions()) -> AsyncThrowingStream<String, any Error> {
        let saying = Saying(text, options)
        return AsyncThrowingStream { try await self.next(saying) }
    }

    private var current: Saying?

    private func next(_ saying: Saying) async throws -> String? {
        if saying.answers == nil {
            settle()
            current = saying
            let prompt = try await fit(turns + [Turn("user", saying.text)], saying.options.maxNewTokens)
            saying.answers = session.generate(prompt, options: saying.options, keepCache: true).makeAsyncIterator()
        }
        do {
            let piece = try await saying.next()
            if let piece { saying.answer += piece } else if current === saying { settle() }
            return piece
        } catch {
            if current === saying { settle() }
            throw error
        }
    }

    /// What was said and answered last joins the history.
    private func settle() {
        if let current, !current.answer.isEmpty { turns += [Turn("user", current.text), Turn("assistant", current.answer)] }
        current = nil
    }

    /// Forget everything but the system turn.
    public func clear() {
        current = nil
        turns.removeAll { $0.role != "system" }
        forgotten = 0
    }

    /// The prompt of as many of the last turns as fit, with room for an answer.
    private func fit(_ turns: [Turn], _ room: Int) async throws -> String {
        let tokenizer = try await session.tokenizer
        let system = turns.prefix { $0.role == "system" }
        var rest = turns.dropFirst(system.count)
        forgotten = 0
        while true {
            let prompt = try format.render(Array(system) + rest)
            let tokens = try tokenizer.encode(prompt).count
            if tokens + min(room, session.maxLength / 2) <= session.maxLength || rest.count <= 1 { return prompt }
            let dropped = rest[rest.startIndex + 1].role == "assistant" ? 2 : 1
            forgotten += dropped
            rest = rest.dropFirst(dropped)
        }
    }

    /// A turn under way; its conversation alone touches it.
    private final class Saying: @unchecked Sendable {
        let text: String
        let options: GenerationOptions
        var answers: AsyncThrowingStream<String, any Error>.Iterator?
        var answer = ""

        init(_ text: String, _ options: GenerationOptions) {
            self.text = text
            self.options = options
        }

        func next() async throws -> String? { try await answers?.next() }
    }
}
