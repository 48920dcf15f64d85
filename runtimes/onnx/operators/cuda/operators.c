/* The library for NVIDIA GPUs: the float16 functions, queued on the stream of the call, so that a step may be captured. */
#include "../registration.h"
#include "kernels.h"

typedef OrtStatus *(*get_stream_fn)(const OrtKernelContext *context, void **stream);
#define ORT_GET_STREAM(api) ((get_stream_fn)(api)[193]) /* KernelContext_GetGPUComputeStream */

const int lime_edge_real = ORT_FLOAT16;
const char *const lime_edge_provider = "CUDAExecutionProvider";
const char *const lime_edge_unsupported = "lime_edge: these operators were compiled for another GPU, or there is none";

static OrtStatus *check(int failed) {
    return failed ? ORT_CREATE_STATUS(API)(ORT_FAIL, "lime_edge: the GPU refused a kernel") : NULL;
}

static OrtStatus *queue_branch(const OrtKernelContext *context, const Branch *branch) {
    void *stream = NULL;
    if (!branch->operands.half) return refuse("lime_edge: on a GPU a and b must be float16");
    if (!branch->operands.rows) return NULL;
    TRY(ORT_GET_STREAM(API)(context, &stream));
    return check(lime_edge_launch_branch(branch, stream));
}

static OrtStatus *compute_branch(void *kernel, OrtKernelContext *context) {
    Branch branch = {0};
    TRY(lime_edge_read_operands(kernel, context, &branch.operands));
    TRY(lime_edge_read_expert(context, &branch));
    TRY(make_output(context, 0, branch.operands.dimensions, 3, &branch.sum));
    return queue_branch(context, &branch);
}

static OrtStatus *compute_branch_norm(void *kernel, OrtKernelContext *context) {
    Branch branch = {0};
    TRY(lime_edge_read_operands(kernel, context, &branch.operands));
    TRY(lime_edge_read_expert(context, &branch));
    TRY(lime_edge_read_norm(kernel, context, &branch));
    TRY(make_output(context, 0, branch.operands.dimensions, 3, &branch.out));
    TRY(make_output(context, 1, branch.operands.dimensions, 3, &branch.sum));
    return queue_branch(context, &branch);
}

static OrtStatus *compute_gate(void *kernel, OrtKernelContext *context) {
    Gate gate;
    void *stream = NULL;
    (void)kernel;
    TRY(lime_edge_read_gate(context, &gate));
    if (!gate.rows || !gate.width) return NULL;
    TRY(ORT_GET_STREAM(API)(context, &stream));
    return check(lime_edge_launch_gate(&gate, stream));
}

const Entry lime_edge_entries[] = {
    {"HalfExpertRowsBranch", 5, 1, lime_edge_create_branch, compute_branch, 0},
    {"HalfGappedExpertRowsBranch", 6, 1, lime_edge_create_branch, compute_branch, 0},
    {"HalfExpertRowsBranchNorm", 7, 2, lime_edge_create_branch_norm, compute_branch_norm, 1},
    {"HalfSwiGLU", 1, 1, lime_edge_create_gate, compute_gate, NOT_SHARED},
};
const size_t lime_edge_entry_count = sizeof lime_edge_entries / sizeof *lime_edge_entries;

__attribute__((visibility("default"))) int lime_edge_supported(void) { return lime_edge_find_gpu(); }
