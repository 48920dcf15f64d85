/* The part of ONNX Runtime's C interface that these operators need, declared here because its Python wheel has no
 * header. The function table only ever grows, and a position never changes its meaning.
 * Source of positions and structures: onnxruntime_c_api.h of ONNX Runtime 1.29; used as version 24 of the interface, the
 * first that tells a tensor's shape without allocating. */
#ifndef LIME_EDGE_ABI_H
#define LIME_EDGE_ABI_H

#include <stddef.h>
#include <stdint.h>

#define ORT_VERSION 24

typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtDomain OrtDomain; /* OrtCustomOpDomain */
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef void *const *OrtApi; /* a table of functions */

typedef struct {
    OrtApi (*get_api)(uint32_t version); /* NULL: this ONNX Runtime is older */
    const char *(*get_version)(void);
} OrtApiBase;

enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };       /* OrtErrorCode */
enum { ORT_ANY = 0, ORT_FLOAT = 1, ORT_FLOAT16 = 10 }; /* ONNXTensorElementDataType */
enum { ORT_REQUIRED = 0, ORT_OPTIONAL = 1 };           /* OrtCustomOpInputOutputCharacteristic */

typedef OrtStatus *(*create_status_fn)(int code, const char *message);
typedef OrtStatus *(*create_domain_fn)(const char *name, OrtDomain **domain);
typedef OrtStatus *(*domain_add_fn)(OrtDomain *domain, const void *operator);
typedef OrtStatus *(*add_domain_fn)(OrtSessionOptions *options, OrtDomain *domain);
typedef OrtStatus *(*get_data_fn)(OrtValue *value, void **data);
typedef OrtStatus *(*get_shape_fn)(const OrtValue *value, int *type, const int64_t **dimensions, size_t *count);
typedef OrtStatus *(*get_float_fn)(const OrtKernelInfo *info, const char *name, float *value);
typedef OrtStatus *(*get_integer_fn)(const OrtKernelInfo *info, const char *name, int64_t *value);
typedef OrtStatus *(*get_integers_fn)(const OrtKernelInfo *info, const char *name, int64_t *values, size_t *count);
typedef OrtStatus *(*get_input_fn)(const OrtKernelContext *context, size_t index, const OrtValue **value);
typedef OrtStatus *(*get_output_fn)(OrtKernelContext *context, size_t index, const int64_t *dimensions, size_t count,
                                    OrtValue **value);
typedef OrtStatus *(*parallel_for_fn)(const OrtKernelContext *context, void (*task)(void *data, size_t index),
                                      size_t count, size_t batches, void *data);

#define ORT_CREATE_STATUS(api) ((create_status_fn)(api)[0])
#define ORT_CREATE_DOMAIN(api) ((create_domain_fn)(api)[26])
#define ORT_DOMAIN_ADD(api) ((domain_add_fn)(api)[27])
#define ORT_ADD_DOMAIN(api) ((add_domain_fn)(api)[28])
#define ORT_GET_DATA(api) ((get_data_fn)(api)[51])
#define ORT_GET_FLOAT(api) ((get_float_fn)(api)[85])
#define ORT_GET_INTEGER(api) ((get_integer_fn)(api)[86])
#define ORT_GET_INPUT(api) ((get_input_fn)(api)[90])
#define ORT_GET_OUTPUT(api) ((get_output_fn)(api)[91])
#define ORT_GET_INTEGERS(api) ((get_integers_fn)(api)[163])
#define ORT_PARALLEL_FOR(api) ((parallel_for_fn)(api)[274])
#define ORT_GET_SHAPE(api) ((get_shape_fn)(api)[414]) /* GetTensorElementTypeAndShapeDataReference */

typedef struct OrtOperator OrtOperator; /* OrtCustomOp: its members in their order */
struct OrtOperator {
    uint32_t version;
    void *(*create_unchecked)(const OrtOperator *self, OrtApi api, const OrtKernelInfo *info);
    const char *(*get_name)(const OrtOperator *self);
    const char *(*get_provider)(const OrtOperator *self);
    int (*get_input_type)(const OrtOperator *self, size_t index);
    size_t (*count_inputs)(const OrtOperator *self);
    int (*get_output_type)(const OrtOperator *self, size_t index);
    size_t (*count_outputs)(const OrtOperator *self);
    void (*compute_unchecked)(void *kernel, OrtKernelContext *context);
    void (*destroy)(void *kernel);
    int (*get_input_kind)(const OrtOperator *self, size_t index);
    int (*get_output_kind)(const OrtOperator *self, size_t index);
    int (*get_input_memory)(const OrtOperator *self, size_t index);
    int (*get_variadic_input_arity)(const OrtOperator *self);
    int (*get_variadic_input_homogeneity)(const OrtOperator *self);
    int (*get_variadic_output_arity)(const OrtOperator *self);
    int (*get_variadic_output_homogeneity)(const OrtOperator *self);
    OrtStatus *(*create)(const OrtOperator *self, OrtApi api, const OrtKernelInfo *info, void **kernel);
    OrtStatus *(*compute)(void *kernel, OrtKernelContext *context);
    OrtStatus *(*infer_shape)(const OrtOperator *self, void *context);
    int (*get_start_version)(const OrtOperator *self);
    int (*get_end_version)(const OrtOperator *self);
    size_t (*get_may_inplace)(int **inputs, int **outputs);
    void (*release_may_inplace)(int *inputs, int *outputs);
    size_t (*get_alias)(int **inputs, int **outputs);
    void (*release_alias)(int *inputs, int *outputs);
};

#endif
