/// The experts of one opened bundle, and the residual d = p - p_ref for any selection of them.
///
/// Vectors keep their stored type and are read when first used; residuals are made on demand, and the last few, 16 megabytes in
/// all, are kept so that switching back costs nothing.
final class ExpertBank {
    private let bundle: LimeBundle
    private var entries: [String: ExpertEntry]
    private var vectors: [String: Expert] = [:]
    private var ahead: [String: [UInt8]]
    private var ready: [Selection: (memory: FloatMemory, used: Int)] = [:]
    private var free: [FloatMemory] = []
    private var clock = 0
    private let most: Int

    /// Installed experts in the order they came.
    private(set) var names: [String]

    init(_ bundle: LimeBundle) {
        self.bundle = bundle
        entries = Dictionary(bundle.manifest.experts.map { ($0.name, $0) }, uniquingKeysWith: { first, _ in first })
        names = bundle.manifest.experts.map(\.name)
        ahead = bundle.readExpertsAhead()
        most = max(2, (16 << 20) / max(1, 4 * bundle.manifest.sumH))
    }

    /// Add an expert, or replace the one of the same name. Throws ``LimeError/foreign(_:)`` where it does not fit.
    func install(_ expert: Expert, _ place: String) throws {
        try check(expert, place)
        vectors[expert.name] = expert
        entries[expert.name] = nil
        if !names.contains(expert.name) { names.append(expert.name) }
        forgetReady()
    }

    /// Forget an expert. Throws ``LimeError/invalid(_:)`` where there is none.
    func remove(_ name: String) throws {
        guard let place = names.firstIndex(of: name) else { throw unknown(name) }
        names.remove(at: place)
        vectors[name] = nil
        entries[name] = nil
        forgetReady()
    }

    /// d of a selection: (sum_H,) float32. It lies in one of a few buffers that are used over and over: it holds until other
    /// selections, at least one, have been asked for.
    ///
    /// - Throws: ``LimeError/invalid(_:)`` unknown name, weights that do not sum to 1; ``LimeError/damaged(_:)`` an expert's file.
    func residual(_ selection: Selection) throws -> FloatMemory {
        clock += 1
        if let found = ready[selection] {
            ready[selection]?.used = clock
            return found.memory
        }
        let slot = takeSlot()
        do {
            try subtract(selection, slot.values)
        } catch {
            free.append(slot)
            throw error
        }
        ready[selection] = (slot, clock)
        return slot
    }

    private func subtract(_ selection: Selection, _ out: UnsafeMutableBufferPointer<Float>) throws {
        switch selection {
        case .expert(let name): subtractReference(try vector(name), bundle.reference, out)
        case .blend(let blend): try mix(blend, out)
        case .none: for at in out.indices { out[at] = -bundle.reference[at] }
        case .routed: preconditionFailure("routing has no residual")
        }
        if !isFinite(out) {
            throw LimeError.invalid(.init("\(selection)", "its residual p - p_ref is beyond float32", "such weights or such a vector cannot be run"))
        }
    }

    /// The weighted sum in double, rounded once: the same bits in every language.
    private func mix(_ blend: Blend, _ out: UnsafeMutableBufferPointer<Float>) throws {
        let total = blend.parts.reduce(0) { $0 + $1.weight }
        if blend.parts.isEmpty || !total.isFinite || abs(total - 1) > 1e-6 {
            let hint = "scale the weights so that they sum to 1 (else the shared vector would be scaled)"
            throw LimeError.invalid(.init("blend", Fault("sum of weights", expected: "1", found: "\(total)"), hint))
        }
        var sum = [Double](repeating: 0, count: out.count)
        for part in blend.parts {
            switch try vector(part.name).vector {
            case .halves(let values): for at in sum.indices { sum[at] += part.weight * Double(Half.toFloat(values[at])) }
            case .floats(let values): for at in sum.indices { sum[at] += part.weight * Double(values[at]) }
            }
        }
        for at in sum.indices { out[at] = Float(sum[at]) - bundle.reference[at] }
    }

    private func vector(_ name: String) throws -> Expert {
        if let known = vectors[name] { return known }
        guard let entry = entries[name] else { throw unknown(name) }
        let place = bundle.file(entry.file).path
        let expert = try Expert(bundle.readExpert(entry.file, ahead: ahead.removeValue(forKey: entry.file)), place)
        if expert.name != name {
            let hint = "the file was renamed: add it with lime-edge experts add --name"
            throw LimeError.damaged(.init(place, Fault("name", expected: name, found: expert.name), hint))
        }
        try check(expert, place)
        vectors[name] = expert
        return expert
    }

    private func check(_ expert: Expert, _ place: String) throws {
        var faults = Faults()
        let manifest = bundle.manifest
        if expert.adapterID != manifest.adapterID { faults.add("adapter_id", manifest.adapterID.shortened(16), expert.adapterID.shortened(16)) }
        if expert.count != manifest.sumH { faults.add("length", manifest.sumH, expert.count) }
        try faults.throwAny(LimeError.foreign, at: place, hint: "an expert fits the shared adapter it was trained with, and no other")
    }

    private func unknown(_ name: String) -> LimeError {
        let installed = names.isEmpty ? "none" : names.joined(separator: ", ")
        return .invalid(.init(bundle.folder.path, "unknown expert '\(name.shortened(80))'", "installed experts: \(installed)"))
    }

    /// A buffer to write to: never the one that was asked for last.
    private func takeSlot() -> FloatMemory {
        if !free.isEmpty { return free.removeFirst() }
        if ready.count >= most, let oldest = ready.min(by: { $0.value.used < $1.value.used }) {
            ready[oldest.key] = nil
            return oldest.value.memory
        }
        return FloatMemory(bundle.manifest.sumH)
    }

    /// An expert changed: nothing that was made is valid; the buffer in use is the last to be reused.
    private func forgetReady() {
        free += ready.values.sorted { $0.used < $1.used }.map(\.memory)
        ready = [:]
    }
}

/// d = p - p_ref for one expert.
func subtractReference(_ expert: Expert, _ reference: [Float], _ out: UnsafeMutableBufferPointer<Float>) {
    reference.withUnsafeBufferPointer { reference in
        switch expert.vector {
        case .halves(let values):
            values.withUnsafeBufferPointer { values in for at in out.indices { out[at] = Half.toFloat(values[at]) - reference[at] } }
        case .floats(let values):
            values.withUnsafeBufferPointer { values in for at in out.indices { out[at] = values[at] - reference[at] } }
        }
    }
}

/// Whether no value is NaN or infinite: x - x is 0 for numbers only, so a sum tells for all at once.
func isFinite(_ values: UnsafeMutableBufferPointer<Float>) -> Bool {
    var sum: Float = 0
    for value in values { sum += value - value }
    return sum == 0
}
