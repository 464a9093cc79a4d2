// Sums of a long vector: a number a thread, or twelve, then a tree in shared memory.
#define THREADS 512

struct Sizes { unsigned long long count; };

// A barrier at each step of the tree; a block's sum is stored.
#ifdef ONLY_sum_by_tree
extern "C" __global__ void sum_by_tree(const int* numbers, int* sums, Sizes sizes) {
    __shared__ int part[THREADS];
    const int thread = threadIdx.x, stride = THREADS * gridDim.x;
    int sum = 0;
    for (int at = blockIdx.x * THREADS + thread; at < sizes.count; at += stride) sum += numbers[at];
    part[thread] = sum;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (thread < half) part[thread] += part[thread + half];
        __syncthreads();
    }
    if (thread == 0) sums[blockIdx.x] = part[0];
}
#endif

// The last warp without barriers; a block's sum is added to that of all.
__device__ void add_up(int* part, int sum, int* all) {
    const int thread = threadIdx.x;
    part[thread] = sum;
    __syncthreads();
    #pragma unroll
    for (int half = THREADS / 2; half > 32; half /= 2) {
        if (thread < half) part[thread] += part[thread + half];
        __syncthreads();
    }
    volatile int* last = part;
    #pragma unroll
    for (int half = 32; half > 0; half /= 2) {
        if (thread < half) last[thread] += last[thread + half];
        __syncwarp();
    }
    if (thread == 0) atomicAdd(all, last[0]);
}

#ifdef ONLY_sum_of_one
extern "C" __global__ void sum_of_one(const int* numbers, int* all, Sizes sizes) {
    __shared__ int part[THREADS];
    const int at = blockIdx.x * THREADS + threadIdx.x;
    add_up(part, at < sizes.count ? numbers[at] : 0, all);
}
#endif

#ifdef ONLY_sum_of_twelve
extern "C" __global__ void sum_of_twelve(const int* numbers, int* all, Sizes sizes) {
    __shared__ int part[THREADS];
    const int first = (blockIdx.x * THREADS + threadIdx.x) * 12;
    int sum = 0;
    #pragma unroll
    for (int step = 0; step < 12; step++)
        if (first + step < sizes.count) sum += numbers[first + step];
    add_up(part, sum, all);
}
#endif
