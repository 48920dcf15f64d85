/* Kernels from what a node of the graph says: its attributes, checked. */
#include "registration.h"

static OrtStatus *read_parts(OrtApi api, const OrtKernelInfo *info, Parts *parts) {
    size_t widths = MOST_PARTS, ranks = MOST_PARTS;
    TRY(ORT_GET_INTEGERS(api)(info, "widths", parts->widths, &widths));
    TRY(ORT_GET_INTEGERS(api)(info, "ranks", parts->ranks, &ranks));
    if (widths != ranks) return refuse("lime_edge: attributes widths and ranks differ in length");
    parts->count = (int64_t)widths;
    for (size_t i = 0; i < widths; i++) {
        if (parts->widths[i] < 1 || parts->widths[i] > INT32_MAX || parts->ranks[i] < 0 || parts->ranks[i] > MOST_RANK)
            return refuse("lime_edge: a width outside 1 to 2^31 - 1 or a rank outside 0 to 1024");
        parts->width += parts->widths[i];
    }
    return NULL;
}

OrtStatus *lime_edge_create_branch(OrtApi api, const OrtKernelInfo *info, Kernel *kernel) {
    size_t count = MOST_PARTS;
    TRY(read_parts(api, info, &kernel->parts));
    TRY(ORT_GET_INTEGERS(api)(info, "offsets", kernel->parts.offsets, &count));
    if ((int64_t)count != kernel->parts.count)
        return refuse("lime_edge: attributes widths and offsets differ in length");
    for (size_t i = 0; i < count; i++)
        if (kernel->parts.offsets[i] < 0) return refuse("lime_edge: an offset below 0");
    return NULL;
}

OrtStatus *lime_edge_create_branch_norm(OrtApi api, const OrtKernelInfo *info, Kernel *kernel) {
    TRY(lime_edge_create_branch(api, info, kernel));
    return ORT_GET_FLOAT(api)(info, "epsilon", &kernel->epsilon);
}

OrtStatus *lime_edge_create_routed(OrtApi api, const OrtKernelInfo *info, Kernel *kernel) {
    Routing *routing = &kernel->routing;
    TRY(read_parts(api, info, &kernel->parts));
    TRY(ORT_GET_INTEGER(api)(info, "experts", &routing->experts));
    TRY(ORT_GET_INTEGER(api)(info, "selection", &routing->selection));
    TRY(ORT_GET_INTEGER(api)(info, "top_k", &routing->top_k));
    TRY(ORT_GET_INTEGER(api)(info, "n_gram", &routing->window));
    TRY(ORT_GET_FLOAT(api)(info, "frozen_share", &routing->frozen_share));
    TRY(ORT_GET_FLOAT(api)(info, "adapted_share", &routing->adapted_share));
    TRY(ORT_GET_FLOAT(api)(info, "threshold", &routing->threshold));
    TRY(ORT_GET_FLOAT(api)(info, "heat", &routing->heat));
    if (routing->experts < 1 || routing->experts > MOST_EXPERTS || routing->top_k < 1 ||
        routing->top_k > routing->experts || routing->window < 1)
        return refuse("lime_edge: 1 to 256 experts, top_k of them, and n_gram of at least 1 are expected");
    for (int64_t i = 0; i < kernel->parts.count; i++)
        if (kernel->parts.ranks[i] && kernel->parts.widths[i] < routing->experts)
            return refuse("lime_edge: routing reads as many outputs as there are experts, and a site has fewer");
    return NULL;
}

OrtStatus *lime_edge_create_gate(OrtApi api, const OrtKernelInfo *info, Kernel *kernel) {
    (void)api, (void)info, (void)kernel;
    return NULL;
}
