/* Asking ONNX Runtime: tensors of a call, outputs, its threads; and what a kernel keeps between calls. */
#ifndef LIME_EDGE_RUNTIME_H
#define LIME_EDGE_RUNTIME_H

#include "abi.h"
#include "operands.h"

#define API lime_edge_api
enum { MOST_DIMENSIONS = 8, ROWS_PER_TASK = 2 * ROWS_AT_ONCE };

extern OrtApi API; /* of the ONNX Runtime that registered last */
extern const int lime_edge_real; /* the element type of activations: float32 on the processor, float16 on a GPU */

/* What a call of the graph says once and for all; several threads may be in one kernel, so nothing here ever changes. */
typedef struct {
    Parts parts; /* without inputs and rank, which the tensors say */
    Routing routing;
    float epsilon;
} Kernel;

#define TRY(call)                            \
    do {                                     \
        OrtStatus *failed_ = (call);         \
        if (failed_ != NULL) return failed_; \
    } while (0)

static inline OrtStatus *refuse(const char *reason) { return ORT_CREATE_STATUS(API)(ORT_INVALID_ARGUMENT, reason); }

/* One tensor of a call. */
typedef struct {
    void *data;
    const int64_t *dimensions; /* ONNX Runtime's own, for as long as the call lasts */
    size_t count;
    int type;
} Tensor;

static inline OrtStatus *read_tensor(const OrtKernelContext *context, size_t index, Tensor *tensor) {
    const OrtValue *value = NULL;
    TRY(ORT_GET_INPUT(API)(context, index, &value));
    if (value == NULL) return refuse("lime_edge: an input is missing");
    TRY(ORT_GET_SHAPE(API)(value, &tensor->type, &tensor->dimensions, &tensor->count));
    if (tensor->count < 1 || tensor->count > MOST_DIMENSIONS)
        return refuse("lime_edge: a tensor of 1 to 8 dimensions is expected");
    return ORT_GET_DATA(API)((OrtValue *)value, &tensor->data);
}

static inline OrtStatus *read_real(const OrtKernelContext *context, size_t index, Tensor *tensor) {
    TRY(read_tensor(context, index, tensor));
    if (tensor->type == lime_edge_real) return NULL;
    return refuse(lime_edge_real == ORT_FLOAT ? "lime_edge: a float32 tensor is expected"
                                              : "lime_edge: a float16 tensor is expected");
}

/* Whether a tensor has exactly these dimensions. */
static inline int is_vector(const Tensor *tensor, int64_t length) {
    return tensor->count == 1 && tensor->dimensions[0] == length;
}

static inline int is_matrix(const Tensor *tensor, int64_t rows, int64_t columns) {
    return tensor->count == 2 && tensor->dimensions[0] == rows && tensor->dimensions[1] == columns;
}

static inline int is_batch(const Tensor *tensor, int64_t batch, int64_t tokens, int64_t width) {
    return tensor->count == 3 && tensor->dimensions[0] == batch && tensor->dimensions[1] == tokens &&
           tensor->dimensions[2] == width;
}

static inline OrtStatus *make_output(OrtKernelContext *context, size_t index, const int64_t *dimensions, size_t count,
                                     void **data) {
    OrtValue *value = NULL;
    TRY(ORT_GET_OUTPUT(API)(context, index, dimensions, count, &value));
    return ORT_GET_DATA(API)(value, data);
}

/* Rows in order on this thread, or spread over ONNX Runtime's own threads where there are many. `run` takes a stretch of
 * at most ROWS_PER_TASK. */
typedef struct {
    void (*run)(const void *job, int64_t first, int64_t end);
    const void *job;
    int64_t rows;
} Task;

static inline void run_task(void *data, size_t index) {
    const Task *task = data;
    const int64_t first = (int64_t)index * ROWS_PER_TASK, end = first + ROWS_PER_TASK;
    task->run(task->job, first, end < task->rows ? end : task->rows);
}

static inline OrtStatus *run_rows(const OrtKernelContext *context, int64_t rows,
                                  void (*run)(const void *, int64_t, int64_t), const void *job) {
    Task task = {run, job, rows};
    const size_t tasks = (size_t)((rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK);
    if (tasks > 1) return ORT_PARALLEL_FOR(API)(context, run_task, tasks, 0, &task);
    if (tasks) run_task(&task, 0);
    return NULL;
}

/* Inputs of a call, every dimension of them checked: each may differ from one call to the next. */
OrtStatus *lime_edge_read_operands(const Kernel *kernel, const OrtKernelContext *context, Operands *operands);

OrtStatus *lime_edge_read_expert(const OrtKernelContext *context, Branch *branch);
OrtStatus *lime_edge_read_norm(const Kernel *kernel, const OrtKernelContext *context, Branch *branch);

OrtStatus *lime_edge_read_gate(OrtKernelContext *context, Gate *gate);

/* The operators' computations. kernel: a Kernel. */
OrtStatus *lime_edge_compute_branch(void *kernel, OrtKernelContext *context);
OrtStatus *lime_edge_compute_branch_norm(void *kernel, OrtKernelContext *context);
OrtStatus *lime_edge_compute_routed(void *kernel, OrtKernelContext *context);
OrtStatus *lime_edge_compute_gate(void *kernel, OrtKernelContext *context);

#endif
