package limeedge

/** A file of the bundle: its size in bytes and its sha256, hex. */
public data class FileEntry(val size: Long, val sha256: String)

/** An adapted layer: its module name, output width H and where it lies in the flat expert vector. */
public data class Site(val name: String, val width: Int, val offset: Int)

/** An expert of the bundle and the file it is in; `added`: came or changed after the export. */
public data class ExpertEntry(val name: String, val file: String, val added: Boolean)

/** What stands before and after one role's text in a conversation. */
public data class Speaker(val prefix: String, val suffix: String)

/**
 * The chat template as text around each turn (docs/prompts.md); no roles and a reason where it cannot be written so.
 *
 * @property closing at the end where no turn is to be written. @property systemOpensUser the system turn stands inside the user's: the
 *   turn after it has no prefix. @property alternating a system turn or none, then user and assistant in turn; others are refused.
 */
public data class Prompts(
    val begin: String,
    val roles: Map<String, Speaker>,
    val opening: String,
    val closing: String,
    val defaultSystem: String?,
    val systemOpensUser: Boolean,
    val strip: Set<String>,
    val alternating: Boolean,
    val reason: String?,
)

/** How text becomes ids: files, kind and split as docs/bundle-format.md names them. */
public data class TokenizerFacts(val file: String, val kind: String, val split: String?, val classes: String?)

/** On which tokens the expert acts: every one, or only from the last [tokens] of a prompt on (0: every one). */
public data class Activation(val tokens: Int)

/** The numbers that a language model's engine needs. */
public data class DecoderFacts(val kvHeads: Int, val headDim: Int, val eos: Set<Int>)

/** An input of an encoder: the axes by name (`batch`, `sequence`) vary; [fill] is what a missing input is: ones, zeros or none. */
public data class InputFacts(val name: String, val isLong: Boolean, val shape: List<Any>, val limit: Long, val fill: String)

/** One target's artifact and how to run it. */
public data class TargetFacts(
    val name: String,
    val file: String,
    val routed: String?,
    val providers: List<String>,
    val threads: Int?,
    val expertInput: Boolean,
    val compute: String,
    val layers: Int,
    val virtualTokens: Int,
    val inputs: List<InputFacts>,
    val outputs: List<String>,
    val functions: List<String>,
    val maxLength: Int?,
    val promptLength: Int?,
    val rows: Int?,
)

/** What lime.json says, checked: field by field against the schema, and against itself. */
public class Manifest internal constructor(fields: Map<*, *>, internal val seal: String) {
    /** decoder, encoder or vision-language. */
    public val kind: String = fields.text("kind")

    /** What an expert fits: the shared adapter and its sites. */
    public val adapterId: String = fields.text("adapter_id")

    /** The model's name. */
    public val modelName: String = fields.map("backbone").text("name")

    /** Most tokens of a sequence; 0 where pixels come in. */
    public val context: Int = fields.map("backbone").int("context")

    /** Token ids are below it. */
    public val vocab: Int = minOf(fields.map("backbone")["vocab"] as Long, Int.MAX_VALUE.toLong()).toInt()

    /** Of the original backbone. */
    public val fingerprint: String = fields.map("backbone").text("fingerprint")
    internal val backboneLayers: Int = fields.map("backbone").int("layers")

    /** int4, int8 or none. */
    public val quant: String = fields.map("quantization").text("quant")

    /** Null for encoders. */
    public val decoder: DecoderFacts? = (fields["decoder"] as? Map<*, *>)?.let { facts ->
        DecoderFacts(facts.int("kv_heads"), facts.int("head_dim"), facts.list("eos").map { (it as Long).toInt() }.toSet())
    }

    /** The adapter's variant: lora, lora_fa, dora, slicefine, prompt_tuning. */
    public val variant: String = fields.map("adapter").text("variant")

    /** The one expert that the bundle holds and cannot switch, or null. */
    public val single: String? = fields.map("adapter")["single"] as String?

    /** Whether no expert vector gives the original model back. */
    public val alwaysOn: Boolean = variant in setOf("dora", "slicefine", "prompt_tuning")

    /** What a bundle opens with: an expert's name, none or routed. */
    public val default: String = fields.text("default")

    /** On which tokens the expert acts. */
    public val activation: Activation = fields.map("activation").let {
        Activation(if (it.text("kind") == "always") 0 else it.int("tokens"))
    }

    /** Null for a model that holds no conversations. */
    public val prompts: Prompts? = (fields["prompts"] as? Map<*, *>)?.let { facts ->
        val roles = facts.map("roles").entries.associate { (role, speaker) ->
            speaker as Map<*, *>
            role as String to Speaker(speaker.text("prefix"), speaker.text("suffix"))
        }
        val strip = facts.list("strip").map { it as String }.toSet()
        Prompts(
            facts.text("begin"), roles, facts.text("opening"), facts["closing"] as String? ?: "", facts["default_system"] as String?,
            facts["system_opens_user"] == true, strip, facts["order"] == "alternating", facts["reason"] as String?,
        )
    }

    /** Null for a model without text. */
    public val tokenizer: TokenizerFacts? = (fields["tokenizer"] as? Map<*, *>)?.let {
        TokenizerFacts(it.text("file"), it.text("kind"), it["split"] as String?, it["classes"] as String?)
    }

    /** In order. */
    public val experts: List<ExpertEntry> = fields.list("experts").map {
        it as Map<*, *>
        ExpertEntry(it.text("name"), it.text("file"), it["added"] as Boolean)
    }

    /** The first is what opens by itself. */
    public val targets: List<TargetFacts> = fields.list("targets").map { readTarget(it as Map<*, *>) }

    /** The adapted layers, in the order of the expert vector. */
    public val sites: List<Site> = fields.list("sites").map {
        it as Map<*, *>
        Site(it.text("name"), it.int("width"), it.int("offset"))
    }

    /** sum_H: numbers in an expert vector. */
    public val sumH: Int = sites.last().let { it.offset + it.width }

    /** Every file but lime.json. */
    public val files: Map<String, FileEntry> = fields.map("files").entries.associate { (path, entry) ->
        entry as Map<*, *>
        path as String to FileEntry(entry["size"] as Long, entry.text("sha256"))
    }

    private fun readTarget(facts: Map<*, *>) = TargetFacts(
        name = facts.text("target"),
        file = facts.text("file"),
        routed = facts["routed"] as String?,
        providers = facts.list("providers").map { it as String },
        threads = (facts["threads"] as Long?)?.toInt(),
        expertInput = facts["expert_input"] as Boolean,
        compute = facts.text("compute"),
        layers = facts.int("layers"),
        virtualTokens = facts.int("virtual_tokens"),
        inputs = facts.list("inputs").map { readInput(it as Map<*, *>) },
        outputs = facts.list("outputs").map { it as String },
        functions = (facts["functions"] as? List<*>).orEmpty().map { it as String },
        maxLength = (facts["max_length"] as Long?)?.toInt(),
        promptLength = (facts["prompt_length"] as Long?)?.toInt(),
        rows = (facts["rows"] as Long?)?.toInt(),
    )

    private fun readInput(facts: Map<*, *>): InputFacts {
        val shape = facts.list("shape").map { if (it is Long) it.toInt() else it as String }
        return InputFacts(facts.text("name"), facts.text("dtype") == "int64", shape, facts["limit"] as Long, facts.text("default"))
    }

    private companion object {
        private fun Map<*, *>.text(name: String) = this[name] as String
        private fun Map<*, *>.int(name: String) = (this[name] as Long).toInt()
        private fun Map<*, *>.map(name: String) = this[name] as Map<*, *>
        private fun Map<*, *>.list(name: String) = this[name] as List<*>
    }
}
