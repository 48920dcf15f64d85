#define _GNU_SOURCE
#include "lime_onnx.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "api.h"
#include "lime_edge_operators.h"

typedef void Status; /* OrtStatus; NULL: all is well */

/* A function of the table. */
#define CALL(name, type) ((type)API[AT_##name])
#define RELEASE(name, object) CALL(name, void (*)(void *))(object)
#define TRY(call)                                  \
    do {                                           \
        Status *status_ = (call);                  \
        if (status_ != NULL) return read(status_); \
    } while (0)

struct LimeGraph {
    void *session;
    void *options; /* operators live as long as their sessions */
    size_t counts[2];
    char **names[2];
};

static OrtTable API;
static const OrtBase *BASE;
static void *ENVIRONMENT, *MEMORY, *ALLOCATOR;
static pthread_mutex_t LOCK = PTHREAD_MUTEX_INITIALIZER;




static char *copy(const char *text) { return strdup(text); }

/* What a status says; it is released. */
static char *read(Status *status) {
    char *text = copy(CALL(GetErrorMessage, const char *(*)(const Status *))(status));
    RELEASE(ReleaseStatus, status);
    return text;
}

static char *begin(const OrtBase *base, const char *library) {
    if (base == NULL) {
        const OrtBase *(*get)(void) = (const OrtBase *(*)(void))dlsym(RTLD_DEFAULT, "OrtGetApiBase");
        if (get == NULL && library != NULL) {
            void *handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
            if (handle == NULL) return copy(dlerror());
            get = (const OrtBase *(*)(void))dlsym(handle, "OrtGetApiBase");
        }
        if (get == NULL) return copy("ONNX Runtime is not in this program: there is no OrtGetApiBase");
        base = get();
    }
    OrtTable table = base->get_api(LIME_ORT_VERSION);
    if (table == NULL) return copy("this ONNX Runtime is older than 1.17");
    API = table;
    TRY(CALL(CreateEnv, Status *(*)(int, const char *, void **))(3, "lime-edge", &ENVIRONMENT));
    TRY(CALL(CreateCpuMemoryInfo, Status *(*)(int, int, void **))(0, 0, &MEMORY));
    TRY(CALL(GetAllocatorWithDefaultOptions, Status *(*)(void **))(&ALLOCATOR));
    BASE = base; /* last: it says that all of it is there */
    return NULL;
}

char *lime_onnx_begin(const void *base, const char *library) {
    pthread_mutex_lock(&LOCK);
    char *fault = BASE != NULL ? NULL : begin(base, library);
    pthread_mutex_unlock(&LOCK);
    return fault;
}

const char *lime_onnx_version(void) { return BASE == NULL ? "" : BASE->get_version(); }

int lime_onnx_has_provider(const char *name) {
    char **names = NULL;
    int count = 0, found = 0;
    Status *status = CALL(GetAvailableProviders, Status *(*)(char ***, int *))(&names, &count);
    if (status != NULL) {
        free(read(status));
        return 0;
    }
    for (int i = 0; i < count; i++) found |= strcmp(names[i], name) == 0;
    free(CALL(ReleaseAvailableProviders, Status *(*)(char **, int))(names, count));
    return found;
}

/* The names of inputs or outputs. */
static char *read_names(LimeGraph *graph, int outputs) {
    typedef Status *(*count_fn)(const void *, size_t *);
    typedef Status *(*name_fn)(const void *, size_t, void *, char **);
    size_t count = 0;
    TRY((outputs ? CALL(SessionGetOutputCount, count_fn) : CALL(SessionGetInputCount, count_fn))(graph->session, &count));
    graph->names[outputs] = calloc(count + 1, sizeof(char *));
    for (size_t i = 0; i < count; i++) {
        char *name = NULL;
        TRY((outputs ? CALL(SessionGetOutputName, name_fn) : CALL(SessionGetInputName, name_fn))(graph->session, i, ALLOCATOR, &name));
        graph->names[outputs][i] = copy(name);
        graph->counts[outputs] = i + 1;
        TRY(CALL(AllocatorFree, Status *(*)(void *, void *))(ALLOCATOR, name));
    }
    return NULL;
}

static char *load(LimeGraph *graph, const char *file, int threads, int xnnpack, int operators) {
    TRY(CALL(CreateSessionOptions, Status *(*)(void **))(&graph->options));
    TRY(CALL(SetSessionLogSeverityLevel, Status *(*)(void *, int))(graph->options, 3));
    if (threads > 0) TRY(CALL(SetIntraOpNumThreads, Status *(*)(void *, int))(graph->options, threads));
    if (operators) TRY(RegisterCustomOps(graph->options, BASE));
    if (xnnpack) {
        typedef Status *(*append_fn)(void *, const char *, const char *const *, const char *const *, size_t);
        TRY(CALL(SessionOptionsAppendExecutionProvider, append_fn)(graph->options, "XNNPACK", NULL, NULL, 0));
    }
    typedef Status *(*create_fn)(void *, const char *, const void *, void **);
    TRY(CALL(CreateSession, create_fn)(ENVIRONMENT, file, graph->options, &graph->session));
    for (int outputs = 0; outputs < 2; outputs++) {
        char *fault = read_names(graph, outputs);
        if (fault != NULL) return fault;
    }
    return NULL;
}

char *lime_graph_load(const char *file, int threads, int xnnpack, int operators, LimeGraph **graph) {
    LimeGraph *made = calloc(1, sizeof *made);
    char *fault = load(made, file, threads, xnnpack, operators);
    if (fault != NULL) {
        lime_graph_free(made);
        return fault;
    }
    *graph = made;
    return NULL;
}

void lime_graph_free(LimeGraph *graph) {
    if (graph->session != NULL) RELEASE(ReleaseSession, graph->session);
    if (graph->options != NULL) RELEASE(ReleaseSessionOptions, graph->options);
    for (int outputs = 0; outputs < 2; outputs++) {
        for (size_t i = 0; i < graph->counts[outputs]; i++) free(graph->names[outputs][i]);
        free(graph->names[outputs]);
    }
    free(graph);
}

size_t lime_graph_count(const LimeGraph *graph, int outputs) { return graph->counts[outputs]; }

const char *lime_graph_name(const LimeGraph *graph, int outputs, size_t index) { return graph->names[outputs][index]; }

static char *read_axes(const void *info, int64_t *axes, size_t *rank) {
    size_t count = 0;
    TRY(CALL(GetDimensionsCount, Status *(*)(const void *, size_t *))(info, &count));
    if (count > LIME_MOST_AXES) return copy("a tensor of more axes than 8");
    TRY(CALL(GetDimensions, Status *(*)(const void *, int64_t *, size_t))(info, axes, count));
    *rank = count;
    return NULL;
}

size_t lime_graph_shape(const LimeGraph *graph, int outputs, size_t index, int64_t axes[LIME_MOST_AXES]) {
    typedef Status *(*info_fn)(const void *, size_t, void **);
    void *type = NULL;
    const void *info = NULL;
    size_t rank = 0;
    Status *status = (outputs ? CALL(SessionGetOutputTypeInfo, info_fn) : CALL(SessionGetInputTypeInfo, info_fn))(graph->session, index, &type);
    if (status == NULL) status = CALL(CastTypeInfoToTensorInfo, Status *(*)(const void *, const void **))(type, &info);
    if (status != NULL) free(read(status));
    else if (info != NULL) free(read_axes(info, axes, &rank));
    if (type != NULL) RELEASE(ReleaseTypeInfo, type);
    return rank;
}

char *lime_graph_run(LimeGraph *graph, LimeStop *stop, const char *const *input_names, LimeTensor *const *inputs, size_t input_count,
                     const char *const *output_names, size_t output_count, LimeTensor **outputs) {
    typedef Status *(*run_fn)(void *, const void *, const char *const *, const void *const *, size_t, const char *const *, size_t, void **);
    TRY(CALL(Run, run_fn)(graph->session, stop, input_names, (const void *const *)inputs, input_count, output_names, output_count, (void **)outputs));
    return NULL;
}

char *lime_tensor_wrap(void *data, size_t bytes, const int64_t *axes, size_t rank, int type, LimeTensor **tensor) {
    typedef Status *(*wrap_fn)(const void *, void *, size_t, const int64_t *, size_t, int, void **);
    TRY(CALL(CreateTensorWithDataAsOrtValue, wrap_fn)(MEMORY, data, bytes, axes, rank, type, (void **)tensor));
    return NULL;
}

void lime_tensor_free(LimeTensor *tensor) { RELEASE(ReleaseValue, tensor); }

char *lime_tensor_floats(LimeTensor *tensor, float **values, int64_t axes[LIME_MOST_AXES], size_t *rank) {
    void *info = NULL;
    int type = 0;
    TRY(CALL(GetTensorTypeAndShape, Status *(*)(const void *, void **))(tensor, &info));
    Status *status = CALL(GetTensorElementType, Status *(*)(const void *, int *))(info, &type);
    char *fault = status != NULL ? read(status) : type != LIME_FLOAT ? copy("an output is not float32") : read_axes(info, axes, rank);
    RELEASE(ReleaseTensorTypeAndShapeInfo, info);
    if (fault != NULL) return fault;
    TRY(CALL(GetTensorMutableData, Status *(*)(void *, void **))(tensor, (void **)values));
    return NULL;
}

char *lime_stop_make(LimeStop **stop) {
    TRY(CALL(CreateRunOptions, Status *(*)(void **))((void **)stop));
    return NULL;
}

void lime_stop_now(LimeStop *stop) {
    Status *status = CALL(RunOptionsSetTerminate, Status *(*)(void *))(stop);
    if (status != NULL) free(read(status));
}

void lime_stop_free(LimeStop *stop) { RELEASE(ReleaseRunOptions, stop); }
