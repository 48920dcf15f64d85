package limeedge

import java.io.ByteArrayOutputStream
import java.text.Normalizer

/**
 * A byte-level BPE tokenizer, as tokenizer.json of the Hugging Face tokenizers library describes it: the same ids.
 *
 * It knows the splits of GPT-2, SmolLM2, Llama 3 (SmolLM3 too) and Qwen; anything else in the file is refused by name.
 * Safe for several threads.
 */
public class Tokenizer private constructor(
    private val split: Split,
    private val classes: CharacterClasses,
    private val normalizes: Boolean,
    private val added: AddedTokens,
    private val pairs: BytePairs,
    private val whole: Map<String, Int>?,
    private val spellings: Array<String?>,
) {
    /** Number of ids, those that no token has included. */
    public val size: Int get() = spellings.size

    /**
     * Token ids of a text; special tokens in it are recognised, none are added.
     *
     * @return ids, each below [size].
     * @throws LimeError.Invalid half a surrogate pair.
     */
    public fun encode(text: String): IntArray {
        val out = IntList()
        added.forEachPart(text, normalizes) { part, id -> if (id >= 0) out.add(id) else encodePlain(part, out) }
        return out.toArray()
    }

    /** Text of token ids, special tokens left out; bytes that are no UTF-8 become U+FFFD. Unknown ids are left out. */
    public fun decode(ids: IntArray): String {
        val bytes = ByteArrayOutputStream()
        for (id in ids) {
            val spelling = spellings.getOrNull(id) ?: continue
            if (id in added.special) continue
            if (spelling.all { it in BYTE_OF }) spelling.forEach { bytes.write(BYTE_OF.getValue(it)) }
            else bytes.write(spelling.toByteArray())
        }
        return decodeLossy(bytes.toByteArray())
    }

    /** The id of a token by its own spelling, or null. */
    public fun find(spelling: String): Int? = spellings.indexOf(spelling).takeIf { it >= 0 }

    private fun encodePlain(text: String, out: IntList) {
        val points = codePoints(text)
        split.cut(points, classes) { start, end ->
            val bytes = String(points, start, end - start).toByteArray()
            val known = whole?.get(spell(bytes))
            if (known != null) out.add(known) else pairs.encode(bytes, out)
        }
    }

    internal companion object {
        /** The printable character that stands for a byte in a vocabulary (GPT-2's table). */
        private val CHAR_OF = CharArray(256).also { chars ->
            val printable = ('!'.code..'~'.code) + (0xA1..0xAC) + (0xAE..0xFF)
            printable.forEach { chars[it] = it.toChar() }
            (0..255).filter { it !in printable }.forEachIndexed { index, byte -> chars[byte] = (256 + index).toChar() }
        }
        private val BYTE_OF = CHAR_OF.withIndex().associate { (byte, char) -> char to byte }
        private const val LARGEST_VOCABULARY = 1 shl 22

        private fun spell(bytes: ByteArray) = String(CharArray(bytes.size) { CHAR_OF[bytes[it].toInt() and 0xFF] })

        private fun codePoints(text: String): IntArray {
            val out = IntList()
            var at = 0
            while (at < text.length) {
                val point = text.codePointAt(at)
                if (point in 0xD800..0xDFFF) throw LimeError.Invalid("text", "half a surrogate pair at $at", "it has no bytes: cut texts between characters")
                out.add(point)
                at += Character.charCount(point)
            }
            return out.toArray()
        }

        /**
         * Build from the text of a tokenizer.json.
         *
         * @param split how it cuts, as the bundle's manifest names it; it is compared with the file.
         * @throws LimeError.Unsupported something in it that this tokenizer does not know.
         * @throws LimeError.Damaged no tokenizer.json.
         */
        fun read(text: String, where: String, split: Split, classes: CharacterClasses): Tokenizer {
            val document = try {
                Json.parse(text) as? Map<*, *>
            } catch (error: Json.Malformed) {
                throw LimeError.Damaged(where, "not JSON: ${error.message}", COPY_AGAIN)
            }
            val model = document?.get("model") as? Map<*, *> ?: throw LimeError.Damaged(where, "no model", COPY_AGAIN)
            refuseUnknown(document, model, where)
            val vocabulary = readVocabulary(model, where)
            val added = AddedTokens.read(document["added_tokens"], where)
            val last = maxOf(vocabulary.values.maxOrNull() ?: -1, added.tokens.values.maxOrNull() ?: -1)
            val spellings = arrayOfNulls<String>(last + 1)
            for ((spelling, id) in vocabulary) spellings[id] = spelling
            for ((content, id) in added.tokens) spellings[id] = content
            val pairs = readMerges(model, vocabulary, where)
            val whole = if (model["ignore_merges"] == true) vocabulary else null
            val normalizes = normalizerKinds(document["normalizer"]).isNotEmpty()
            return Tokenizer(split, classes, normalizes, added, pairs, whole, spellings)
        }

        private fun refuseUnknown(document: Map<*, *>, model: Map<*, *>, where: String) {
            val faults = Faults()
            if (model["type"] != "BPE") faults.add("model", "BPE", model["type"])
            if (model["dropout"] != null) faults.add("dropout", "none", model["dropout"])
            for (key in listOf("continuing_subword_prefix", "end_of_word_suffix")) {
                if (!(model[key] as? String).isNullOrEmpty()) faults.add(key, "none", model[key])
            }
            for (key in listOf("fuse_unk", "byte_fallback")) if (model[key] == true) faults.add(key, false, true)
            for (kind in normalizerKinds(document["normalizer"])) if (kind != "NFC") faults.add("normalizer", "NFC or none", kind)
            if ((document["decoder"] as? Map<*, *>)?.get("type") != "ByteLevel") faults.add("decoder", "ByteLevel", document["decoder"])
            faults.throwAny { LimeError.Unsupported(where, it, "give token ids instead of text") }
        }

        private fun normalizerKinds(normalizer: Any?): List<Any?> {
            if (normalizer !is Map<*, *>) return emptyList()
            if (normalizer["type"] != "Sequence") return listOf(normalizer["type"])
            return (normalizer["normalizers"] as? List<*>).orEmpty().map { (it as? Map<*, *>)?.get("type") }
        }

        private fun readVocabulary(model: Map<*, *>, where: String): Map<String, Int> {
            val vocabulary = HashMap<String, Int>()
            for ((spelling, id) in model["vocab"] as? Map<*, *> ?: emptyMap<String, Int>()) {
                if (id !is Long || id !in 0 until LARGEST_VOCABULARY) throw LimeError.Damaged(where, "vocab: an id is $id", COPY_AGAIN)
                vocabulary[spelling as String] = id.toInt()
            }
            return vocabulary
        }

        private fun readMerges(model: Map<*, *>, vocabulary: Map<String, Int>, where: String): BytePairs {
            val merges = model["merges"] as? List<*> ?: throw LimeError.Damaged(where, "no merges", COPY_AGAIN)
            val unknown = (model["unk_token"] as? String)?.let { vocabulary[it] } ?: -1
            val pairs = BytePairs(IntArray(256) { vocabulary[CHAR_OF[it].toString()] ?: unknown }, merges.size)
            merges.forEachIndexed { rank, merge ->
                val (left, right) = when (merge) {
                    is String -> merge.split(' ')
                    is List<*> -> merge.map { it as? String ?: "" }
                    else -> emptyList()
                }.takeIf { it.size == 2 } ?: throw LimeError.Damaged(where, "merge $rank is no pair", COPY_AGAIN)
                val ids = listOf(left, right, left + right).map {
                    vocabulary[it] ?: throw LimeError.Damaged(where, "merge $rank makes no token", COPY_AGAIN)
                }
                pairs.add(ids[0], ids[1], rank, ids[2])
            }
            return pairs
        }
    }

    /** Tokens that are found in a text before anything else: of those that begin earliest, the longest. */
    internal class AddedTokens(val tokens: Map<String, Int>, val special: Set<Int>, private val raw: Set<String>) {
        private val starts = tokens.keys.groupBy { it[0] }.mapValues { (_, all) -> all.sortedByDescending { it.length } }

        /** Calls [part] with every stretch of plain text and id -1, or with a token and its id, in order. */
        fun forEachPart(text: String, normalizes: Boolean, part: (String, Int) -> Unit) {
            cut(text, { !normalizes || it in raw }) { piece, id ->
                if (id >= 0 || !normalizes) part(piece, id)
                else cut(Normalizer.normalize(piece, Normalizer.Form.NFC), { it !in raw }, part)
            }
        }

        private inline fun cut(text: String, takes: (String) -> Boolean, part: (String, Int) -> Unit) {
            var begin = 0
            var at = 0
            while (at < text.length) {
                val token = starts[text[at]]?.firstOrNull { text.startsWith(it, at) && takes(it) }
                if (token == null) {
                    at++
                    continue
                }
                if (at > begin) part(text.substring(begin, at), -1)
                part(token, tokens.getValue(token))
                at += token.length
                begin = at
            }
            if (begin < text.length) part(text.substring(begin), -1)
        }

        companion object {
            fun read(list: Any?, where: String): AddedTokens {
                val tokens = LinkedHashMap<String, Int>()
                val special = HashSet<Int>()
                val raw = HashSet<String>()
                for (entry in list as? List<*> ?: emptyList<Any?>()) {
                    val fields = entry as? Map<*, *>
                    val content = fields?.get("content") as? String
                    val id = fields?.get("id") as? Long
                    if (content.isNullOrEmpty() || id == null || id !in 0 until LARGEST_VOCABULARY) {
                        throw LimeError.Damaged(where, "an added token without content or id", COPY_AGAIN)
                    }
                    for (option in listOf("single_word", "lstrip", "rstrip")) if (fields[option] == true) {
                        throw LimeError.Unsupported(where, "added token '$content': $option", "give token ids instead of text")
                    }
                    tokens[content] = id.toInt()
                    if (fields["special"] == true) special += id.toInt()
                    if (fields["normalized"] != true) raw += content
                }
                return AddedTokens(tokens, special, raw)
            }
        }
    }
}

internal const val COPY_AGAIN: String = "the bundle is damaged: copy or export it again"
