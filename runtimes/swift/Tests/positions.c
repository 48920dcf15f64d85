/* Whether api.h's positions are those of ONNX Runtime's own header: compiled for its assertions, never run. */
#include <onnxruntime_c_api.h>

#include "../Sources/CLimeONNX/api.h"

#define SAME(name, place) _Static_assert(offsetof(OrtApi, name) == (place) * sizeof(void *), #name);
POSITIONS(SAME)
_Static_assert(offsetof(OrtApiBase, GetVersionString) == offsetof(OrtBase, get_version), "OrtApiBase");
_Static_assert(ORT_API_VERSION >= LIME_ORT_VERSION, "an older header");
_Static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT == 1 && ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 == 7, "element types");
_Static_assert(ORT_LOGGING_LEVEL_ERROR == 3 && OrtDeviceAllocator == 0 && OrtMemTypeDefault == 0, "constants");
