// The k highest of each row in bf16, a block a row: the k-th number by radix selection, two bits a pass, counted by ballots; those above it
// in their order by a scan of votes, then those equal to it. A second kernel sorts what was kept, 32 a row, by a bitonic network.
#include <cuda_bf16.h>

struct Sizes { unsigned count, k; };

// Numbers in their order.
__device__ unsigned ordered(unsigned short bits) {
    const unsigned wide = bits, mask = wide & 0x8000 ? 0xffff : 0x8000;
    const float number = __uint_as_float(wide << 16);
    return number == number ? wide ^ mask : 0xffff;
}

// How many of the row that agree with `found` where `mask` is set have each value of the next two bits.
__device__ void count_digits(unsigned counts[4], unsigned* sums, unsigned found, unsigned mask, int shift, const unsigned short* row,
                             unsigned count) {
    #pragma unroll
    for (int digit = 0; digit < 4; digit++) counts[digit] = 0;
    if (threadIdx.x < 4) sums[threadIdx.x] = 0;
    __syncthreads();
    unsigned lanes = __ballot_sync(0xffffffff, threadIdx.x < count);
    for (unsigned at = threadIdx.x; at < count;) {
        const unsigned number = ordered(__ldg(row + at));
        const bool fits = (number & mask) == found;
        const unsigned own = (number >> shift) & 3;
        #pragma unroll
        for (unsigned digit = 0; digit < 4; digit++)
            counts[digit] += __popc(__ballot_sync(lanes, fits && own == digit));
        at += blockDim.x;
        lanes = __ballot_sync(lanes, at < count);
    }
    if (threadIdx.x % 32 == 0) {
        #pragma unroll
        for (int digit = 0; digit < 4; digit++) atomicAdd(sums + digit, counts[digit]);
    }
    __syncthreads();
    #pragma unroll
    for (int digit = 0; digit < 4; digit++) counts[digit] = sums[digit];
    __syncthreads();
}

// The one number that agrees with `found`.
__device__ unsigned short only(unsigned short* flag, unsigned found, unsigned mask, const unsigned short* row, unsigned count) {
    if (threadIdx.x < 2) flag[threadIdx.x] = 0;
    __syncthreads();
    const unsigned end = (count + blockDim.x - 1) / blockDim.x * blockDim.x;
    for (unsigned at = threadIdx.x; at < end; at += blockDim.x) {
        const unsigned short number = at < count ? __ldg(row + at) : 0;
        if (at < count && (ordered(number) & mask) == found) { flag[0] = 1; flag[1] = number; }
        __syncthreads();
        const unsigned short seen = flag[0], its = flag[1];
        __syncthreads();
        if (seen) return its;
    }
    return 0;
}

__device__ unsigned short kth(unsigned* sums, const unsigned short* row, unsigned count, unsigned k) {
    unsigned counts[4], found = 0, mask = 0;
    for (int shift = 14; shift >= 0; shift -= 2) {
        count_digits(counts, sums, found, mask, shift, row, count);
        #pragma unroll
        for (int digit = 3; digit >= 0; digit--) {
            if (counts[digit] >= k) {
                found |= digit << shift;
                mask |= 3 << shift;
                if (counts[digit] == 1 && k == 1) return only((unsigned short*)sums, found, mask, row, count);
                break;
            }
            k -= counts[digit];
        }
    }
    return found & 0x8000 ? found ^ 0x8000 : found ^ 0xffff;
}

// How many threads before this one vote yes, and how many of all.
__device__ void scan(unsigned* sums, bool yes, unsigned* before, unsigned* all) {
    const unsigned votes = __ballot_sync(0xffffffff, yes), warp = threadIdx.x / 32;
    unsigned lower;
    asm("mov.u32 %0, %lanemask_le;" : "=r"(lower));
    unsigned place = __popc(votes & lower);
    if (threadIdx.x % 32 == 0) sums[warp] = __popc(votes);
    __syncthreads();
    if (threadIdx.x == 0) {
        unsigned sum = 0;
        for (unsigned at = 0; at < blockDim.x / 32; at++) {
            const unsigned own = sums[at];
            sums[at] = own + sum;
            sum += own;
        }
    }
    __syncthreads();
    if (warp >= 1) place += sums[warp - 1];
    *before = place - yes;
    *all = sums[(blockDim.x + 31) / 32 - 1];
    __syncthreads();
}

#ifdef ONLY_select
extern "C" __global__ void __launch_bounds__(1024) select(const unsigned short* rows, unsigned short* kept, long long* places, Sizes it) {
    __shared__ unsigned sums[32];
    const unsigned short* row = rows + blockIdx.x * it.count;
    unsigned short* to = kept + blockIdx.x * it.k;
    long long* its_place = places + blockIdx.x * it.k;
    const unsigned last = ordered(kth(sums, row, it.count, it.k));
    const unsigned end = (it.count + blockDim.x - 1) / blockDim.x * blockDim.x;
    unsigned start = 0, before, all;
    for (unsigned at = threadIdx.x; at < end; at += blockDim.x) {
        const unsigned short number = at < it.count ? __ldg(row + at) : 0;
        const bool higher = at < it.count && ordered(number) > last;
        scan(sums, higher, &before, &all);
        if (higher) { to[start + before] = number; its_place[start + before] = at; }
        start += all;
    }
    unsigned left = it.k - start;
    for (unsigned at = threadIdx.x; at < end; at += blockDim.x) {
        const unsigned short number = at < it.count ? __ldg(row + at) : 0;
        const bool equal = at < it.count && ordered(number) == last;
        scan(sums, equal, &before, &all);
        if (equal && before < left) { to[start + before] = number; its_place[start + before] = at; }
        if (all >= left) break;
        left -= all;
        start += all;
    }
}
#endif

__device__ float real(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }

__device__ void exchange(unsigned short* keys, long long* values, bool* valid, int a, int b, bool upwards) {
    const float first = real(keys[a]), second = real(keys[b]);
    // What is no number comes first, what is not valid last.
    const bool above = (first != first && second == second) || first > second;
    const bool swap = (above && valid[a]) || !valid[b];
    if (swap == upwards) {
        const unsigned short key = keys[a]; keys[a] = keys[b]; keys[b] = key;
        const long long value = values[a]; values[a] = values[b]; values[b] = value;
        const bool is = valid[a]; valid[a] = valid[b]; valid[b] = is;
    }
}

#ifdef ONLY_sort
extern "C" __global__ void __launch_bounds__(256) sort(unsigned short* kept, long long* places, Sizes it) {
    __shared__ unsigned short keys[16][32];
    __shared__ long long values[16][32];
    __shared__ bool valid[16][32];
    const unsigned row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= it.count) return;
    unsigned short* own_keys = keys[threadIdx.y];
    long long* own_values = values[threadIdx.y];
    bool* own_valid = valid[threadIdx.y];
    #pragma unroll
    for (unsigned at = threadIdx.x; at < 32; at += 16) {
        own_valid[at] = at < it.k;
        own_keys[at] = at < it.k ? kept[row * it.k + at] : 0;
        own_values[at] = at < it.k ? places[row * it.k + at] : 0;
    }
    #pragma unroll
    for (unsigned size = 2; size <= 32; size *= 2) {
        const bool upwards = size < 32 && (threadIdx.x & (size / 2)) != 0;
        #pragma unroll
        for (unsigned stride = size / 2; stride > 0; stride /= 2) {
            __syncwarp();
            const unsigned at = 2 * threadIdx.x - (threadIdx.x & (stride - 1));
            exchange(own_keys, own_values, own_valid, at, at + stride, upwards);
        }
    }
    __syncwarp();
    #pragma unroll
    for (unsigned at = threadIdx.x; at < 32; at += 16)
        if (at < it.k) { kept[row * it.k + at] = own_keys[at]; places[row * it.k + at] = own_values[at]; }
}
#endif
