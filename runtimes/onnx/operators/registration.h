/* What a library of operators says of itself; registration.c tells it to ONNX Runtime. */
#ifndef LIME_EDGE_REGISTRATION_H
#define LIME_EDGE_REGISTRATION_H

#include "runtime.h"

enum { MOST_ENTRIES = 8, NOT_SHARED = -1 };

typedef struct {
    const char *name;
    size_t inputs, outputs;
    OrtStatus *(*create)(OrtApi api, const OrtKernelInfo *info, Kernel *kernel);
    OrtStatus *(*compute)(void *kernel, OrtKernelContext *context); /* kernel: a Kernel */
    int shared; /* the output that may lie in input 1's memory, or NOT_SHARED */
} Entry;

/* Each library has these, and lime_edge_real, once. */
extern const Entry lime_edge_entries[];
extern const size_t lime_edge_entry_count;     /* at most MOST_ENTRIES */
extern const char *const lime_edge_provider;   /* NULL: the processor */
extern const char *const lime_edge_unsupported; /* what is said where lime_edge_supported() gives 0 */

/* Kernels from attributes. */
OrtStatus *lime_edge_create_branch(OrtApi api, const OrtKernelInfo *info, Kernel *kernel);
OrtStatus *lime_edge_create_branch_norm(OrtApi api, const OrtKernelInfo *info, Kernel *kernel);
OrtStatus *lime_edge_create_routed(OrtApi api, const OrtKernelInfo *info, Kernel *kernel);
OrtStatus *lime_edge_create_gate(OrtApi api, const OrtKernelInfo *info, Kernel *kernel);

/* 1 where this machine has what the library was compiled for. */
int lime_edge_supported(void);

#endif
