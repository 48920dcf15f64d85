package limeedge

/** Finds a bundle's tokenizer: kind and split as its manifest names them, character classes from its file. */
internal object TokenizerReader {
    private const val HINT = "give token ids instead of text"

    fun read(bundle: LimeBundle): Tokenizer {
        val where = bundle.folder.path
        val facts = bundle.manifest.tokenizer
            ?: throw LimeError.Missing(where, "holds no tokenizer", HINT)
        if (facts.kind != "byte-bpe") throw LimeError.Unsupported(where, listOf(Fault("tokenizer", "byte-bpe", facts.kind)), HINT)
        val split = Split.values().firstOrNull { Names.lower(it.name) == facts.split }
            ?: throw LimeError.Unsupported(where, listOf(Fault("tokenizer's split", Split.values().joinToString { Names.lower(it.name) }, "${facts.split}")), HINT)
        val classes = facts.classes ?: throw LimeError.Unsupported(where, "the tokenizer has no character classes", HINT)
        val text = decode(bundle, facts.file)
        return Tokenizer.read(text, bundle.file(facts.file).path, split, CharacterClasses.read(decode(bundle, classes), bundle.file(classes).path))
    }

    private fun decode(bundle: LimeBundle, path: String): String = try {
        decodeUtf8(bundle.readChecked(path))
    } catch (error: Json.Malformed) {
        throw LimeError.Damaged(bundle.file(path).path, "${error.message}", COPY_AGAIN)
    }
}
