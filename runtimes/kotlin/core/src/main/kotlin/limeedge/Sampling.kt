package limeedge

/**
 * 64 random bits a call, from a 64-bit seed.
 *
 * Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, figure 17.
 */
internal class SplitMix64(private var state: Long) {
    /** The next number, all 64 bits. */
    fun next(): Long {
        state += GAMMA
        var mixed = state
        mixed = (mixed xor (mixed ushr 30)) * FIRST
        mixed = (mixed xor (mixed ushr 27)) * SECOND
        return mixed xor (mixed ushr 31)
    }

    /** A multiple of 2^-53 in [0, 1): the upper 53 bits of one number. */
    fun uniform(): Double = (next() ushr 11) * TWO_TO_MINUS_53

    private companion object {
        private const val GAMMA = -0x61C8864680B583EBL // 0x9E3779B97F4A7C15
        private const val FIRST = -0x40A7B892E31B1A47L // 0xBF58476D1CE4E5B9
        private const val SECOND = -0x6B2FB644ECCEEE15L // 0x94D049BB133111EB
        private const val TWO_TO_MINUS_53 = 1.0 / (1L shl 53)
    }
}

/** From logits (V,) float32 to a token id: the same one in every language; docs/sampling.md says each step. */
internal class Sampler(private val options: GenerationOptions) {
    private val random = SplitMix64(options.seed?.toLong() ?: java.security.SecureRandom().nextLong())

    /** Pick a token. @throws LimeError.Engine the logits hold NaN or +inf, or nothing finite. */
    fun pick(logits: FloatArray): Int {
        if (options.temperature == 0.0) return pickBest(logits)
        val largest = checked(logits[best(logits)]).toDouble()
        var ids = if (options.topK > 0) chooseLikeliest(logits, IntArray(logits.size) { it }, options.topK) else IntArray(logits.size) { it }
        var weights = DoubleArray(ids.size) { Math.exp((logits[ids[it]].toDouble() - largest) / options.temperature) }
        if (options.topP < 1) {
            val kept = chooseMass(weights, logits, ids, options.topP)
            ids = IntArray(kept.size) { ids[kept[it]] }
            weights = DoubleArray(kept.size) { weights[kept[it]] }
        }
        return ids[draw(weights, random.uniform())]
    }

    companion object {
        private const val CANDIDATES = 64

        /** The likeliest token, of several the one with the lowest id. */
        fun pickBest(logits: FloatArray): Int = best(logits).also { checked(logits[it]) }

        /** Where the largest value is; NaN counts as the largest. */
        private fun best(logits: FloatArray): Int {
            var best = 0
            for (at in logits.indices) {
                if (logits[at].isNaN()) return at
                if (logits[at] > logits[best]) best = at
            }
            return best
        }

        private fun checked(largest: Float): Float {
            if (largest.isNaN() || largest.isInfinite()) {
                throw LimeError.Engine("logits", "they hold $largest: no token can be picked", "verify() tells whether the bundle computes here what PyTorch did")
            }
            return largest
        }

        /** Of [ids] (rising) those with the [count] largest logits, rising; of equal ones the first. */
        fun chooseLikeliest(logits: FloatArray, ids: IntArray, count: Int): IntArray {
            if (count >= ids.size) return ids
            val least = kthLargest(FloatArray(ids.size) { logits[ids[it]] }, count)
            var ties = count - ids.count { logits[it] > least }
            return ids.filter { logits[it] > least || (logits[it] == least && ties-- > 0) }.toIntArray()
        }

        /** Places of the fewest weights that hold [share] of all, rising: likeliest first, of equal ones the first. */
        private fun chooseMass(weights: DoubleArray, logits: FloatArray, ids: IntArray, share: Double): IntArray {
            val values = FloatArray(ids.size) { logits[ids[it]] }
            val all = IntArray(ids.size) { it }
            val goal = share * weights.fold(0.0) { sum, weight -> sum + weight }
            var count = CANDIDATES
            while (true) {
                val places = chooseLikeliest(values, all, count).sortedByDescending { values[it] } // stable
                var held = 0.0
                for ((taken, place) in places.withIndex()) {
                    held += weights[place]
                    if (held >= goal) return places.subList(0, taken + 1).sorted().toIntArray()
                }
                if (places.size == values.size) return all
                count *= 8
            }
        }

        /** The first place where the running sum of the weights exceeds [uniform] of their sum. */
        private fun draw(weights: DoubleArray, uniform: Double): Int {
            val goal = uniform * weights.fold(0.0) { sum, weight -> sum + weight }
            var sum = 0.0
            for (at in weights.indices) {
                sum += weights[at]
                if (sum > goal) return at
            }
            return weights.size - 1
        }

        /** The k-th largest value; [values] is reordered (Hoare's selection). */
        private fun kthLargest(values: FloatArray, k: Int): Float {
            var low = 0
            var high = values.size - 1
            val wanted = k - 1
            while (low < high) {
                val pivot = values[(low + high) ushr 1]
                var left = low
                var right = high
                while (left <= right) {
                    while (values[left] > pivot) left++
                    while (values[right] < pivot) right--
                    if (left <= right) {
                        val swapped = values[left]
                        values[left++] = values[right]
                        values[right--] = swapped
                    }
                }
                when {
                    wanted <= right -> high = right
                    wanted >= left -> low = left
                    else -> return values[wanted]
                }
            }
            return values[wanted]
        }
    }
}
