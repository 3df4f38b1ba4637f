// Products of one vector with the rows of matrices, for the kernel of decoder_cuda.cu, which says
// what the macros are. The vector, called the input, lies in dynamic shared memory. All blocks of
// the grid, and all their warps, share the rows.
//
// A chunk is 16 bytes of weights, so CHUNK numbers of the input, or CHUNK / VECTOR vectors of 16
// bytes. Lane l of a warp multiplies the chunks l, l + 32, l + 64 ... of a row. The vectors lie in
// the order in which the lanes read them, so that 32 lanes read 32 neighbours (here with 4 vectors
// a chunk):
//
//   shared: | lane 0  lane 1 ... lane 31 | lane 0 ... lane 31 | lane 0 ... | ... | sums of chunks |
//           |   vector 0 of its chunk    | vector 1 of it     | 2, then 3  |     | 0, 1, 2, ...   |
//           |<------------- round 0: chunks 0 to 31 ---------------------->| 1 ..|                |
//           ^ input(k): the vector with number k                                 ^ chunk_sum(0)
//                                                                  (float CHUNK_SUMS of shared)
//
// The sums of chunks, in float, are there for quantized weights alone: a bias is multiplied by
// them, and integers are read as 1 + integer / 2**BITS. Behind them, with TENSOR_CORES, are the
// sums that the warps of a block have for their shares of a row (float PARTIAL_SUMS of shared).

constexpr int LANES = 32, WARPS = THREADS / LANES;
constexpr int VECTOR = 16 / sizeof(Number);        // numbers in 16 bytes
constexpr int CHUNK = BITS ? 128 / BITS : VECTOR;  // weights in 16 bytes

// Weights of 4 bits cost more instructions than time to read them, but for tensor cores, which
// multiply 16 rows at once. They take no float.
constexpr bool TENSOR_CORES = BITS == 4 && sizeof(Number) == 2;
constexpr int TILE = 16;                         // rows that a warp multiplies at once
constexpr int SPLITS = WARPS < 8 ? WARPS : 8;    // warps that share a tile, each with some chunks
constexpr int STEPS_AT_ONCE = 4;                 // of a tile, whose weights are read at once
constexpr int PASS = 256;                        // rows between two reductions over the splits

constexpr int MULTIPLE = BITS ? GROUP_SIZE : VECTOR;
constexpr int Q = N_HEADS * HEAD_DIM;
constexpr int LARGEST = HIDDEN > DIM && HIDDEN > Q ? HIDDEN : DIM > Q ? DIM : Q;
constexpr int ROUNDS = (LARGEST + LANES * CHUNK - 1) / (LANES * CHUNK);
constexpr int CHUNK_SUMS = ROUNDS * LANES * CHUNK * sizeof(Number) / sizeof(float);
constexpr int PARTIAL_SUMS = CHUNK_SUMS + (BITS ? LARGEST / CHUNK : 0);
constexpr int SHARED_FLOATS = PARTIAL_SUMS + (TENSOR_CORES ? SPLITS * 2 * PASS : 0);

static_assert(BITS == 0 || BITS == 4 || BITS == 8, "weights of other sizes are not read");
static_assert(DIM % MULTIPLE + Q % MULTIPLE + HIDDEN % MULTIPLE == 0, "no row ends amid 16 bytes");
static_assert(SHARED_FLOATS * 4 <= SHARED_MEMORY, "what is multiplied has room");

struct alignas(16) Vector { Number values[VECTOR]; };
struct Matrix { const void* weight; const Number *scales, *biases; };
struct Row { const uint4* chunks; const Number *scales, *biases; };

using Count = unsigned long long;

extern __shared__ Vector shared[];  // the picture above

__device__ float warp_sum(float x) {
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

// Wait until others have counted up to `target`.
__device__ void wait_for(Count* counter, Count target) {
    Count now;
    do {
        asm volatile("ld.acquire.gpu.u64 %0, [%1];" : "=l"(now) : "l"(counter) : "memory");
    } while (now < target);
}

// Wait for all blocks of the grid. `barrier` counts those that have arrived, and is never reset.
__device__ void grid_sync(Count* barrier) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        wait_for(barrier, (atomicAdd(barrier, Count(1)) / gridDim.x + 1) * gridDim.x);
    }
    __syncthreads();
}

// Row number `row` of a matrix with K columns.
template <int K> __device__ Row row_of(Matrix matrix, int row) {
    const uint4* chunks = static_cast<const uint4*>(matrix.weight) + size_t(row) * (K / CHUNK);
    size_t groups = size_t(row) * (K / GROUP_SIZE);
    return {chunks, matrix.scales + groups, matrix.biases + groups};
}

// The vector of the input that begins with its number k.
__device__ Vector& input(int k) {
    int round = k / (LANES * CHUNK), lane = k / CHUNK % LANES, part = k % CHUNK / VECTOR;
    return shared[(round * (CHUNK / VECTOR) + part) * LANES + lane];
}

// Where number i of a vector lies in it. Tensor cores take pairs: here 0 and 4, 1 and 5, 2 and 6, 3
// and 7, which are apart by half of 32 bits in a word of weights.
__device__ constexpr int slot(int i) {
    return TENSOR_CORES ? i % 4 * 2 + i / 4 : i;
}

// Set the input's numbers from k on.
__device__ void set_input(int k, Vector numbers) {
    Vector ordered;
    for (int i = 0; i < VECTOR; i++) ordered.values[slot(i)] = numbers.values[i];
    input(k) = ordered;
}

// The sum of the numbers of the input that a chunk of weights is multiplied by.
__device__ float& chunk_sum(int chunk) {
    return reinterpret_cast<float*>(shared)[CHUNK_SUMS + chunk];
}

// Wait for the K numbers of the input, and sum them chunk by chunk where weights are quantized.
template <int K> __device__ void sum_chunks() {
    __syncthreads();
    if constexpr (BITS > 0) {
        for (int chunk = threadIdx.x; chunk < K / CHUNK; chunk += THREADS) {
            float sum = 0;
            for (int i = 0; i < CHUNK; i += VECTOR) {
                Vector some = input(chunk * CHUNK + i);
                for (float value : some.values) sum += value;
            }
            chunk_sum(chunk) = sum;
        }
        __syncthreads();
    }
}

// The product of the input with a row of K numbers. Each lane of a warp reads 16 bytes at a time.
template <int K> __device__ float dot(const Number* row) {
    float sum = 0;
    #pragma unroll 8
    for (int k = threadIdx.x % LANES * VECTOR; k < K; k += LANES * VECTOR) {
        uint4 words = __ldcs(reinterpret_cast<const uint4*>(row + k));
        Vector weights = reinterpret_cast<Vector&>(words);
        Vector inputs = input(k);
        for (int i = 0; i < VECTOR; i++) {
            sum += float(inputs.values[slot(i)]) * float(weights.values[i]);
        }
    }
    return warp_sum(sum);
}

// The product of the input with a row of a matrix, which may be quantized, by a warp.
template <int K> __device__ __noinline__ float dot(Row row) {
    if (BITS == 0) return dot<K>(reinterpret_cast<const Number*>(row.chunks));
    float sum = 0;
    #pragma unroll 4
    for (int chunk = threadIdx.x % LANES; chunk < K / CHUNK; chunk += LANES) {
        uint4 four = __ldcs(row.chunks + chunk);
        int group = chunk * CHUNK / GROUP_SIZE;
        float scale = row.scales[group], bias = row.biases[group];
        unsigned words[4] = {four.x, four.y, four.z, four.w};
        float product = 0;
        for (int j = 0; j < CHUNK; j += VECTOR) {
            Vector inputs = input(chunk * CHUNK + j);
            for (int i = 0; i < VECTOR; i++) {  // 1 + integer / 2**BITS: no slow conversion
                constexpr int SHIFT = 23 - BITS;
                int start = (j + i) * BITS % 32;
                unsigned word = words[(j + i) * BITS / 32];
                word = start < SHIFT ? word << (SHIFT - start) : word >> (start - SHIFT);
                word = 0x3f800000 | (word & ((1 << BITS) - 1) << SHIFT);
                product += float(inputs.values[slot(i)]) * __uint_as_float(word);
            }
        }
        sum += scale * (product - chunk_sum(chunk)) * (1 << BITS) + bias * chunk_sum(chunk);
    }
    return warp_sum(sum);
}

// The products of the input with the rows of a tile, by a warp, from the chunks that are its split's
// share. Lane 4 g + q reads chunk q of each step's four, of rows g and g + 8. The other matrix has in
// column 2 q the input's numbers for chunk q, else zeros: so lane 4 g + q gets the products of the
// chunks that it read. Returns those of rows g and g + 8.
template <int K> __device__ __noinline__ float2 multiply_tile(Row row, Row row_8, int split) {
    const Row rows[2] = {row, row_8};
    float sums[2] = {};
    constexpr int CHUNKS = K / CHUNK, STEPS = (CHUNKS + 3) / 4;
    int lane = threadIdx.x % LANES, q = lane % 4;
    unsigned mask = lane / 4 == 2 * q ? ~0u : 0;
    #pragma unroll 1
    for (int start = split; start < STEPS; start += STEPS_AT_ONCE * SPLITS) {
        uint4 weights[STEPS_AT_ONCE][2] = {};
        Number scales[STEPS_AT_ONCE][2], biases[STEPS_AT_ONCE][2];
        #pragma unroll
        for (int s = 0; s < STEPS_AT_ONCE; s++) {
            int chunk = (start + s * SPLITS) * 4 + q, group = chunk * CHUNK / GROUP_SIZE;
            for (int i = 0; i < 2 && chunk < CHUNKS; i++) {
                weights[s][i] = __ldcs(rows[i].chunks + chunk);
                scales[s][i] = rows[i].scales[group];
                biases[s][i] = rows[i].biases[group];
            }
        }
        #pragma unroll
        for (int s = 0; s < STEPS_AT_ONCE; s++) {
            int chunk = (start + s * SPLITS) * 4 + q;
            const Vector* inputs = &input(min(chunk, CHUNKS - 1) * CHUNK);
            const uint4 &first = weights[s][0], &second = weights[s][1];
            unsigned words[2][4] = {
                {first.x, first.y, first.z, first.w}, {second.x, second.y, second.z, second.w}
            };
            float products[2][4] = {};  // of pairs 0 and 1 of each word, and of pairs 2 and 3
            for (int j = 0; j < 4; j++) {
                uint4 four = reinterpret_cast<const uint4&>(inputs[j * LANES]);
                unsigned pairs[4] = {four.x & mask, four.y & mask, four.z & mask, four.w & mask};
                for (int i = 0; i < 4; i += 2) {
                    unsigned some[4] = {
                        weight_pair(words[0][j], i), weight_pair(words[1][j], i),
                        weight_pair(words[0][j], i + 1), weight_pair(words[1][j], i + 1)
                    };
                    multiply_add(products[i / 2], some, pairs[i], pairs[i + 1]);
                }
            }
            if (chunk >= CHUNKS) continue;
            float sum = chunk_sum(chunk);
            for (int i = 0; i < 2; i++) {
                float product = (products[0][2 * i] + products[1][2 * i] - sum) * 16;
                sums[i] += float(scales[s][i]) * product + float(biases[s][i]) * sum;
            }
        }
    }
    for (float& sum : sums) {
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
    }
    return {sums[0], sums[1]};
}

// Multiply the input by rows of N matrices, each with n_rows rows of K numbers: a thread calls
// finish(row, products) for each row; get_row(row, i) returns that of matrix i.
template <int K, int N, class GetRow, class Finish>
__device__ void multiply(int n_rows, GetRow get_row, Finish finish) {
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    if constexpr (!TENSOR_CORES) {
        // Warp by warp, the blocks take turns with the rows.
        for (int row = warp * gridDim.x + blockIdx.x; row < n_rows; row += WARPS * gridDim.x) {
            float products[N];
            #pragma unroll 1
            for (int i = 0; i < N; i++) products[i] = dot<K>(get_row(row, i));
            if (lane == 0) finish(row, products);
        }
    } else {
        // Each block has a share of the rows, whose tiles the warps take in turns.
        float* partial = reinterpret_cast<float*>(shared) + PARTIAL_SUMS;  // (SPLITS, N, PASS)
        int start = size_t(n_rows) * blockIdx.x / gridDim.x;
        int end = size_t(n_rows) * (blockIdx.x + 1) / gridDim.x, split = warp % SPLITS;
        for (; start < end; start += PASS) {
            int n = min(end - start, PASS), n_tiles = (n + TILE - 1) / TILE;
            for (int item = warp / SPLITS; item < n_tiles * N; item += WARPS / SPLITS) {
                int i = item % N, first = item / N * TILE + lane / 4;
                float2 sums = multiply_tile<K>(get_row(start + min(first, n - 1), i),
                                               get_row(start + min(first + 8, n - 1), i), split);
                float* at = partial + (split * N + i) * PASS + first;  // PASS has room for whole tiles
                if (lane % 4 == 0) at[0] = sums.x, at[8] = sums.y;
            }
            __syncthreads();
            for (int row = threadIdx.x; row < n; row += THREADS) {
                float products[N] = {};
                for (int s = 0; s < SPLITS; s++) {
                    for (int i = 0; i < N; i++) products[i] += partial[(s * N + i) * PASS + row];
                }
                finish(start + row, products);
            }
            __syncthreads();
        }
    }
}

// LoRA for matrices with one input: `a` (rows, K), of which each matrix has `rank`, and `b` (all
// outputs, rank). Rows of b are whole vectors: `rank` is a multiple of VECTOR. `inner` (rows) gets
// the input's products with a; `arrived`, if any, counts those that are ready.
struct Lora {
    const Number *a, *b;
    int rank, rows;
    float* inner;
    Count* arrived;
    bool is_ready = false;
};

// Begin with LoRA: the grid's last blocks multiply the input by a row of `a` each.
template <int K> __device__ void start_lora(const Lora& lora) {
    __shared__ float sums[WARPS];
    for (int row = gridDim.x - 1 - blockIdx.x; row < lora.rows; row += gridDim.x) {
        float sum = 0;
        #pragma unroll 4
        for (int k = threadIdx.x * VECTOR; k < K; k += THREADS * VECTOR) {
            uint4 words = __ldcs(reinterpret_cast<const uint4*>(lora.a + size_t(row) * K + k));
            Vector weights = reinterpret_cast<Vector&>(words), inputs = input(k);
            for (int i = 0; i < VECTOR; i++) {
                sum += float(inputs.values[slot(i)]) * float(weights.values[i]);
            }
        }
        sum = warp_sum(sum);
        if (threadIdx.x % LANES == 0) sums[threadIdx.x / LANES] = sum;
        __syncthreads();
        if (threadIdx.x == 0) {
            sum = 0;
            for (float part : sums) sum += part;
            lora.inner[row] = sum;
            if (lora.arrived) {
                __threadfence();
                atomicAdd(lora.arrived, Count(1));
            }
        }
        __syncthreads();
    }
}

// Wait until `inner` is ready.
__device__ void wait_for(Lora& lora) {
    if (lora.rows && !lora.is_ready) wait_for(lora.arrived, lora.rows);
    lora.is_ready = true;
}

// Add LoRA to N outputs of a matrix, which is number `matrix` of those with this input; `first` of
// all their outputs is the first of the N.
template <int N>
__device__ void add_lora(const Lora& lora, int matrix, int first, float (&outputs)[N]) {
    const float* inner = lora.inner + matrix * lora.rank;
    const Number* b = lora.b + size_t(first) * lora.rank;
    #pragma unroll 1
    for (int r = 0; r < lora.rank; r += VECTOR) {
        float factors[VECTOR];
        for (int i = 0; i < VECTOR; i += 4) {
            float4 four = __ldcg(reinterpret_cast<const float4*>(inner + r + i));
            factors[i] = four.x, factors[i + 1] = four.y;
            factors[i + 2] = four.z, factors[i + 3] = four.w;
        }
        for (int n = 0; n < N; n++) {
            Vector weights = reinterpret_cast<const Vector&>(b[n * lora.rank + r]);
            for (int i = 0; i < VECTOR; i++) outputs[n] += factors[i] * float(weights.values[i]);
        }
    }
}
