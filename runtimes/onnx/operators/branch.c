/* The residual branch of a group: y + d * (B A x), for a few rows at once. */
#include "operators.h"

#include <stddef.h>

#include "simd.h"

/* `rows`, `half`, `lanes` and `unroll` are constants at every call of an INLINE function: gcc and clang make a loop over
 * them straight code with its sums in registers. */

/* 8, 16 or 24 ranks (`lanes` vectors). A row has `unroll` sums per rank, of every unroll-th input, to hide the latency:
 * as many of them at a time as there are registers for, then the next over the same inputs. */
INLINE void project_few(const Parts *parts, int rows, const float *x, const void *a, int half, float *hidden, int lanes,
                        int unroll) {
    const int64_t inputs = parts->inputs, rank = parts->rank, whole = inputs - inputs % unroll;
    const int together = unroll > rows ? unroll / rows : 1;
    for (int first = 0; first < unroll; first += together) {
        vec sums[96 / WIDE] = {0};
        for (int64_t k = first; k < whole; k += unroll)
            for (int u = 0; u < together; u++) {
                vec weights[24 / WIDE];
                for (int lane = 0; lane < lanes; lane++)
                    weights[lane] = load_weights(a, (k + u) * rank + WIDE * lane, half);
                for (int row = 0; row < rows; row++) {
                    const vec value = spread(x[row * inputs + k + u]);
                    for (int lane = 0; lane < lanes; lane++) {
                        vec *sum = sums + (u * lanes + lane) * rows + row;
                        *sum = fuse(value, weights[lane], *sum);
                    }
                }
            }
        for (int64_t k = whole; first == 0 && k < inputs; k++)
            for (int lane = 0; lane < lanes; lane++) {
                const vec weights = load_weights(a, k * rank + WIDE * lane, half);
                for (int row = 0; row < rows; row++) {
                    vec *sum = sums + lane * rows + row;
                    *sum = fuse(spread(x[row * inputs + k]), weights, *sum);
                }
            }
        for (int lane = 0; lane < lanes; lane++)
            for (int row = 0; row < rows; row++) {
                float *to = hidden + row * rank + WIDE * lane;
                vec sum = first ? load(to) + sums[lane * rows + row] : sums[lane * rows + row];
                for (int u = 1; u < together; u++) sum += sums[(u * lanes + lane) * rows + row];
                store(to, sum);
            }
    }
}

/* Any number of ranks, in memory; four inputs at a time. */
INLINE void project_many(const Parts *parts, int rows, const float *x, const void *a, int half, float *hidden) {
    const int64_t inputs = parts->inputs, rank = parts->rank;
    memset(hidden, 0, sizeof(float) * (size_t)(rows * rank));
    int64_t k = 0;
    for (; k + 4 <= inputs; k += 4)
        for (int64_t r = 0; r < rank; r += WIDE) {
            vec weights[4];
            for (int u = 0; u < 4; u++) weights[u] = load_weights(a, (k + u) * rank + r, half);
            for (int row = 0; row < rows; row++) {
                const float *from = x + row * inputs + k;
                float *to = hidden + row * rank + r;
                const vec one = fuse(spread(from[1]), weights[1], spread(from[0]) * weights[0]);
                const vec two = fuse(spread(from[3]), weights[3], spread(from[2]) * weights[2]);
                store(to, load(to) + one + two);
            }
        }
    for (; k < inputs; k++)
        for (int64_t r = 0; r < rank; r += WIDE) {
            const vec weights = load_weights(a, k * rank + r, half);
            for (int row = 0; row < rows; row++) {
                float *to = hidden + row * rank + r;
                store(to, fuse(spread(x[row * inputs + k]), weights, load(to)));
            }
        }
}

INLINE void project_any(const Parts *parts, int rows, const float *x, const void *a, int half, float *hidden) {
    if (parts->rank == 8)
        project_few(parts, rows, x, a, half, hidden, 8 / WIDE, 8);
    else if (parts->rank == 16)
        project_few(parts, rows, x, a, half, hidden, 16 / WIDE, 4);
    else if (parts->rank == 24)
        project_few(parts, rows, x, a, half, hidden, 24 / WIDE, 2);
    else
        project_many(parts, rows, x, a, half, hidden);
}

INLINE void project_rows(const Parts *parts, int64_t rows, const float *x, const void *a, int half, float *hidden) {
    if (rows == 4) {
        project_any(parts, 4, x, a, half, hidden);
        return;
    }
    if (rows >= 2) {
        project_any(parts, 2, x, a, half, hidden);
        x += 2 * parts->inputs;
        hidden += 2 * parts->rank;
    }
    if (rows != 2) project_any(parts, 1, x, a, half, hidden);
}

SIMD void lime_edge_project(const Parts *parts, int64_t rows, const float *x, const void *a, int half, float *hidden) {
    if (half)
        project_rows(parts, rows, x, a, 1, hidden);
    else
        project_rows(parts, rows, x, a, 0, hidden);
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

/* WIDE columns of hidden b for each row: only the rows of b that are the part's own ranks. */
INLINE void read_vectors(const Parts *parts, int rows, const float *hidden, const void *b, int half, int64_t rank_row,
                         int64_t rank, int64_t column, vec *delta) {
    vec even[ROWS_AT_ONCE] = {0}, odd[ROWS_AT_ONCE] = {0};
    int64_t r = rank_row;
    for (; r + 2 <= rank_row + rank; r += 2) {
        const vec one = load_weights(b, r * parts->width + column, half);
        const vec two = load_weights(b, (r + 1) * parts->width + column, half);
        for (int row = 0; row < rows; row++) {
            even[row] = fuse(spread(hidden[row * parts->rank + r]), one, even[row]);
            odd[row] = fuse(spread(hidden[row * parts->rank + r + 1]), two, odd[row]);
        }
    }
    if (r < rank_row + rank) {
        const vec one = load_weights(b, r * parts->width + column, half);
        for (int row = 0; row < rows; row++)
            even[row] = fuse(spread(hidden[row * parts->rank + r]), one, even[row]);
    }
    for (int row = 0; row < rows; row++) delta[row] = even[row] + odd[row];
}

INLINE float read_one(int64_t width, const float *hidden, const void *b, int half, int64_t row, int64_t rank,
                      int64_t column) {
    float sum = 0;
    for (int64_t r = row; r < row + rank; r++) sum += hidden[r] * load_weight(b, r * width + column, half);
    return sum;
}

INLINE void add_any(const Parts *parts, int rows, const float *hidden, const float *y, const void *b, int half,
                    const float *const *d, float *out) {
    const int64_t width = parts->width;
    int64_t start = 0, rank_row = 0;
    for (int64_t part = 0; part < parts->count; start += parts->widths[part], rank_row += parts->ranks[part++]) {
        const int64_t rank = parts->ranks[part], own = parts->widths[part], offset = parts->offsets[part];
        int64_t i = 0;
        for (; rank && i + WIDE <= own; i += WIDE) {
            vec delta[ROWS_AT_ONCE];
            read_vectors(parts, rows, hidden, b, half, rank_row, rank, start + i, delta);
            for (int row = 0; row < rows; row++) {
                const int64_t at = row * width + start + i;
                store(out + at, fuse(load(d[row] + offset + i), delta[row], load(y + at)));
            }
        }
        for (; rank && i < own; i++)
            for (int row = 0; row < rows; row++) {
                const float delta = read_one(width, hidden + row * parts->rank, b, half, rank_row, rank, start + i);
                out[row * width + start + i] = y[row * width + start + i] + d[row][offset + i] * delta;
            }
        for (int row = 0; !rank && out != y && row < rows; row++)
            memcpy(out + row * width + start, y + row * width + start, sizeof(float) * (size_t)own);
    }
}

INLINE void add_rows(const Parts *parts, int64_t rows, const float *hidden, const float *y, const void *b, int half,
                     const float *const *d, float *out) {
    if (rows == 4) {
        add_any(parts, 4, hidden, y, b, half, d, out);
        return;
    }
    if (rows >= 2) {
        add_any(parts, 2, hidden, y, b, half, d, out);
        hidden += 2 * parts->rank;
        y += 2 * parts->width;
        out += 2 * parts->width;
        d += 2;
    }
    if (rows != 2) add_any(parts, 1, hidden, y, b, half, d, out);
}

SIMD void lime_edge_add_branch(const Parts *parts, int64_t rows, const float *hidden, const float *y, const void *b,
                               int half, const float *const *d, float *out) {
    if (half)
        add_rows(parts, rows, hidden, y, b, 1, d, out);
    else
        add_rows(parts, rows, hidden, y, b, 0, d, out);
}

INLINE vec read_vector(const Parts *parts, const float *hidden, const void *b, int half, int64_t row, int64_t rank,
                       int64_t column) {
    vec delta[1];
    read_vectors(parts, 1, hidden, b, half, row, rank, column, delta);
    return delta[0];
}

SIMD void lime_edge_read_columns(const Parts *parts, const float *hidden, const void *b, int half, int64_t row,
                                 int64_t rank, int64_t first, int64_t count, float *delta) {
    int64_t column = 0;
    for (; column + WIDE <= count; column += WIDE)
        store(delta + column, half ? read_vector(parts, hidden, b, 1, row, rank, first + column)
                                   : read_vector(parts, hidden, b, 0, row, rank, first + column));
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
                d = fuse(spread(weights[chosen[i]]), load(bank + chosen[i] * parts->width + column), d);
            const vec delta = read_vector(parts, hidden, b, half, row, rank, column);
            store(out + column, fuse(d, delta, load(out + column)));
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
