import Foundation
import Testing

@testable import LimeEdge

/// Sessions as applications use and abuse them.
@Suite struct UseTests {
    private let prompt = [5, 17, 200, 31, 9]
    private let long = GenerationOptions(maxNewTokens: 40, ignoreEOS: true)

    private func fresh(_ name: String, _ selection: String) async throws -> [Float] {
        let session = try await openSession(name)
        try await session.use(selection)
        return try await session.logits(prompt, keep: 1)[0]
    }

    @Test("10,000 switches equal fresh sessions")
    func switches() async throws {
        let selections = ["expert0", "expert1", "expert2", "expert3", "none", "expert0=0.5,expert1=0.5", "expert1=0.25,expert3=0.75"]
        var expected: [[Float]] = []
        for selection in selections { expected.append(try await fresh("lora-int4", selection)) }
        var random = SplitMix64(2)
        let session = try await openSession("lora-int4")
        for count in 0..<10_000 {
            let at = Int(random.next() % UInt64(selections.count))
            try await session.use(selections[at])
            if count % 10 == 0, try await session.logits(prompt, keep: 1)[0] != expected[at] { Issue.record("switch \(count) to \(selections[at])") }
        }
    }

    @Test("two sessions in two tasks never bleed")
    func twoSessions() async throws {
        try await withThrowingTaskGroup(of: Void.self) { group in
            for name in ["expert0", "expert2"] {
                let expected = try await fresh("lora", name)
                group.addTask {
                    let session = try await openSession("lora")
                    for _ in 0..<300 {
                        try await session.use(name)
                        if try await session.logits([5, 17, 200, 31, 9], keep: 1)[0] != expected { Issue.record("\(name)") }
                    }
                }
            }
            try await group.waitForAll()
        }
    }

    @Test("one session in many tasks answers one after another, never a mixture")
    func oneSession() async throws {
        let expected = [try await fresh("lora", "expert0"), try await fresh("lora", "expert2")]
        let session = try await openSession("lora")
        try await withThrowingTaskGroup(of: Void.self) { group in
            for number in 0..<4 {
                group.addTask {
                    for _ in 0..<200 {
                        let row = try await session.logits([5, 17, 200, 31, 9], keep: 1)[0]
                        if !expected.contains(row) { Issue.record("a mixture") }
                        try await session.use(number % 2 == 0 ? "expert0" : "expert2")
                    }
                }
            }
            try await session.use("expert0")
            try await group.waitForAll()
        }
    }

    @Test("two generations on one session: one is its own, the other ends with an error")
    func twoGenerations() async throws {
        let session = try await openSession("lora")
        try await session.use("expert0")
        let alone = try await collect(session.generateIDs(prompt, options: long))
        for _ in 0..<20 {
            let tasks = (0..<2).map { _ in Task { try await collect(session.generateIDs([5, 17, 200, 31, 9], options: GenerationOptions(maxNewTokens: 40, ignoreEOS: true))) } }
            var whole = 0
            for task in tasks {
                switch await task.result {
                case .success(let tokens):
                    #expect(tokens == alone)
                    whole += 1
                case .failure(let error): #expect((error as? LimeError)?.kind == "misused", "\(error)")
                }
            }
            #expect(whole >= 1)
        }
    }

    @Test("a cancelled generation leaves a usable session, and so does a loop that is left")
    func cancelled() async throws {
        let session = try await openSession("lora")
        try await session.use("expert0")
        let expected = try await collect(session.generateIDs(prompt, options: long))
        for count in 0..<50 {
            let (started, start) = AsyncStream.makeStream(of: Void.self)
            let task = Task {
                for try await _ in session.generateIDs([5, 17, 200, 31, 9], options: GenerationOptions(maxNewTokens: 40, ignoreEOS: true)) { start.yield() }
            }
            if count % 2 == 0 { for await _ in started { break } } else { try await Task.sleep(for: .milliseconds(1)) }
            task.cancel()
            _ = await task.result
            try await session.reset()
            if count % 10 == 0 { #expect(try await collect(session.generateIDs(prompt, options: long)) == expected) }
        }
        var first: [Int] = []
        for try await token in session.generateIDs(prompt, options: long) {
            first.append(token)
            if first.count == 3 { break }
        }
        #expect(first == Array(expected.prefix(3)))
        #expect(await session.finishReason == nil)
        #expect(try await collect(session.generateIDs(prompt, options: long)) == expected)
    }

    @Test("what disturbs a generation ends it with an error")
    func disturbed() async throws {
        let session = try await openSession("lora")
        let disturbances: [(String, @Sendable (LimeSession) async throws -> Void)] = [
            ("use", { try await $0.use("expert2") }), ("reset", { try await $0.reset() }), ("logits", { _ = try await $0.logits([5, 17]) }),
            ("extend", { _ = try await $0.extend([4]) }), ("generate", { for try await _ in $0.generateIDs([5, 17]) { break } }),
        ]
        for (name, disturb) in disturbances {
            try await session.use("expert0")
            var count = 0
            _ = await expectError("misused", name) {
                for try await _ in session.generateIDs(prompt, options: long) {
                    count += 1
                    if count == 3 { try await disturb(session) }
                }
            }
            #expect(count == 3, "\(name)")
        }
        try await session.use("expert0")
        var count = 0
        for try await _ in session.generateIDs(prompt, options: long) {
            count += 1
            if count == 3 { try await session.use("expert0") } // the same one: nothing changed
        }
        #expect(count == 40)
    }

    @Test("a closed session refuses every call")
    func closed() async throws {
        let session = try await openSession("lora")
        await session.close()
        await session.close()
        _ = await expectError("misused") { try await session.use("expert1") }
        _ = await expectError("misused") { _ = try await session.logits(prompt) }
        _ = await expectError("misused") { _ = try await collect(session.generateIDs(prompt)) }
    }

    @Test("a skill of the same adapter installs from another bundle, a foreign one does not")
    func installs() async throws {
        let other = try LimeBundle.open(Vectors.bundle("lora-fold"))
        let session = try await openSession("lora")
        let before = try await fresh("lora", "expert2")
        #expect(try await session.install(other.file(other.manifest.experts[2].file), name: "late") == "late")
        try await session.use("late")
        #expect(try await session.logits(prompt, keep: 1)[0] == before)
        _ = await expectError("invalid") { try await session.remove("late") }
        try await session.use("expert0")
        try await session.remove("late")
        _ = await expectError("invalid") { try await session.use("late") }
        let foreign = try LimeBundle.open(Vectors.bundle("foreign"))
        _ = await expectError("foreign") { try await session.install(foreign.file(foreign.manifest.experts[0].file), name: "x") }
    }

    @Test("an adapter that acts from the generation prompt on keeps the prompt over a switch")
    func activated() async throws {
        let session = try await openSession("activated")
        let prompt = (0..<30).map { 3 + 7 * $0 % 250 }
        try await session.use("expert0")
        _ = try await collect(session.generateIDs(prompt, options: long))
        try await session.use("expert1")
        #expect(await session.cache == [Segment(selection: "none", tokens: 25)])
        let found = try await collect(session.generateIDs(prompt, options: long))
        let other = try await openSession("activated")
        try await other.use("expert1")
        #expect(try await collect(other.generateIDs(prompt, options: long)) == found)
    }

    @Test("a cache that is too small is said before anything runs")
    func tooSmall() async throws {
        let session = try await openSession("lora", SessionOptions(threads: 1, maxLength: 4))
        _ = await expectError("full") { _ = try await session.logits(prompt) }
        _ = await expectError("full") { _ = try await collect(session.generateIDs(prompt)) }
        #expect(try await session.logits([3, 4, 5, 6], keep: 1).count == 1)
        _ = await expectError("full") { _ = try await session.extend([3]) }
        _ = await expectError("invalid") { _ = try await openSession("lora", SessionOptions(maxLength: 100_000)) }
        _ = await expectError("invalid") { _ = try await openSession("lora", SessionOptions(threads: 0)) }
        for bad in [[], [-1], [1 << 20]] { _ = await expectError("invalid") { _ = try await session.logits(bad) } }
    }

    @Test("many at once: a request that is wrong is named before anything runs, and memory bounds the rows")
    func wrongRequests() async throws {
        let session = try await openSession("lora")
        let greedy = GenerationOptions(maxNewTokens: 8, ignoreEOS: true)
        let sound = Request([5, 6, 7], .expert("expert0"))
        for (wrong, place) in [
            ([sound, Request([Int](), .none)], "request 1"), ([Request([5], .expert("nobody"))], "request 0"),
            ([sound, sound, Request([1 << 20], .none)], "request 2"), ([Request([Int](repeating: 5, count: 64), .none)], "request 0"),
        ] {
            let error = await expectError("invalid", place) { _ = try await collect(session.generateManyIDs(wrong, options: greedy)) }
            #expect(error?.place.hasPrefix(place) == true)
        }
        _ = await expectError("invalid") { _ = try await collect(session.generateManyIDs([])) }
        _ = await expectError("invalid") { _ = try await collect(session.generateManyIDs([sound], rows: 0)) }
        _ = await expectError("invalid") { _ = try await collect(session.generateManyIDs([sound], memory: 100)) }
        let wide = try await collect(session.generateManyIDs([sound, sound, sound], options: greedy))
        #expect(wide.filter { $0.end == .length }.count == 3)
        let narrow = try await collect(session.generateManyIDs([sound, sound], options: greedy, memory: 1 << 14))
        #expect(wide.filter { $0.row == 0 }.flatMap(\.tokens) == narrow.filter { $0.row == 1 }.flatMap(\.tokens))
    }

    @Test("a conversation keeps what the cache holds and forgets the oldest turns")
    func conversation() async throws {
        let session = try await openSession("lora")
        let talk = try Conversation(session, system: "Be kind.")
        for _ in 0..<3 { _ = try await collect(talk.say("hello", options: GenerationOptions(maxNewTokens: 3, ignoreEOS: true))) }
        #expect(await talk.turns.map(\.role).prefix(3) == ["system", "user", "assistant"])
        #expect(await talk.forgotten > 0, "64 tokens do not hold it all")
        await talk.clear()
        #expect(await talk.turns.count == 1)
    }
}
