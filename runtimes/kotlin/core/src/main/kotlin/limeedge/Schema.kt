package limeedge

/**
 * Checks a JSON value against a JSON schema and fills in the defaults.
 *
 * The schema of lime.json is made from the Python fields (docs/bundle.schema.json), so that every language accepts the
 * same manifests. Only the keywords that it uses are known; another one is a bug of ours.
 */
internal class Schema(private val root: Map<*, *>) {
    private val definitions = root["\$defs"] as Map<*, *>
    private val patterns = HashMap<String, Regex>()

    init {
        checkKeywords(root)
        definitions.values.forEach { checkKeywords(it as Map<*, *>) }
    }

    /** [value] with defaults filled in; what is wrong goes to [faults]. */
    fun check(value: Any?, faults: Faults): Any? = check(value, root, "", faults)

    private fun check(value: Any?, rule: Map<*, *>, path: String, faults: Faults): Any? {
        if (faults.list.size >= MOST) return value
        (rule["\$ref"] as? String)?.let { return check(value, definitions[it.substringAfterLast('/')] as Map<*, *>, path, faults) }
        (rule["anyOf"] as? List<*>)?.let { return checkAny(value, it, rule["discriminator"] as? Map<*, *>, path, faults) }
        (rule["enum"] as? List<*>)?.let { allowed ->
            if (value !in allowed) faults.add(path, allowed.joinToString(" or "), shorten(value))
            return value
        }
        when (val type = rule["type"]) {
            null -> return value
            "object" -> if (value is Map<*, *>) return checkObject(value, rule, path, faults) else faults.add(path, type, shorten(value))
            "array" -> if (value is List<*>) return checkArray(value, rule, path, faults) else faults.add(path, type, shorten(value))
            "string" -> if (value is String) checkString(value, rule, path, faults) else faults.add(path, type, shorten(value))
            "integer" -> if (value is Long) checkRange(value, rule, path, faults) else faults.add(path, type, shorten(value))
            "number" -> if (value is Number) checkRange(value, rule, path, faults) else faults.add(path, type, shorten(value))
            "boolean" -> if (value !is Boolean) faults.add(path, type, shorten(value))
            "null" -> if (value != null) faults.add(path, "null", shorten(value))
            else -> error("schema: type $type")
        }
        return value
    }

    private fun checkAny(value: Any?, options: List<*>, discriminator: Map<*, *>?, path: String, faults: Faults): Any? {
        if (discriminator != null) {
            val tag = (value as? Map<*, *>)?.get(discriminator["propertyName"])
            val target = (discriminator["mapping"] as Map<*, *>)[tag]
            if (target != null) return check(value, mapOf("\$ref" to target), path, faults)
            faults.add("$path.${discriminator["propertyName"]}", (discriminator["mapping"] as Map<*, *>).keys.joinToString(" or "), shorten(tag))
            return value
        }
        val tried = options.map { option -> Faults().let { it to check(value, option as Map<*, *>, path, it) } }
        val fit = tried.firstOrNull { it.first.list.isEmpty() }
        if (fit != null) return fit.second
        val nearest = tried.filter { (own, _) -> own.list.none { it.what == path } } // right type, wrong inside
        (nearest.firstOrNull() ?: tried.first()).first.list.forEach { faults.list += it }
        return value
    }

    private fun checkObject(value: Map<*, *>, rule: Map<*, *>, path: String, faults: Faults): Map<*, *> {
        val properties = rule["properties"] as? Map<*, *> ?: emptyMap<String, Any?>()
        val others = rule["additionalProperties"]
        (rule["maxProperties"] as? Long)?.let { if (value.size > it) faults.add(path, "at most $it entries", value.size) }
        for (name in rule["required"] as? List<*> ?: emptyList<Any?>()) {
            if (name !in value) faults.add("${join(path, name)} is missing")
        }
        val complete = LinkedHashMap<Any?, Any?>()
        for ((name, property) in properties) {
            if (name in value) complete[name] = check(value[name], property as Map<*, *>, join(path, name), faults)
            else if ("default" in property as Map<*, *>) complete[name] = check(property["default"], property, join(path, name), faults)
        }
        for ((name, item) in value) {
            if (name in properties) continue
            (rule["propertyNames"] as? Map<*, *>)?.let { checkString(name as String, it, "${join(path, name)} (name)", faults) }
            when (others) {
                false -> faults.add("${join(path, name)} is no known field")
                is Map<*, *> -> complete[name] = check(item, others, join(path, name), faults)
                else -> complete[name] = item
            }
        }
        return complete
    }

    private fun checkArray(value: List<*>, rule: Map<*, *>, path: String, faults: Faults): List<*> {
        (rule["minItems"] as? Long)?.let { if (value.size < it) faults.add(path, "at least $it entries", value.size) }
        (rule["maxItems"] as? Long)?.let {
            if (value.size > it) {
                faults.add(path, "at most $it entries", value.size)
                return value
            }
        }
        val items = rule["items"] as? Map<*, *> ?: return value
        return value.mapIndexed { index, item -> check(item, items, "$path[$index]", faults) }
    }

    private fun checkString(value: String, rule: Map<*, *>, path: String, faults: Faults) {
        val length = value.codePointCount(0, value.length)
        (rule["maxLength"] as? Long)?.let { if (length > it) return faults.add(path, "at most $it characters", length) }
        (rule["minLength"] as? Long)?.let { if (length < it) faults.add(path, "at least $it characters", length) }
        (rule["pattern"] as? String)?.let {
            val pattern = patterns.getOrPut(it) { Regex(it) }
            if (!pattern.containsMatchIn(value)) faults.add(path, "text like $it", shorten(value))
        }
    }

    private fun checkRange(value: Number, rule: Map<*, *>, path: String, faults: Faults) {
        val least = rule["minimum"] as? Number
        val most = rule["maximum"] as? Number
        val number = value.toDouble()
        if ((least != null && number < least.toDouble()) || (most != null && number > most.toDouble())) {
            faults.add(path, "$least..$most", value)
        }
    }

    private fun checkKeywords(rule: Map<*, *>) {
        for ((keyword, value) in rule) {
            check(keyword in KNOWN) { "schema: unknown keyword $keyword" }
            when (keyword) {
                "properties" -> (value as Map<*, *>).values.forEach { checkKeywords(it as Map<*, *>) }
                "anyOf" -> (value as List<*>).forEach { checkKeywords(it as Map<*, *>) }
                "items", "additionalProperties", "propertyNames" -> if (value is Map<*, *>) checkKeywords(value)
            }
        }
    }

    private fun join(path: String, name: Any?) = if (path.isEmpty()) "$name" else "$path.$name"

    private fun shorten(value: Any?): String {
        val text = when (value) {
            is Map<*, *> -> "an object"
            is List<*> -> "a list"
            is String -> Json.write(value)
            else -> "$value"
        }
        return if (text.length > 40) text.take(40) + "..." else text
    }

    private companion object {
        private const val MOST = 50 // faults; more help nobody
        private val KNOWN = setOf(
            "\$schema", "\$id", "\$ref", "\$defs", "title", "description", "default", "type", "enum", "anyOf", "discriminator",
            "properties", "required", "additionalProperties", "propertyNames", "maxProperties", "items", "minItems",
            "maxItems", "pattern", "minLength", "maxLength", "minimum", "maximum",
        )
    }
}
