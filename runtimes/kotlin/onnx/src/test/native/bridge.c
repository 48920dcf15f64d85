// A libonnxruntime.so.1 that hands on to another build of ONNX Runtime, for tests only.
//
// ONNX Runtime's Java natives ask for symbols of their own version (VERS_1.29.0), and Maven Central and PyPI serve different
// versions. Answers are compared bit by bit with Python's on the *same* library: this file carries the version that
// the Java natives want and opens Python's library (REAL, a path). Its API is versioned and newer ones serve older callers.
//
//   cc -shared -fPIC -DREAL='"/.../libonnxruntime.so.1.31.1"' -Wl,-soname,libonnxruntime.so.1 \
//      -Wl,--version-script=bridge.map bridge.c -ldl -o libonnxruntime.so
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

static void *find(const char *name) {
  void *library = dlopen(REAL, RTLD_NOW | RTLD_LOCAL);
  void *symbol = library ? dlsym(library, name) : NULL;
  if (!symbol) {
    fprintf(stderr, "bridge to %s: %s\n", REAL, dlerror());
    abort();
  }
  return symbol;
}

const void *OrtGetApiBase(void) { return ((const void *(*)(void))find("OrtGetApiBase"))(); }

void *OrtSessionOptionsAppendExecutionProvider_CPU(void *options, int arena) {
  return ((void *(*)(void *, int))find("OrtSessionOptionsAppendExecutionProvider_CPU"))(options, arena);
}
