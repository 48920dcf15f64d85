import Foundation

/// The experts of an opened bundle on one target, and which of them is in use; the part that all sessions share.
///
/// "routed" mixes the experts of the checkpoint: that bank is frozen in the artifact, and experts installed later are pinned or
/// blended, never routed to.
final class ExpertSwitch {
    let bundle: LimeBundle
    let facts: TargetFacts
    private let engine: any SwitchableEngine
    private let bank: ExpertBank
    private let nothing = FloatMemory(0)

    /// What is in use.
    private(set) var selection = Selection.none

    /// Begins with what the bundle opens with.
    init(_ bundle: LimeBundle, _ engine: any SwitchableEngine, _ facts: TargetFacts) throws {
        self.bundle = bundle
        self.engine = engine
        self.facts = facts
        bank = ExpertBank(bundle)
        try apply(bundle.manifest.single.map(Selection.expert) ?? Selection(parsing: bundle.manifest.defaultSelection))
    }

    /// Names of the installed experts.
    var experts: [String] { bank.names }

    func apply(_ wanted: Selection) throws {
        let residual = try find(wanted)
        if bundle.manifest.single == nil {
            try guardEngine { if let residual { try engine.setExpert(residual.view) } else { try engine.setRouted() } }
        }
        selection = wanted
    }

    /// d = p - p_ref of a selection, (sum_H,) float32, until other selections are asked for; nil for routing, empty in a bundle of
    /// a single expert.
    ///
    /// - Throws: ``LimeError/invalid(_:)`` the bundle cannot run it; ``LimeError/damaged(_:)`` an expert's file.
    func find(_ wanted: Selection) throws -> FloatMemory? {
        let manifest = bundle.manifest
        let place = bundle.folder.path
        if let single = manifest.single {
            if wanted == .expert(single) { return nothing }
            throw LimeError.invalid(.init(place, "holds '\(single)' alone (--single), asked for '\(wanted)'", "export it without --single"))
        }
        switch wanted {
        case .routed:
            if facts.routed != nil { return nil }
            throw LimeError.invalid(.init(place, "has no routed graph", "pick an expert, a blend or none"))
        case .none where manifest.alwaysOn:
            let what = "a \(manifest.variant) adapter cannot be switched off: no expert vector gives the original model"
            throw LimeError.invalid(.init(place, what, "pick an expert or a blend"))
        default: return try bank.residual(wanted)
        }
    }

    /// Add an expert file while running; `changed` is called where the expert in use becomes another one.
    func install(_ file: URL, name: String?, changed: () throws -> Void) throws -> String {
        var expert = try Expert(file: file)
        if let name {
            if let fault = Names.checkExpert(name) { throw LimeError.invalid(.init("name", fault, "pick another one")) }
            expert.name = name
        }
        if let clash = experts.first(where: { $0 != expert.name && Names.lower($0) == Names.lower(expert.name) }) {
            throw LimeError.invalid(.init(file.path, "'\(expert.name)' and '\(clash)' differ by letter case only", "pick another name"))
        }
        if let single = bundle.manifest.single {
            throw LimeError.invalid(.init(bundle.folder.path, "holds '\(single)' alone (--single)", "export it without --single"))
        }
        try bank.install(expert, file.path)
        if selection.names.contains(expert.name) {
            try changed()
            try apply(selection)
        }
        return expert.name
    }

    /// Forget an installed expert. Throws ``LimeError/invalid(_:)`` where it is unknown, or in use.
    func remove(_ name: String) throws {
        if selection.names.contains(name) {
            throw LimeError.invalid(.init(bundle.folder.path, "expert '\(name.shortened(80))' is in use", "switch to another one first"))
        }
        try bank.remove(name)
    }

    /// What an engine throws becomes a ``LimeError``.
    func guardEngine<Value>(_ call: () throws -> Value) throws -> Value {
        do {
            return try call()
        } catch let error as LimeError {
            throw error
        } catch {
            let what = String("\(error)".prefix { !$0.isNewline }).shortened(500)
            throw LimeError.engine(.init(facts.name, what, "Verify tells whether the bundle runs here"))
        }
    }
}

/// The target of an engine in a bundle, its large files checked.
func findTarget(_ bundle: LimeBundle, _ engines: any EngineFactory) throws -> TargetFacts {
    guard let facts = bundle.manifest.target(engines.target) else {
        let others = bundle.manifest.targets.map(\.name).joined(separator: ", ")
        throw LimeError.missing(.init(bundle.folder.path, "holds no \(engines.target) artifact", "it holds \(others)"))
    }
    try bundle.checkLarge("\(engines.target)/")
    return facts
}

let closedReport = LimeError.Report("session", "it is closed", "open another one")
