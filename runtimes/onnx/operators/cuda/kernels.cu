// The branch on a GPU: one kernel a call, where the graph's own nodes are five.
//
// A block computes hidden = x a of its tokens itself, however many blocks share them: a (K, R) is a few tens of kB, and
// computing it again is cheaper than a kernel of its own. A step of one token takes as long as its memory is away, so
// what a thread will need of y, b, the expert and the norm is under way before x a is begun. Every sum is in a fixed
// order: an answer has the same bits in every run.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels.h"

namespace {

constexpr int CHUNK = 8;                     // a thread reads CHUNK ranks, 16 bytes, at once
constexpr int TILE = 192, MOST_THREADS = 1024; // columns of a block without the norm; most threads of one with it
constexpr int TOKENS_AT_ONCE = 4;            // of a prompt
constexpr int MANY_BLOCKS = 256;             // about what a GPU runs at once: beyond, blocks take more tokens each
constexpr int AHEAD = 4;                     // rows of a that a thread asks for at once
constexpr int MOST_GROUPS = 16;              // of sums, added in two rounds

// What the kernels read; the parts' ranks begin where those before end.
struct Job {
    const __half *x, *y, *a, *b, *expert, *stream, *gain;
    __half *out, *sum;
    int64_t expert_step;
    int tokens, rows, inputs, width, rank, count;
    float epsilon;
    int widths[MOST_PARTS], ranks[MOST_PARTS];
    int64_t offsets[MOST_PARTS];
};

// A column's part: its ranks, first to first + count, and its place in the flat residual.
struct Place {
    int first, count;
    int64_t expert;
};

__device__ Place find_place(const Job &job, int n) {
    int part = 0, first = 0;
    while (n >= job.widths[part]) {
        n -= job.widths[part];
        first += job.ranks[part++];
    }
    return {first, job.ranks[part], job.offsets[part] + n};
}

// hidden (TOKENS, count) = x (rows first.., K) a (K, from:from + count), in shared memory; both multiples of CHUNK.
// partial: CHUNK floats a thread and token. Each thread sums every `lanes`-th row of a.
template <int TOKENS>
__device__ void project(const Job &job, int first, int from, int count, float *partial, float *hidden) {
    const int thread = threadIdx.x, threads = blockDim.x, size = TOKENS * count;
    const int chunks = count / CHUNK, lanes = threads / chunks, chunk = thread % chunks, lane = thread / chunks;
    float sums[TOKENS][CHUNK] = {};
    for (int begin = lane; lane < lanes && begin < job.inputs; begin += lanes * AHEAD) {
        uint4 packed[AHEAD];
        float x[AHEAD][TOKENS];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int k = begin + i * lanes;
            packed[i] = make_uint4(0, 0, 0, 0);
            if (k < job.inputs)
                packed[i] = __ldg(reinterpret_cast<const uint4 *>(job.a + (int64_t)k * job.rank + from) + chunk);
#pragma unroll
            for (int t = 0; t < TOKENS; t++)
                x[i][t] = k < job.inputs && first + t < job.rows
                              ? __half2float(job.x[(int64_t)(first + t) * job.inputs + k])
                              : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const __half2 *pairs = reinterpret_cast<const __half2 *>(&packed[i]);
#pragma unroll
            for (int pair = 0; pair < CHUNK / 2; pair++) {
                const float2 two = __half22float2(pairs[pair]);
#pragma unroll
                for (int t = 0; t < TOKENS; t++) {
                    sums[t][2 * pair] += x[i][t] * two.x;
                    sums[t][2 * pair + 1] += x[i][t] * two.y;
                }
            }
        }
    }
    if (lane < lanes) {
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            float4 *mine = reinterpret_cast<float4 *>(partial + ((t * lanes + lane) * chunks + chunk) * CHUNK);
            mine[0] = make_float4(sums[t][0], sums[t][1], sums[t][2], sums[t][3]);
            mine[1] = make_float4(sums[t][4], sums[t][5], sums[t][6], sums[t][7]);
        }
    }
    __syncthreads();
    const int groups = max(1, min(MOST_GROUPS, threads / size));
    float *second = hidden + size;
    for (int i = thread; i < groups * size; i += threads) {
        const int group = i / size, own = i - group * size, t = own / count, r = own - t * count;
        float sum = 0.0f;
#pragma unroll 8
        for (int l = group; l < lanes; l += groups) sum += partial[(t * lanes + l) * count + r];
        second[i] = sum;
    }
    __syncthreads();
    for (int i = thread; i < size; i += threads) {
        float sum = 0.0f;
#pragma unroll 4
        for (int group = 0; group < groups; group++) sum += second[group * size + i];
        hidden[i] = sum;
    }
    __syncthreads();
}

// Floats of shared memory that `project` takes, hidden included.
int64_t count_floats(int tokens, int threads, int rank) {
    return (int64_t)tokens * threads * CHUNK + tokens * rank + max(tokens * rank, threads);
}

// The first CHUNK ranks of a column of b.
struct Column {
    Place place;
    __half b[CHUNK];
};

__device__ Column load(const Job &job, int n) {
    Column column = {find_place(job, n)};
    const __half *b = job.b + (int64_t)column.place.first * job.width + n;
#pragma unroll
    for (int i = 0; i < CHUNK; i++)
        column.b[i] = i < column.place.count ? b[(int64_t)i * job.width] : __float2half(0.0f);
    return column;
}

// hidden b of a column; hidden begins with rank `from`.
__device__ float multiply(const Job &job, const Column &column, const float *hidden, int from, int n) {
    const int first = column.place.first, count = column.place.count;
    float delta = 0.0f;
#pragma unroll
    for (int i = 0; i < CHUNK; i++)
        if (i < count) delta += hidden[first - from + i] * __half2float(column.b[i]);
#pragma unroll 4
    for (int r = first + CHUNK; r < first + count; r++)
        delta += hidden[r - from] * __half2float(job.b[(int64_t)r * job.width + n]);
    return delta;
}

__device__ float read_expert(const Job &job, const Place &place, int row) {
    return place.count ? __half2float(job.expert[row / job.tokens * job.expert_step + place.expert]) : 0.0f;
}

template <int TOKENS>
__global__ void __launch_bounds__(TILE) add_branch(const Job job) {
    extern __shared__ float shared[];
    float *partial = shared, *hidden = shared + TOKENS * TILE * CHUNK;
    const int begin = blockIdx.x * TILE, n = min(begin + (int)threadIdx.x, job.width - 1), first = blockIdx.y * TOKENS;
    const Place last = find_place(job, min(begin + TILE, job.width) - 1);
    const int from = min(find_place(job, begin).first / CHUNK * CHUNK, job.rank - CHUNK);
    const int most = max(1, (last.first + last.count - from + CHUNK - 1) / CHUNK) * CHUNK;
    const int count = min(most, job.rank - from);
    const Column column = load(job, n);
    float y[TOKENS], expert[TOKENS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        const int row = min(first + t, job.rows - 1);
        y[t] = __half2float(job.y[(int64_t)row * job.width + n]);
        expert[t] = read_expert(job, column.place, row);
    }
    project<TOKENS>(job, first, from, count, partial, hidden);
    if (begin + (int)threadIdx.x >= job.width) return;
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
        if (first + t < job.rows)
            job.sum[(int64_t)(first + t) * job.width + n] =
                __float2half(y[t] + expert[t] * multiply(job, column, hidden + t * count, from, n));
}

// One block a token, because the norm needs the whole row.
__global__ void __launch_bounds__(MOST_THREADS) add_branch_and_normalise(const Job job) {
    extern __shared__ float shared[];
    __shared__ float squares[MOST_THREADS / 32];
    const int threads = blockDim.x, row = blockIdx.x;
    const int64_t begin = (int64_t)row * job.width;
    float *partial = shared, *hidden = shared + max(threads * CHUNK, job.width), *sums = partial; // not at one time
    int n = threadIdx.x;
    Column column;
    float y = 0.0f, stream = 0.0f, expert = 0.0f, gain = 0.0f, square = 0.0f;
    auto fetch = [&](int at) {
        column = load(job, at);
        y = __half2float(job.y[begin + at]);
        stream = __half2float(job.stream[begin + at]);
        expert = read_expert(job, column.place, row);
    };
    if (n < job.width) {
        fetch(n);
        gain = __half2float(job.gain[n]);
    }
    project<1>(job, row, 0, job.rank, partial, hidden);
    while (n < job.width) {
        const __half update = __float2half(y + expert * multiply(job, column, hidden, 0, n));
        const __half sum = __float2half(__half2float(update) + stream);
        job.sum[begin + n] = sum;
        sums[n] = __half2float(sum);
        square += sums[n] * sums[n];
        n += threads;
        if (n < job.width) fetch(n);
    }
#pragma unroll
    for (int step = 16; step; step /= 2) square += __shfl_xor_sync(0xffffffff, square, step);
    if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = square;
    __syncthreads();
    float total = 0.0f;
    for (int i = 0; i < threads / 32; i++) total += squares[i];
    const float scale = rsqrtf(total / job.width + job.epsilon);
    for (int at = threadIdx.x; at < job.width; at += threads) {
        if (at != (int)threadIdx.x) gain = __half2float(job.gain[at]);
        job.out[begin + at] = __float2half(sums[at] * scale * gain);
    }
}

__global__ void __launch_bounds__(TILE) gate(const __half *x, __half *out, int width, int64_t size) {
    const int64_t i = (int64_t)blockIdx.x * TILE + threadIdx.x;
    if (i >= size) return;
    const int64_t row = i / width;
    const __half *left = x + i + row * width;
    const float value = __half2float(left[0]), right = __half2float(left[width]);
    out[i] = __float2half(value / (1.0f + __expf(-value)) * right);
}

int64_t divide_up(int64_t size, int64_t step) { return (size + step - 1) / step; }

template <typename Kernel>
void allow(Kernel kernel, size_t memory) {
    if (memory > 48 * 1024) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)memory);
}

template <int TOKENS>
void launch(const Job &job, cudaStream_t stream) {
    const dim3 blocks((unsigned)divide_up(job.width, TILE), (unsigned)divide_up(job.rows, TOKENS));
    const size_t memory = sizeof(float) * count_floats(TOKENS, TILE, job.rank);
    allow(add_branch<TOKENS>, memory);
    add_branch<TOKENS><<<blocks, TILE, memory, stream>>>(job);
}

void launch_norm(const Job &job, cudaStream_t stream) {
    const int wanted = (int)divide_up(max(job.width, job.rank / CHUNK), 32) * 32;
    const int threads = min(MOST_THREADS, wanted);
    const int64_t more = max(0, job.width - threads * CHUNK); // the sums lie where the partial sums were
    const size_t memory = sizeof(float) * (count_floats(1, threads, job.rank) + more);
    allow(add_branch_and_normalise, memory);
    add_branch_and_normalise<<<(unsigned)job.rows, threads, memory, stream>>>(job);
}

} // namespace

int lime_edge_launch_branch(const Branch *branch, void *stream) {
    const Operands &o = branch->operands;
    const Parts &parts = o.parts;
    Job job = {};
    if (o.rows > INT32_MAX) return (int)cudaErrorInvalidValue;
    job.x = (const __half *)o.x, job.y = (const __half *)o.y, job.a = (const __half *)o.a, job.b = (const __half *)o.b;
    job.expert = (const __half *)branch->expert, job.expert_step = branch->expert_step;
    job.stream = (const __half *)branch->stream, job.gain = (const __half *)branch->gain;
    job.out = (__half *)branch->out, job.sum = (__half *)branch->sum;
    job.tokens = (int)o.dimensions[1], job.rows = (int)o.rows, job.epsilon = branch->epsilon;
    job.inputs = (int)parts.inputs, job.width = (int)parts.width, job.rank = (int)parts.rank;
    for (int i = 0; i < parts.count; i++) {
        job.widths[i] = (int)parts.widths[i];
        job.offsets[i] = parts.offsets[i];
        job.ranks[i] = (int)parts.ranks[i];
    }
    if (job.out != nullptr)
        launch_norm(job, (cudaStream_t)stream);
    else if (divide_up(job.width, TILE) * job.rows <= MANY_BLOCKS)
        launch<1>(job, (cudaStream_t)stream);
    else
        launch<TOKENS_AT_ONCE>(job, (cudaStream_t)stream);
    return (int)cudaGetLastError();
}

int lime_edge_launch_gate(const Gate *gate_, void *stream) {
    const int64_t size = gate_->rows * gate_->width;
    gate<<<(unsigned)divide_up(size, TILE), TILE, 0, (cudaStream_t)stream>>>(
        (const __half *)gate_->x, (__half *)gate_->out, (int)gate_->width, size);
    return (int)cudaGetLastError();
}

int lime_edge_find_gpu(void) {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, gate) == cudaSuccess;
}
