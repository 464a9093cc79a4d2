// One kernel for each constant, with ONLY_ and its name defined. A round does the same again and again; two runs that differ in rounds tell
// what a round takes. What is computed goes to `sink` where it has one value that it never has, so that nothing is left out.
struct Sizes { unsigned long long bytes; unsigned rounds, seed; };

#define KERNEL(NAME) extern "C" __global__ void NAME(unsigned char* data, unsigned* sink, Sizes it)
#define ROUNDS _Pragma("unroll 1") for (unsigned round = 0; round < it.rounds; round++)
#define EACH(AT, COUNT) _Pragma("unroll") for (int AT = 0; AT < COUNT; AT++)

// Eight independent chains of sixteen steps a round. Each part has a line of its own, by which machine code is told apart.
#define FIRST(TYPE) TYPE x[8], sum = 0; EACH(k, 8) x[k] = LANE + k;
#define STEPS(STEP) ROUNDS EACH(step, 16) EACH(k, 8) { STEP; }
#define LAST(TYPE) EACH(k, 8) sum += x[k]; if (sum == (TYPE)1.2345e30) sink[0] = 1;

#define LANE (threadIdx.x + it.seed)

#ifdef ONLY_multiply_add
KERNEL(multiply_add) {
    const float factor = __uint_as_float(it.seed);
    FIRST(float)
    STEPS(x[k] = fmaf(x[k], factor, factor))
    LAST(float)
}
#endif

#ifdef ONLY_alu
KERNEL(alu) {
    FIRST(unsigned)
    STEPS(x[k] = __funnelshift_l(x[k], x[k], it.seed))
    LAST(unsigned)
}
#endif

#ifdef ONLY_imad
KERNEL(imad) {
    FIRST(unsigned)
    STEPS(x[k] = x[k] * it.seed + it.seed)
    LAST(unsigned)
}
#endif

#ifdef ONLY_doubles
KERNEL(doubles) {
    const double factor = it.seed;
    FIRST(double)
    STEPS(x[k] = fma(x[k], factor, factor))
    LAST(double)
}
#endif

#ifdef ONLY_special
KERNEL(special) {
    FIRST(float)
    STEPS(asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x[k])))
    LAST(float)
}
#endif

#ifdef ONLY_conversion
KERNEL(conversion) {
    FIRST(unsigned)
    STEPS(asm volatile("popc.b32 %0, %0;" : "+r"(x[k])))
    LAST(unsigned)
}
#endif

#ifdef ONLY_issue
// Multiply-adds, shifts and products of integers as two, one and one: no pipe has as much to do as there are slots.
KERNEL(issue) {
    const float factor = __uint_as_float(it.seed);
    float x[4], sum = 0;
    unsigned y[2], z[2];
    EACH(k, 4) x[k] = LANE + k;
    EACH(k, 2) { y[k] = LANE + k; z[k] = LANE * k; }
    ROUNDS EACH(step, 16) {
        EACH(k, 4) x[k] = fmaf(x[k], factor, factor);
        EACH(k, 2) { y[k] = __funnelshift_l(y[k], y[k], it.seed); z[k] = z[k] * it.seed + it.seed; }
    }
    EACH(k, 4) sum += x[k];
    EACH(k, 2) sum += y[k] + z[k];
    if (sum == 1.2345e30f) sink[0] = 1;
}
#endif

// Operands in registers of their own, so that none are moved between products.
#define OPERANDS unsigned a[4], b[2]; EACH(i, 4) a[i] = LANE + i; EACH(i, 2) b[i] = LANE + 4 + i;

#define MULTIPLY(SUMS) asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 " \
    "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
    : "+f"(SUMS[0]), "+f"(SUMS[1]), "+f"(SUMS[2]), "+f"(SUMS[3]) \
    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

#ifdef ONLY_matrix
// Eight independent products, four times a round.
KERNEL(matrix) {
    float sums[8][4] = {0.0f}, sum = 0;
    OPERANDS
    ROUNDS EACH(step, 4) EACH(k, 8) MULTIPLY(sums[k]);
    EACH(k, 8) EACH(i, 4) sum += sums[k][i];
    if (sum == 1.2345e30f) sink[0] = 1;
}
#endif

#ifdef ONLY_same_address
// Eight additions a round of all lanes of a warp to its own number.
KERNEL(same_address) {
    __shared__ unsigned bins[32];
    if (threadIdx.x < 32) bins[threadIdx.x] = 0;
    __syncthreads();
    ROUNDS EACH(step, 8) atomicAdd(bins + threadIdx.x / 32, LANE + round);
    __syncthreads();
    if (bins[threadIdx.x % 32] == 0xdeadbeef) sink[0] = 1;
}
#endif

#ifdef ONLY_tags
// Sixteen loads a round, each of 32 lines that the first level has.
KERNEL(tags) {
    const unsigned char* from = data + threadIdx.x % 32 * 128;
    unsigned sum = 0, found;
    ROUNDS EACH(step, 16) {
        asm volatile("ld.global.ca.u32 %0, [%1];" : "=r"(found) : "l"(from + step * 4096));
        sum += found;
    }
    if (sum == 0xdeadbeef) sink[0] = 1;
}
#endif

#ifdef ONLY_cache
// A mebibyte a block and round of a buffer that the second level has.
KERNEL(cache) {
    float sum = 0;
    ROUNDS {
        const unsigned long long start = (blockIdx.x * 977ull + round * 131) * 16384 % (it.bytes - (1 << 20));
        const unsigned char* from = data + start + threadIdx.x * 16;
        #pragma unroll 4
        for (int step = 0; step < 128; step++) {
            float a, b, c, d;
            asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(a), "=f"(b), "=f"(c), "=f"(d) : "l"(from + step * 8192));
            sum += a + b + c + d;
        }
    }
    if (sum == 1.2345e30f) sink[0] = 1;
}
#endif

#ifdef ONLY_memory
// The buffer's first half to its second, once a round.
KERNEL(memory) {
    const unsigned long long half = it.bytes / 2, step = gridDim.x * blockDim.x * 16ull;
    ROUNDS {
        #pragma unroll 4
        for (unsigned long long at = (blockIdx.x * blockDim.x + threadIdx.x) * 16ull; at < half; at += step) {
            unsigned a, b, c, d;
            asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "l"(data + at));
            asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" :: "l"(data + half + at), "r"(a), "r"(b), "r"(c), "r"(d));
        }
    }
}
#endif

// One chain of 64 steps a round, of one warp.
#define CHAIN(STEP) ROUNDS EACH(step, 64) { STEP; }

#ifdef ONLY_latency_alu
KERNEL(latency_alu) {
    const float factor = __uint_as_float(it.seed);
    float x = LANE;
    CHAIN(x = fmaf(x, factor, factor))
    if (x == 1.2345e30f) sink[0] = 1;
}
#endif

#ifdef ONLY_latency_special
KERNEL(latency_special) {
    float x = LANE;
    CHAIN(asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x)))
    if (x == 1.2345e30f) sink[0] = 1;
}
#endif

#ifdef ONLY_latency_matrix
KERNEL(latency_matrix) {
    float sums[4] = {0.0f};
    OPERANDS
    CHAIN(MULTIPLY(sums))
    if (sums[0] + sums[1] + sums[2] + sums[3] == 1.2345e30f) sink[0] = 1;
}
#endif

#ifdef ONLY_latency_shared
// Each word holds the address of the next.
KERNEL(latency_shared) {
    __shared__ unsigned next[1024];
    const unsigned base = (unsigned)__cvta_generic_to_shared(next);
    for (int at = threadIdx.x; at < 1024; at += blockDim.x) next[at] = base + (at + 32) % 1024 * 4;
    __syncthreads();
    unsigned at = base + threadIdx.x % 32 * 4;
    CHAIN(asm volatile("ld.shared.u32 %0, [%0];" : "+r"(at)))
    if (at == 0xdeadbeef) sink[0] = 1;
}
#endif

#ifdef ONLY_link
// Makes addresses of the places that the first word of each line of 128 bytes holds.
KERNEL(link) {
    const unsigned long long line = (blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x) * 128;
    if (line < it.bytes) *(unsigned long long*)(data + line) += (unsigned long long)data;
}
#endif

// Goes on where the last launch has ended.
#define CHASE(LOAD) \
    unsigned long long at = *(unsigned long long*)sink; \
    if (at == 0) at = (unsigned long long)data; \
    CHAIN(asm volatile("ld.global." LOAD ".u64 %0, [%0];" : "+l"(at))) \
    *(unsigned long long*)sink = at;

#ifdef ONLY_latency_first_level
KERNEL(latency_first_level) { CHASE("ca") }
#endif

#ifdef ONLY_latency_cache
KERNEL(latency_cache) { CHASE("cg") }
#endif

#ifdef ONLY_latency_memory
KERNEL(latency_memory) { CHASE("cg") }
#endif

#ifdef ONLY_latency_barrier
KERNEL(latency_barrier) { ROUNDS EACH(step, 16) __syncthreads(); }
#endif

#ifdef ONLY_clock
// Cycles of a long run, for their time.
KERNEL(clock) {
    const float factor = __uint_as_float(it.seed);
    float x = LANE;
    const long long start = clock64();
    CHAIN(x = fmaf(x, factor, factor))
    const long long end = clock64();
    if (threadIdx.x == 0) *(long long*)sink = end - start;
    if (x == 1.2345e30f) sink[2] = 1;
}
#endif
