package limeedge

/** An opened encoder or vision bundle on one target. [use] switches the expert of the calls that follow; nothing is kept between calls. */
public class EncoderSession private constructor(bundle: LimeBundle, private val engine: EncoderEngine, facts: TargetFacts) :
    ExpertSwitch(bundle, engine, facts) {
    /** Names of the inputs that [run] takes. */
    public val inputs: List<String> get() = facts.inputs.map { it.name }

    /** Names of the outputs that [run] gives. */
    public val outputs: List<String> get() = facts.outputs

    /**
     * Run the model once.
     *
     * @param inputs by name: token ids (B, T) as long, or pixels (B, C, H, W) as float. An attention mask that is left out
     *   is ones, token types are zeros.
     * @return every output by name, float32: `logits`, or `last_hidden_state`, `sentence_embedding` (B, H), ...
     * @throws LimeError.Invalid an input is missing, unknown, of the wrong shape, or holds ids out of range, NaN or infinity.
     */
    public fun run(inputs: Map<String, Tensor>): Map<String, Tensor> = exclusively {
        val complete = check(inputs)
        guardEngine { engine.run(complete) }
    }

    /** Complete inputs in the types of the graph; all faults at once. */
    private fun check(given: Map<String, Tensor>): Map<String, Tensor> {
        val faults = Faults()
        val axes = HashMap<String, Int>()
        val checked = LinkedHashMap<String, Tensor>()
        for (name in (given.keys - inputs.toSet()).sorted()) faults.add("unknown input '$name'")
        for (entry in facts.inputs) {
            val values = given[entry.name]
            if (values == null) {
                if (entry.fill.isEmpty()) faults.add("input '${entry.name}' is missing")
            } else if (fits(entry, values, axes, faults)) {
                checked[entry.name] = values
            }
        }
        val context = bundle.manifest.context
        axes["sequence"]?.let { if (it > context) faults.add("tokens", "at most $context", it) }
        faults.throwAny { LimeError.Invalid("run", it, "this model takes ${inputs.joinToString(", ")}") }
        for (entry in facts.inputs.filter { it.name !in checked }) checked[entry.name] = fill(entry, axes)
        return checked
    }

    private fun fits(entry: InputFacts, values: Tensor, axes: MutableMap<String, Int>, faults: Faults): Boolean {
        val wanted = entry.shape.map { axes[it] ?: it }
        val shown = wanted.joinToString(", ", "(", ")")
        val odd = wanted.size != values.shape.size || wanted.indices.any { wanted[it] is Int && wanted[it] != values.shape[it] }
        val floats = values.floats
        when {
            (values.longs != null) != entry.isLong -> faults.add("${entry.name}: type", if (entry.isLong) "long" else "float", if (entry.isLong) "float" else "long")
            odd -> faults.add("${entry.name}: shape", shown, values.shape)
            values.size == 0 -> faults.add("${entry.name}: shape", "$shown, nothing empty", values.shape)
            entry.limit > 0 && values.longs != null && values.longs.any { it < 0 || it >= entry.limit } ->
                faults.add(entry.name, "0..${entry.limit - 1}", "${values.longs.min()}..${values.longs.max()}")
            floats != null && !floats.all { it.isFinite() } -> faults.add("${entry.name} holds NaN or infinite values")
            else -> {
                wanted.forEachIndexed { axis, size -> if (size is String) axes[size] = values.shape[axis] }
                return true
            }
        }
        return false
    }

    private fun fill(entry: InputFacts, axes: Map<String, Int>): Tensor {
        val shape = IntArray(entry.shape.size) { entry.shape[it] as? Int ?: axes.getValue(entry.shape[it] as String) }
        val size = shape.fold(1) { product, axis -> product * axis }
        val value = if (entry.fill == "ones") 1 else 0
        return if (entry.isLong) Tensor.of(LongArray(size) { value.toLong() }, *shape) else Tensor.of(FloatArray(size) { value.toFloat() }, *shape)
    }

    public companion object {
        /** Load an encoder or a vision model. @throws LimeError.Missing not exported for that engine. @throws LimeError.Invalid it holds a decoder. */
        public fun open(bundle: LimeBundle, engines: EngineFactory, options: SessionOptions = SessionOptions()): EncoderSession {
            if (bundle.manifest.kind != "encoder") {
                throw LimeError.Invalid(bundle.folder.path, listOf(Fault("kind", "encoder", bundle.manifest.kind)), "open it with LimeSession.open")
            }
            val facts = findTarget(bundle, engines)
            return EncoderSession(bundle, engines.openEncoder(bundle, options), facts).also { it.begin() }
        }
    }
}
