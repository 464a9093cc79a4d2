// Products in f16 with sums in f32 by mma.sync, in three steps: fragments picked from shared memory number by number; tiles of 64 x 64 by
// ldmatrix from a layout without conflicts; tiles of 128 x 128 in three stages that cp.async fills. B is given by columns for the last two.
#include <cuda_fp16.h>

struct Sizes { int m, n, k; };

__device__ __forceinline__ void multiply(const unsigned* a, const unsigned* b, float* sums) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void load_four(unsigned* to, const uint4* from) {
    asm volatile("ldmatrix.sync.aligned.x4.m8n8.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"((unsigned)__cvta_generic_to_shared(from)));
}

__device__ __forceinline__ void load_two(unsigned* to, const uint4* from) {
    asm volatile("ldmatrix.sync.aligned.x2.m8n8.shared.b16 {%0,%1}, [%2];"
        : "=r"(to[0]), "=r"(to[1]) : "r"((unsigned)__cvta_generic_to_shared(from)));
}

__device__ __forceinline__ void copy_async(uint4* to, const uint4* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;"
        :: "r"((unsigned)__cvta_generic_to_shared(to)), "l"(from));
}

// Blocks of 32 x 32 and a depth of 16, eight warps of 16 x 8.
#ifdef ONLY_picked
extern "C" __global__ void __launch_bounds__(256) picked(const half* a, const half* b, float* c, Sizes it) {
    __shared__ half as[32][16], bs[16][32];
    const int top = 32 * blockIdx.y, first = 32 * blockIdx.x, x = threadIdx.x, y = threadIdx.y;
    const int thread = y * blockDim.x + x, warp = thread / 32, lane = thread % 32;
    const int column = 8 * (warp % 4), row = 16 * (warp / 4), group = lane / 4, pair = 2 * (lane % 4);
    half left[8], right[4];
    float sums[4] = {0.0f};
    for (int tile = 0; tile < it.k; tile += 16) {
        as[y][x] = a[(top + y) * it.k + tile + x];
        as[y + 16][x] = a[(top + y + 16) * it.k + tile + x];
        bs[y][x] = b[(tile + y) * it.n + first + x];
        bs[y][x + 16] = b[(tile + y) * it.n + first + 16 + x];
        __syncthreads();
        #pragma unroll
        for (int i = 0; i < 8; i++) left[i] = as[row + group + (i & 2 ? 8 : 0)][pair + (i & 1) + (i & 4 ? 8 : 0)];
        #pragma unroll
        for (int i = 0; i < 4; i++) right[i] = bs[pair + (i & 1) + (i & 2 ? 8 : 0)][column + group];
        multiply((const unsigned*)left, (const unsigned*)right, sums);
        __syncthreads();
    }
    float* to = c + (top + row + group) * it.n + first + column + pair;
    to[0] = sums[0];
    to[1] = sums[1];
    to[8 * it.n] = sums[2];
    to[8 * it.n + 1] = sums[3];
}
#endif

// Where a lane stores sixteen bytes of a tile, and where it finds its part of A and of B.
struct Places {
    int row, column, row_a, column_a, row_b, column_b;
    __device__ Places(int warp, int lane) {
        row = warp * 4 + lane / 8;
        column = (lane % 8) ^ (lane / 8);
        row_a = (lane % 16) / 2;
        column_a = (lane / 16 + 4 * (lane % 2)) ^ (row_a % 4);
        row_b = (lane % 8) / 2;
        column_b = (lane / 8 + 4 * (lane % 2)) ^ (row_b % 4);
    }
};

template <int TILES>
__device__ __forceinline__ void store(float (*sums)[TILES][4], float* c, int n, int lane) {
    #pragma unroll
    for (int i = 0; i < TILES; i++)
        #pragma unroll
        for (int j = 0; j < TILES; j++) {
            float* to = c + (i * 16 + lane / 4) * n + j * 8 + 2 * (lane % 4);
            *(float2*)to = make_float2(sums[i][j][0], sums[i][j][1]);
            *(float2*)(to + 8 * n) = make_float2(sums[i][j][2], sums[i][j][3]);
        }
}

// Blocks of 64 x 64 and a depth of 32, eight warps of 32 x 16.
#ifdef ONLY_permuted
extern "C" __global__ void __launch_bounds__(256) permuted(const half* a, const half* b, float* c, Sizes it) {
    __shared__ uint4 as[32][8], bs[32][8];
    const int top = blockIdx.y * 64, first = blockIdx.x * 64;
    const int thread = threadIdx.y * blockDim.x + threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int from_a = 16 * (warp / 4), from_b = 8 * (warp % 4);
    const Places at(warp, lane);
    const uint4* tile_a = (const uint4*)(a + top * it.k);
    const uint4* tile_b = (const uint4*)(b + first * it.k);
    unsigned left[4], right[2];
    float sums[2][2][4] = {0.0f};
    for (int tile = 0; tile < it.k / 8; tile += 4) {
        as[at.row][at.column] = tile_a[(warp * 8 + lane / 4) * it.k / 8 + tile + lane % 4];
        bs[at.row][at.column] = tile_b[(warp * 8 + lane / 4) * it.k / 8 + tile + lane % 4];
        __syncthreads();
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < 2; j++)
                for (int half = 0; half < 4; half += 2) {
                    load_four(left, as[from_a + i * 8 + at.row_a] + (at.column_a ^ half));
                    load_two(right, bs[from_b + j * 4 + at.row_b] + (at.column_b ^ half));
                    multiply(left, right, sums[i][j]);
                }
        __syncthreads();
    }
    store<2>(sums, c + (top + 2 * from_a) * it.n + first + 2 * from_b, it.n, lane);
}
#endif

// Blocks of 128 x 128 and a depth of 32 in three stages, eight warps of 64 x 32.
#ifdef ONLY_staged
extern "C" __global__ void __launch_bounds__(256) staged(const half* a, const half* b, float* c, Sizes it) {
    __shared__ uint4 as[3 * 64][8], bs[3 * 64][8];
    const int top = blockIdx.y * 128, first = blockIdx.x * 128;
    const int thread = threadIdx.y * blockDim.x + threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int from_a = 32 * (warp / 4), from_b = 16 * (warp % 4);
    const Places at(warp, lane);
    const uint4* tile_a = (const uint4*)(a + top * it.k) + (warp * 8 + lane / 4) * it.k / 8 + lane % 4;
    const uint4* tile_b = (const uint4*)(b + first * it.k) + (warp * 8 + lane / 4) * it.k / 8 + lane % 4;
    const int half = 64 * it.k / 8;
    auto fetch = [&](int stage, int from) {
        uint4 (*to_a)[8] = as + 64 * stage, (*to_b)[8] = bs + 64 * stage;
        copy_async(to_a[at.row] + at.column, tile_a + from);
        copy_async(to_a[at.row + 32] + at.column, tile_a + half + from);
        copy_async(to_b[at.row] + at.column, tile_b + from);
        copy_async(to_b[at.row + 32] + at.column, tile_b + half + from);
        asm volatile("cp.async.commit_group;");
    };
    unsigned left[4][8], right[4][4];
    float sums[4][4][4] = {0.0f};
    fetch(0, 0);
    fetch(1, 4);
    for (int stage = 0; stage < it.k / 32; stage++) {
        uint4 (*tile_a)[8] = as + 64 * (stage % 3), (*tile_b)[8] = bs + 64 * (stage % 3);
        asm volatile("cp.async.wait_group 1;");
        __syncthreads();
        for (int i = 0; i < 4; i++) {
            load_four(left[i], tile_a[i * 8 + from_a + at.row_a] + at.column_a);
            load_four(left[i] + 4, tile_a[i * 8 + from_a + at.row_a] + (at.column_a ^ 2));
        }
        for (int j = 0; j < 4; j++) {
            load_two(right[j], tile_b[j * 4 + from_b + at.row_b] + at.column_b);
            load_two(right[j] + 2, tile_b[j * 4 + from_b + at.row_b] + (at.column_b ^ 2));
        }
        fetch((stage + 2) % 3, min((stage + 2) * 4, it.k / 8 - 4));
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++) {
                multiply(left[i], right[j], sums[i][j]);
                multiply(left[i] + 4, right[j] + 2, sums[i][j]);
            }
    }
    store<4>(sums, c + (top + 2 * from_a) * it.n + first + 2 * from_b, it.n, lane);
}
#endif
