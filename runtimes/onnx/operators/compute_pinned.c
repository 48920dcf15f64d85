/* Calls of ExpertRowsBranch, GappedExpertRowsBranch, ExpertRowsBranchNorm and SwiGLU: read and check the inputs, compute
 * a few rows at a time. */
#include "runtime.h"

OrtStatus *lime_edge_read_operands(const Kernel *kernel, const OrtKernelContext *context, Operands *operands) {
    Tensor x, y, a, b;
    Parts *parts = &operands->parts;
    TRY(read_floats(context, 0, &x));
    TRY(read_floats(context, 1, &y));
    TRY(read_tensor(context, 2, &a));
    TRY(read_tensor(context, 3, &b));
    *parts = kernel->parts;
    if (y.count != 3 || y.dimensions[2] != parts->width)
        return refuse("lime_edge: y (B, S, N) does not fit the attribute widths");
    if (a.count != 2 || b.count != 2 || a.dimensions[1] != b.dimensions[0] || b.dimensions[1] != parts->width)
        return refuse("lime_edge: a (K, R) and b (R, N) do not fit each other or the attribute widths");
    if (a.type != b.type || (a.type != ORT_FLOAT && a.type != ORT_FLOAT16))
        return refuse("lime_edge: a and b must both be float32 or both be float16");
    int64_t rank = 0;
    for (int64_t i = 0; i < parts->count; i++) rank += parts->ranks[i];
    parts->inputs = a.dimensions[0];
    parts->rank = a.dimensions[1];
    if (parts->rank % 8 || parts->rank > MOST_RANK || rank > parts->rank)
        return refuse("lime_edge: the rank of a must be a multiple of 8, at most 1024, and hold the attribute ranks");
    if (!is_batch(&x, y.dimensions[0], y.dimensions[1], parts->inputs))
        return refuse("lime_edge: x (B, S, K) and y (B, S, N) do not fit a (K, R) and b (R, N)");
    for (int i = 0; i < 3; i++) operands->dimensions[i] = y.dimensions[i];
    operands->rows = y.dimensions[0] * y.dimensions[1];
    operands->x = x.data;
    operands->y = y.data;
    operands->a = a.data;
    operands->b = b.data;
    operands->half = a.type == ORT_FLOAT16;
    return NULL;
}

typedef struct {
    Operands operands;
    const float *expert;  /* (1, 1, sum_H), or (B, 1, sum_H): a residual for each row of the batch */
    int64_t expert_step;  /* from one row's residual to the next one's */
    const float *stream, *gain;
    float epsilon;
    float *out, *sum; /* out: NULL without the norm */
} Branch;

static OrtStatus *read_expert(const OrtKernelContext *context, Branch *branch) {
    Tensor expert;
    const Parts *parts = &branch->operands.parts;
    const int64_t batch = branch->operands.dimensions[0];
    TRY(read_floats(context, 4, &expert));
    if (expert.count != 3 || expert.dimensions[1] != 1 || (expert.dimensions[0] != 1 && expert.dimensions[0] != batch))
        return refuse("lime_edge: the expert must have one row, or one for each row of y: (1 or B, 1, sum_H)");
    for (int64_t i = 0; i < parts->count; i++)
        if (parts->ranks[i] && parts->offsets[i] > expert.dimensions[2] - parts->widths[i])
            return refuse("lime_edge: the expert is shorter than the attribute offsets say");
    branch->expert = expert.data;
    branch->expert_step = expert.dimensions[0] == 1 ? 0 : expert.dimensions[2];
    return NULL;
}

static OrtStatus *read_norm(const Kernel *kernel, const OrtKernelContext *context, Branch *branch) {
    Tensor stream, gain;
    const int64_t *dimensions = branch->operands.dimensions;
    TRY(read_floats(context, 5, &stream));
    TRY(read_floats(context, 6, &gain));
    if (!is_batch(&stream, dimensions[0], dimensions[1], dimensions[2]) || !is_vector(&gain, dimensions[2]))
        return refuse("lime_edge: stream (B, S, N) and gain (N,) do not fit y (B, S, N)");
    branch->stream = stream.data;
    branch->gain = gain.data;
    branch->epsilon = kernel->epsilon;
    return NULL;
}

/* Rows first to end of the batch's B S rows. */
static void run_branch(const void *job, int64_t first, int64_t end) {
    const Branch *branch = job;
    const Operands *o = &branch->operands;
    const Parts *parts = &o->parts;
    const int64_t width = parts->width, tokens = o->dimensions[1];
    float hidden[ROWS_AT_ONCE * MOST_RANK];
    lime_edge_fetch(parts, o->b, o->half, branch->expert + first / tokens * branch->expert_step);
    for (int64_t row = first; row < end; row += ROWS_AT_ONCE) {
        const int64_t rows = end - row < ROWS_AT_ONCE ? end - row : ROWS_AT_ONCE;
        const float *d[ROWS_AT_ONCE];
        for (int64_t i = 0; i < rows; i++) d[i] = branch->expert + (row + i) / tokens * branch->expert_step;
        lime_edge_project(parts, rows, o->x + row * parts->inputs, o->a, o->half, hidden);
        lime_edge_add_branch(parts, rows, hidden, o->y + row * width, o->b, o->half, d, branch->sum + row * width);
        for (int64_t i = row; branch->out != NULL && i < row + rows; i++)
            lime_edge_add_and_normalise(width, branch->sum + i * width, branch->stream + i * width, branch->gain,
                                        branch->epsilon, branch->out + i * width, branch->sum + i * width);
    }
}

OrtStatus *lime_edge_compute_branch(void *kernel, OrtKernelContext *context) {
    Branch branch = {0};
    Operands *operands = &branch.operands;
    TRY(lime_edge_read_operands(kernel, context, operands));
    TRY(read_expert(context, &branch));
    TRY(make_output(context, 0, operands->dimensions, 3, &branch.sum));
    return run_rows(context, operands->rows, run_branch, &branch);
}

OrtStatus *lime_edge_compute_branch_norm(void *kernel, OrtKernelContext *context) {
    Branch branch = {0};
    Operands *operands = &branch.operands;
    TRY(lime_edge_read_operands(kernel, context, operands));
    TRY(read_expert(context, &branch));
    TRY(read_norm(kernel, context, &branch));
    TRY(make_output(context, 0, operands->dimensions, 3, &branch.out));
    TRY(make_output(context, 1, operands->dimensions, 3, &branch.sum));
    return run_rows(context, operands->rows, run_branch, &branch);
}

/* --- SwiGLU ------------------------------------------------------------------------------------------------------ */

typedef struct {
    const float *x;
    float *out;
    int64_t width;
} Gate;

static void run_gate(const void *job, int64_t first, int64_t end) {
    const Gate *g = job;
    for (int64_t row = first; row < end; row++)
        lime_edge_gate(g->width, g->x + 2 * row * g->width, g->out + row * g->width);
}

OrtStatus *lime_edge_compute_gate(void *kernel, OrtKernelContext *context) {
    Tensor x;
    Gate job;
    int64_t dimensions[MOST_DIMENSIONS], rows = 1;
    (void)kernel;
    TRY(read_floats(context, 0, &x));
    const size_t last = x.count - 1;
    for (size_t i = 0; i < last; i++) rows *= dimensions[i] = x.dimensions[i];
    if (x.dimensions[last] % 2) return refuse("lime_edge: SwiGLU halves its input's last dimension, which is odd");
    job.x = x.data;
    job.width = dimensions[last] = x.dimensions[last] / 2;
    TRY(make_output(context, 0, dimensions, x.count, &job.out));
    return job.width ? run_rows(context, rows, run_gate, &job) : NULL;
}
