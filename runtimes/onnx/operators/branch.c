/* The residual branch of a group: y + d * (B A x). */
#include "operators.h"

#include <stddef.h>

#include "simd.h"

/* 8, 16 or 24 ranks (`lanes` vectors, a constant) in registers, `unroll` inputs at a time to hide the latency. */
INLINE void project_few(const Parts *parts, const float *x, const void *a, int half, float *hidden, int lanes,
                        int unroll) {
    const int64_t inputs = parts->inputs, rank = parts->rank;
    vec sums[64 / WIDE] = {0};
    int64_t k = 0;
    for (; k + unroll <= inputs; k += unroll)
        for (int u = 0; u < unroll; u++)
            for (int lane = 0; lane < lanes; lane++)
                sums[u * lanes + lane] += spread(x[k + u]) * load_weights(a, (k + u) * rank + WIDE * lane, half);
    for (; k < inputs; k++)
        for (int lane = 0; lane < lanes; lane++)
            sums[lane] += spread(x[k]) * load_weights(a, k * rank + WIDE * lane, half);
    for (int lane = 0; lane < lanes; lane++) {
        vec sum = sums[lane];
        for (int u = 1; u < unroll; u++) sum += sums[u * lanes + lane];
        store(hidden + WIDE * lane, sum);
    }
}

/* Any number of ranks, in memory; four inputs at a time. */
INLINE void project_many(const Parts *parts, const float *x, const void *a, int half, float *hidden) {
    const int64_t inputs = parts->inputs, rank = parts->rank;
    memset(hidden, 0, sizeof(float) * (size_t)rank);
    int64_t k = 0;
    for (; k + 4 <= inputs; k += 4)
        for (int64_t r = 0; r < rank; r += WIDE) {
            const int64_t at = k * rank + r;
            vec one = spread(x[k]) * load_weights(a, at, half) + spread(x[k + 1]) * load_weights(a, at + rank, half);
            vec two = spread(x[k + 2]) * load_weights(a, at + 2 * rank, half) +
                      spread(x[k + 3]) * load_weights(a, at + 3 * rank, half);
            store(hidden + r, load(hidden + r) + one + two);
        }
    for (; k < inputs; k++)
        for (int64_t r = 0; r < rank; r += WIDE)
            store(hidden + r, load(hidden + r) + spread(x[k]) * load_weights(a, k * rank + r, half));
}

INLINE void project_any(const Parts *parts, const float *x, const void *a, int half, float *hidden) {
    if (parts->rank == 8)
        project_few(parts, x, a, half, hidden, 8 / WIDE, 8);
    else if (parts->rank == 16)
        project_few(parts, x, a, half, hidden, 16 / WIDE, 4);
    else if (parts->rank == 24)
        project_few(parts, x, a, half, hidden, 24 / WIDE, 2);
    else
        project_many(parts, x, a, half, hidden);
}

/* Rows of b are short and far apart: the processor's own prefetching is late for each of them. */
void lime_edge_fetch(const Parts *parts, const void *b, int half, const float *d) {
    const int64_t size = half ? 2 : 4, line = 64;
    int64_t column = 0, row = 0;
    for (int64_t part = 0; part < parts->count; column += parts->widths[part], row += parts->ranks[part++]) {
        for (int64_t r = row; r < row + parts->ranks[part]; r++)
            for (int64_t at = 0; at < parts->widths[part] * size; at += line)
                __builtin_prefetch((const char *)b + (r * parts->width + column) * size + at);
        for (int64_t at = 0; d != NULL && parts->ranks[part] && at < parts->widths[part]; at += line / 4)
            __builtin_prefetch(d + parts->offsets[part] + at);
    }
}

SIMD void lime_edge_project(const Parts *parts, const float *x, const void *a, int half, float *hidden) {
    if (half)
        project_any(parts, x, a, 1, hidden);
    else
        project_any(parts, x, a, 0, hidden);
}

/* WIDE columns of hidden b: only the rows of the part's own ranks. */
INLINE vec read_vector(int64_t width, const float *hidden, const void *b, int half, int64_t row, int64_t rank,
                       int64_t column) {
    vec even = {0}, odd = {0};
    int64_t r = row;
    for (; r + 2 <= row + rank; r += 2) {
        even += spread(hidden[r]) * load_weights(b, r * width + column, half);
        odd += spread(hidden[r + 1]) * load_weights(b, (r + 1) * width + column, half);
    }
    if (r < row + rank) even += spread(hidden[r]) * load_weights(b, r * width + column, half);
    return even + odd;
}

INLINE float read_one(int64_t width, const float *hidden, const void *b, int half, int64_t row, int64_t rank,
                      int64_t column) {
    float sum = 0;
    for (int64_t r = row; r < row + rank; r++) sum += hidden[r] * load_weight(b, r * width + column, half);
    return sum;
}

INLINE void add_any(const Parts *parts, const float *hidden, const float *y, const void *b, int half, const float *d,
                    float *out) {
    int64_t column = 0, row = 0;
    for (int64_t part = 0; part < parts->count; part++) {
        const int64_t rank = parts->ranks[part], end = column + parts->widths[part];
        const float *own = d + parts->offsets[part] - column;
        if (!rank && out != y) memcpy(out + column, y + column, sizeof(float) * (size_t)(end - column));
        if (!rank) {
            column = end;
            continue;
        }
        for (; column + WIDE <= end; column += WIDE) {
            vec delta = read_vector(parts->width, hidden, b, half, row, rank, column);
            store(out + column, load(y + column) + load(own + column) * delta);
        }
        for (; column < end; column++)
            out[column] = y[column] + own[column] * read_one(parts->width, hidden, b, half, row, rank, column);
        row += rank;
    }
}

SIMD void lime_edge_add_branch(const Parts *parts, const float *hidden, const float *y, const void *b, int half,
                               const float *d, float *out) {
    if (half)
        add_any(parts, hidden, y, b, 1, d, out);
    else
        add_any(parts, hidden, y, b, 0, d, out);
}

SIMD void lime_edge_read_columns(const Parts *parts, const float *hidden, const void *b, int half, int64_t row,
                                 int64_t rank, int64_t first, int64_t count, float *delta) {
    int64_t column = 0;
    for (; column + WIDE <= count; column += WIDE)
        store(delta + column, half ? read_vector(parts->width, hidden, b, 1, row, rank, first + column)
                                   : read_vector(parts->width, hidden, b, 0, row, rank, first + column));
    for (; column < count; column++) delta[column] = read_one(parts->width, hidden, b, half, row, rank, first + column);
}

INLINE void add_routed_any(const Parts *parts, int64_t experts, const float *hidden, const float *y, const void *b,
                           int half, const float *bank, const float *weights, float *out) {
    int64_t column = 0, row = 0;
    if (out != y) memcpy(out, y, sizeof(float) * (size_t)parts->width);
    for (int64_t part = 0; part < parts->count; part++) {
        const int64_t rank = parts->ranks[part], end = column + parts->widths[part];
        if (!rank) {
            column = end;
            continue;
        }
        int64_t chosen[MOST_EXPERTS], count = 0; /* most selections leave few */
        for (int64_t e = 0; e < experts; e++)
            if (weights[e] != 0) chosen[count++] = e;
        for (; column + WIDE <= end; column += WIDE) {
            vec d = {0};
            for (int64_t i = 0; i < count; i++)
                d += spread(weights[chosen[i]]) * load(bank + chosen[i] * parts->width + column);
            store(out + column, load(out + column) + d * read_vector(parts->width, hidden, b, half, row, rank, column));
        }
        for (; column < end; column++) {
            float d = 0;
            for (int64_t i = 0; i < count; i++) d += weights[chosen[i]] * bank[chosen[i] * parts->width + column];
            out[column] += d * read_one(parts->width, hidden, b, half, row, rank, column);
        }
        row += rank;
        weights += experts;
        bank += experts * parts->width;
    }
}

SIMD void lime_edge_add_routed_branch(const Parts *parts, int64_t experts, const float *hidden, const float *y,
                                      const void *b, int half, const float *bank, const float *weights, float *out) {
    if (half)
        add_routed_any(parts, experts, hidden, y, b, 1, bank, weights, out);
    else
        add_routed_any(parts, experts, hidden, y, b, 0, bank, weights, out);
}
