/* Calls of RoutedBranch: its scales are of the whole call, so all rows are read before the first is computed. */
#include <stdlib.h>

#include "runtime.h"

enum { STACK_FLOATS = 4096 };

typedef struct {
    Operands operands;
    const Routing *routing;
    const float *bank, *recovery;
    int64_t sites, reads;          /* G, and G E */
    float *scratch;                /* a token's: hidden (R,), frozen reads (G, E), adapted reads (G, E) */
    int64_t scratch_width;
    float most[2 * MOST_PARTS];    /* largest |read| per site, frozen and adapted in turn */
    float *out;
} Routed;

static OrtStatus *read_routed(const Kernel *kernel, const OrtKernelContext *context, Routed *branch) {
    Tensor bank, recovery;
    const Parts *parts = &branch->operands.parts;
    branch->routing = &kernel->routing;
    for (int64_t i = 0; i < parts->count; i++) branch->sites += parts->ranks[i] > 0;
    branch->reads = branch->sites * kernel->routing.experts;
    branch->scratch_width = parts->rank + 2 * branch->reads;
    TRY(read_real(context, 4, &bank));
    TRY(read_real(context, 5, &recovery));
    if (!is_matrix(&bank, branch->reads, parts->width) || !is_vector(&recovery, branch->reads))
        return refuse("lime_edge: bank (G E, N) and recovery (G E,) do not fit the attributes");
    branch->bank = bank.data;
    branch->recovery = recovery.data;
    return NULL;
}

static void read_row(const Routed *branch, int64_t row) {
    const Operands *o = &branch->operands;
    const Parts *parts = &o->parts;
    const int64_t experts = branch->routing->experts;
    const float *x = o->x, *y = (const float *)o->y + row * parts->width, *recovery = branch->recovery;
    float *hidden = branch->scratch + row * branch->scratch_width;
    float *frozen = hidden + parts->rank, *adapted = frozen + branch->reads;
    lime_edge_project(parts, 1, x + row * parts->inputs, o->a, o->half, hidden);
    int64_t column = 0, first = 0;
    for (int64_t part = 0; part < parts->count; column += parts->widths[part++]) {
        const int64_t rank = parts->ranks[part];
        if (!rank) continue;
        lime_edge_read_columns(parts, hidden, o->b, o->half, first, rank, column, experts, adapted);
        for (int64_t e = 0; e < experts; e++) frozen[e] = y[column + e] + recovery[e] * adapted[e];
        first += rank;
        frozen += experts;
        adapted += experts;
        recovery += experts;
    }
}

static void read_rows(const void *job, int64_t first, int64_t end) {
    const Routed *branch = job;
    lime_edge_fetch(&branch->operands.parts, branch->operands.b, branch->operands.half, NULL);
    for (int64_t row = first; row < end; row++) read_row(branch, row);
}

/* The token whose routing a token of the same sequence takes: the last one of its window. */
static int64_t find_anchor(const Routed *branch, int64_t row) {
    const int64_t window = branch->routing->window, tokens = branch->operands.dimensions[1];
    const int64_t start = row / tokens * tokens, in_window = (row - start) % window, left = tokens - 1 - (row - start);
    return row + (window - 1 - in_window < left ? window - 1 - in_window : left);
}

static void run_routed(const void *job, int64_t first, int64_t end) {
    const Routed *branch = job;
    const Operands *o = &branch->operands;
    const int64_t experts = branch->routing->experts, width = o->parts.width;
    float weights[MOST_PARTS * MOST_EXPERTS];
    for (int64_t row = first; row < end; row++) {
        const float *hidden = branch->scratch + row * branch->scratch_width;
        const float *frozen = branch->scratch + find_anchor(branch, row) * branch->scratch_width + o->parts.rank;
        for (int64_t site = 0; site < branch->sites; site++)
            lime_edge_weigh(branch->routing, frozen + site * experts, frozen + branch->reads + site * experts,
                            branch->most[2 * site], branch->most[2 * site + 1], weights + site * experts);
        lime_edge_add_routed_branch(&o->parts, experts, hidden, (const float *)o->y + row * width, o->b, o->half, branch->bank, weights,
                                    branch->out + row * width);
    }
}

/* Over the anchors of the call. */
static void find_most(Routed *branch) {
    const int64_t experts = branch->routing->experts, reads = branch->reads;
    for (int64_t row = 0; row < branch->operands.rows; row++) {
        if (find_anchor(branch, row) != row) continue;
        const float *frozen = branch->scratch + row * branch->scratch_width + branch->operands.parts.rank;
        for (int64_t i = 0; i < reads; i++) {
            const float one = frozen[i] < 0 ? -frozen[i] : frozen[i];
            const float two = frozen[reads + i] < 0 ? -frozen[reads + i] : frozen[reads + i];
            float *site = branch->most + 2 * (i / experts);
            if (one > site[0]) site[0] = one;
            if (two > site[1]) site[1] = two;
        }
    }
}

OrtStatus *lime_edge_compute_routed(void *kernel, OrtKernelContext *context) {
    Routed branch = {0};
    Operands *operands = &branch.operands;
    float near[STACK_FLOATS], *far = NULL;
    TRY(lime_edge_read_operands(kernel, context, operands));
    TRY(read_routed(kernel, context, &branch));
    TRY(make_output(context, 0, operands->dimensions, 3, (void **)&branch.out));
    if (!operands->rows) return NULL;
    if (operands->rows > STACK_FLOATS / branch.scratch_width) {
        far = calloc((size_t)operands->rows, sizeof(float) * (size_t)branch.scratch_width);
        if (far == NULL) return ORT_CREATE_STATUS(API)(ORT_FAIL, "lime_edge: out of memory while routing");
    }
    branch.scratch = far != NULL ? far : near;
    OrtStatus *failed = run_rows(context, operands->rows, read_rows, &branch);
    if (failed == NULL) {
        find_most(&branch);
        failed = run_rows(context, operands->rows, run_routed, &branch);
    }
    free(far);
    return failed;
}
