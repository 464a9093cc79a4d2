// The words of CUDA C++ that CubeCL's kernels use, for a host compiler. Each thread of a block runs on a fiber of its own; what
// threads do together goes through the hooks, which the crate sets before a launch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define __global__
#define __device__ static inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__
#define UM_UNSEEN __attribute__((no_sanitize("thread"), noinline))
#define UM_INLINE __attribute__((always_inline)) static inline

struct uint3 {
    unsigned x, y, z;
};
typedef uint3 dim3;

static inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return uint3{x, y, z}; }

// What the crate tells a kernel. The same layouts are in execute.rs.
struct um_lane_t {
    uint3 thread, block, dim, grid;
    unsigned lane;
};

struct um_hooks_t {
    // An access that is about to happen: the sum of 1 for a load, 2 for a store and 4 where it is atomic.
    void (*access)(const void *address, unsigned size, unsigned kind, const void *site);
    // Waits for every thread of the block.
    void (*block_wait)(unsigned line);
    // Gives a value to the warp and waits for the lanes in the mask; returns the values of all 32.
    const uint64_t *(*exchange)(unsigned mask, uint64_t value, unsigned line);
    // A product of matrix fragments.
    void (*product)();
    // An iteration of a loop begins.
    void (*loop)();
};

extern "C" {
um_lane_t *um_lane;
um_hooks_t um_hooks;
// What follows the kernel's own part is there to see accesses past the end of it.
alignas(1024) unsigned char dynamic_shared_mem[UM_SHARED + UM_GUARD];
}

constexpr int warpSize = 32;

// A thread is the same thread for as long as it runs: hence `const`.
#define UM_POSITION __attribute__((no_sanitize("thread"), noinline, const))
UM_POSITION static uint3 um_thread() { return um_lane->thread; }
UM_POSITION static uint3 um_block() { return um_lane->block; }
UM_POSITION static uint3 um_dim() { return um_lane->dim; }
UM_POSITION static uint3 um_grid() { return um_lane->grid; }

#define threadIdx (um_thread())
#define blockIdx (um_block())
#define blockDim (um_dim())
#define gridDim (um_grid())

// What the crate writes at the head of each loop's body.
UM_UNSEEN static void um_loop() { um_hooks.loop(); }

// Barriers, shuffles and votes.

UM_UNSEEN static void um_block_wait(unsigned line) { um_hooks.block_wait(line); }
UM_UNSEEN static const uint64_t *um_exchange(unsigned mask, uint64_t value, unsigned line) {
    return um_hooks.exchange(mask, value, line);
}

template <class T> static inline uint64_t um_bits(T value) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    return bits;
}

// The value of lane `source`; a lane's own where there is no such lane in its segment.
template <class T> UM_UNSEEN T um_shuffle(unsigned mask, T value, unsigned source, bool inside, unsigned line) {
    const uint64_t *values = um_exchange(mask, um_bits(value), line);
    T result = value;
    if (inside) memcpy(&result, &values[source], sizeof(T));
    return result;
}

template <class T> UM_UNSEEN T um_shfl(unsigned mask, T value, int source, int width, unsigned line) {
    unsigned first = um_lane->lane & ~(width - 1);
    return um_shuffle(mask, value, first + (source & (width - 1)), true, line);
}
template <class T> UM_UNSEEN T um_shfl_xor(unsigned mask, T value, int flip, int width, unsigned line) {
    unsigned source = um_lane->lane ^ flip;
    return um_shuffle(mask, value, source & 31, source < (um_lane->lane & ~(width - 1)) + width, line);
}
template <class T> UM_UNSEEN T um_shfl_up(unsigned mask, T value, unsigned delta, int width, unsigned line) {
    unsigned place = um_lane->lane & (width - 1);
    return um_shuffle(mask, value, um_lane->lane - delta, place >= delta, line);
}
template <class T> UM_UNSEEN T um_shfl_down(unsigned mask, T value, unsigned delta, int width, unsigned line) {
    unsigned place = um_lane->lane & (width - 1);
    return um_shuffle(mask, value, um_lane->lane + delta, place + delta < unsigned(width), line);
}
UM_UNSEEN static unsigned um_ballot(unsigned mask, bool vote, unsigned line) {
    const uint64_t *votes = um_exchange(mask, vote, line);
    unsigned bits = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1 && votes[lane]) bits |= 1u << lane;
    return bits;
}
UM_UNSEEN static bool um_all(unsigned mask, bool vote, unsigned line) { return !um_ballot(mask, !vote, line); }

// The width may be left out, as in CUDA.
#define UM_WIDTH(width, ...) width
#define __shfl_sync(mask, value, at, ...) um_shfl(mask, value, at, UM_WIDTH(__VA_ARGS__ __VA_OPT__(, ) 32), __LINE__)
#define __shfl_xor_sync(mask, value, at, ...) um_shfl_xor(mask, value, at, UM_WIDTH(__VA_ARGS__ __VA_OPT__(, ) 32), __LINE__)
#define __shfl_up_sync(mask, value, at, ...) um_shfl_up(mask, value, at, UM_WIDTH(__VA_ARGS__ __VA_OPT__(, ) 32), __LINE__)
#define __shfl_down_sync(mask, value, at, ...) um_shfl_down(mask, value, at, UM_WIDTH(__VA_ARGS__ __VA_OPT__(, ) 32), __LINE__)
#define __ballot_sync(mask, vote) um_ballot(mask, vote, __LINE__)
#define __any_sync(mask, vote) (um_ballot(mask, vote, __LINE__) != 0)
#define __all_sync(mask, vote) um_all(mask, vote, __LINE__)
#define __syncwarp() ((void)um_exchange(~0u, 0, __LINE__))
#define __syncthreads() um_block_wait(__LINE__)
static inline void __threadfence() {}

// Atomics: nothing else runs meanwhile. CubeCL stores by an exchange whose result it drops: that one loads nothing.

template <class T, class F> UM_UNSEEN T um_atomic(T *place, unsigned kind, F change) {
    um_hooks.access(place, sizeof(T), kind, __builtin_return_address(0));
    T old = *place;
    *place = change(old);
    return old;
}
#define UM_ATOMIC(name, kind, expression)                                                                                    \
    template <class T> UM_INLINE T name(T *place, std::common_type_t<T> value) {                                       \
        return um_atomic(place, kind, [=](T old) -> T { return expression; });                                         \
    }
UM_ATOMIC(atomicAdd, 7, old + value)
UM_ATOMIC(atomicSub, 7, old - value)
UM_ATOMIC(atomicExch, 6, value)
UM_ATOMIC(atomicMin, 7, value < old ? value : old)
UM_ATOMIC(atomicMax, 7, old < value ? value : old)
UM_ATOMIC(atomicAnd, 7, old & value)
UM_ATOMIC(atomicOr, 7, old | value)
UM_ATOMIC(atomicXor, 7, old ^ value)
template <class T> UM_INLINE T atomicCAS(T *place, std::common_type_t<T> expected, std::common_type_t<T> value) {
    return um_atomic(place, 7, [=](T old) -> T { return old == expected ? value : old; });
}

// Numbers.

template <class A, class B> static inline std::common_type_t<A, B> min(A a, B b) {
    typedef std::common_type_t<A, B> T;
    if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));
    else return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B> static inline std::common_type_t<A, B> max(A a, B b) {
    typedef std::common_type_t<A, B> T;
    if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
    else return T(a) < T(b) ? T(b) : T(a);
}
// One rounding, as the GPU's instruction; the compiler makes it one instruction too.
using std::fma;
static inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
#define __expf(x) std::exp(float(x))
#define __logf(x) std::log(float(x))
#define __powf(x, y) std::pow(float(x), float(y))
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline float __fsqrt_rn(float x) { return std::sqrt(x); }
static inline float __frsqrt_rn(float x) { return 1.0f / std::sqrt(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(uint64_t x) { return __builtin_popcountll(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
static inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
static inline unsigned __umulhi(unsigned a, unsigned b) { return uint64_t(a) * b >> 32; }

// Calls a kernel with pointers to its arguments, as the driver does.
template <class... A, size_t... I> UM_UNSEEN static void um_call(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
    kernel(*reinterpret_cast<std::remove_const_t<A> *>(arguments[I])...);
}
template <class... A> UM_UNSEEN static void um_call(void (*kernel)(A...), void **arguments) {
    um_call(kernel, arguments, std::index_sequence_for<A...>());
}

#include "accesses.h"
