import Foundation

/// Reads lime.json: its schema, its own hash, every field, and what has to agree (docs/bundle-format.md).
enum ManifestReader {
    static let file = "lime.json"
    static let reference = "reference.safetensors"
    static let largest = 16 << 20
    private static let longest: Int64 = 1 << 28

    /// What the bytes of a lime.json say.
    ///
    /// - Throws: ``LimeError/unsupported(_:)`` another schema, ``LimeError/damaged(_:)`` anything else.
    static func read(_ bytes: [UInt8], _ place: String) throws -> Manifest {
        let fields: Json
        do {
            fields = try Json.parse(bytes)
        } catch let error as Json.Malformed {
            throw LimeError.damaged(.init(place, "not readable JSON: \(error)", copyAgain))
        }
        try checkSchema(fields, place)
        let seal = fields["manifest_sha256"]?.string
        guard let seal, seal == sealOf(bytes) else {
            throw LimeError.damaged(.init(
                place, "manifest_sha256 does not fit its text", "the bundle is damaged or was edited by hand: copy or export it again"))
        }
        var faults = Faults()
        do {
            let complete = try Schema(Json.parse(bundleSchema)).check(fields, &faults)
            try faults.throwAny(LimeError.damaged, at: place, hint: copyAgain)
            checkOffsets(complete, &faults)
            try faults.throwAny(LimeError.damaged, at: place, hint: copyAgain)
            let manifest = try Manifest(complete, seal: seal)
            Contradictions(manifest: manifest, fields: complete).find(&faults)
            try faults.throwAny(LimeError.damaged, at: place, hint: copyAgain)
            return manifest
        } catch let error as Json.Malformed {
            throw LimeError.damaged(.init(place, "\(error)", copyAgain))
        }
    }

    /// sha256 over the file with 64 zeros where the digits of manifest_sha256 are.
    static func sealOf(_ bytes: [UInt8]) -> String {
        let wanted = Array("\"manifest_sha256\": \"".utf8)
        var copy = bytes
        if let start = find(wanted, in: bytes), start + wanted.count + 64 <= bytes.count {
            for at in 0..<64 { copy[start + wanted.count + at] = UInt8(ascii: "0") }
        }
        return Sha256.digest(copy)
    }

    private static func checkSchema(_ fields: Json, _ place: String) throws {
        guard fields["format"]?.string == "lime-edge-bundle" else {
            throw LimeError.damaged(.init(place, "not a lime-edge bundle", "write one with lime-edge export"))
        }
        let found = fields["schema"]
        if found?.integer == 2 { return }
        let hint = (found?.integer ?? 2) < 2 ? "export again: older bundles are not read" : "use a newer version of this library"
        throw LimeError.unsupported(.init(place, Fault("schema", expected: "2", found: (found?.text ?? "nothing").shortened(20)), hint))
    }

    /// Offsets before anything is computed with them: the widths before each site, added up.
    private static func checkOffsets(_ fields: Json, _ faults: inout Faults) {
        var offset: Int64 = 0
        var names: Set<String> = []
        for site in fields["sites"]?.array ?? [] {
            let name = site["name"]?.string ?? ""
            guard let found = site["offset"]?.integer, found == offset else { return faults.add("site \(name): offset", offset, site["offset"]?.text) }
            offset += site["width"]?.integer ?? 0
            if !names.insert(name).inserted { faults.add("site \(name) is there twice") }
        }
        if offset > longest { faults.add("sites: numbers in an expert vector", "at most \(longest)", offset) }
    }
}

/// What a manifest says twice and not alike.
private struct Contradictions {
    let manifest: Manifest
    let fields: Json

    func find(_ faults: inout Faults) {
        checkFiles(&faults)
        checkExperts(&faults)
        checkKind(&faults)
        for (target, raw) in zip(manifest.targets, fields["targets"]?.array ?? []) { checkTarget(target, raw, &faults) }
        checkSelections(&faults)
        checkBeside(&faults)
    }

    private func checkFiles(_ faults: inout Faults) {
        for path in manifest.paths {
            if let fault = Names.checkPath(path) { faults.add("files: \(fault)") }
            if Names.lower(path) == ManifestReader.file { faults.add("files: \(path) is the manifest itself") }
        }
        for clash in Names.findClashes(manifest.paths) { faults.add("files: \(clash)") }
        if manifest.files[ManifestReader.reference] == nil { faults.add("files: \(ManifestReader.reference) is missing") }
    }

    private func checkExperts(_ faults: inout Faults) {
        var folded: Set<String> = []
        for entry in manifest.experts {
            if let fault = Names.checkExpert(entry.name) { faults.add("experts: \(fault)") }
            if !folded.insert(Names.lower(entry.name)).inserted { faults.add("experts: '\(entry.name)' is there twice (letter case does not count)") }
            if !entry.file.hasPrefix("experts/") {
                faults.add("expert '\(entry.name)': file", "below experts/", entry.file)
            } else if manifest.files[entry.file] == nil {
                faults.add("expert '\(entry.name)' has no file entry")
            }
        }
        if Set(manifest.experts.map(\.file)).count != manifest.experts.count { faults.add("experts: two of them share a file") }
        if let single = manifest.single, manifest.experts.map(\.name) != [single] {
            faults.add("experts of a bundle with a single one", single, manifest.experts.map(\.name).joined(separator: ", "))
        }
    }

    private func checkKind(_ faults: inout Faults) {
        let wanted = manifest.kind == "encoder" ? "encoder" : "decoder"
        for name in ["decoder", "encoder"] where (fields[name]?.object != nil) != (name == wanted) {
            faults.add("\(name): \(name == wanted ? "missing in" : "has no place in") a bundle of kind \(manifest.kind)")
        }
        guard let decoder = fields["decoder"], let heads = decoder["heads"]?.integer, let kvHeads = decoder["kv_heads"]?.integer else { return }
        if heads % max(kvHeads, 1) != 0 { faults.add("decoder: heads", "a multiple of kv_heads (\(kvHeads))", heads) }
        for id in manifest.decoder?.eos.sorted() ?? [] where id >= manifest.vocab { faults.add("decoder: eos", "ids below \(manifest.vocab)", id) }
        if manifest.context < 1 { faults.add("backbone: context", "at least 1", manifest.context) }
    }

    private func checkTarget(_ target: TargetFacts, _ raw: Json, _ faults: inout Faults) {
        let place = "target \(target.name)"
        let graph = target.name == "onnx" ? target.routed : nil // elsewhere it names a function of the same file
        for path in [target.file, graph, raw["stock"]?.string].compactMap({ $0 }) {
            if !path.hasPrefix("\(target.name)/") {
                faults.add("\(place): file", "below \(target.name)/", path)
            } else if manifest.files[path] == nil, !manifest.paths.contains(where: { $0.hasPrefix("\(path)/") }) {
                faults.add("\(place): \(path) has no file entry")
            }
        }
        if target.expertInput == (manifest.single != nil) { faults.add("\(place): expert_input", manifest.single == nil, target.expertInput) }
        for field in listNeeded(target, place, &faults) {
            switch raw[field] {
            case nil, .null, .integer(0): faults.add("\(place): \(field) is missing")
            case .array(let items) where items.isEmpty: faults.add("\(place): \(field) is missing")
            default: break
            }
        }
    }

    private func listNeeded(_ target: TargetFacts, _ place: String, _ faults: inout Faults) -> [String] {
        if manifest.kind == "encoder" {
            let encoder = Fields(fields["encoder"] ?? .null)
            if encoder.json.object != nil, target.inputs.map(\.name) != encoder.texts("inputs") || target.outputs != encoder.texts("outputs") {
                faults.add("\(place): inputs and outputs are not the encoder's")
            }
            return ["inputs", "outputs"]
        }
        if target.layers != manifest.backboneLayers { faults.add("\(place): layers", manifest.backboneLayers, target.layers) }
        switch target.name {
        case "onnx": return ["layers"]
        case "executorch": return ["layers", "max_length", "prompt_length", "rows"]
        default: return ["layers", "max_length", "lengths"]
        }
    }

    private func checkSelections(_ faults: inout Faults) {
        let cannotSwitchOff = manifest.alwaysOn || manifest.single != nil
        let chosen = manifest.defaultSelection
        if !Names.reserved.contains(chosen), !manifest.experts.contains(where: { $0.name == chosen }) {
            faults.add("default", "an expert, none or routed", chosen)
        }
        if chosen == "routed", manifest.targets.allSatisfy({ $0.routed == nil }) { faults.add("default: routed, but no target has a routed graph") }
        if chosen == "none", cannotSwitchOff { faults.add("default: none, but the adapter cannot be switched off") }
        if manifest.activationTokens > 0, cannotSwitchOff || manifest.kind == "encoder" {
            faults.add("activation: generation_prompt, but the adapter cannot be switched off")
        }
    }

    private func checkBeside(_ faults: inout Faults) {
        if let prompts = manifest.prompts {
            if prompts.roles.isEmpty == (prompts.reason == nil) {
                faults.add("prompts", "roles, or the reason why there are none", prompts.roles.isEmpty ? "neither" : "both")
            }
            if let text = fields["activation"]?["text"]?.string, !prompts.roles.isEmpty, ByteKey(text) != ByteKey(prompts.opening) {
                faults.add("activation: text is not the opening of the assistant's turn")
            }
        }
        for path in [manifest.tokenizer?.file, manifest.tokenizer?.classes].compactMap({ $0 }) where manifest.files[path] == nil {
            faults.add("tokenizer: \(path) has no file entry")
        }
        let targets = manifest.targets.map(\.name)
        if Set(targets).count != targets.count { faults.add("targets: one is there twice") }
        for (name, companion) in fields["companions"]?.object?.members ?? [] { checkCompanion(name, companion, targets, &faults) }
    }

    private func checkCompanion(_ name: String, _ companion: Json, _ targets: [String], _ faults: inout Faults) {
        let target = companion["target"]?.string ?? ""
        if !targets.contains(target) { faults.add("companion \(name): target", targets.joined(separator: " or "), target) }
        let names = Set(manifest.experts.map(\.name)).union(Names.reserved)
        for (expert, path) in companion["experts"]?.object?.members ?? [] {
            let path = path.string ?? ""
            if !names.contains(expert) { faults.add("companion \(name): no such expert: \(expert)") }
            let folder = companion["folder"]?.string ?? ""
            if !path.hasPrefix("\(folder)/") {
                faults.add("companion \(name): file", "below \(folder)/", path)
            } else if manifest.files[path] == nil {
                faults.add("companion \(name): \(path) has no file entry")
            }
        }
    }
}

/// Where some bytes begin in others, or nil.
func find(_ wanted: [UInt8], in bytes: [UInt8], from start: Int = 0) -> Int? {
    guard let first = wanted.first, bytes.count >= wanted.count else { return wanted.isEmpty ? start : nil }
    return bytes.withUnsafeBufferPointer { bytes in
        wanted.withUnsafeBufferPointer { wanted in
            var at = start
            while at + wanted.count <= bytes.count {
                if bytes[at] == first, (1..<wanted.count).allSatisfy({ bytes[at + $0] == wanted[$0] }) { return at }
                at += 1
            }
            return nil
        }
    }
}
