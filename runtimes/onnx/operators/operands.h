/* What a call of an operator is given, wherever it is computed: addresses, and sizes that have been checked. */
#ifndef LIME_EDGE_OPERANDS_H
#define LIME_EDGE_OPERANDS_H

#include "operators.h"

/* What every branch reads: x (B, S, K), y (B, S, N), a (K, R), b (R, N). */
typedef struct {
    Parts parts;
    const void *x, *y, *a, *b;
    int half; /* whether a and b are float16 */
    int64_t dimensions[3], rows; /* y's; B S */
} Operands;

/* A branch multiplied by the expert that was given. */
typedef struct {
    Operands operands;
    const void *expert;  /* (1, 1, sum_H), or (B, 1, sum_H): a residual for each row of the batch */
    int64_t expert_step; /* from one row's residual to the next one's */
    const void *stream, *gain;
    float epsilon;
    void *out, *sum; /* out: NULL without the norm */
} Branch;

/* SwiGLU's x (..., 2 N) and out (..., N). */
typedef struct {
    const void *x;
    void *out;
    int64_t rows, width;
} Gate;

#endif
