/* What the GPU computes. All tensors are row-major float16 in its memory; sums are float32 and rounded once, at the end. */
#ifndef LIME_EDGE_CUDA_KERNELS_H
#define LIME_EDGE_CUDA_KERNELS_H

#include "../operands.h"

#ifdef __cplusplus
extern "C" {
#endif

/* out = sum = y + d * (x a b) where the branch has no norm; else sum = stream + that and out = RMSNorm(sum) * gain.
 * stream: of CUDA, where the work is queued. Returns cudaError_t, 0 where it was queued. */
int lime_edge_launch_branch(const Branch *branch, void *stream);

/* out = silu(x[..., :N]) * x[..., N:] */
int lime_edge_launch_gate(const Gate *gate, void *stream);

/* Whether a GPU is there that the kernels were compiled for. */
int lime_edge_find_gpu(void);

#ifdef __cplusplus
}
#endif

#endif
