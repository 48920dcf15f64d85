import Foundation

/// One thing that is wrong.
public struct Fault: Sendable, Equatable, CustomStringConvertible {
    /// The thing: a file, a field, an argument.
    public let what: String
    /// What it should be, where that helps.
    public let expected: String?
    /// What it is, where that helps.
    public let found: String?

    /// A fault; `expected` and `found` where they help.
    public init(_ what: String, expected: String? = nil, found: String? = nil) {
        self.what = what
        self.expected = expected
        self.found = found
    }

    /// `what: expected E, found F`.
    public var description: String {
        switch (expected, found) {
        case (nil, nil): what
        case (let expected?, nil): "\(what): expected \(expected)"
        case (nil, let found?): "\(what): found \(found)"
        case (let expected?, let found?): "\(what): expected \(expected), found \(found)"
        }
    }
}

/// A fault that the caller can mend; everything that this library throws on purpose.
public enum LimeError: Error, Sendable, Equatable {
    /// What every error says.
    public struct Report: Sendable, Equatable {
        /// The file, bundle or call that it is about.
        public let place: String
        /// Everything that is wrong there, at least one.
        public let faults: [Fault]
        /// What to do about it, or empty.
        public let hint: String

        /// Several faults of one place, at least one.
        public init(place: String, faults: [Fault], hint: String) {
            self.place = place
            self.faults = faults.isEmpty ? [Fault("nothing is said to be wrong")] : faults
            self.hint = hint
        }
    }

    /// A file, an engine or a target is not there.
    case missing(Report)
    /// Bytes are not what the bundle says, or not what their format says: copy them again.
    case damaged(Report)
    /// An expert that was made for another shared adapter or another table of sites.
    case foreign(Report)
    /// Sound, but not for this version of the library: a newer schema, a tokenizer or a kind of model it does not know.
    case unsupported(Report)
    /// A call that asks for what cannot be: unknown names, weights that do not sum to 1, options out of range.
    case invalid(Report)
    /// The cache has no room for the tokens.
    case full(Report)
    /// A call at the wrong time: a closed session, a generation whose cache another call changed.
    case misused(Report)
    /// The engine refuses a graph or fails while it runs.
    case engine(Report)

    /// Where, everything wrong there, and a hint.
    public var report: Report {
        switch self {
        case .missing(let report), .damaged(let report), .foreign(let report), .unsupported(let report), .invalid(let report),
            .full(let report), .misused(let report), .engine(let report):
            report
        }
    }

    /// The file, bundle or call that it is about.
    public var place: String { report.place }
    /// Everything that is wrong there, at least one.
    public var faults: [Fault] { report.faults }
    /// What is wrong: the first fault's.
    public var what: String { report.faults[0].what }
    /// What was expected, where that helps: the first fault's.
    public var expected: String? { report.faults[0].expected }
    /// What was found, where that helps: the first fault's.
    public var found: String? { report.faults[0].found }
    /// What to do about it, or empty.
    public var hint: String { report.hint }

    /// The case's name: missing, damaged, ...
    public var kind: String {
        switch self {
        case .missing: "missing"
        case .damaged: "damaged"
        case .foreign: "foreign"
        case .unsupported: "unsupported"
        case .invalid: "invalid"
        case .full: "full"
        case .misused: "misused"
        case .engine: "engine"
        }
    }
}

extension LimeError.Report {
    /// One fault.
    public init(_ place: String, _ fault: Fault, _ hint: String) {
        self.init(place: place, faults: [fault], hint: hint)
    }

    /// One thing that is wrong, in words.
    public init(_ place: String, _ what: String, _ hint: String) {
        self.init(place: place, faults: [Fault(what)], hint: hint)
    }
}

extension LimeError: LocalizedError, CustomStringConvertible {
    /// Where, and everything that is wrong there.
    public var errorDescription: String? {
        if faults.count == 1 { return "\(place): \(faults[0])" }
        let shown = 20
        let more = faults.count > shown ? ["... and \(faults.count - shown) more"] : []
        let lines = faults.prefix(shown).map(\.description) + more
        return "\(place): \(faults.count) faults" + lines.map { "\n  - \($0)" }.joined()
    }

    /// What was expected and found.
    public var failureReason: String? { faults[0].description }

    /// What to do about it.
    public var recoverySuggestion: String? { hint.isEmpty ? nil : hint }

    /// Everything, the hint included.
    public var description: String { (errorDescription ?? "") + (hint.isEmpty ? "" : "\n  hint: \(hint)") }
}

/// Collects every fault of one input, so that they are thrown together.
struct Faults {
    private(set) var list: [Fault] = []

    mutating func add(_ what: String, _ expected: Any? = nil, _ found: Any? = nil) {
        list.append(Fault(what, expected: expected.map { "\($0)" }, found: found.map { "\($0)" }))
    }

    mutating func append(_ others: [Fault]) { list += others }

    /// Throw what `error` makes of the faults, if there are any.
    func throwAny(_ error: (LimeError.Report) -> LimeError, at place: String, hint: String) throws {
        if !list.isEmpty { throw error(LimeError.Report(place: place, faults: list, hint: hint)) }
    }
}

let copyAgain = "the bundle is damaged: copy or export it again"

extension String {
    /// Its beginning, where it is long.
    func shortened(_ count: Int) -> String { unicodeScalars.count > count ? String(String.UnicodeScalarView(unicodeScalars.prefix(count))) : self }
}
