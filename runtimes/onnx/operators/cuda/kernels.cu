// The branch on a GPU: one kernel a call, where the graph's own nodes are five.
//
// A block computes hidden = x a of its tokens itself, however many blocks share them: a (K, R) is a few tens of kB in the
// second-level cache, and computing it again is cheaper than a kernel of its own. Every sum is in a fixed order, so an
// answer has the same bits in every run, alone and in a batch of the same kind.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels.h"

namespace {

constexpr int CHUNK = 8;                      // a thread reads CHUNK ranks, 16 bytes, at once
constexpr int TILE = 256, ROW_THREADS = 512;  // columns of a block without the norm; threads where a block takes a row
constexpr int TOKENS_AT_ONCE = 4;             // of a prompt
constexpr int64_t MANY_BLOCKS = 256;          // about what a GPU runs at once: beyond, blocks take more tokens each
constexpr int LINE = 64;                      // numbers of a line of the second-level cache

// What the kernels read; the parts' ranks begin where those before end.
struct Job {
    const __half *x, *y, *a, *b, *expert, *stream, *gain;
    __half *out, *sum;
    int64_t expert_step, tokens, rows;
    int inputs, width, rank;
    float epsilon;
    int widths[MOST_PARTS], ranks[MOST_PARTS];
    int64_t offsets[MOST_PARTS];
};

__device__ void prefetch(const void *address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// Ask for the columns first to end of b while x a is computed: they come from the GPU's memory, and that takes as long.
__device__ void prefetch_columns(const Job &job, int first, int end) {
    const int lines = (end - first + LINE - 1) / LINE;
    for (int i = threadIdx.x; i < job.rank * lines; i += blockDim.x)
        prefetch(job.b + (int64_t)(i / lines) * job.width + first + i % lines * LINE);
}

// hidden (TOKENS, R) = x (rows first.., K) a (K, R), both in shared memory; partial: THREADS * CHUNK floats a token.
// Each thread sums every `lanes`-th row of a, then threads add those sums in two rounds.
template <int TOKENS, int THREADS>
__device__ void project(const Job &job, int64_t first, float *partial, float *hidden) {
    constexpr int AHEAD = TOKENS == 1 ? 8 : 4; // loads under way
    const int rank = job.rank, thread = threadIdx.x;
    const int chunks = rank / CHUNK, lanes = THREADS / chunks, chunk = thread % chunks, lane = thread / chunks;
    float sums[TOKENS][CHUNK] = {};
    for (int begin = lane; lane < lanes && begin < job.inputs; begin += lanes * AHEAD) {
        uint4 packed[AHEAD];
        __half x[AHEAD][TOKENS];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int k = begin + i * lanes;
            packed[i] = make_uint4(0, 0, 0, 0);
            if (k < job.inputs) packed[i] = __ldg(reinterpret_cast<const uint4 *>(job.a + (int64_t)k * rank) + chunk);
#pragma unroll
            for (int t = 0; t < TOKENS; t++) {
                x[i][t] = __float2half(0.0f);
                if (k < job.inputs && first + t < job.rows) x[i][t] = job.x[(first + t) * job.inputs + k];
            }
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const __half2 *pairs = reinterpret_cast<const __half2 *>(&packed[i]);
#pragma unroll
            for (int pair = 0; pair < CHUNK / 2; pair++) {
                const float2 two = __half22float2(pairs[pair]);
#pragma unroll
                for (int t = 0; t < TOKENS; t++) {
                    const float value = __half2float(x[i][t]);
                    sums[t][2 * pair] += value * two.x;
                    sums[t][2 * pair + 1] += value * two.y;
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
    const int groups = max(1, THREADS / (TOKENS * rank)), size = TOKENS * rank;
    float *second = hidden + size;
    for (int i = thread; i < groups * size; i += THREADS) {
        const int group = i / size, r = i % rank, t = i % size / rank;
        float sum = 0.0f;
#pragma unroll 8
        for (int l = group; l < lanes; l += groups) sum += partial[(t * lanes + l) * rank + r];
        second[i] = sum;
    }
    __syncthreads();
    for (int i = thread; i < size; i += THREADS) {
        float sum = 0.0f;
#pragma unroll 8
        for (int group = 0; group < groups; group++) sum += second[group * size + i];
        hidden[i] = sum;
    }
    __syncthreads();
}

// Floats of shared memory that `project` takes, hidden included.
int64_t count_floats(int tokens, int threads, int rank) {
    return (int64_t)tokens * threads * CHUNK + tokens * rank + (tokens * rank > threads ? tokens * rank : threads);
}

// What the branch adds to column n of a row: d * (hidden b), 0 where the column is of no site.
__device__ float branch(const Job &job, const float *hidden, int64_t row, int n) {
    int column = n, part = 0, first = 0;
    while (column >= job.widths[part]) {
        column -= job.widths[part];
        first += job.ranks[part++];
    }
    const int rank = job.ranks[part];
    if (!rank) return 0.0f;
    const int64_t batch_row = row / job.tokens;
    const __half expert = job.expert[batch_row * job.expert_step + job.offsets[part] + column];
    const __half *b = job.b + (int64_t)first * job.width + n;
    float delta = 0.0f;
    for (int r = 0; r < rank; r += CHUNK) {
        __half values[CHUNK];
#pragma unroll
        for (int i = 0; i < CHUNK; i++) values[i] = r + i < rank ? b[(int64_t)(r + i) * job.width] : __float2half(0.0f);
#pragma unroll
        for (int i = 0; i < CHUNK; i++)
            if (r + i < rank) delta += hidden[first + r + i] * __half2float(values[i]);
    }
    return delta * __half2float(expert);
}

template <int TOKENS>
__global__ void __launch_bounds__(TILE) add_branch(const Job job) {
    extern __shared__ float shared[];
    float *partial = shared, *hidden = shared + TOKENS * TILE * CHUNK;
    const int begin = blockIdx.x * TILE, n = begin + threadIdx.x;
    const int64_t first = (int64_t)blockIdx.y * TOKENS;
    prefetch_columns(job, begin, min(begin + TILE, job.width));
    project<TOKENS, TILE>(job, first, partial, hidden);
    if (n >= job.width) return;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        const int64_t row = first + t, at = row * job.width + n;
        if (row < job.rows)
            job.sum[at] = __float2half(__half2float(job.y[at]) + branch(job, hidden + t * job.rank, row, n));
    }
}

// One block a token, because the norm needs the whole row.
__global__ void __launch_bounds__(ROW_THREADS) add_branch_and_normalise(const Job job) {
    extern __shared__ float shared[];
    __shared__ float squares[ROW_THREADS / 32];
    float *partial = shared, *hidden = shared + ROW_THREADS * CHUNK;
    const int64_t row = blockIdx.x, begin = row * job.width;
    prefetch_columns(job, 0, job.width);
    for (int n = threadIdx.x * LINE; n < job.width; n += ROW_THREADS * LINE) prefetch(job.gain + n);
    project<1, ROW_THREADS>(job, row, partial, hidden);
    float square = 0.0f;
    for (int n = threadIdx.x; n < job.width; n += ROW_THREADS) {
        const __half update = __float2half(__half2float(job.y[begin + n]) + branch(job, hidden, row, n));
        const __half sum = __float2half(__half2float(update) + __half2float(job.stream[begin + n]));
        job.sum[begin + n] = sum; // read again below, by this thread alone
        square += __half2float(sum) * __half2float(sum);
    }
    for (int step = 16; step; step /= 2) square += __shfl_down_sync(0xffffffff, square, step);
    if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = square;
    __syncthreads();
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < ROW_THREADS / 32; i++) total += squares[i];
    const float scale = rsqrtf(total / job.width + job.epsilon);
    for (int n = threadIdx.x; n < job.width; n += ROW_THREADS)
        job.out[begin + n] = __float2half(__half2float(job.sum[begin + n]) * scale * __half2float(job.gain[n]));
}

__global__ void __launch_bounds__(TILE) gate(const __half *x, __half *out, int64_t width, int64_t size) {
    const int64_t i = (int64_t)blockIdx.x * TILE + threadIdx.x;
    if (i >= size) return;
    const __half *row = x + i / width * 2 * width + i % width;
    const float left = __half2float(row[0]), right = __half2float(row[width]);
    out[i] = __float2half(left / (1.0f + expf(-left)) * right);
}

int64_t divide_up(int64_t size, int64_t step) { return (size + step - 1) / step; }

template <int TOKENS>
void launch(const Job &job, cudaStream_t stream) {
    const dim3 blocks((unsigned)divide_up(job.width, TILE), (unsigned)divide_up(job.rows, TOKENS));
    const size_t memory = sizeof(float) * count_floats(TOKENS, TILE, job.rank);
    if (memory > 48 * 1024)
        cudaFuncSetAttribute(add_branch<TOKENS>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)memory);
    add_branch<TOKENS><<<blocks, TILE, memory, stream>>>(job);
}

} // namespace

int lime_edge_launch_branch(const Branch *branch, void *stream) {
    const Operands &o = branch->operands;
    const Parts &parts = o.parts;
    Job job = {};
    job.x = (const __half *)o.x, job.y = (const __half *)o.y, job.a = (const __half *)o.a, job.b = (const __half *)o.b;
    job.expert = (const __half *)branch->expert, job.expert_step = branch->expert_step;
    job.stream = (const __half *)branch->stream, job.gain = (const __half *)branch->gain;
    job.out = (__half *)branch->out, job.sum = (__half *)branch->sum;
    job.tokens = o.dimensions[1], job.rows = o.rows, job.epsilon = branch->epsilon;
    job.inputs = (int)parts.inputs, job.width = (int)parts.width, job.rank = (int)parts.rank;
    for (int i = 0; i < parts.count; i++) {
        job.widths[i] = (int)parts.widths[i];
        job.offsets[i] = parts.offsets[i];
        job.ranks[i] = (int)parts.ranks[i];
    }
    if (job.out != nullptr) {
        const size_t memory = sizeof(float) * count_floats(1, ROW_THREADS, job.rank);
        add_branch_and_normalise<<<(unsigned)job.rows, ROW_THREADS, memory, (cudaStream_t)stream>>>(job);
    } else if (divide_up(job.width, TILE) * job.rows <= MANY_BLOCKS) {
        launch<1>(job, (cudaStream_t)stream);
    } else {
        launch<TOKENS_AT_ONCE>(job, (cudaStream_t)stream);
    }
    return (int)cudaGetLastError();
}

int lime_edge_launch_gate(const Gate *gate_, void *stream) {
    const int64_t size = gate_->rows * gate_->width;
    gate<<<(unsigned)divide_up(size, TILE), TILE, 0, (cudaStream_t)stream>>>(
        (const __half *)gate_->x, (__half *)gate_->out, gate_->width, size);
    return (int)cudaGetLastError();
}

int lime_edge_find_gpu(void) {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, gate) == cudaSuccess;
}
