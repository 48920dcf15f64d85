package limeedge

/** What is in use: an expert, a mixture of some, the original model, or experts weighed per token. */
public sealed class Selection {
    /** One expert by its name. */
    public data class Expert(val name: String) : Selection() {
        override fun toString(): String = name
    }

    /** A fixed mixture; the weights sum to 1 (else the shared vector would be scaled). Order counts for nothing but rounding. */
    public data class Blend(val weights: Map<String, Double>) : Selection() {
        override fun toString(): String = weights.entries.joinToString(",") { (name, weight) -> "$name=${describe(weight)}" }
    }

    /** The original model, no adapter. */
    public object None : Selection() {
        override fun toString(): String = "none"
    }

    /** The checkpoint's experts, weighed per token and site. */
    public object Routed : Selection() {
        override fun toString(): String = "routed"
    }

    public companion object {
        /**
         * Read a selection as typed: NAME, none, routed, or a blend NAME=WEIGHT,NAME=WEIGHT.
         *
         * @throws LimeError.Invalid a weight that is no number.
         */
        public fun parse(text: String): Selection {
            if (text.equals("none", ignoreCase = true)) return None
            if (text.equals("routed", ignoreCase = true)) return Routed
            if ('=' !in text) return Expert(text)
            val weights = LinkedHashMap<String, Double>()
            for (part in text.split(',')) {
                val name = part.substringBefore('=').trim()
                val weight = part.substringAfter('=', "").trim().toDoubleOrNull()
                    ?: throw LimeError.Invalid("blend '$text'", "'$part' is no weight", "write a blend as NAME=WEIGHT,NAME=WEIGHT")
                weights[name] = (weights[name] ?: 0.0) + weight
            }
            return Blend(weights)
        }

        /** As C's %g writes it: six digits, no trailing zeros. */
        private fun describe(weight: Double): String {
            if (weight.isNaN() || weight.isInfinite()) return "$weight"
            val rounded = java.math.BigDecimal(weight).round(java.math.MathContext(6)).stripTrailingZeros()
            val exponent = rounded.precision() - rounded.scale() - 1
            if (rounded.signum() == 0) return "0"
            if (exponent in -4..5) return rounded.toPlainString()
            val digits = rounded.movePointLeft(exponent).toPlainString()
            return "${digits}e${if (exponent < 0) "-" else "+"}${Math.abs(exponent).toString().padStart(2, '0')}"
        }
    }
}
