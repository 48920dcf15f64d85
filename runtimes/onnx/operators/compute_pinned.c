/* The processor's ExpertRowsBranch, GappedExpertRowsBranch, ExpertRowsBranchNorm and SwiGLU: a few rows at a time. */
#include "runtime.h"

/* Rows first to end of the batch's B S rows. */
static void run_branch(const void *job, int64_t first, int64_t end) {
    const Branch *branch = job;
    const Operands *o = &branch->operands;
    const Parts *parts = &o->parts;
    const int64_t width = parts->width, tokens = o->dimensions[1];
    const float *x = o->x, *y = o->y, *expert = branch->expert, *stream = branch->stream;
    float hidden[ROWS_AT_ONCE * MOST_RANK], *out = branch->out, *sum = branch->sum;
    lime_edge_fetch(parts, o->b, o->half, expert + first / tokens * branch->expert_step);
    for (int64_t row = first; row < end; row += ROWS_AT_ONCE) {
        const int64_t rows = end - row < ROWS_AT_ONCE ? end - row : ROWS_AT_ONCE;
        const float *d[ROWS_AT_ONCE];
        for (int64_t i = 0; i < rows; i++) d[i] = expert + (row + i) / tokens * branch->expert_step;
        lime_edge_project(parts, rows, x + row * parts->inputs, o->a, o->half, hidden);
        lime_edge_add_branch(parts, rows, hidden, y + row * width, o->b, o->half, d, sum + row * width);
        for (int64_t i = row; out != NULL && i < row + rows; i++)
            lime_edge_add_and_normalise(width, sum + i * width, stream + i * width, branch->gain, branch->epsilon,
                                        out + i * width, sum + i * width);
    }
}

OrtStatus *lime_edge_compute_branch(void *kernel, OrtKernelContext *context) {
    Branch branch = {0};
    Operands *operands = &branch.operands;
    TRY(lime_edge_read_operands(kernel, context, operands));
    TRY(lime_edge_read_expert(context, &branch));
    TRY(make_output(context, 0, operands->dimensions, 3, &branch.sum));
    return run_rows(context, operands->rows, run_branch, &branch);
}

OrtStatus *lime_edge_compute_branch_norm(void *kernel, OrtKernelContext *context) {
    Branch branch = {0};
    Operands *operands = &branch.operands;
    TRY(lime_edge_read_operands(kernel, context, operands));
    TRY(lime_edge_read_expert(context, &branch));
    TRY(lime_edge_read_norm(kernel, context, &branch));
    TRY(make_output(context, 0, operands->dimensions, 3, &branch.out));
    TRY(make_output(context, 1, operands->dimensions, 3, &branch.sum));
    return run_rows(context, operands->rows, run_branch, &branch);
}

/* --- SwiGLU ------------------------------------------------------------------------------------------------------ */

static void run_gate(const void *job, int64_t first, int64_t end) {
    const Gate *g = job;
    const float *x = g->x;
    float *out = g->out;
    for (int64_t row = first; row < end; row++)
        lime_edge_gate(g->width, x + 2 * row * g->width, out + row * g->width);
}

OrtStatus *lime_edge_compute_gate(void *kernel, OrtKernelContext *context) {
    Gate gate;
    (void)kernel;
    TRY(lime_edge_read_gate(context, &gate));
    return gate.width ? run_rows(context, gate.rows, run_gate, &gate) : NULL;
}
