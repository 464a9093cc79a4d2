// Matrix fragments. Each lane keeps the whole matrix, so that a product needs no exchange; of a load or a store a lane tells, and
// stores, its own share only.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace nvcuda {
namespace wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };
namespace precision {
struct tf32 {};
}

template <class T> struct um_stored { typedef T type; };
template <> struct um_stored<precision::tf32> { typedef float type; };

template <class Use, int M, int N, int K> struct um_shape;
template <int M, int N, int K> struct um_shape<matrix_a, M, N, K> { static const int rows = M, columns = K; };
template <int M, int N, int K> struct um_shape<matrix_b, M, N, K> { static const int rows = K, columns = N; };
template <int M, int N, int K> struct um_shape<accumulator, M, N, K> { static const int rows = M, columns = N; };

template <class Use, int M, int N, int K, class T, class Layout = void> struct fragment : um_shape<Use, M, N, K> {
    typedef typename um_stored<T>::type element;
    typedef um_shape<Use, M, N, K> shape;
    static const int num_elements = shape::rows * shape::columns;
    element x[num_elements];
};

// Where element (row, column) lies in memory.
static inline unsigned um_offset(int row, int column, unsigned pitch, bool rows_first) {
    return rows_first ? row * pitch + column : column * pitch + row;
}

template <class F, class T> UM_UNSEEN void um_load(F &to, const T *from, unsigned pitch, bool rows_first, unsigned line) {
    um_exchange(~0u, 0, line);
    for (int i = 0; i < F::num_elements; ++i) {
        int row = i / F::columns, column = i % F::columns;
        const T *at = from + um_offset(row, column, pitch, rows_first);
        if (i % 32 == int(um_lane->lane)) um_hooks.access(at, sizeof(T), 1, __builtin_return_address(0));
        to.x[i] = *at;
    }
    um_exchange(~0u, 0, line);
}

template <class F, class T> UM_UNSEEN void um_store(T *to, const F &from, unsigned pitch, bool rows_first, unsigned line) {
    um_exchange(~0u, 0, line);
    for (int i = um_lane->lane; i < F::num_elements; i += 32) {
        T *at = to + um_offset(i / F::columns, i % F::columns, pitch, rows_first);
        um_hooks.access(at, sizeof(T), 2, __builtin_return_address(0));
        *at = from.x[i];
    }
    um_exchange(~0u, 0, line);
}

template <class Use, int M, int N, int K, class T, class L, class E>
static inline void load_matrix_sync(fragment<Use, M, N, K, T, L> &to, const E *from, unsigned pitch) {
    um_load(to, from, pitch, std::is_same_v<L, row_major>, __LINE__);
}
template <int M, int N, int K, class T, class E>
static inline void load_matrix_sync(fragment<accumulator, M, N, K, T> &to, const E *from, unsigned pitch, layout_t layout) {
    um_load(to, from, pitch, layout == mem_row_major, __LINE__);
}
template <int M, int N, int K, class T, class E>
static inline void store_matrix_sync(E *to, const fragment<accumulator, M, N, K, T> &from, unsigned pitch, layout_t layout) {
    um_store(to, from, pitch, layout == mem_row_major, __LINE__);
}
template <class F, class V> UM_UNSEEN void fill_fragment(F &to, V value) {
    for (auto &element : to.x) element = typename F::element(value);
}

static inline float __float_to_tf32(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits = (bits + 0x1000) & ~0x1fffu;
    memcpy(&value, &bits, 4);
    return value;
}
static inline float um_operand(precision::tf32, float x) { return __float_to_tf32(x); }
template <class T> static inline float um_operand(T, T x) { return x; }

template <int M, int N, int K, class TA, class LA, class TB, class LB, class TC>
UM_UNSEEN void mma_sync(fragment<accumulator, M, N, K, TC> &d, const fragment<matrix_a, M, N, K, TA, LA> &a,
                        const fragment<matrix_b, M, N, K, TB, LB> &b, const fragment<accumulator, M, N, K, TC> &c) {
    um_hooks.product();
    float left[M * K], right[K * N], sums[M * N];
    for (int i = 0; i < M * K; ++i) left[i] = um_operand(TA(), a.x[i]);
    for (int i = 0; i < K * N; ++i) right[i] = um_operand(TB(), b.x[i]);
    for (int i = 0; i < M * N; ++i) sums[i] = c.x[i];
    for (int m = 0; m < M; ++m)
        for (int k = 0; k < K; ++k)
            for (int n = 0; n < N; ++n) sums[m * N + n] += left[m * K + k] * right[k * N + n];
    for (int i = 0; i < M * N; ++i) d.x[i] = sums[i];
}

} // namespace wmma
} // namespace nvcuda

using nvcuda::wmma::__float_to_tf32;
