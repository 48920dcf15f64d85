/* The part of ONNX Runtime's function table that lime_onnx.c uses. The table only ever grows, and a position never changes its
 * meaning; positions.c, which the tests build, compares them with ONNX Runtime's own header.
 *
 * Source of positions: onnxruntime_c_api.h of ONNX Runtime 1.21; used as version 17 of the interface. */
#ifndef LIME_ONNX_API_H
#define LIME_ONNX_API_H

#include <stddef.h>
#include <stdint.h>

enum { LIME_ORT_VERSION = 17 };

typedef void *const *OrtTable;
typedef struct {
    OrtTable (*get_api)(uint32_t version); /* NULL: this ONNX Runtime is older */
    const char *(*get_version)(void);
} OrtBase;

#define POSITIONS(X) \
    X(GetErrorMessage, 2) X(CreateEnv, 3) X(CreateSession, 7) X(Run, 9) X(CreateSessionOptions, 10) X(SetSessionLogSeverityLevel, 22) \
    X(SetIntraOpNumThreads, 24) X(SessionGetInputCount, 30) X(SessionGetOutputCount, 31) X(SessionGetInputTypeInfo, 33) \
    X(SessionGetOutputTypeInfo, 34) X(SessionGetInputName, 36) X(SessionGetOutputName, 37) X(CreateRunOptions, 39) \
    X(RunOptionsSetTerminate, 46) X(CreateTensorWithDataAsOrtValue, 49) X(GetTensorMutableData, 51) X(CastTypeInfoToTensorInfo, 55) \
    X(GetTensorElementType, 60) X(GetDimensionsCount, 61) X(GetDimensions, 62) X(GetTensorTypeAndShape, 65) X(CreateCpuMemoryInfo, 69) \
    X(AllocatorFree, 76) X(GetAllocatorWithDefaultOptions, 78) X(ReleaseStatus, 93) X(ReleaseSession, 95) X(ReleaseValue, 96) \
    X(ReleaseRunOptions, 97) X(ReleaseTypeInfo, 98) X(ReleaseTensorTypeAndShapeInfo, 99) X(ReleaseSessionOptions, 100) \
    X(GetAvailableProviders, 125) X(ReleaseAvailableProviders, 126) X(SessionOptionsAppendExecutionProvider, 216)

#define POSITION(name, place) AT_##name = place,
enum { POSITIONS(POSITION) };
#undef POSITION

#endif
