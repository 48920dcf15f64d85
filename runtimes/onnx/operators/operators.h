/* What the operators compute, apart from ONNX Runtime. All tensors are row-major float32, weights may be float16.
 *
 * A row is one token. Rows that are given together share what is read of the weights; each row's sums are added in the
 * same order however many there are, so a row's answer has the same bits alone and in a batch. */
#ifndef LIME_EDGE_OPERATORS_H
#define LIME_EDGE_OPERATORS_H

#include <stdint.h>

enum { MOST_PARTS = 8, MOST_RANK = 1024, MOST_EXPERTS = 256 };
enum { ROWS_AT_ONCE = 4 };

/* Members of a group (q, k, v), side by side in its output; rank 0: the expert does not change this one. */
typedef struct {
    int64_t count, widths[MOST_PARTS], ranks[MOST_PARTS], offsets[MOST_PARTS]; /* offsets: into the flat residual */
    int64_t width;                                                             /* N, of all of them */
    int64_t inputs, rank; /* K, and R: all ranks, rounded up to a multiple of 8 with zeros */
} Parts;

/* Ask for b (R, N) and the parts' stretches of d, which may be NULL, before lime_edge_project so that they arrive
 * meanwhile. */
void lime_edge_fetch(const Parts *parts, const void *b, int half, const float *d);

/* hidden (rows, R) = x (rows, K) a (K, R); rows: 1 to ROWS_AT_ONCE */
void lime_edge_project(const Parts *parts, int64_t rows, const float *x, const void *a, int half, float *hidden);

/* out (rows, N) = y + d * (hidden b), b (R, N) block-diagonal; d: each row's flat residual. out may be y. */
void lime_edge_add_branch(const Parts *parts, int64_t rows, const float *hidden, const float *y, const void *b,
                          int half, const float *const *d, float *out);

/* delta (count,) = (hidden b)[first:first + count], the columns of one part whose ranks begin at `row` */
void lime_edge_read_columns(const Parts *parts, const float *hidden, const void *b, int half, int64_t row, int64_t rank,
                            int64_t first, int64_t count, float *delta);

/* sum = update + stream; out = sum / sqrt(mean(sum^2) + epsilon) * gain, all (N,). sum may be update. */
void lime_edge_add_and_normalise(int64_t width, const float *update, const float *stream, const float *gain,
                                 float epsilon, float *out, float *sum);

/* out (N,) = silu(x[:N]) * x[N:], x (2 N,) */
void lime_edge_gate(int64_t width, const float *x, float *out);

/* Selections of routing, named as in lime_edge.compiler.maths.routing. */
enum { SPARSE_AUTO_TOPK = 0, HARD_TOPK = 1, AUTO_TOPK = 2, SOFT_TOPK = 3 };

typedef struct {
    int64_t experts, selection, top_k, window; /* window: n_gram */
    float frozen_share, adapted_share;         /* of the logits, the temperature included */
    float threshold, heat;                     /* theta of Auto Top-K; temperature of the smooth gates */
} Routing;

/* weights (E,) of one site and token: share-weighted reads over their largest, softmax, selection. */
void lime_edge_weigh(const Routing *routing, const float *frozen, const float *adapted, float frozen_most,
                     float adapted_most, float *weights);

/* out (N,) = y + (weights bank) * (hidden b); weights (G, E), bank (G E, N) block-diagonal. out may be y. */
void lime_edge_add_routed_branch(const Parts *parts, int64_t experts, const float *hidden, const float *y,
                                 const void *b, int half, const float *bank, const float *weights, float *out);

#endif
