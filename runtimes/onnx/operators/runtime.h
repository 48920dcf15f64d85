/* Asking ONNX Runtime: tensors of a call, outputs, its threads; and what a kernel keeps between calls. */
#ifndef LIME_EDGE_RUNTIME_H
#define LIME_EDGE_RUNTIME_H

#include "abi.h"
#include "operators.h"

#define API lime_edge_api
enum { MOST_DIMENSIONS = 8, MOST_INPUTS = 8, ROWS_PER_TASK = 8 };

extern OrtApi API; /* of the ONNX Runtime that registered last */

typedef struct {
    Parts parts;
    Routing routing;
    float epsilon;
    int half; /* whether a and b are float16 */
    /* Asking for shapes costs as much as a branch: they are checked when the number of tokens or a tensor changes. */
    int64_t rows;                 /* of the call that was last checked; -1: none was */
    void *addresses[MOST_INPUTS]; /* of its inputs, but y */
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
    int64_t dimensions[MOST_DIMENSIONS];
    size_t count;
    int type;
} Tensor;

static inline OrtStatus *read_shape(const OrtValue *value, Tensor *tensor) {
    OrtShape *shape = NULL;
    TRY(ORT_GET_SHAPE(API)(value, &shape));
    OrtStatus *failed = ORT_COUNT_DIMENSIONS(API)(shape, &tensor->count);
    if (failed == NULL && (tensor->count < 1 || tensor->count > MOST_DIMENSIONS))
        failed = refuse("lime_edge: a tensor of 1 to 8 dimensions is expected");
    if (failed == NULL) failed = ORT_GET_DIMENSIONS(API)(shape, tensor->dimensions, tensor->count);
    if (failed == NULL) failed = ORT_GET_ELEMENT_TYPE(API)(shape, &tensor->type);
    ORT_RELEASE_SHAPE(API)(shape);
    return failed;
}

static inline OrtStatus *read_data(const OrtKernelContext *context, size_t index, const OrtValue **value, void **data) {
    TRY(ORT_GET_INPUT(API)(context, index, value));
    return ORT_GET_DATA(API)((OrtValue *)*value, data);
}

static inline OrtStatus *read_tensor(const OrtKernelContext *context, size_t index, Tensor *tensor) {
    const OrtValue *value = NULL;
    TRY(read_data(context, index, &value, &tensor->data));
    return read_shape(value, tensor);
}

static inline OrtStatus *read_floats(const OrtKernelContext *context, size_t index, Tensor *tensor) {
    TRY(read_tensor(context, index, tensor));
    return tensor->type == ORT_FLOAT ? NULL : refuse("lime_edge: a float32 tensor is expected");
}

static inline OrtStatus *make_output(OrtKernelContext *context, size_t index, const Tensor *like, float **data) {
    OrtValue *value = NULL;
    TRY(ORT_GET_OUTPUT(API)(context, index, like->dimensions, like->count, &value));
    return ORT_GET_DATA(API)(value, (void **)data);
}

static inline int64_t count_rows(const Tensor *tensor) {
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < tensor->count; i++) rows *= tensor->dimensions[i];
    return rows;
}

static inline int64_t last(const Tensor *tensor) { return tensor->dimensions[tensor->count - 1]; }

/* Rows in order on this thread, or spread over ONNX Runtime's own threads where there are many. */
typedef struct {
    void (*run)(const void *job, int64_t row);
    const void *job;
    int64_t rows;
} Task;

static inline void run_task(void *data, size_t index) {
    const Task *task = data;
    const int64_t first = (int64_t)index * ROWS_PER_TASK, end = first + ROWS_PER_TASK;
    for (int64_t row = first; row < end && row < task->rows; row++) task->run(task->job, row);
}

static inline OrtStatus *run_rows(const OrtKernelContext *context, int64_t rows, void (*run)(const void *, int64_t),
                                  const void *job) {
    Task task = {run, job, rows};
    const size_t tasks = (size_t)((rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK);
    if (tasks > 1) return ORT_PARALLEL_FOR(API)(context, run_task, tasks, 0, &task);
    if (tasks) run_task(&task, 0);
    return NULL;
}

/* The operators' computations. kernel: a Kernel. */
OrtStatus *lime_edge_compute_branch(void *kernel, OrtKernelContext *context);
OrtStatus *lime_edge_compute_branch_norm(void *kernel, OrtKernelContext *context);
OrtStatus *lime_edge_compute_routed(void *kernel, OrtKernelContext *context);
OrtStatus *lime_edge_compute_gate(void *kernel, OrtKernelContext *context);

#endif
