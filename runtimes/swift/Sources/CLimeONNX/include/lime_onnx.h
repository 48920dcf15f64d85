/* ONNX Runtime's C interface as the engine in Swift needs it: graphs, tensors over memory of the caller's, calls that can be stopped.
 *
 * What can fail returns NULL, or what went wrong in words, which the caller frees. ONNX Runtime itself is found when it is first
 * needed, in the program or in a library, so that this builds without its headers and without linker flags. */
#ifndef LIME_ONNX_H
#define LIME_ONNX_H

#include <stddef.h>
#include <stdint.h>

typedef struct LimeGraph LimeGraph;
typedef struct LimeTensor LimeTensor;
typedef struct LimeStop LimeStop;

typedef enum { LIME_FLOAT = 1, LIME_INT64 = 7 } LimeElement; /* ONNXTensorElementDataType */
#define LIME_MOST_AXES 8

/* Find ONNX Runtime; the first call that succeeds decides for the whole program.
 * base: what OrtGetApiBase() gives, or NULL: it is looked for in the program, then in `library` (a file, or NULL). */
char *lime_onnx_begin(const void *base, const char *library);

/* Its version; empty before lime_onnx_begin. */
const char *lime_onnx_version(void);

/* Whether it was built with an execution provider. */
int lime_onnx_has_provider(const char *name);

/* Load a graph from a file. threads: 0 leaves it to ONNX Runtime. xnnpack, operators: whether to use them. */
char *lime_graph_load(const char *file, int threads, int xnnpack, int operators, LimeGraph **graph);
void lime_graph_free(LimeGraph *graph);

/* Inputs (outputs: 0) or outputs (1): their number, a name, which is the graph's, and a shape: -1 where an axis varies, rank 0 where
 * it is no tensor. */
size_t lime_graph_count(const LimeGraph *graph, int outputs);
const char *lime_graph_name(const LimeGraph *graph, int outputs, size_t index);
size_t lime_graph_shape(const LimeGraph *graph, int outputs, size_t index, int64_t axes[LIME_MOST_AXES]);

/* Run it. Outputs that are not NULL are written in place, the others are made and given back. stop: NULL, or what can stop it. */
char *lime_graph_run(LimeGraph *graph, LimeStop *stop, const char *const *input_names, LimeTensor *const *inputs, size_t input_count,
                     const char *const *output_names, size_t output_count, LimeTensor **outputs);

/* A tensor over memory that must stay where it is as long as the tensor does. */
char *lime_tensor_wrap(void *data, size_t bytes, const int64_t *axes, size_t rank, int type, LimeTensor **tensor);
void lime_tensor_free(LimeTensor *tensor);

/* Where a float32 tensor's values lie, and its shape. */
char *lime_tensor_floats(LimeTensor *tensor, float **values, int64_t axes[LIME_MOST_AXES], size_t *rank);

/* Stops calls that run with it, from any thread. */
char *lime_stop_make(LimeStop **stop);
void lime_stop_now(LimeStop *stop);
void lime_stop_free(LimeStop *stop);

#endif
