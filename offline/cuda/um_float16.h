// A 16-bit float on the host: stored in 16 bits, computed in f32, rounded to the nearest, ties to even, as the GPU does.
#pragma once

#include "cuda_runtime.h"

static inline uint16_t um_to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7fff;
    if (magnitude >= 0x477ff000) return sign | 0x7c00;
    if (magnitude < 0x38800000) {
        // Adding a half leaves the subnormal's bits at the end of the sum, rounded.
        float sum = std::fabs(value) + 0.5f;
        uint32_t ends;
        memcpy(&ends, &sum, 4);
        return sign | (ends - 0x3f000000);
    }
    uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return sign | ((rounded - 0x38000000) >> 13);
}

static inline float um_from_half(uint16_t half) {
    uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude < 0x400) return (sign ? -1.0f : 1.0f) * float(magnitude) * 0x1p-24f;
    uint32_t bits = sign | ((magnitude << 13) + (magnitude >= 0x7c00 ? 0x70000000 : 0x38000000));
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t um_to_bfloat(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static inline float um_from_bfloat(uint16_t half) {
    uint32_t bits = uint32_t(half) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

template <uint16_t (*TO)(float), float (*FROM)(uint16_t)> struct um_float16 {
    uint16_t bits;

    um_float16() = default;
    template <class N, class = std::enable_if_t<std::is_arithmetic_v<N>>> um_float16(N value) : bits(TO(float(value))) {}
    operator float() const { return FROM(bits); }
    um_float16 &operator+=(um_float16 other) { return *this = *this + other; }
    um_float16 &operator*=(um_float16 other) { return *this = *this * other; }
    friend um_float16 operator+(um_float16 a, um_float16 b) { return float(a) + float(b); }
    friend um_float16 operator-(um_float16 a, um_float16 b) { return float(a) - float(b); }
    friend um_float16 operator*(um_float16 a, um_float16 b) { return float(a) * float(b); }
    friend um_float16 operator/(um_float16 a, um_float16 b) { return float(a) / float(b); }
    friend um_float16 operator-(um_float16 a) { return -float(a); }
};

// Two of them, as one register of the GPU.
template <class T> struct um_pair16 {
    T x, y;

    friend um_pair16 operator+(um_pair16 a, um_pair16 b) { return {a.x + b.x, a.y + b.y}; }
    friend um_pair16 operator-(um_pair16 a, um_pair16 b) { return {a.x - b.x, a.y - b.y}; }
    friend um_pair16 operator*(um_pair16 a, um_pair16 b) { return {a.x * b.x, a.y * b.y}; }
    friend um_pair16 operator/(um_pair16 a, um_pair16 b) { return {a.x / b.x, a.y / b.y}; }
};

#define UM_FLOAT16_FUNCTIONS(T, T2)                                                                                    \
    static inline T __hmin(T a, T b) { return std::fmin(float(a), float(b)); }                                         \
    static inline T __hmax(T a, T b) { return std::fmax(float(a), float(b)); }                                         \
    static inline T __hfma(T a, T b, T c) { return std::fma(float(a), float(b), float(c)); }                           \
    static inline T hexp(T x) { return std::exp(float(x)); }                                                           \
    static inline T hlog(T x) { return std::log(float(x)); }                                                           \
    static inline T hsqrt(T x) { return std::sqrt(float(x)); }                                                         \
    static inline T __habs(T x) { return std::fabs(float(x)); }                                                        \
    static inline bool __hisnan(T x) { return std::isnan(float(x)); }                                                  \
    static inline T2 __hfma2(T2 a, T2 b, T2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }              \
    static inline T2 __hmin2(T2 a, T2 b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }                              \
    static inline T2 __hmax2(T2 a, T2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }                              \
    static inline T2 h2exp(T2 x) { return {hexp(x.x), hexp(x.y)}; }                                                    \
    static inline T2 h2log(T2 x) { return {hlog(x.x), hlog(x.y)}; }                                                    \
    static inline T2 h2sqrt(T2 x) { return {hsqrt(x.x), hsqrt(x.y)}; }                                                 \
    static inline T2 __habs2(T2 x) { return {__habs(x.x), __habs(x.y)}; }
