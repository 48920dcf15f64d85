/* WIDE float32 at a time, one register: AVX2 with FMA and F16C on x86-64, NEON on arm64 (gcc spills wider ones). */
#ifndef LIME_EDGE_SIMD_H
#define LIME_EDGE_SIMD_H

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define SIMD __attribute__((target("avx2,fma,f16c")))
enum { WIDE = 8 };
#elif defined(__aarch64__)
#include <arm_neon.h>
#define SIMD
enum { WIDE = 4 };
#else
#error "only x86-64 and arm64 have these operators; ONNX Runtime runs the functions in the graph instead"
#endif
#define INLINE static inline __attribute__((always_inline, unused)) SIMD

typedef float vec __attribute__((vector_size(4 * WIDE)));
typedef int32_t ivec __attribute__((vector_size(4 * WIDE)));

INLINE vec load(const float *from) {
    vec values;
    memcpy(&values, from, sizeof values);
    return values;
}

INLINE void store(float *to, vec values) { memcpy(to, &values, sizeof values); }

#if defined(__x86_64__)
INLINE vec spread(float value) { return (vec){value, value, value, value, value, value, value, value}; }
#else
INLINE vec spread(float value) { return (vec){value, value, value, value}; }
#endif

/* sum + one * two, rounded once: spelled out so that no compiler rounds it twice in one place and once in another. */
INLINE vec fuse(vec one, vec two, vec sum) {
#if defined(__x86_64__)
    return (vec)_mm256_fmadd_ps((__m256)one, (__m256)two, (__m256)sum);
#else
    return (vec)vfmaq_f32((float32x4_t)sum, (float32x4_t)one, (float32x4_t)two);
#endif
}

INLINE float add_lanes(vec v) {
    float sum = 0;
    for (int i = 0; i < WIDE; i += 4) sum += (v[i] + v[i + 1]) + (v[i + 2] + v[i + 3]);
    return sum;
}

/* WIDE weights from element `index` on: float16 where `half`, else float32. `half` is a constant at every call. */
INLINE vec load_weights(const void *weights, int64_t index, int half) {
    if (!half) return load((const float *)weights + index);
    const uint16_t *from = (const uint16_t *)weights + index;
#if defined(__x86_64__)
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)from));
#else
    return (vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
#endif
}

INLINE float load_weight(const void *weights, int64_t index, int half) {
    if (!half) return ((const float *)weights)[index];
    const uint16_t *from = (const uint16_t *)weights + index;
#if defined(__x86_64__)
    return _cvtsh_ss(*from);
#else
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vld1_dup_u16(from))), 0);
#endif
}

/* e^x to about 1e-7 of it: 2^n times a polynomial of degree 6 on |r| <= log(2) / 2. Above 88.37 it is infinite, below
 * -87 it stays e^-87. */
INLINE vec exponential(vec x) {
    const float to_nearest = 12582912.0f; /* 1.5 * 2^23: adding it leaves the rounded integer */
    ivec low = x < -87.0f, high = x > 89.0f;
    x = (vec)(((ivec)x & ~low & ~high) | ((ivec)spread(-87.0f) & low) | ((ivec)spread(89.0f) & high));
    vec n = x * 1.44269504f + to_nearest - to_nearest;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f; /* log(2) in two parts: n times the first is exact */
    vec p = r * (1.0f / 720) + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (vec)((__builtin_convertvector(n, ivec) + 127) << 23);
}

#endif
