import Foundation
import LimeEdge
import Observation

/// A line of the chat: who said it, under which skill, and whether it is still being written.
struct Line: Identifiable, Sendable {
    let id: Int
    let fromUser: Bool
    var text: String
    var skill = ""
    var isOpen = false
}

/// The chat without its screen: one session, its conversation, skills as chips.
@MainActor @Observable
final class ChatModel {
    /// Chips, in order: experts, then none and routed where the bundle has them.
    private(set) var skills: [String] = []
    private(set) var selected = ""
    private(set) var lines: [Line] = []
    private(set) var isBusy = false
    /// An error or a note, to be shown until the next action.
    private(set) var notice: String?
    private let session: LimeSession
    private let conversation: Conversation
    private let options: GenerationOptions
    private var task: Task<Void, Never>?

    init(_ session: LimeSession, options: GenerationOptions = GenerationOptions()) async throws {
        self.session = session
        self.options = options
        conversation = try Conversation(session)
        await refresh()
    }

    /// Switch to a chip; an answer that is being written ends first.
    func select(_ skill: String) {
        act { model in
            try await model.session.use(skill)
            await model.refresh()
        }
    }

    /// Say something; the answer grows in `lines`.
    func say(_ text: String) {
        act { model in
            model.lines.append(Line(id: model.lines.count, fromUser: true, text: text))
            let at = model.open(model.selected)
            defer { model.lines[at].isOpen = false }
            for try await piece in model.conversation.say(text, options: model.options) { model.lines[at].text += piece }
            let forgotten = await model.conversation.forgotten
            if forgotten > 0 { model.notice = "the oldest \(forgotten) turns were left out" }
        }
    }

    /// One text to every skill, all in one pass; the conversation is not touched.
    func askAll(_ text: String) {
        act { model in
            let prompt = try ChatFormat(model.session.bundle).render([Turn("user", text)])
            let names = await model.session.experts
            let first = model.lines.count
            for name in names { _ = model.open(name) }
            defer { for row in names.indices { model.lines[first + row].isOpen = false } }
            let requests = names.map { Request(prompt, .expert($0)) }
            for try await answer in model.session.generateMany(requests, options: model.options, memory: 512 << 20) {
                model.lines[first + answer.row].text += answer.piece
                model.lines[first + answer.row].isOpen = answer.end == nil
            }
        }
    }

    /// Add a skill file; its chip appears.
    func install(_ file: URL) {
        act { model in
            #if canImport(Darwin)
            let reachable = file.startAccessingSecurityScopedResource()
            defer { if reachable { file.stopAccessingSecurityScopedResource() } }
            #endif
            let name = try await model.session.install(file)
            await model.refresh()
            model.notice = "\(name) was added"
        }
    }

    /// End the answer that is being written.
    func stop() { task?.cancel() }

    private func refresh() async {
        let manifest = session.bundle.manifest
        let canBeOff = !manifest.alwaysOn && manifest.single == nil
        skills = await session.experts + (canBeOff ? ["none"] : []) + (manifest.targets.contains { $0.routed != nil } ? ["routed"] : [])
        selected = await session.selection.description
    }

    private func open(_ skill: String) -> Int {
        lines.append(Line(id: lines.count, fromUser: false, text: "", skill: skill, isOpen: true))
        return lines.count - 1
    }

    /// One action after another: a new one ends the one that runs.
    private func act(_ action: @escaping @MainActor (ChatModel) async throws -> Void) {
        let before = task
        before?.cancel()
        task = Task {
            await before?.value
            isBusy = true
            notice = nil
            do {
                try await action(self)
            } catch is CancellationError {
            } catch {
                notice = "\(error)"
            }
            isBusy = false
        }
    }
}
