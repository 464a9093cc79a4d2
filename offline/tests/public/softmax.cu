// Softmax of rows, a block of 256 threads a row: a running maximum and sum, joined over a warp by shuffles and over warps in shared
// memory, then the row once more.
#define THREADS 256
#define WARPS (THREADS / 32)

struct Sizes { unsigned long long columns; };

__device__ void join_lanes(float& highest, float& sum) {
    for (int step = 16; step > 0; step /= 2) {
        const float other = __shfl_down_sync(0xffffffff, highest, step);
        const float its_sum = __shfl_down_sync(0xffffffff, sum, step);
        const float joined = fmaxf(other, highest);
        sum = sum * expf(highest - joined) + its_sum * expf(other - joined);
        highest = joined;
    }
}

extern "C" __global__ void softmax(const float* from, float* to, Sizes sizes) {
    __shared__ float parts[2 * WARPS];
    const unsigned long long columns = sizes.columns, row = blockIdx.x * columns, end = row + columns;
    const unsigned long long thread = threadIdx.x, steps = (columns + THREADS - 1) / THREADS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float highest = from[row + thread], sum = 1.0f;
    for (int step = 1; step < steps; step++) {
        const int at = row + step * THREADS + thread;
        if (at < end) {
            const float joined = fmaxf(highest, from[at]);
            sum = sum * expf(highest - joined) + expf(from[at] - joined);
            highest = joined;
        }
    }
    join_lanes(highest, sum);
    if (lane == 0) { parts[2 * warp] = highest; parts[2 * warp + 1] = sum; }
    __syncthreads();
    highest = -3.4e38f;
    sum = 0.0f;
    if (lane < WARPS) { highest = parts[2 * lane]; sum = parts[2 * lane + 1]; }
    join_lanes(highest, sum);
    highest = __shfl_sync(0xffffffff, highest, 0);
    sum = __shfl_sync(0xffffffff, sum, 0);
    for (int step = 0; step < steps; step++) {
        const int at = row + step * THREADS + thread;
        if (at < end) to[at] = expf(from[at] - highest) / sum;
    }
}
