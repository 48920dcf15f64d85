package limeedge

import java.security.MessageDigest

/** Reads lime.json: its schema, its own hash, every field, and what has to agree (docs/bundle-format.md). */
internal object ManifestReader {
    const val FILE = "lime.json"
    const val REFERENCE = "reference.safetensors"
    const val LARGEST = 16L shl 20
    private const val FORMAT = "lime-edge-bundle"
    private const val SCHEMA = 2L
    private const val LONGEST = 1L shl 28
    private const val SEAL = "\"manifest_sha256\": \""

    private val schema: Schema by lazy {
        val stream = checkNotNull(javaClass.getResourceAsStream("/limeedge/bundle.schema.json")) { "the jar lacks its schema" }
        Schema(Json.parse(stream.use { decodeUtf8(it.readBytes()) }) as Map<*, *>)
    }

    /**
     * What the bytes of a lime.json say.
     *
     * @throws LimeError.Unsupported another schema. @throws LimeError.Damaged anything else.
     */
    fun read(bytes: ByteArray, where: String): Manifest {
        val fields = try {
            Json.parse(decodeUtf8(bytes))
        } catch (error: Json.Malformed) {
            throw LimeError.Damaged(where, "not readable JSON: ${error.message}", COPY_AGAIN)
        }
        checkSchema(fields, where)
        if (sealOf(bytes) != (fields as Map<*, *>)["manifest_sha256"]) {
            throw LimeError.Damaged(
                where, "manifest_sha256 does not fit its text", "the bundle is damaged or was edited by hand: copy or export it again",
            )
        }
        val faults = Faults()
        val complete = schema.check(fields, faults) as Map<*, *>
        faults.throwAny { LimeError.Damaged(where, it, COPY_AGAIN) }
        checkOffsets(complete, faults)
        faults.throwAny { LimeError.Damaged(where, it, COPY_AGAIN) }
        val manifest = Manifest(complete, fields["manifest_sha256"] as String)
        findContradictions(manifest, complete, faults)
        faults.throwAny { LimeError.Damaged(where, it, COPY_AGAIN) }
        return manifest
    }

    /** sha256 over the file with 64 zeros where the digits of manifest_sha256 are. */
    fun sealOf(bytes: ByteArray): String {
        val start = indexOf(bytes, SEAL.toByteArray())
        val digest = MessageDigest.getInstance("SHA-256")
        if (start < 0 || start + SEAL.length + 64 > bytes.size) return hex(digest.digest(bytes))
        val digits = start + SEAL.length
        digest.update(bytes, 0, digits)
        digest.update("0".repeat(64).toByteArray())
        digest.update(bytes, digits + 64, bytes.size - digits - 64)
        return hex(digest.digest())
    }

    private fun indexOf(bytes: ByteArray, wanted: ByteArray): Int =
        (0..bytes.size - wanted.size).firstOrNull { at -> wanted.indices.all { bytes[at + it] == wanted[it] } } ?: -1

    private fun checkSchema(fields: Any?, where: String) {
        if (fields !is Map<*, *> || fields["format"] != FORMAT) {
            throw LimeError.Damaged(where, "not a lime-edge bundle", "write one with lime-edge export")
        }
        val found = fields["schema"]
        if (found == SCHEMA) return
        val hint = if (found is Long && found < SCHEMA) "export again: older bundles are not read" else "use a newer version of this library"
        throw LimeError.Unsupported(where, listOf(Fault("schema", "$SCHEMA", "$found".take(20))), hint)
    }

    /** Offsets before anything is computed with them: the widths before each site, added up. */
    private fun checkOffsets(fields: Map<*, *>, faults: Faults) {
        var offset = 0L
        val names = HashSet<Any?>()
        for (site in fields["sites"] as List<*>) {
            site as Map<*, *>
            if (site["offset"] != offset) return faults.add("site ${site["name"]}: offset", offset, site["offset"])
            offset += site["width"] as Long
            if (!names.add(site["name"])) faults.add("site ${site["name"]} is there twice")
        }
        if (offset > LONGEST) faults.add("sites: numbers in an expert vector", "at most $LONGEST", offset)
    }

    private fun findContradictions(manifest: Manifest, fields: Map<*, *>, faults: Faults) {
        checkFiles(manifest, faults)
        checkExperts(manifest, faults)
        checkKind(manifest, fields, faults)
        for (target in manifest.targets) checkTarget(manifest, target, fields, faults)
        checkSelections(manifest, faults)
        checkBeside(manifest, fields, faults)
    }

    private fun checkFiles(manifest: Manifest, faults: Faults) {
        for (path in manifest.files.keys) {
            Names.checkPath(path)?.let { faults.add("files: $it") }
            if (Names.lower(path) == FILE) faults.add("files: $path is the manifest itself")
        }
        Names.findClashes(manifest.files.keys).forEach { faults.add("files: $it") }
        if (REFERENCE !in manifest.files) faults.add("files: $REFERENCE is missing")
    }

    private fun checkExperts(manifest: Manifest, faults: Faults) {
        val folded = HashSet<String>()
        for (entry in manifest.experts) {
            Names.checkExpert(entry.name)?.let { faults.add("experts: $it") }
            if (!folded.add(Names.lower(entry.name))) faults.add("experts: '${entry.name}' is there twice (letter case does not count)")
            if (!entry.file.startsWith("experts/")) faults.add("expert '${entry.name}': file", "below experts/", entry.file)
            else if (entry.file !in manifest.files) faults.add("expert '${entry.name}' has no file entry")
        }
        if (manifest.experts.map { it.file }.toSet().size != manifest.experts.size) faults.add("experts: two of them share a file")
        if (manifest.single != null && manifest.experts.map { it.name } != listOf(manifest.single)) {
            faults.add("experts of a bundle with a single one", listOf(manifest.single), manifest.experts.map { it.name })
        }
    }

    private fun checkKind(manifest: Manifest, fields: Map<*, *>, faults: Faults) {
        val wanted = if (manifest.kind == "encoder") "encoder" else "decoder"
        for (name in listOf("decoder", "encoder")) {
            if ((fields[name] != null) == (name == wanted)) continue
            faults.add("$name: ${if (name == wanted) "missing in" else "has no place in"} a bundle of kind ${manifest.kind}")
        }
        val decoder = fields["decoder"] as? Map<*, *> ?: return
        if (decoder["heads"] as Long % decoder["kv_heads"] as Long != 0L) {
            faults.add("decoder: heads", "a multiple of kv_heads (${decoder["kv_heads"]})", decoder["heads"])
        }
        for (id in decoder["eos"] as List<*>) if (id as Long >= manifest.vocab) faults.add("decoder: eos", "ids below ${manifest.vocab}", id)
        if (manifest.context < 1) faults.add("backbone: context", "at least 1", manifest.context)
    }

    private fun checkTarget(manifest: Manifest, target: TargetFacts, fields: Map<*, *>, faults: Faults) {
        val where = "target ${target.name}"
        val raw = (fields["targets"] as List<*>).map { it as Map<*, *> }.first { it["target"] == target.name }
        val graph = target.routed.takeIf { target.name == "onnx" } // elsewhere it names a function of the same file
        for (path in listOfNotNull(target.file, graph, raw["stock"] as String?)) {
            if (!path.startsWith("${target.name}/")) faults.add("$where: file", "below ${target.name}/", path)
            else if (path !in manifest.files && manifest.files.keys.none { it.startsWith("$path/") }) {
                faults.add("$where: $path has no file entry")
            }
        }
        if (target.expertInput == (manifest.single != null)) faults.add("$where: expert_input", manifest.single == null, target.expertInput)
        val needed = if (manifest.kind == "encoder") {
            checkEncoder(target, fields["encoder"] as? Map<*, *>, where, faults)
            listOf("inputs", "outputs")
        } else {
            if (target.layers != manifest.backboneLayers) faults.add("$where: layers", manifest.backboneLayers, target.layers)
            when (target.name) {
                "onnx" -> listOf("layers")
                "executorch" -> listOf("layers", "max_length", "prompt_length", "rows")
                else -> listOf("layers", "max_length", "lengths")
            }
        }
        for (field in needed) {
            val value = raw[field]
            if (value == null || value == 0L || (value as? List<*>)?.isEmpty() == true) faults.add("$where: $field is missing")
        }
    }

    private fun checkEncoder(target: TargetFacts, encoder: Map<*, *>?, where: String, faults: Faults) {
        if (encoder == null) return
        if (target.inputs.map { it.name } != encoder["inputs"] || target.outputs != encoder["outputs"]) {
            faults.add("$where: inputs and outputs are not the encoder's")
        }
    }

    private fun checkSelections(manifest: Manifest, faults: Faults) {
        val names = manifest.experts.map { it.name }.toSet()
        val cannotSwitchOff = manifest.alwaysOn || manifest.single != null
        if (manifest.default !in names + Names.RESERVED) faults.add("default", "an expert, none or routed", manifest.default)
        if (manifest.default == "routed" && manifest.targets.none { it.routed != null }) {
            faults.add("default: routed, but no target has a routed graph")
        }
        if (manifest.default == "none" && cannotSwitchOff) faults.add("default: none, but the adapter cannot be switched off")
        if (manifest.activation.tokens > 0 && (cannotSwitchOff || manifest.kind == "encoder")) {
            faults.add("activation: generation_prompt, but the adapter cannot be switched off")
        }
    }

    private fun checkBeside(manifest: Manifest, fields: Map<*, *>, faults: Faults) {
        manifest.prompts?.let {
            if (it.roles.isEmpty() == (it.reason == null)) {
                faults.add("prompts", "roles, or the reason why there are none", if (it.roles.isEmpty()) "neither" else "both")
            }
            val text = (fields["activation"] as Map<*, *>)["text"]
            if (text != null && it.roles.isNotEmpty() && text != it.opening) faults.add("activation: text is not the opening of the assistant's turn")
        }
        for (path in listOfNotNull(manifest.tokenizer?.file, manifest.tokenizer?.classes)) {
            if (path !in manifest.files) faults.add("tokenizer: $path has no file entry")
        }
        val targets = manifest.targets.map { it.name }
        if (targets.toSet().size != targets.size) faults.add("targets: one is there twice")
        val names = manifest.experts.map { it.name } + Names.RESERVED
        for ((name, companion) in fields["companions"] as Map<*, *>) {
            companion as Map<*, *>
            if (companion["target"] !in targets) faults.add("companion $name: target", targets.joinToString(" or "), companion["target"])
            for ((expert, path) in companion["experts"] as Map<*, *>) {
                if (expert !in names) faults.add("companion $name: no such expert: $expert")
                if (!(path as String).startsWith("${companion["folder"]}/")) faults.add("companion $name: file", "below ${companion["folder"]}/", path)
                else if (path !in manifest.files) faults.add("companion $name: $path has no file entry")
            }
        }
    }
}

internal fun hex(bytes: ByteArray): String {
    val digits = "0123456789abcdef"
    return StringBuilder(bytes.size * 2).apply { bytes.forEach { append(digits[it.toInt() shr 4 and 15]).append(digits[it.toInt() and 15]) } }.toString()
}
