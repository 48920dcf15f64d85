import Foundation

/// Weights of a fixed mixture of experts, in order; they sum to 1 (else the shared vector would be scaled).
public struct Blend: Sendable, Hashable, ExpressibleByDictionaryLiteral {
    /// One expert's part.
    public struct Part: Sendable, Hashable {
        /// The expert's.
        public let name: String
        /// Of the sum.
        public let weight: Double
    }

    /// In order: it counts for nothing but rounding.
    public let parts: [Part]

    /// Weights by name; a name that comes twice has the sum of both.
    public init(_ weights: [(name: String, weight: Double)]) {
        var parts: [Part] = []
        for (name, weight) in weights {
            if let place = parts.firstIndex(where: { $0.name == name }) {
                parts[place] = Part(name: name, weight: parts[place].weight + weight)
            } else {
                parts.append(Part(name: name, weight: weight))
            }
        }
        self.parts = parts
    }

    /// `["plural": 0.7, "past": 0.3]`
    public init(dictionaryLiteral elements: (String, Double)...) { self.init(elements.map { (name: $0.0, weight: $0.1) }) }
}

/// What is in use: an expert, a mixture of some, the original model, or experts weighed per token.
public enum Selection: Sendable, Hashable, CustomStringConvertible {
    /// One expert by its name.
    case expert(String)
    /// A fixed mixture; the weights sum to 1.
    case blend(Blend)
    /// The original model, no adapter.
    case none
    /// The checkpoint's experts, weighed per token and site.
    case routed

    /// Read a selection as typed: NAME, none, routed, or a blend NAME=WEIGHT,NAME=WEIGHT.
    ///
    /// - Throws: ``LimeError/invalid(_:)`` a weight that is no number.
    public init(parsing text: String) throws {
        switch Names.lower(text) {
        case "none": self = .none
        case "routed": self = .routed
        default:
            if !text.contains("=") {
                self = .expert(text)
                return
            }
            self = .blend(Blend(try text.split(separator: ",", omittingEmptySubsequences: false).map { try Self.readPart(String($0), of: text) }))
        }
    }

    private static func readPart(_ part: String, of text: String) throws -> (name: String, weight: Double) {
        let halves = part.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false).map { $0.trimmingCharacters(in: .whitespaces) }
        guard halves.count == 2, let weight = Double(halves[1]) else {
            throw LimeError.invalid(.init("blend '\(text.shortened(80))'", "'\(part.shortened(80))' is no weight", "write a blend as NAME=WEIGHT,NAME=WEIGHT"))
        }
        return (halves[0], weight)
    }

    /// As typed.
    public var description: String {
        switch self {
        case .expert(let name): name
        case .blend(let blend): blend.parts.map { "\($0.name)=\(String(format: "%g", $0.weight))" }.joined(separator: ",")
        case .none: "none"
        case .routed: "routed"
        }
    }

    /// Experts that it names.
    var names: [String] {
        switch self {
        case .expert(let name): [name]
        case .blend(let blend): blend.parts.map(\.name)
        case .none, .routed: []
        }
    }
}
