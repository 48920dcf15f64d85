/// One turn of a conversation.
public struct Turn: Sendable, Equatable {
    /// Who speaks: system, user, assistant.
    public let role: String
    /// What.
    public let text: String

    /// A turn.
    public init(_ role: String, _ text: String) {
        self.role = role
        self.text = text
    }
}

/// Writes conversations as the model was taught them: the bundle's chat template, reduced to what stands around each turn.
public struct ChatFormat: Sendable {
    private let prompts: Prompts

    init(_ prompts: Prompts) { self.prompts = prompts }

    /// - Throws: ``LimeError/unsupported(_:)`` the template could not be reduced, or there is none: give complete prompts.
    public init(_ bundle: LimeBundle) throws {
        guard let prompts = bundle.manifest.prompts, !prompts.roles.isEmpty else {
            let reason = bundle.manifest.prompts?.reason ?? "the model has no chat template"
            throw LimeError.unsupported(.init(bundle.folder.path, "no chat: \(reason)", "give complete prompts to generate()"))
        }
        self.prompts = prompts
    }

    /// Roles that may speak.
    public var roles: [String] { prompts.roles.map(\.name) }

    /// The text of a conversation.
    ///
    /// - Parameters:
    ///   - turns: in order.
    ///   - open: begin the assistant's turn.
    /// - Throws: ``LimeError/invalid(_:)`` a role that the template does not know, or an order that it was not proven for.
    public func render(_ turns: [Turn], open: Bool = true) throws -> String {
        try check(turns)
        var all = turns
        if let system = prompts.defaultSystem, turns.first?.role != "system" { all.insert(Turn("system", system), at: 0) }
        var merged = false
        var out = prompts.begin
        for turn in all {
            guard let speaker = prompts.speaker(turn.role) else { continue }
            if !merged { out += speaker.prefix }
            out += prompts.strip.contains(turn.role) ? strip(turn.text) : turn.text
            out += speaker.suffix
            merged = prompts.systemOpensUser && turn.role == "system"
        }
        return out + (open ? prompts.opening : prompts.closing)
    }

    private func check(_ turns: [Turn]) throws {
        let hint = "the model's chat template knows no other; give a complete prompt to generate()"
        if let odd = turns.first(where: { prompts.speaker($0.role) == nil }) {
            throw LimeError.invalid(.init("conversation", Fault("role", expected: roles.joined(separator: " or "), found: odd.role.shortened(40)), hint))
        }
        let spoken = turns.first?.role == "system" ? turns.dropFirst() : turns[...]
        let inTurn = spoken.enumerated().allSatisfy { $1.role == ($0 % 2 == 0 ? "user" : "assistant") }
        if turns.isEmpty || (prompts.alternating && (spoken.isEmpty || !inTurn)) {
            let found = turns.isEmpty ? "nothing" : turns.map(\.role).joined(separator: ", ")
            let wanted = "a system turn or none, then user and assistant in turn"
            throw LimeError.invalid(.init("conversation", Fault("order", expected: wanted, found: found), hint))
        }
    }

    /// As Python's str.strip does.
    private func strip(_ text: String) -> String {
        let scalars = text.unicodeScalars.drop(while: Self.isStripped)
        guard let last = scalars.lastIndex(where: { !Self.isStripped($0) }) else { return "" }
        return String(scalars[...last])
    }

    private static func isStripped(_ scalar: Unicode.Scalar) -> Bool {
        switch scalar.value {
        case 0x09...0x0D, 0x1C...0x20, 0x85, 0xA0, 0x1680, 0x2000...0x200A, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000: true
        default: false
        }
    }
}
