/* The operators' names and attributes, and their registration. The graph holds a function of the same name for each, so
 * ONNX Runtime uses these where they are registered and the function's own nodes elsewhere. */
#include <stdlib.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "runtime.h"

#define EXPORTED __attribute__((visibility("default")))

OrtApi API;

/* --- kernels from attributes ------------------------------------------------------------------------------------- */

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

static OrtStatus *create_branch(const OrtOperator *self, OrtApi api, const OrtKernelInfo *info, Kernel *kernel) {
    size_t count = MOST_PARTS;
    (void)self;
    TRY(read_parts(api, info, &kernel->parts));
    TRY(ORT_GET_INTEGERS(api)(info, "offsets", kernel->parts.offsets, &count));
    if ((int64_t)count != kernel->parts.count)
        return refuse("lime_edge: attributes widths and offsets differ in length");
    for (size_t i = 0; i < count; i++)
        if (kernel->parts.offsets[i] < 0) return refuse("lime_edge: an offset below 0");
    return NULL;
}

static OrtStatus *create_branch_norm(const OrtOperator *self, OrtApi api, const OrtKernelInfo *info, Kernel *kernel) {
    TRY(create_branch(self, api, info, kernel));
    return ORT_GET_FLOAT(api)(info, "epsilon", &kernel->epsilon);
}

static OrtStatus *create_routed(const OrtOperator *self, OrtApi api, const OrtKernelInfo *info, Kernel *kernel) {
    Routing *routing = &kernel->routing;
    (void)self;
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

static OrtStatus *create_gate(const OrtOperator *self, OrtApi api, const OrtKernelInfo *info, Kernel *kernel) {
    (void)self, (void)api, (void)info, (void)kernel;
    return NULL;
}

/* --- registration ------------------------------------------------------------------------------------------------ */

typedef OrtStatus *(*create_fn)(const OrtOperator *self, OrtApi api, const OrtKernelInfo *info, Kernel *kernel);

typedef struct {
    OrtOperator operator; /* first: ONNX Runtime hands back a pointer to it */
    const char *name;
    size_t inputs, outputs;
    create_fn create;
} Entry;

static const Entry *entry(const OrtOperator *self) { return (const Entry *)(const void *)self; }

static OrtStatus *create(const OrtOperator *self, OrtApi api, const OrtKernelInfo *info, void **result) {
    Kernel *kernel = calloc(1, sizeof *kernel);
    if (kernel == NULL) return ORT_CREATE_STATUS(api)(ORT_FAIL, "lime_edge: out of memory");
    OrtStatus *failed = entry(self)->create(self, api, info, kernel);
    if (failed != NULL)
        free(kernel);
    else
        *result = kernel;
    return failed;
}

static const char *get_name(const OrtOperator *self) { return entry(self)->name; }
static const char *get_provider(const OrtOperator *self) { return (void)self, NULL; } /* the processor */
static size_t count_inputs(const OrtOperator *self) { return entry(self)->inputs; }
static size_t count_outputs(const OrtOperator *self) { return entry(self)->outputs; }
static int get_input_type(const OrtOperator *self, size_t index) {
    (void)self;
    return index < 2 || index == 4 ? ORT_FLOAT : ORT_ANY; /* a, b, what only functions read; see read_floats */
}
static int get_output_type(const OrtOperator *self, size_t index) { return (void)self, (void)index, ORT_FLOAT; }
static int get_input_kind(const OrtOperator *self, size_t index) {
    return (void)self, index < 8 ? ORT_REQUIRED : ORT_OPTIONAL; /* RoutedBranch: anchors, with windows only */
}
static int get_output_kind(const OrtOperator *self, size_t index) { return (void)self, (void)index, ORT_REQUIRED; }
static int get_memory(const OrtOperator *self, size_t index) { return (void)self, (void)index, 0; }
static int get_one(const OrtOperator *self) { return (void)self, 1; }

static size_t offer_in_place(int **inputs, int **outputs, int output) {
    *inputs = malloc(sizeof **inputs);
    *outputs = malloc(sizeof **outputs);
    if (*inputs == NULL || *outputs == NULL) {
        free(*inputs);
        free(*outputs);
        return 0;
    }
    **inputs = 1;
    **outputs = output;
    return 1;
}
static size_t offer_first(int **inputs, int **outputs) { return offer_in_place(inputs, outputs, 0); }
static size_t offer_second(int **inputs, int **outputs) { return offer_in_place(inputs, outputs, 1); }
static void release_in_place(int *inputs, int *outputs) {
    free(inputs);
    free(outputs);
}

#define OPERATOR(compute_, offer_)               \
    {.version = ORT_VERSION,                     \
     .get_name = get_name,                       \
     .get_provider = get_provider,               \
     .get_input_type = get_input_type,           \
     .count_inputs = count_inputs,               \
     .get_output_type = get_output_type,         \
     .count_outputs = count_outputs,             \
     .destroy = free,                            \
     .get_input_kind = get_input_kind,           \
     .get_output_kind = get_output_kind,         \
     .get_input_memory = get_memory,             \
     .get_variadic_input_arity = get_one,        \
     .get_variadic_input_homogeneity = get_one,  \
     .get_variadic_output_arity = get_one,       \
     .get_variadic_output_homogeneity = get_one, \
     .create = create,                           \
     .compute = compute_,                        \
     .get_may_inplace = offer_,                  \
     .release_may_inplace = release_in_place}

static const Entry ENTRIES[] = {
    {OPERATOR(lime_edge_compute_branch, offer_first), "ExpertRowsBranch", 5, 1, create_branch},
    {OPERATOR(lime_edge_compute_branch, offer_first), "GappedExpertRowsBranch", 6, 1, create_branch},
    {OPERATOR(lime_edge_compute_branch_norm, offer_second), "ExpertRowsBranchNorm", 7, 2, create_branch_norm},
    {OPERATOR(lime_edge_compute_routed, offer_first), "RoutedBranch", 9, 1, create_routed},
    {OPERATOR(lime_edge_compute_gate, NULL), "SwiGLU", 1, 1, create_gate},
};

/* 1 where this processor, and the system that saves its registers, has what the operators are compiled for. The
 * instruction is asked itself: __builtin_cpu_supports lacks "f16c" in clang 17 and needs a symbol that not every C library has. */
EXPORTED int lime_edge_supported(void) {
#if defined(__x86_64__)
    const unsigned needed = bit_FMA | bit_F16C | bit_AVX | bit_OSXSAVE, saved = 6; /* both halves of the registers */
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & needed) != needed) return 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & saved) == saved && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_AVX2) != 0;
#else
    return 1;
#endif
}

/* What ONNX Runtime calls; the name is its own. */
EXPORTED OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    OrtDomain *domain = NULL;
    OrtApi api = base->get_api(ORT_VERSION);
    if (api == NULL)
        return ORT_CREATE_STATUS(base->get_api(1))(ORT_FAIL, "lime_edge: ONNX Runtime 1.24 or newer is needed");
    API = api;
    if (!lime_edge_supported()) return refuse("lime_edge: these operators need a processor with AVX2, FMA and F16C");
    TRY(ORT_CREATE_DOMAIN(api)("lime_edge", &domain)); /* lives as long as the library, as its operators do */
    for (size_t i = 0; i < sizeof ENTRIES / sizeof *ENTRIES; i++)
        TRY(ORT_DOMAIN_ADD(api)(domain, &ENTRIES[i].operator));
    return ORT_ADD_DOMAIN(api)(options, domain);
}
