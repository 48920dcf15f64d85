package limeedge

/**
 * How to pick tokens and when to stop (docs/sampling.md).
 *
 * @property maxNewTokens at most this many. @property temperature 0 is greedy. @property topK keep the k likeliest, 0 keeps
 *   all. @property topP of those, the fewest that hold this share of the weight, in (0, 1]. @property seed of the generator;
 *   null for one that nobody knows. @property stop strings that end the text and are not part of it. @property ignoreEos
 *   generate on past the end token.
 * @throws LimeError.Invalid an option out of range.
 */
public data class GenerationOptions(
    val maxNewTokens: Int = 128,
    val temperature: Double = 0.0,
    val topK: Int = 0,
    val topP: Double = 1.0,
    val seed: ULong? = null,
    val stop: List<String> = emptyList(),
    val ignoreEos: Boolean = false,
) {
    init {
        val faults = Faults()
        if (maxNewTokens < 1) faults.add("maxNewTokens", "at least 1", maxNewTokens)
        if (!(temperature >= 0 && temperature.isFinite())) faults.add("temperature", "finite, 0 or more", temperature)
        if (topK < 0) faults.add("topK", "0 or more", topK)
        if (!(topP > 0 && topP <= 1)) faults.add("topP", "in (0, 1]", topP)
        if (stop.any { it.isEmpty() }) faults.add("stop strings may not be empty")
        faults.throwAny { LimeError.Invalid("generation options", it, "leave an option out for its default") }
    }
}

/** Why a generation ended. */
public enum class FinishReason {
    /** The end token, or a stop string. */
    STOP,

    /** As many tokens as were asked for. */
    LENGTH,

    /** The cache is full. */
    CACHE,

    /** Its logits were no numbers (only where many are asked at once: alone it is thrown). */
    FAILED,
}
