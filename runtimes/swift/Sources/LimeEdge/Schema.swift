import Foundation

/// Checks a JSON value against a JSON schema and fills in the defaults.
///
/// The schema of lime.json is made from the Python fields (docs/bundle.schema.json), so that every language accepts the
/// same manifests. Only the keywords that it uses are known; another one is a bug of ours, and a test says so.
struct Schema {
    private let root: Json
    private let definitions: Json
    private let patterns: [String: NSRegularExpression]

    /// - Throws: ``Json/Malformed`` a keyword that is not known.
    init(_ root: Json) throws {
        self.root = root
        definitions = root["$defs"] ?? .null
        var patterns: [String: NSRegularExpression] = [:]
        try Self.collect(root, &patterns)
        for (_, rule) in definitions.object?.members ?? [] { try Self.collect(rule, &patterns) }
        self.patterns = patterns
    }

    /// `value` with defaults filled in; what is wrong goes to `faults`.
    func check(_ value: Json, _ faults: inout Faults) -> Json { check(value, root, "", &faults) }

    private static let most = 50 // faults; more help nobody

    private func check(_ value: Json, _ rule: Json, _ path: String, _ faults: inout Faults) -> Json {
        if faults.list.count >= Self.most { return value }
        if let reference = rule["$ref"]?.string { return check(value, find(reference), path, &faults) }
        if let options = rule["anyOf"]?.array { return checkAny(value, options, rule["discriminator"], path, &faults) }
        if let allowed = rule["enum"]?.array {
            if !allowed.contains(where: { areEqual($0, value) }) { faults.add(path, allowed.map(show).joined(separator: " or "), show(value)) }
            return value
        }
        guard let type = rule["type"]?.string else { return value }
        switch (type, value) {
        case ("object", .object(let object)): return checkObject(object, rule, path, &faults)
        case ("array", .array(let items)): return checkArray(items, rule, path, &faults)
        case ("string", .string(let text)): checkString(text, rule, path, &faults)
        case ("integer", .integer), ("number", .integer), ("number", .number): checkRange(value, rule, path, &faults)
        case ("boolean", .bool), ("null", .null): break
        default: faults.add(path, type, show(value))
        }
        return value
    }

    private func find(_ reference: String) -> Json {
        definitions[String(reference.split(separator: "/").last ?? "")] ?? .null
    }

    private func checkAny(_ value: Json, _ options: [Json], _ discriminator: Json?, _ path: String, _ faults: inout Faults) -> Json {
        if let property = discriminator?["propertyName"]?.string, let mapping = discriminator?["mapping"] {
            let tag = value[property]
            if let target = tag?.string.flatMap({ mapping[$0]?.string }) { return check(value, find(target), path, &faults) }
            faults.add("\(path).\(property)", (mapping.object?.names ?? []).joined(separator: " or "), show(tag ?? .null))
            return value
        }
        var tried: [Faults] = []
        for option in options {
            var own = Faults()
            let complete = check(value, option, path, &own)
            if own.list.isEmpty { return complete }
            tried.append(own)
        }
        let nearest = tried.first { own in !own.list.contains { $0.what == path } } // right type, wrong inside
        faults.append((nearest ?? tried.first)?.list ?? [])
        return value
    }

    private func checkObject(_ value: JsonObject, _ rule: Json, _ path: String, _ faults: inout Faults) -> Json {
        let properties = rule["properties"]?.object ?? JsonObject()
        if let most = rule["maxProperties"]?.int, value.members.count > most { faults.add(path, "at most \(most) entries", value.members.count) }
        for name in rule["required"]?.array ?? [] {
            if let name = name.string, value[name] == nil { faults.add("\(join(path, name)) is missing") }
        }
        var complete = JsonObject()
        for (name, property) in properties.members {
            guard let given = value[name] ?? property["default"] else { continue }
            _ = complete.add(name, check(given, property, join(path, name), &faults))
        }
        for (name, item) in value.members where properties[name] == nil {
            if let rule = rule["propertyNames"] { checkString(name, rule, "\(join(path, name.shortened(80))) (name)", &faults) }
            switch rule["additionalProperties"] {
            case .bool(false): faults.add("\(join(path, name.shortened(80))) is no known field")
            case .object(let others): _ = complete.add(name, check(item, .object(others), join(path, name), &faults))
            default: _ = complete.add(name, item)
            }
        }
        return .object(complete)
    }

    private func checkArray(_ value: [Json], _ rule: Json, _ path: String, _ faults: inout Faults) -> Json {
        if let least = rule["minItems"]?.int, value.count < least { faults.add(path, "at least \(least) entries", value.count) }
        if let most = rule["maxItems"]?.int, value.count > most {
            faults.add(path, "at most \(most) entries", value.count)
            return .array(value)
        }
        guard let items = rule["items"] else { return .array(value) }
        return .array(value.enumerated().map { check($1, items, "\(path)[\($0)]", &faults) })
    }

    private func checkString(_ value: String, _ rule: Json, _ path: String, _ faults: inout Faults) {
        let length = value.unicodeScalars.count
        if let most = rule["maxLength"]?.int, length > most { return faults.add(path, "at most \(most) characters", length) }
        if let least = rule["minLength"]?.int, length < least { faults.add(path, "at least \(least) characters", length) }
        guard let text = rule["pattern"]?.string, let pattern = patterns[text] else { return }
        let range = NSRange(location: 0, length: value.utf16.count)
        if pattern.firstMatch(in: value, range: range) == nil { faults.add(path, "text like \(text)", show(.string(value))) }
    }

    private func checkRange(_ value: Json, _ rule: Json, _ path: String, _ faults: inout Faults) {
        let least = rule["minimum"]?.double
        let most = rule["maximum"]?.double
        let number = value.double ?? .nan
        if number < least ?? -.infinity || number > most ?? .infinity {
            faults.add(path, "\(show(rule["minimum"] ?? .null))..\(show(rule["maximum"] ?? .null))", show(value))
        }
    }

    private func join(_ path: String, _ name: String) -> String { path.isEmpty ? name : "\(path).\(name)" }

    private func show(_ value: Json) -> String {
        switch value {
        case .object: "an object"
        case .array: "a list"
        default: value.text.shortened(40)
        }
    }

    private static let known: Set<String> = [
        "$schema", "$id", "$ref", "$defs", "title", "description", "default", "type", "enum", "anyOf", "discriminator", "properties",
        "required", "additionalProperties", "propertyNames", "maxProperties", "items", "minItems", "maxItems", "pattern", "minLength",
        "maxLength", "minimum", "maximum",
    ]

    private static func collect(_ rule: Json, _ patterns: inout [String: NSRegularExpression]) throws {
        for (keyword, value) in rule.object?.members ?? [] {
            if !known.contains(keyword) { throw Json.Malformed(description: "schema: unknown keyword \(keyword)") }
            switch (keyword, value) {
            case ("properties", .object(let properties)): for (_, property) in properties.members { try collect(property, &patterns) }
            case ("anyOf", .array(let options)): for option in options { try collect(option, &patterns) }
            case ("items", .object), ("additionalProperties", .object), ("propertyNames", .object): try collect(value, &patterns)
            case ("pattern", .string(let text)): patterns[text] = try NSRegularExpression(pattern: text)
            default: break
            }
        }
    }
}
