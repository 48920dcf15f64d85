/// A file of the bundle: its size in bytes and its sha256, hex.
public struct FileEntry: Sendable {
    /// In bytes.
    public let size: Int64
    /// In hex.
    public let sha256: String
}

/// An adapted layer: its module name, output width H and where it lies in the flat expert vector.
public struct Site: Sendable {
    /// Of the module.
    public let name: String
    /// H, numbers.
    public let width: Int
    /// Numbers before it.
    public let offset: Int
}

/// An expert of the bundle and the file it is in.
public struct ExpertEntry: Sendable {
    /// As `use` takes it.
    public let name: String
    /// Path in the bundle.
    public let file: String
    /// Whether it came or changed after the export.
    public let added: Bool
}

/// What stands before and after one role's text in a conversation.
public struct Speaker: Sendable {
    /// Before the text.
    public let prefix: String
    /// After it.
    public let suffix: String
}

/// The chat template as text around each turn (docs/prompts.md); no roles and a reason where it cannot be written so.
public struct Prompts: Sendable {
    /// At the beginning.
    public let begin: String
    /// By role, in the template's order.
    public let roles: [(name: String, speaker: Speaker)]
    /// Begins the assistant's turn.
    public let opening: String
    /// At the end where no turn is to be written.
    public let closing: String
    /// Said where a conversation has no system turn.
    public let defaultSystem: String?
    /// The system turn stands inside the user's: the turn after it has no prefix.
    public let systemOpensUser: Bool
    /// Roles whose text is stripped of white space.
    public let strip: Set<String>
    /// A system turn or none, then user and assistant in turn; others are refused.
    public let alternating: Bool
    /// Why there are no roles.
    public let reason: String?

    func speaker(_ role: String) -> Speaker? { roles.first { $0.name == role }?.speaker }
}

/// How text becomes ids: files, kind and split as docs/bundle-format.md names them.
public struct TokenizerFacts: Sendable {
    /// Path of tokenizer.json in the bundle.
    public let file: String
    /// byte-bpe, ...
    public let kind: String
    /// gpt2, smollm2, llama3, qwen2; nil for others.
    public let split: String?
    /// Path of the character classes.
    public let classes: String?
}

/// The numbers that a language model's engine needs.
public struct DecoderFacts: Sendable {
    /// Heads of keys and values.
    public let kvHeads: Int
    /// Width of a head.
    public let headDim: Int
    /// Token ids that end an answer.
    public let eos: Set<Int>
}

/// An axis of an input: a size, or a name (`batch`, `sequence`) where it varies.
public enum Axis: Sendable, Equatable {
    /// Always that long.
    case size(Int)
    /// Varies.
    case name(String)
}

/// An input of an encoder.
public struct InputFacts: Sendable {
    /// As `run` takes it.
    public let name: String
    /// Whether it holds integers, such as token ids.
    public let isLong: Bool
    /// Its axes, outermost first.
    public let shape: [Axis]
    /// Integers are below it; 0: no limit.
    public let limit: Int64
    /// What a missing input is: ones, zeros, or empty where it may not be missing.
    public let fill: String
}

/// One target's artifact and how to run it.
public struct TargetFacts: Sendable {
    /// onnx, executorch, coreml.
    public let name: String
    /// Path of the artifact in the bundle.
    public let file: String
    /// Path of what weighs experts per token, or nil.
    public let routed: String?
    /// ONNX Runtime's execution providers, first choice first.
    public let providers: [String]
    /// Of the engine; nil leaves it to the engine.
    public let threads: Int?
    /// Whether an expert is given at every call; false where a single one is folded in.
    public let expertInput: Bool
    /// What it computes in: float32, float16, int8-dynamic, int8-per-token.
    public let compute: String
    /// Layers with a cache.
    public let layers: Int
    /// Tokens of a prompt adapter, in the cache before everything else.
    public let virtualTokens: Int
    /// Of an encoder.
    public let inputs: [InputFacts]
    /// Of an encoder.
    public let outputs: [String]
    /// The graph's functions that our operators may compute.
    public let functions: [String]
    /// Tokens that the artifact's own cache holds; nil where the engine decides.
    public let maxLength: Int?
    /// Tokens of one call at most.
    public let promptLength: Int?
    /// Lengths of a call that the artifact was made for (Core ML).
    public let lengths: [Int]
}

/// What lime.json says, checked: field by field against the schema, and against itself.
public struct Manifest: Sendable {
    /// decoder, encoder or vision-language.
    public let kind: String
    /// What an expert fits: the shared adapter and its sites.
    public let adapterID: String
    /// The model's name.
    public let modelName: String
    /// Most tokens of a sequence; 0 where pixels come in.
    public let context: Int
    /// Token ids are below it.
    public let vocab: Int
    /// Of the original backbone.
    public let fingerprint: String
    let backboneLayers: Int
    /// int4, int8 or none.
    public let quant: String
    /// Nil for encoders.
    public let decoder: DecoderFacts?
    /// The adapter's variant: lora, lora_fa, dora, slicefine, prompt_tuning.
    public let variant: String
    /// The one expert that the bundle holds and cannot switch, or nil.
    public let single: String?
    /// What a bundle opens with: an expert's name, none or routed.
    public let defaultSelection: String
    /// The expert acts from the last so many tokens of a prompt on; 0: on every token.
    public let activationTokens: Int
    /// Nil for a model that holds no conversations.
    public let prompts: Prompts?
    /// Nil for a model without text.
    public let tokenizer: TokenizerFacts?
    /// In order.
    public let experts: [ExpertEntry]
    /// The first is what opens by itself.
    public let targets: [TargetFacts]
    /// The adapted layers, in the order of the expert vector.
    public let sites: [Site]
    /// Every file but lime.json, by its path.
    public let files: [String: FileEntry]
    /// Paths of `files` as lime.json orders them.
    let paths: [String]
    let seal: String

    /// sum_H: numbers in an expert vector.
    public var sumH: Int { sites.last.map { $0.offset + $0.width } ?? 0 }

    /// Whether no expert vector gives the original model back.
    public var alwaysOn: Bool { ["dora", "slicefine", "prompt_tuning"].contains(variant) }

    /// One target's facts, or nil.
    public func target(_ name: String) -> TargetFacts? { targets.first { $0.name == name } }
}

extension Manifest {
    /// From fields that passed the schema, defaults filled in.
    init(_ fields: Json, seal: String) throws {
        let fields = Fields(fields)
        let backbone = try fields.fields("backbone")
        let adapter = try fields.fields("adapter")
        let activation = try fields.fields("activation")
        let files = try fields.members("files").map { ($0.name, FileEntry(size: try $0.value.integer("size"), sha256: try $0.value.text("sha256"))) }
        kind = try fields.text("kind")
        adapterID = try fields.text("adapter_id")
        modelName = try backbone.text("name")
        context = try backbone.int("context")
        vocab = try backbone.int("vocab")
        fingerprint = try backbone.text("fingerprint")
        backboneLayers = try backbone.int("layers")
        quant = try fields.fields("quantization").text("quant")
        decoder = try fields.optional("decoder").map(Self.readDecoder)
        variant = try adapter.text("variant")
        single = adapter.optionalText("single")
        defaultSelection = try fields.text("default")
        activationTokens = try activation.text("kind") == "always" ? 0 : activation.int("tokens")
        prompts = try fields.optional("prompts").map(Self.readPrompts)
        tokenizer = try fields.optional("tokenizer").map {
            TokenizerFacts(file: try $0.text("file"), kind: try $0.text("kind"), split: $0.optionalText("split"), classes: $0.optionalText("classes"))
        }
        experts = try fields.list("experts").map {
            ExpertEntry(name: try $0.text("name"), file: try $0.text("file"), added: try $0.bool("added"))
        }
        targets = try fields.list("targets").map(Self.readTarget)
        sites = try fields.list("sites").map {
            Site(name: try $0.text("name"), width: try $0.int("width"), offset: try $0.int("offset"))
        }
        self.files = Dictionary(files, uniquingKeysWith: { first, _ in first })
        paths = files.map(\.0)
        self.seal = seal
    }

    private static func readDecoder(_ facts: Fields) throws -> DecoderFacts {
        DecoderFacts(kvHeads: try facts.int("kv_heads"), headDim: try facts.int("head_dim"), eos: Set(facts.ints("eos")))
    }

    static func readPrompts(_ facts: Fields) throws -> Prompts {
        let roles = try facts.members("roles").map { ($0.name, Speaker(prefix: try $0.value.text("prefix"), suffix: try $0.value.text("suffix"))) }
        return Prompts(
            begin: try facts.text("begin"), roles: roles, opening: try facts.text("opening"), closing: facts.optionalText("closing") ?? "",
            defaultSystem: facts.optionalText("default_system"), systemOpensUser: facts.json["system_opens_user"]?.bool == true,
            strip: Set(facts.texts("strip")), alternating: facts.optionalText("order") == "alternating", reason: facts.optionalText("reason"))
    }

    private static func readTarget(_ facts: Fields) throws -> TargetFacts {
        TargetFacts(
            name: try facts.text("target"), file: try facts.text("file"), routed: facts.optionalText("routed"), providers: facts.texts("providers"),
            threads: facts.json["threads"]?.int, expertInput: try facts.bool("expert_input"), compute: try facts.text("compute"),
            layers: facts.json["layers"]?.int ?? 0, virtualTokens: facts.json["virtual_tokens"]?.int ?? 0,
            inputs: try facts.list("inputs").map(readInput), outputs: facts.texts("outputs"), functions: facts.texts("functions"),
            maxLength: facts.json["max_length"]?.int, promptLength: facts.json["prompt_length"]?.int, lengths: facts.ints("lengths"))
    }

    private static func readInput(_ facts: Fields) throws -> InputFacts {
        let shape = (facts.json["shape"]?.array ?? []).map { axis in axis.int.map { Axis.size($0) } ?? .name(axis.string ?? "") }
        return InputFacts(
            name: try facts.text("name"), isLong: try facts.text("dtype") == "int64", shape: shape, limit: try facts.integer("limit"),
            fill: try facts.text("default"))
    }
}

/// Fields of a checked object; what the schema promised and is not there is a malformed text all the same, never a crash.
struct Fields {
    let json: Json

    init(_ json: Json) { self.json = json }

    private func need<T>(_ name: String, _ value: T?) throws -> T {
        guard let value else { throw Json.Malformed(description: "\(name) is missing or of another type") }
        return value
    }

    func text(_ name: String) throws -> String { try need(name, json[name]?.string) }

    func optionalText(_ name: String) -> String? { json[name]?.string }

    func integer(_ name: String) throws -> Int64 { try need(name, json[name]?.integer) }

    func int(_ name: String) throws -> Int { try need(name, json[name]?.int) }

    func bool(_ name: String) throws -> Bool { try need(name, json[name]?.bool) }

    func fields(_ name: String) throws -> Fields { Fields(.object(try need(name, json[name]?.object))) }

    func optional(_ name: String) -> Fields? { json[name]?.object.map { Fields(.object($0)) } }

    func list(_ name: String) throws -> [Fields] { (json[name]?.array ?? []).map(Fields.init) }

    func members(_ name: String) throws -> [(name: String, value: Fields)] {
        try need(name, json[name]?.object).members.map { ($0.name, Fields($0.value)) }
    }

    func texts(_ name: String) -> [String] { (json[name]?.array ?? []).compactMap(\.string) }

    func ints(_ name: String) -> [Int] { (json[name]?.array ?? []).compactMap(\.int) }
}
