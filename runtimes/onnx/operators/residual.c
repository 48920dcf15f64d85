/* An expert's residual from its stored vector: what a switch to an expert costs that is not kept ready. */
#include <stdint.h>

#include "simd.h"

/* residual (n,) = vector - reference; vector: float16, read as float32. */
__attribute__((visibility("default"))) SIMD void lime_edge_subtract(const uint16_t *vector, const float *reference,
                                                                    int64_t count, float *residual) {
    int64_t i = 0;
    for (; i + WIDE <= count; i += WIDE) store(residual + i, load_weights(vector, i, 1) - load(reference + i));
    for (; i < count; i++) residual[i] = load_weight(vector, i, 1) - reference[i];
}
