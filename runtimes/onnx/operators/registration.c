/* The operators of this library, told to ONNX Runtime. The graph holds a function of the same name for each, so ONNX
 * Runtime uses these where they are registered and the function's own nodes elsewhere. */
#include <stdlib.h>

#include "registration.h"

#define EXPORTED __attribute__((visibility("default")))

OrtApi API;

typedef struct {
    OrtOperator operator; /* first: ONNX Runtime hands back a pointer to it */
    const Entry *entry;
} Registered;

static Registered REGISTERED[MOST_ENTRIES]; /* live as long as the library */

static const Entry *entry(const OrtOperator *self) { return ((const Registered *)(const void *)self)->entry; }

static OrtStatus *create(const OrtOperator *self, OrtApi api, const OrtKernelInfo *info, void **result) {
    Kernel *kernel = calloc(1, sizeof *kernel);
    if (kernel == NULL) return ORT_CREATE_STATUS(api)(ORT_FAIL, "lime_edge: out of memory");
    OrtStatus *failed = entry(self)->create(api, info, kernel);
    if (failed != NULL)
        free(kernel);
    else
        *result = kernel;
    return failed;
}

static const char *get_name(const OrtOperator *self) { return entry(self)->name; }
static const char *get_provider(const OrtOperator *self) { return (void)self, lime_edge_provider; }
static size_t count_inputs(const OrtOperator *self) { return entry(self)->inputs; }
static size_t count_outputs(const OrtOperator *self) { return entry(self)->outputs; }
static int get_input_type(const OrtOperator *self, size_t index) {
    (void)self;
    return index < 2 || index == 4 ? lime_edge_real : ORT_ANY; /* a, b, what only functions read; see read_real */
}
static int get_output_type(const OrtOperator *self, size_t index) { return (void)self, (void)index, lime_edge_real; }
static int get_input_kind(const OrtOperator *self, size_t index) {
    return (void)self, index < 8 ? ORT_REQUIRED : ORT_OPTIONAL; /* RoutedBranch: anchors, with windows only */
}
static int get_output_kind(const OrtOperator *self, size_t index) { return (void)self, (void)index, ORT_REQUIRED; }
static int get_memory(const OrtOperator *self, size_t index) { return (void)self, (void)index, 0; } /* the provider's */
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

static OrtOperator describe(const Entry *entry) {
    size_t (*const offers[])(int **, int **) = {offer_first, offer_second};
    return (OrtOperator){
        .version = ORT_VERSION,
        .get_name = get_name,
        .get_provider = get_provider,
        .get_input_type = get_input_type,
        .count_inputs = count_inputs,
        .get_output_type = get_output_type,
        .count_outputs = count_outputs,
        .destroy = free,
        .get_input_kind = get_input_kind,
        .get_output_kind = get_output_kind,
        .get_input_memory = get_memory,
        .get_variadic_input_arity = get_one,
        .get_variadic_input_homogeneity = get_one,
        .get_variadic_output_arity = get_one,
        .get_variadic_output_homogeneity = get_one,
        .create = create,
        .compute = entry->compute,
        .get_may_inplace = entry->shared == NOT_SHARED ? NULL : offers[entry->shared],
        .release_may_inplace = release_in_place,
    };
}

/* What ONNX Runtime calls; the name is its own. */
EXPORTED OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    OrtDomain *domain = NULL;
    OrtApi api = base->get_api(ORT_VERSION);
    if (api == NULL)
        return ORT_CREATE_STATUS(base->get_api(1))(ORT_FAIL, "lime_edge: ONNX Runtime 1.24 or newer is needed");
    API = api;
    if (!lime_edge_supported()) return refuse(lime_edge_unsupported);
    TRY(ORT_CREATE_DOMAIN(api)("lime_edge", &domain)); /* lives as long as the library, as its operators do */
    for (size_t i = 0; i < lime_edge_entry_count; i++) {
        REGISTERED[i] = (Registered){describe(&lime_edge_entries[i]), &lime_edge_entries[i]};
        TRY(ORT_DOMAIN_ADD(api)(domain, &REGISTERED[i].operator));
    }
    return ORT_ADD_DOMAIN(api)(options, domain);
}
