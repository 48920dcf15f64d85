/// One selection on one target, compared.
public struct Check: Sendable {
    /// What came of it.
    public enum Result: String, Sendable {
        /// Within what rounding explains.
        case ok
        /// Not.
        case missed
        /// It could not be compared.
        case unchecked
    }

    /// onnx, coreml, ...
    public let target: String
    /// As typed.
    public let selection: String
    /// What came of it.
    public let result: Result
    /// What was missed, or why it was not checked.
    public var why = ""
    /// Root mean square error of a row, averaged over rows, in standard deviations of the output.
    public var error: Double?
    /// The largest of any row.
    public var worst: Double?
    /// Greedy tokens or classes equal to PyTorch's, of `decisions`.
    public var agreed = 0
    /// How many there were.
    public var decisions = 0
}

/// Does a bundle compute here what PyTorch computed at export? The files' hashes, then every expert against golden outputs.
public enum Verify {
    static let deciding = "logits"

    /// Compare every file's sha256, then the answers of one target.
    ///
    /// - Parameters:
    ///   - selections: some of the golden ones, as typed; all by default.
    /// - Returns: one check for every selection.
    /// - Throws: ``LimeError/damaged(_:)`` a file; ``LimeError/missing(_:)`` no golden outputs.
    public static func run(
        _ bundle: LimeBundle, with engines: any EngineFactory, selections: [String] = [], options: SessionOptions = SessionOptions()
    ) async throws -> [Check] {
        try bundle.verifyFiles()
        guard let golden = try Golden.read(bundle) else {
            throw LimeError.missing(.init(bundle.folder.path, "no golden outputs to compare with", "export the bundle again"))
        }
        let known = golden.selections + bundle.manifest.experts.map(\.name).filter { !golden.selections.contains($0) }
        let wanted = try selections.map { try Selection(parsing: $0).description }
        if let odd = wanted.first(where: { !known.contains($0) }) {
            let some = golden.selections.joined(separator: ", ")
            throw LimeError.invalid(.init(bundle.folder.path, "no golden outputs for '\(odd.shortened(80))'", "there are some for \(some)"))
        }
        let subject: Subject = bundle.manifest.kind == "encoder"
            ? .encoder(try await EncoderSession.open(bundle, with: engines, options: options))
            : .decoder(try await LimeSession.open(bundle, with: engines, options: options))
        var checks: [Check] = []
        for label in wanted.isEmpty ? known : wanted { checks.append(try await check(subject, golden, label)) }
        return checks
    }

    private enum Subject {
        case decoder(LimeSession)
        case encoder(EncoderSession)

        var bundle: LimeBundle {
            switch self {
            case .decoder(let session): session.bundle
            case .encoder(let session): session.bundle
            }
        }

        var facts: TargetFacts {
            switch self {
            case .decoder(let session): session.facts
            case .encoder(let session): session.facts
            }
        }
    }

    private static func check(_ subject: Subject, _ golden: Golden, _ label: String) async throws -> Check {
        let facts = subject.facts
        if let why = try findObstacle(subject, golden, label) { return Check(target: facts.name, selection: label, result: .unchecked, why: why) }
        do {
            let found: [String: [[Float]]]
            switch subject {
            case .decoder(let session):
                try await session.use(label)
                found = [deciding: try await replay(session, golden, label)]
            case .encoder(let session):
                try await session.use(label)
                found = try await replay(session, golden)
            }
            return Judge(golden: golden, compute: facts.compute, label: label).judge(facts.name, found)
        } catch let error as LimeError {
            return Check(target: facts.name, selection: label, result: .missed, why: "\(error.place): \(error.faults[0])")
        }
    }

    /// Why a selection cannot be compared, or nil.
    private static func findObstacle(_ subject: Subject, _ golden: Golden, _ label: String) throws -> String? {
        let selection = try Selection(parsing: label)
        let experts = Dictionary(subject.bundle.manifest.experts.map { ($0.name, $0) }, uniquingKeysWith: { first, _ in first })
        if case .decoder(let session) = subject {
            let needed = (golden.calls[0].values.first?.shape.last ?? 0) + golden.steps
            if session.maxLength < needed { return "its cache holds \(session.maxLength) tokens, \(needed) are needed" }
        }
        if selection == .routed, subject.facts.routed == nil { return "this target has no routed graph" }
        let removed = selection.names.filter { experts[$0] == nil }
        if !removed.isEmpty { return "\(removed.joined(separator: ", ")): removed after the export" }
        if !golden.selections.contains(label) || selection.names.contains(where: { experts[$0]?.added == true }) {
            return "came after the export: PyTorch never ran it"
        }
        return nil
    }

    /// The prompt, then the oracle's own tokens one by one: full rows, calls one after another.
    private static func replay(_ session: LimeSession, _ golden: Golden, _ label: String) async throws -> [[Float]] {
        guard let index = golden.selections.firstIndex(of: label), let best = golden.outputs[deciding]?.expected[index].best else { return [] }
        var found: [[Float]] = []
        for (call, inputs) in golden.calls.enumerated() {
            let prompt = (inputs["input_ids"]?.integers ?? []).map(Int.init)
            found += try await session.logits(prompt, keep: 1)
            for step in 0..<max(golden.steps - 1, 0) { found += try await session.extend([best[call * golden.steps + step]]) }
        }
        return found
    }

    private static func replay(_ session: EncoderSession, _ golden: Golden) async throws -> [String: [[Float]]] {
        var found: [String: [[Float]]] = [:]
        for call in golden.calls {
            let outputs = try await session.run(call)
            for (name, output) in golden.outputs {
                let values = outputs[name]?.floats ?? []
                let width = outputs[name]?.shape.last ?? 0
                found[name, default: []] += output.rows.map { Array(values[$0 * width..<($0 + 1) * width]) }
            }
        }
        return found
    }
}

/// Is an answer PyTorch's, within what rounding explains, and not another selection's? Rules: docs/bundle-format.md.
struct Judge {
    let golden: Golden
    let compute: String
    let label: String

    private struct Limits {
        let mean: Double
        let worst: Double
        let lead: Double
    }

    private static let narrow = 16
    private static let lean = 0.25
    private static let tolerances: [String: Limits] = [
        "float32": Limits(mean: 1e-4, worst: 1e-4, lead: 1e-3), "float16": Limits(mean: 0.02, worst: 0.05, lead: 0.2),
        "int8-dynamic": Limits(mean: 0.1, worst: 0.25, lead: 1), "int8-per-token": Limits(mean: 0.2, worst: 0.4, lead: 1),
    ]

    func judge(_ target: String, _ found: [String: [[Float]]]) -> Check {
        let index = golden.selections.firstIndex(of: label) ?? 0
        var check = Check(target: target, selection: label, result: .ok, error: 0, worst: 0)
        var faults: [String] = []
        for (name, output) in golden.outputs.sorted(by: { $0.key < $1.key }) {
            let expected = output.expected[index]
            let mine = Rows(found[name] ?? [], output.columns, centre: golden.steps > 0)
            guard mine.best.count == expected.best.count else {
                faults.append("\(name): another number of rows")
                continue
            }
            let errors = mine.best.indices.map { distance(mine, expected, $0) / output.scale }
            let average = errors.reduce(0, +) / Double(max(errors.count, 1))
            let limits = limits(output.columns.count)
            check.error = largest(check.error, average)
            check.worst = errors.reduce(check.worst, largest)
            if !(average <= limits.mean && errors.allSatisfy { $0 <= limits.worst }) { faults.append("\(name) differ") }
            if name == Verify.deciding {
                let odd = mine.best.indices.filter { mine.best[$0] != expected.best[$0] }
                check.agreed += mine.best.count - odd.count
                check.decisions += mine.best.count
                if odd.contains(where: { Double(expected.margin[$0]) > limits.lead * output.scale }) { faults.append("another choice where PyTorch was sure") }
            }
            compareOthers(mine, output, index, limits.mean * output.scale, &faults)
        }
        return finish(check, faults)
    }

    private func finish(_ check: Check, _ faults: [String]) -> Check {
        let isSound = check.error?.isFinite == true
        let result: Check.Result = isSound && faults.isEmpty ? .ok : .missed
        return Check(
            target: check.target, selection: check.selection, result: result, why: isSound ? faults.joined(separator: "; ") : "NaN or infinite values",
            error: isSound ? check.error : nil, worst: isSound ? check.worst : nil, agreed: check.agreed, decisions: check.decisions)
    }

    /// NaN counts as the largest.
    private func largest(_ one: Double?, _ other: Double) -> Double { one.map { $0.isNaN || $0 > other ? $0 : other } ?? other }

    private func distance(_ mine: Rows, _ expected: Rows, _ row: Int) -> Double {
        var squares = square(mine.peak[row] - expected.peak[row])
        for at in mine.values[row].indices { squares += square(mine.values[row][at] - expected.values[row][at]) }
        return (squares / Double(mine.values[row].count + 1)).squareRoot()
    }

    /// After its first token every selection reads another text: only rows that all answer alike are compared.
    private func compareOthers(_ mine: Rows, _ output: GoldenOutput, _ index: Int, _ limit: Double, _ faults: inout [String]) {
        let shared = mine.best.indices.filter { golden.steps == 0 || $0 % golden.steps == 0 }
        let own = shared.flatMap { mine.values[$0] }
        let others = output.expected.map { rows in shared.flatMap { rows.values[$0] } }
        let away = others.indices.map { other in
            other != index && rms(others[other], others[index]) < limit / 2 ? Double.infinity : rms(others[other], own)
        }
        guard let nearest = away.indices.min(by: { away[$0] < away[$1] }) else { return }
        if nearest != index, away[nearest] <= limit {
            faults.append("answers like \(golden.selections[nearest])")
        } else if faults.isEmpty, mayLean(output.columns.count), let other = findLean(own, others, index, limit) {
            faults.append("leans towards \(golden.selections[other])")
        }
    }

    /// Rounding errors have no direction; a mixture's points from the answers of the one to those of the other.
    private func findLean(_ own: [Float], _ others: [[Float]], _ index: Int, _ limit: Double) -> Int? {
        var found: (other: Int, explained: Double)?
        for other in others.indices {
            var along = 0.0
            var squares = 0.0
            for at in own.indices {
                let way = Double(others[other][at] - others[index][at])
                along += way * Double(own[at] - others[index][at])
                squares += way * way
            }
            squares = max(squares / Double(own.count), 1e-30)
            let lean = along / Double(own.count) / squares
            let explained = lean > Self.lean ? lean * squares.squareRoot() : 0
            if explained > found?.explained ?? 0 { found = (other, explained) }
        }
        return found.flatMap { $0.explained > Self.lean * limit ? $0.other : nil }
    }

    private func mayLean(_ width: Int) -> Bool { compute == "float32" || (label != "routed" && width >= Self.narrow) }

    private func limits(_ width: Int) -> Limits {
        let exact = Limits(mean: 1e-4, worst: 1e-4, lead: 1e-3)
        let limits = Self.tolerances[compute] ?? exact
        let loose = compute == "float32" ? 1.0 : (label == "routed" ? 2.0 : 1) * (width < Self.narrow ? 3.0 : 1)
        return Limits(mean: limits.mean * loose, worst: limits.worst * loose, lead: limits.lead * loose)
    }

    private func rms(_ one: [Float], _ other: [Float]) -> Double {
        (zip(one, other).reduce(0) { $0 + square($1.0 - $1.1) } / Double(max(one.count, 1))).squareRoot()
    }

    private func square(_ value: Float) -> Double { Double(value) * Double(value) }
}
