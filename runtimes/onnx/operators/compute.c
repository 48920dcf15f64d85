/* A call of each operator: read its inputs, check their shapes where they may have changed, compute row by row. */
#include <stdlib.h>

#include "runtime.h"

enum { STACK_FLOATS = 4096 };

/* --- What the branches share; ExpertBranch, GappedExpertBranch, ExpertBranchNorm ---------------------------------- */

typedef struct {
    void *addresses[MOST_INPUTS]; /* of the inputs, by index */
    const Kernel *kernel;
    const float *x, *y, *d, *stream, *gain, *bank;
    const void *a, *b;
    float *out, *sum;
    /* routed: */
    const float *recovery;
    float *scratch;
    int64_t sites, tokens, scratch_width;
    const float *most;
} Branch;

static OrtStatus *check_weights(Kernel *kernel, const OrtKernelContext *context) {
    Tensor a, b;
    Parts *parts = &kernel->parts;
    TRY(read_tensor(context, 2, &a));
    TRY(read_tensor(context, 3, &b));
    if (a.count != 2 || b.count != 2 || a.dimensions[1] != b.dimensions[0] || b.dimensions[1] != parts->width)
        return refuse("lime_edge: a (K, R) and b (R, N) do not fit each other or the attribute widths");
    if (a.type != b.type || (a.type != ORT_FLOAT && a.type != ORT_FLOAT16))
        return refuse("lime_edge: a and b must both be float32 or both be float16");
    int64_t rank = 0;
    for (int64_t i = 0; i < parts->count; i++) rank += parts->ranks[i];
    if (a.dimensions[1] % 8 || a.dimensions[1] > MOST_RANK || rank > a.dimensions[1])
        return refuse("lime_edge: the rank of a must be a multiple of 8, at most 1024, and hold the attribute ranks");
    parts->inputs = a.dimensions[0];
    parts->rank = a.dimensions[1];
    kernel->half = a.type == ORT_FLOAT16;
    return NULL;
}

static OrtStatus *check_inputs(Kernel *kernel, const OrtKernelContext *context, int64_t rows) {
    Tensor x;
    TRY(check_weights(kernel, context));
    TRY(read_floats(context, 0, &x));
    return last(&x) == kernel->parts.inputs && count_rows(&x) == rows
               ? NULL
               : refuse("lime_edge: x (..., K) and y (..., N) do not fit a (K, R) and b (R, N)");
}

static OrtStatus *check_expert(const Kernel *kernel, const OrtKernelContext *context) {
    Tensor expert;
    TRY(read_floats(context, 4, &expert));
    for (int64_t i = 0; i < kernel->parts.count; i++)
        if (kernel->parts.ranks[i] && kernel->parts.offsets[i] > last(&expert) - kernel->parts.widths[i])
            return refuse("lime_edge: the expert is shorter than the attribute offsets say");
    return NULL;
}

static OrtStatus *check_norm(const Kernel *kernel, const OrtKernelContext *context, int64_t rows) {
    Tensor stream, gain;
    TRY(read_floats(context, 5, &stream));
    TRY(read_floats(context, 6, &gain));
    return last(&stream) == kernel->parts.width && count_rows(&stream) == rows && last(&gain) == kernel->parts.width
               ? NULL
               : refuse("lime_edge: stream (..., N) and gain (N,) do not fit y (..., N)");
}

static OrtStatus *check_routed(const Kernel *kernel, const OrtKernelContext *context, int64_t reads) {
    Tensor bank, recovery;
    TRY(read_floats(context, 4, &bank));
    TRY(read_floats(context, 5, &recovery));
    return bank.count == 2 && bank.dimensions[0] == reads && bank.dimensions[1] == kernel->parts.width &&
                   last(&recovery) == reads
               ? NULL
               : refuse("lime_edge: bank (G E, N) and recovery (G E,) do not fit the attributes");
}

/* Where the `count` inputs of a call lie, and y's shape; `changed` says that the shapes are to be checked. */
static OrtStatus *read_branch(Kernel *kernel, const OrtKernelContext *context, Branch *branch, size_t count, Tensor *y,
                              int *changed) {
    const OrtValue *value = NULL;
    TRY(read_floats(context, 1, y));
    if (last(y) != kernel->parts.width) return refuse("lime_edge: y (..., N) does not fit the attribute widths");
    *changed = __atomic_load_n(&kernel->rows, __ATOMIC_ACQUIRE) != count_rows(y);
    for (size_t i = 0; i < count; i++) {
        if (i == 1) continue;
        TRY(read_data(context, i, &value, &branch->addresses[i]));
        *changed |= branch->addresses[i] != __atomic_load_n(&kernel->addresses[i], __ATOMIC_RELAXED);
    }
    if (*changed) {
        __atomic_store_n(&kernel->rows, -1, __ATOMIC_RELAXED); /* a check that fails leaves nothing to rely on */
        TRY(check_inputs(kernel, context, count_rows(y)));
    }
    branch->kernel = kernel;
    branch->x = branch->addresses[0];
    branch->y = y->data;
    branch->a = branch->addresses[2];
    branch->b = branch->addresses[3];
    return NULL;
}

/* All shapes of this call fit: one of as many rows, at the same addresses, need not be checked. That is safe where only
 * the number of rows may differ between calls, as in the graphs of our exporter: the expert's length is declared. */
static void remember(Kernel *kernel, const Branch *branch, int64_t rows) {
    for (size_t i = 0; i < MOST_INPUTS; i++)
        __atomic_store_n(&kernel->addresses[i], branch->addresses[i], __ATOMIC_RELAXED);
    __atomic_store_n(&kernel->rows, rows, __ATOMIC_RELEASE); /* last: another thread may be in the same kernel */
}

static void run_branch(const void *job, int64_t row) {
    const Branch *branch = job;
    const Kernel *kernel = branch->kernel;
    const Parts *parts = &kernel->parts;
    float hidden[MOST_RANK];
    float *sum = branch->sum + row * parts->width;
    if (row % ROWS_PER_TASK == 0) lime_edge_fetch(parts, branch->b, kernel->half, branch->d);
    lime_edge_project(parts, branch->x + row * parts->inputs, branch->a, kernel->half, hidden);
    lime_edge_add_branch(parts, hidden, branch->y + row * parts->width, branch->b, kernel->half, branch->d, sum);
    if (branch->out != NULL)
        lime_edge_add_and_normalise(parts->width, sum, branch->stream + row * parts->width, branch->gain,
                                    kernel->epsilon, branch->out + row * parts->width, sum);
}

/* The first `count` inputs of a pinned branch, 5 or, with what the norm reads, 7; checked where they have changed. */
static OrtStatus *read_pinned(Kernel *kernel, const OrtKernelContext *context, Branch *branch, size_t count,
                              Tensor *y) {
    int changed = 0;
    TRY(read_branch(kernel, context, branch, count, y, &changed));
    if (changed) {
        TRY(check_expert(kernel, context));
        if (count > 5) TRY(check_norm(kernel, context, count_rows(y)));
        remember(kernel, branch, count_rows(y));
    }
    branch->d = branch->addresses[4];
    branch->stream = branch->addresses[5];
    branch->gain = branch->addresses[6];
    return NULL;
}

OrtStatus *lime_edge_compute_branch(void *kernel, OrtKernelContext *context) {
    Branch branch = {0};
    Tensor y;
    TRY(read_pinned(kernel, context, &branch, 5, &y));
    TRY(make_output(context, 0, &y, &branch.sum));
    return run_rows(context, count_rows(&y), run_branch, &branch);
}

OrtStatus *lime_edge_compute_branch_norm(void *kernel, OrtKernelContext *context) {
    Branch branch = {0};
    Tensor y;
    TRY(read_pinned(kernel, context, &branch, 7, &y));
    TRY(make_output(context, 0, &y, &branch.out));
    TRY(make_output(context, 1, &y, &branch.sum));
    return run_rows(context, count_rows(&y), run_branch, &branch);
}

/* --- RoutedBranch ------------------------------------------------------------------------------------------------ */

/* A token's scratch: hidden (R,), frozen reads (G, E), adapted reads (G, E). */
static void read_row(const void *job, int64_t row) {
    const Branch *branch = job;
    const Parts *parts = &branch->kernel->parts;
    const int64_t experts = branch->kernel->routing.experts;
    const float *y = branch->y + row * parts->width, *recovery = branch->recovery;
    float *hidden = branch->scratch + row * branch->scratch_width;
    float *frozen = hidden + parts->rank, *adapted = frozen + branch->sites * experts;
    if (row % ROWS_PER_TASK == 0) lime_edge_fetch(parts, branch->b, branch->kernel->half, NULL);
    lime_edge_project(parts, branch->x + row * parts->inputs, branch->a, branch->kernel->half, hidden);
    int64_t column = 0, first = 0;
    for (int64_t part = 0; part < parts->count; column += parts->widths[part++]) {
        const int64_t rank = parts->ranks[part];
        if (!rank) continue;
        lime_edge_read_columns(parts, hidden, branch->b, branch->kernel->half, first, rank, column, experts, adapted);
        for (int64_t e = 0; e < experts; e++) frozen[e] = y[column + e] + recovery[e] * adapted[e];
        first += rank;
        frozen += experts;
        adapted += experts;
        recovery += experts;
    }
}

/* The token whose routing a token of the same sequence takes: the last one of its window. */
static int64_t find_anchor(const Branch *branch, int64_t row) {
    const int64_t window = branch->kernel->routing.window, start = row / branch->tokens * branch->tokens;
    const int64_t end = (row - start) / window * window + window - 1;
    return start + (end < branch->tokens ? end : branch->tokens - 1);
}

static void run_routed(const void *job, int64_t row) {
    const Branch *branch = job;
    const Kernel *kernel = branch->kernel;
    const Parts *parts = &kernel->parts;
    const int64_t experts = kernel->routing.experts, reads = branch->sites * experts;
    const float *hidden = branch->scratch + row * branch->scratch_width;
    const float *frozen = branch->scratch + find_anchor(branch, row) * branch->scratch_width + parts->rank;
    float weights[MOST_PARTS * MOST_EXPERTS];
    for (int64_t site = 0; site < branch->sites; site++)
        lime_edge_weigh(&kernel->routing, frozen + site * experts, frozen + reads + site * experts,
                        branch->most[2 * site], branch->most[2 * site + 1], weights + site * experts);
    lime_edge_add_routed_branch(parts, experts, hidden, branch->y + row * parts->width, branch->b, kernel->half,
                                branch->bank, weights, branch->sum + row * parts->width);
}

/* Largest |read| per site over the anchors of the call, frozen and adapted in turn. */
static void find_most(const Branch *branch, int64_t rows, float *most) {
    const int64_t experts = branch->kernel->routing.experts, reads = branch->sites * experts;
    for (int64_t i = 0; i < 2 * branch->sites; i++) most[i] = 0;
    for (int64_t row = 0; row < rows; row++) {
        if (find_anchor(branch, row) != row) continue;
        const float *frozen = branch->scratch + row * branch->scratch_width + branch->kernel->parts.rank;
        for (int64_t i = 0; i < reads; i++) {
            const float one = frozen[i] < 0 ? -frozen[i] : frozen[i];
            const float two = frozen[reads + i] < 0 ? -frozen[reads + i] : frozen[reads + i];
            float *site = most + 2 * (i / experts);
            if (one > site[0]) site[0] = one;
            if (two > site[1]) site[1] = two;
        }
    }
}

OrtStatus *lime_edge_compute_routed(void *state, OrtKernelContext *context) {
    Kernel *kernel = state;
    Branch branch = {0};
    Tensor y;
    int changed = 0;
    float near[STACK_FLOATS], most[2 * MOST_PARTS];
    TRY(read_branch(kernel, context, &branch, 6, &y, &changed));
    for (int64_t i = 0; i < kernel->parts.count; i++) branch.sites += kernel->parts.ranks[i] > 0;
    const int64_t reads = branch.sites * kernel->routing.experts, rows = count_rows(&y);
    if (changed) TRY(check_routed(kernel, context, reads));
    if (changed) remember(kernel, &branch, rows);
    branch.bank = branch.addresses[4];
    branch.recovery = branch.addresses[5];
    branch.tokens = y.count > 1 ? y.dimensions[y.count - 2] : 1;
    branch.scratch_width = kernel->parts.rank + 2 * reads;
    branch.most = most;
    TRY(make_output(context, 0, &y, &branch.sum));
    if (!rows) return NULL;
    float *far = NULL;
    if (rows * branch.scratch_width > STACK_FLOATS) {
        far = malloc(sizeof(float) * (size_t)(rows * branch.scratch_width));
        if (far == NULL) return ORT_CREATE_STATUS(API)(ORT_FAIL, "lime_edge: out of memory while routing");
    }
    branch.scratch = far != NULL ? far : near;
    OrtStatus *failed = run_rows(context, rows, read_row, &branch);
    if (failed == NULL) {
        find_most(&branch, rows, most);
        failed = run_rows(context, rows, run_routed, &branch);
    }
    free(far);
    return failed;
}

/* --- SwiGLU ------------------------------------------------------------------------------------------------------ */

typedef struct {
    const float *x;
    float *out;
    int64_t width;
} Gate;

static void run_gate(const void *job, int64_t row) {
    const Gate *g = job;
    lime_edge_gate(g->width, g->x + 2 * row * g->width, g->out + row * g->width);
}

OrtStatus *lime_edge_compute_gate(void *kernel, OrtKernelContext *context) {
    Tensor x;
    Gate job;
    (void)kernel;
    TRY(read_floats(context, 0, &x));
    if (last(&x) % 2) return refuse("lime_edge: SwiGLU halves its input's last dimension, which is odd");
    job.x = x.data;
    job.width = x.dimensions[x.count - 1] /= 2;
    TRY(make_output(context, 0, &x, &job.out));
    return run_rows(context, count_rows(&x), run_gate, &job);
}
