/* What stands between a branch and the next product: the residual stream's norm, the gated activation. */
#include "operators.h"

#include <math.h>

#include "simd.h"

SIMD void lime_edge_add_and_normalise(int64_t width, const float *update, const float *stream, const float *gain,
                                      float epsilon, float *out, float *sum) {
    vec even = {0}, odd = {0};
    float squares = 0;
    int64_t i = 0;
    for (; i + 2 * WIDE <= width; i += 2 * WIDE) {
        vec first = load(update + i) + load(stream + i), second = load(update + i + WIDE) + load(stream + i + WIDE);
        store(sum + i, first);
        store(sum + i + WIDE, second);
        even += first * first;
        odd += second * second;
    }
    for (; i < width; i++) {
        sum[i] = update[i] + stream[i];
        squares += sum[i] * sum[i];
    }
    squares += add_lanes(even + odd);
    const float scale = 1.0f / sqrtf(squares / (float)width + epsilon);
    for (i = 0; i + WIDE <= width; i += WIDE) store(out + i, load(sum + i) * scale * load(gain + i));
    for (; i < width; i++) out[i] = sum[i] * scale * gain[i];
}

SIMD void lime_edge_gate(int64_t width, const float *x, float *out) {
    const float *up = x + width;
    int64_t i = 0;
    for (; i + WIDE <= width; i += WIDE) {
        vec value = load(x + i);
        store(out + i, value * load(up + i) / (1.0f + exponential(-value)));
    }
    for (; i < width; i++) out[i] = x[i] * up[i] / (1.0f + exponential(spread(-x[i]))[0]);
}
