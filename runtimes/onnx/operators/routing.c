/* Zero-parameter routing of one site and token. Source: lime_edge/compiler/maths/routing.py, which the tests compare with. */
#include "operators.h"

#include "simd.h"

static const float SMALLEST_SCALE = 1e-6f, SMALLEST_SUM = 1e-9f;

static float largest(const float *values, int64_t count) {
    float most = values[0];
    for (int64_t i = 1; i < count; i++) most = values[i] > most ? values[i] : most;
    return most;
}

INLINE void exponentials(float *values, int64_t count) {
    float padded[WIDE];
    for (int64_t i = 0; i < count; i += WIDE) {
        const size_t bytes = sizeof(float) * (size_t)(count - i < WIDE ? count - i : WIDE);
        memset(padded, 0, sizeof padded);
        memcpy(padded, values + i, bytes);
        store(padded, exponential(load(padded)));
        memcpy(values + i, padded, bytes);
    }
}

SIMD static void soften(float *logits, int64_t count) {
    const float most = largest(logits, count);
    float sum = 0;
    for (int64_t i = 0; i < count; i++) logits[i] -= most;
    exponentials(logits, count);
    for (int64_t i = 0; i < count; i++) sum += logits[i];
    for (int64_t i = 0; i < count; i++) logits[i] /= sum;
}

/* Marks the k largest, the first of equals; returns the k-th largest. */
static float find_largest(const float *values, int64_t count, int64_t k, int *taken) {
    float kth = 0;
    memset(taken, 0, sizeof *taken * (size_t)count);
    for (int64_t round = 0; round < k; round++) {
        int64_t best = -1;
        for (int64_t i = 0; i < count; i++)
            if (!taken[i] && (best < 0 || values[i] > values[best])) best = i;
        taken[best] = 1;
        kth = values[best];
    }
    return kth;
}

/* 0 for all but the k largest. */
static void keep_largest(float *values, int64_t count, int64_t k) {
    int taken[MOST_EXPERTS];
    find_largest(values, count, k, taken);
    for (int64_t i = 0; i < count; i++)
        if (!taken[i]) values[i] = 0;
}

static void renormalise(float *values, int64_t count) {
    float sum = 0;
    for (int64_t i = 0; i < count; i++) sum += values[i];
    if (sum < SMALLEST_SUM) sum = SMALLEST_SUM;
    for (int64_t i = 0; i < count; i++) values[i] /= sum;
}

/* w sigmoid((w - limit) / heat), renormalised */
SIMD static void gate_smoothly(float *values, int64_t count, float limit, float heat) {
    float falls[MOST_EXPERTS], sum = SMALLEST_SUM;
    for (int64_t i = 0; i < count; i++) falls[i] = (limit - values[i]) / heat;
    exponentials(falls, count);
    for (int64_t i = 0; i < count; i++) sum += values[i] /= 1.0f + falls[i];
    for (int64_t i = 0; i < count; i++) values[i] /= sum;
}

SIMD void lime_edge_weigh(const Routing *routing, const float *frozen, const float *adapted, float frozen_most,
                          float adapted_most, float *weights) {
    const int64_t count = routing->experts;
    const float first = routing->frozen_share / (frozen_most > SMALLEST_SCALE ? frozen_most : SMALLEST_SCALE);
    const float second = routing->adapted_share / (adapted_most > SMALLEST_SCALE ? adapted_most : SMALLEST_SCALE);
    for (int64_t i = 0; i < count; i++) weights[i] = first * frozen[i] + second * adapted[i];
    soften(weights, count);
    if (routing->selection == SPARSE_AUTO_TOPK) {
        const float limit = routing->threshold * largest(weights, count);
        keep_largest(weights, count, 2 * routing->top_k < count ? 2 * routing->top_k : count);
        for (int64_t i = 0; i < count; i++)
            if (!(weights[i] >= limit)) weights[i] = 0;
        renormalise(weights, count);
    } else if (routing->selection == HARD_TOPK) {
        keep_largest(weights, count, routing->top_k);
        renormalise(weights, count);
    } else if (routing->selection == AUTO_TOPK) {
        gate_smoothly(weights, count, routing->threshold * largest(weights, count), routing->heat);
    } else {
        int taken[MOST_EXPERTS];
        gate_smoothly(weights, count, find_largest(weights, count, routing->top_k, taken), routing->heat);
    }
}
