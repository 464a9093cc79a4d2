// C = alpha A B + beta C in f32, in four steps: a number of C a thread, tiles in shared memory, eight numbers of a column a thread, eight by
// eight numbers a thread.
struct Sizes { int m, n, k; float alpha, beta; };

// 32 x 32 threads; neighbours have neighbouring columns.
#ifdef ONLY_coalesced
extern "C" __global__ void coalesced(const float* a, const float* b, float* c, Sizes it) {
    const int row = blockIdx.x * 32 + threadIdx.x / 32, column = blockIdx.y * 32 + threadIdx.x % 32;
    if (row >= it.m || column >= it.n) return;
    float sum = 0.0f;
    for (int at = 0; at < it.k; at++) sum += a[row * it.k + at] * b[at * it.n + column];
    c[row * it.n + column] = it.alpha * sum + it.beta * c[row * it.n + column];
}
#endif

// The same with tiles of 32 x 32 of A and B in shared memory.
#ifdef ONLY_tiled
extern "C" __global__ void tiled(const float* a, const float* b, float* c, Sizes it) {
    __shared__ float as[32 * 32], bs[32 * 32];
    const unsigned column = threadIdx.x % 32, row = threadIdx.x / 32;
    a += blockIdx.x * 32 * it.k;
    b += blockIdx.y * 32;
    c += blockIdx.x * 32 * it.n + blockIdx.y * 32;
    float sum = 0.0f;
    for (int tile = 0; tile < it.k; tile += 32) {
        as[row * 32 + column] = a[row * it.k + column];
        bs[row * 32 + column] = b[row * it.n + column];
        __syncthreads();
        a += 32;
        b += 32 * it.n;
        for (int at = 0; at < 32; at++) sum += as[row * 32 + at] * bs[at * 32 + column];
        __syncthreads();
    }
    c[row * it.n + column] = it.alpha * sum + it.beta * c[row * it.n + column];
}
#endif

// Tiles of 64 x 64 and a depth of 8; 512 threads with eight numbers of a column each.
#ifdef ONLY_columns
extern "C" __global__ void columns(const float* a, const float* b, float* c, Sizes it) {
    __shared__ float as[64 * 8], bs[8 * 64];
    const int column = threadIdx.x % 64, group = threadIdx.x / 64;
    const unsigned from_a = threadIdx.x / 8, depth_a = threadIdx.x % 8, depth_b = threadIdx.x / 64, from_b = threadIdx.x % 64;
    a += blockIdx.y * 64 * it.k;
    b += blockIdx.x * 64;
    c += blockIdx.y * 64 * it.n + blockIdx.x * 64;
    float sums[8] = {0.0f};
    for (unsigned tile = 0; tile < it.k; tile += 8) {
        as[from_a * 8 + depth_a] = a[from_a * it.k + depth_a];
        bs[depth_b * 64 + from_b] = b[depth_b * it.n + from_b];
        __syncthreads();
        a += 8;
        b += 8 * it.n;
        for (unsigned at = 0; at < 8; at++) {
            const float factor = bs[at * 64 + column];
            for (unsigned i = 0; i < 8; i++) sums[i] += as[(group * 8 + i) * 8 + at] * factor;
        }
        __syncthreads();
    }
    for (unsigned i = 0; i < 8; i++) {
        float* to = c + (group * 8 + i) * it.n + column;
        *to = it.alpha * sums[i] + it.beta * *to;
    }
}
#endif

// Tiles of 128 x 128 and a depth of 8; 256 threads with eight by eight numbers each.
#ifdef ONLY_squares
extern "C" __global__ void __launch_bounds__(256, 1) squares(const float* a, const float* b, float* c, Sizes it) {
    __shared__ float as[128 * 8], bs[8 * 128];
    const int column = threadIdx.x % 16 * 8, row = threadIdx.x / 16 * 8;
    const unsigned from_a = threadIdx.x / 8, depth_a = threadIdx.x % 8, depth_b = threadIdx.x / 128, from_b = threadIdx.x % 128;
    a += blockIdx.y * 128 * it.k;
    b += blockIdx.x * 128;
    c += blockIdx.y * 128 * it.n + blockIdx.x * 128;
    float sums[64] = {0.0f}, left[8] = {0.0f}, right[8] = {0.0f};
    for (unsigned tile = 0; tile < it.k; tile += 8) {
        for (unsigned step = 0; step < 128; step += 32)
            as[(from_a + step) * 8 + depth_a] = a[(from_a + step) * it.k + depth_a];
        for (unsigned step = 0; step < 8; step += 2)
            bs[(depth_b + step) * 128 + from_b] = b[(depth_b + step) * it.n + from_b];
        __syncthreads();
        a += 8;
        b += 8 * it.n;
        for (unsigned at = 0; at < 8; at++) {
            for (unsigned i = 0; i < 8; i++) left[i] = as[(row + i) * 8 + at];
            for (unsigned j = 0; j < 8; j++) right[j] = bs[at * 128 + column + j];
            for (unsigned i = 0; i < 8; i++)
                for (unsigned j = 0; j < 8; j++) sums[i * 8 + j] += left[i] * right[j];
        }
        __syncthreads();
    }
    for (unsigned i = 0; i < 8; i++)
        for (unsigned j = 0; j < 8; j++) {
            float* to = c + (row + i) * it.n + column + j;
            *to = it.alpha * sums[i * 8 + j] + it.beta * *to;
        }
}
#endif
