// The decoder's layer for one token, in one kernel. With a kernel for each operation the GPU rests
// while one ends and the next begins, and the processor has ten times as many to launch. A block of
// threads fills a multiprocessor; all blocks wait for each other (grid_sync) between two products,
// so that no two such kernels may run at once. decoder_cuda.py launches it.
//
// Macros, which decoder_cuda.py defines:
//   Number             type of activations, scales and norms: float, or one of numbers.cuh
//   BITS, GROUP_SIZE   of quantized weights; 0 and 1 where weights are of type Number
//   DIM, HIDDEN        sizes of the layer's input and of the feed-forward network
//   N_HEADS, N_KV_HEADS, HEAD_DIM
//   EPSILON            of RMSNorm
//   THREADS            of a block
//   SHARED_MEMORY      bytes of dynamic shared memory of a block
//   MAX_SPLITS         blocks, at most, that the positions of one head are split among
//
// Dynamic shared memory. The input is what the rows of a matrix are multiplied by. A chunk is 16
// bytes of weights, so CHUNK numbers of the input, or CHUNK / VECTOR vectors of 16 bytes. Lane l of
// a warp multiplies the chunks l, l + 32, l + 64 ... of a row. The vectors lie in the order in
// which the lanes read them, so that 32 lanes read 32 neighbours (here with 4 vectors a chunk):
//
//   shared: | lane 0  lane 1 ... lane 31 | lane 0 ... lane 31 | lane 0 ... | ... | sums of chunks |
//           |   vector 0 of its chunk    | vector 1 of it     | 2, then 3  |     | 0, 1, 2, ...   |
//           |<------------- round 0: chunks 0 to 31 ---------------------->| 1 ..|                |
//           ^ input(k): the vector with number k                                 ^ chunk_sum(0)
//                                                                  (float CHUNK_SUMS of shared)
//
// The sums of chunks, in float, are there for quantized weights alone: a bias is multiplied by
// them, and integers are read as 1 + integer / 2**BITS.

constexpr int Q = N_HEADS * HEAD_DIM, KV = N_KV_HEADS * HEAD_DIM, QKV = Q + 2 * KV;
constexpr int LANES = 32, WARPS = THREADS / LANES;
constexpr int VECTOR = 16 / sizeof(Number);        // numbers in 16 bytes
constexpr int CHUNK = BITS ? 128 / BITS : VECTOR;  // weights in 16 bytes
constexpr int POSITIONS = 4;                       // that a warp attends to at once
constexpr int CHANNELS = HEAD_DIM / LANES;         // of a head, a thread's
constexpr int SPLIT = HEAD_DIM + 4;                // floats of a split; the last two are padding
constexpr float LOG2_E = 1.44269504f;

constexpr int MULTIPLE = BITS ? GROUP_SIZE : VECTOR;
constexpr int LARGEST = HIDDEN > DIM && HIDDEN > Q ? HIDDEN : DIM > Q ? DIM : Q;
constexpr int ROUNDS = (LARGEST + LANES * CHUNK - 1) / (LANES * CHUNK);
constexpr int CHUNK_SUMS = ROUNDS * LANES * CHUNK * sizeof(Number) / sizeof(float);

static_assert(BITS == 0 || BITS == 4 || BITS == 8, "weights of other sizes are not read");
static_assert(DIM % MULTIPLE + Q % MULTIPLE + HIDDEN % MULTIPLE == 0, "no row ends amid 16 bytes");
static_assert(HEAD_DIM % (2 * LANES) == 0, "each thread takes pairs of channels");
static_assert((CHUNK_SUMS + LARGEST / CHUNK) * 4 <= SHARED_MEMORY, "what is multiplied has room");

struct alignas(16) Vector { Number values[VECTOR]; };
struct alignas(CHANNELS * sizeof(Number)) Channels { Number values[CHANNELS]; };
struct Matrix { const void* weight; const Number *scales, *biases; };

using Count = unsigned long long;

extern __shared__ Vector shared[];  // the picture above

__device__ float warp_sum(float x) {
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

// Wait for all blocks of the grid. `barrier` counts those that have arrived, and is never reset.
__device__ void grid_sync(Count* barrier) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        Count now, target = (atomicAdd(barrier, Count(1)) / gridDim.x + 1) * gridDim.x;
        do {
            asm volatile("ld.acquire.gpu.u64 %0, [%1];" : "=l"(now) : "l"(barrier) : "memory");
        } while (now < target);
    }
    __syncthreads();
}

// The vector of the input that begins with its number k.
__device__ Vector& input(int k) {
    int round = k / (LANES * CHUNK), lane = k / CHUNK % LANES, part = k % CHUNK / VECTOR;
    return shared[(round * (CHUNK / VECTOR) + part) * LANES + lane];
}

// The sum of the numbers of the input that a chunk of weights is multiplied by.
__device__ float& chunk_sum(int chunk) {
    return reinterpret_cast<float*>(shared)[CHUNK_SUMS + chunk];
}

// Wait for the K numbers of the input, and sum them chunk by chunk where weights are quantized.
template <int K> __device__ void sum_chunks() {
    __syncthreads();
    if (BITS == 0) return;
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

// RMSNorm of `in` (DIM), which becomes the input.
__device__ void normalize(const Number* in, const Number* weight) {
    constexpr int N = (DIM / VECTOR + THREADS - 1) / THREADS;
    __shared__ float sums[WARPS];
    Vector inputs[N], weights[N];
    float sum = 0;
    for (int n = 0; n < N; n++) {
        int k = (n * THREADS + threadIdx.x) * VECTOR;
        if (k >= DIM) break;
        uint4 words = __ldcg(reinterpret_cast<const uint4*>(in + k));
        inputs[n] = reinterpret_cast<Vector&>(words);
        weights[n] = reinterpret_cast<const Vector&>(weight[k]);
        for (float value : inputs[n].values) sum += value * value;
    }
    sum = warp_sum(sum);
    if (threadIdx.x % LANES == 0) sums[threadIdx.x / LANES] = sum;
    __syncthreads();
    sum = 0;
    for (float part : sums) sum += part;
    float factor = rsqrtf(sum / DIM + float(EPSILON));
    for (int n = 0; n < N; n++) {
        int k = (n * THREADS + threadIdx.x) * VECTOR;
        if (k >= DIM) break;
        for (int i = 0; i < VECTOR; i++) {
            float value = float(inputs[n].values[i]) * factor;
            inputs[n].values[i] = Number(value * float(weights[n].values[i]));
        }
        input(k) = inputs[n];
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
        for (int i = 0; i < VECTOR; i++) sum += float(inputs.values[i]) * float(weights.values[i]);
    }
    return warp_sum(sum);
}

// The product of the input with a row of a matrix, which may be quantized.
template <int K> __device__ __noinline__ float dot(Matrix matrix, int row) {
    if (BITS == 0) return dot<K>(static_cast<const Number*>(matrix.weight) + size_t(row) * K);
    const uint4* chunks = static_cast<const uint4*>(matrix.weight) + size_t(row) * (K / CHUNK);
    const Number* scales = matrix.scales + size_t(row) * (K / GROUP_SIZE);
    const Number* biases = matrix.biases + size_t(row) * (K / GROUP_SIZE);
    float sum = 0;
    #pragma unroll 4
    for (int chunk = threadIdx.x % LANES; chunk < K / CHUNK; chunk += LANES) {
        uint4 four = __ldcs(chunks + chunk);
        float scale = scales[chunk * CHUNK / GROUP_SIZE], bias = biases[chunk * CHUNK / GROUP_SIZE];
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
                product += float(inputs.values[i]) * __uint_as_float(word);
            }
        }
        sum += scale * (product - chunk_sum(chunk)) * (1 << BITS) + bias * chunk_sum(chunk);
    }
    return warp_sum(sum);
}

// One query head's attention to one split of the positions, as in "Flash-Decoding" (Dao et al.,
// 2023). `out` (SPLIT) gets the sums of weighted values (HEAD_DIM), the maximum logit and the sum
// of exponentials. `qkv` (QKV + ranks) holds queries, keys and values at `position`, before LoRA
// and rotation, and the products with LoRA's first matrices. The last split has that position,
// and writes it to the cache.
__device__ void attention(
    int head, int split, int n_splits, const float* qkv, const Number* lora_b, int ranks,
    Number* keys, Number* values, const float* frequencies, int position, int capacity, float* out
) {
    constexpr int HEADS_PER_KV = N_HEADS / N_KV_HEADS;
    __shared__ float all_sums[WARPS][HEAD_DIM], all_max_logits[WARPS], all_sum_exps[WARPS];
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, kv_head = head / HEADS_PER_KV;
    size_t cached = size_t(kv_head) * capacity * HEAD_DIM + lane * CHANNELS;

    auto load = [&](int at, float* channels) {
        at += lane * CHANNELS;
        for (int i = 0; i < CHANNELS; i++) channels[i] = __ldcg(qkv + at + i);
        for (int r = 0; r < ranks; r++) {
            float inner = __ldcg(qkv + QKV + r);
            const Number* outer = lora_b + size_t(r) * QKV + at;
            for (int i = 0; i < CHANNELS; i++) channels[i] += inner * float(outer[i]);
        }
    };
    auto rope = [&](float* channels, float scale) {
        for (int i = 0; i < CHANNELS; i += 2) {
            float sine, cosine, a = channels[i], b = channels[i + 1];
            sincosf(position * frequencies[(lane * CHANNELS + i) / 2], &sine, &cosine);
            channels[i] = (a * cosine - b * sine) * scale;
            channels[i + 1] = (b * cosine + a * sine) * scale;
        }
    };
    auto score = [](const float* query, Channels key) {
        float sum = 0;
        for (int i = 0; i < CHANNELS; i++) sum += query[i] * float(key.values[i]);
        return warp_sum(sum);
    };

    float query[CHANNELS], sums[CHANNELS] = {}, max_logit = -1e30f, sum_exp = 0;
    load(head * HEAD_DIM, query);
    rope(query, rsqrtf(HEAD_DIM) * LOG2_E);
    if (warp == 0 && split == n_splits - 1) {
        float key[CHANNELS];
        Channels new_key, new_value;
        load(Q + kv_head * HEAD_DIM, key);
        load(Q + KV + kv_head * HEAD_DIM, sums);
        rope(key, 1);
        for (int i = 0; i < CHANNELS; i++) {
            new_key.values[i] = Number(key[i]);
            new_value.values[i] = Number(sums[i]);
        }
        if (head % HEADS_PER_KV == 0) {
            size_t at = cached + size_t(position) * HEAD_DIM;
            reinterpret_cast<Channels&>(keys[at]) = new_key;
            reinterpret_cast<Channels&>(values[at]) = new_value;
        }
        max_logit = score(query, new_key);
        sum_exp = 1;
    }
    int per_split = (position + n_splits - 1) / n_splits;
    int end = min((split + 1) * per_split, position);
    for (int p = split * per_split + warp * POSITIONS; p < end; p += WARPS * POSITIONS) {
        Channels some_keys[POSITIONS], some_values[POSITIONS];
        for (int j = 0; j < POSITIONS; j++) {
            size_t at = cached + size_t(min(p + j, end - 1)) * HEAD_DIM;
            some_keys[j] = reinterpret_cast<const Channels&>(keys[at]);
            some_values[j] = reinterpret_cast<const Channels&>(values[at]);
        }
        float scores[POSITIONS], old_max = max_logit;
        for (int j = 0; j < POSITIONS; j++) {
            scores[j] = score(query, some_keys[j]);
            max_logit = max(max_logit, scores[j]);
        }
        float shrink = exp2f(old_max - max_logit);
        sum_exp *= shrink;
        for (int i = 0; i < CHANNELS; i++) sums[i] *= shrink;
        for (int j = 0; j < POSITIONS && p + j < end; j++) {
            float weight = exp2f(scores[j] - max_logit);
            sum_exp += weight;
            for (int i = 0; i < CHANNELS; i++) {
                sums[i] += weight * float(some_values[j].values[i]);
            }
        }
    }
    // Merge what the warps have.
    for (int i = 0; i < CHANNELS; i++) all_sums[warp][lane * CHANNELS + i] = sums[i];
    all_max_logits[warp] = max_logit;
    all_sum_exps[warp] = sum_exp;
    __syncthreads();
    for (float other : all_max_logits) max_logit = max(max_logit, other);
    for (int k = threadIdx.x; k < HEAD_DIM; k += THREADS) {
        float sum = 0;
        sum_exp = 0;
        for (int w = 0; w < WARPS; w++) {
            float weight = exp2f(all_max_logits[w] - max_logit);
            sum += weight * all_sums[w][k];
            sum_exp += weight * all_sum_exps[w];
        }
        out[k] = sum;
        out[HEAD_DIM] = max_logit;
        out[HEAD_DIM + 1] = sum_exp;
    }
    __syncthreads();
}

// Merge the splits of each head into the output of attention, which becomes the input.
__device__ void merge_splits(const float* splits, int n_splits) {
    for (int k = threadIdx.x * VECTOR; k < Q; k += THREADS * VECTOR) {
        const float* split = splits + k / HEAD_DIM * n_splits * SPLIT;
        float sums[VECTOR] = {}, max_logit = -1e30f, sum_exp = 0;
        #pragma unroll 4
        for (int s = 0; s < n_splits; s++, split += SPLIT) {
            float2 tail = __ldcg(reinterpret_cast<const float2*>(split + HEAD_DIM));
            float old_max = max_logit;
            max_logit = max(max_logit, tail.x);
            float shrink = exp2f(old_max - max_logit), weight = exp2f(tail.x - max_logit);
            sum_exp = sum_exp * shrink + tail.y * weight;
            for (int i = 0; i < VECTOR; i += 4) {
                float4 some = __ldcg(reinterpret_cast<const float4*>(split + k % HEAD_DIM + i));
                float values[4] = {some.x, some.y, some.z, some.w};
                for (int j = 0; j < 4; j++) {
                    sums[i + j] = sums[i + j] * shrink + values[j] * weight;
                }
            }
        }
        Vector merged;
        for (int i = 0; i < VECTOR; i++) merged.values[i] = Number(sums[i] / sum_exp);
        input(k) = merged;
    }
}

// What a layer makes of the token `in` (DIM), which is at `*position`, into `out` (DIM).
extern "C" __global__ __launch_bounds__(THREADS, 1) void decoder_layer(
    const Number* in, const int* position, const Number* attention_norm, const Number* ffn_norm,
    const void* wq, const Number* wq_scales, const Number* wq_biases,
    const void* wk, const Number* wk_scales, const Number* wk_biases,
    const void* wv, const Number* wv_scales, const Number* wv_biases,
    const void* wo, const Number* wo_scales, const Number* wo_biases,
    const void* w1, const Number* w1_scales, const Number* w1_biases,
    const void* w2, const Number* w2_scales, const Number* w2_biases,
    const void* w3, const Number* w3_scales, const Number* w3_biases,
    const Number* lora_a, const Number* lora_b, Number* keys, Number* values,
    const float* frequencies, Count* barrier, const Number* previous,
    Number* out, float* qkv, float* splits, Number* residual, Number* hidden,
    int ranks, int capacity
) {
    // `previous`, the output for the last token, is only waited for. Warp by warp, the blocks take
    // turns with the rows of a matrix.
    int lane = threadIdx.x % LANES, block = blockIdx.x, n_blocks = gridDim.x, offset = *position;
    int first = threadIdx.x / LANES * n_blocks + block, step = WARPS * n_blocks;

    // Queries, keys and values, and the products with LoRA's first matrices.
    normalize(in, attention_norm);
    sum_chunks<DIM>();
    for (int row = first; row < QKV + ranks; row += step) {
        float product;
        if (row < QKV) {
            bool is_query = row < Q, is_key = !is_query && row < Q + KV;
            Matrix matrix = is_query ? Matrix{wq, wq_scales, wq_biases}
                          : is_key   ? Matrix{wk, wk_scales, wk_biases}
                                     : Matrix{wv, wv_scales, wv_biases};
            int start = is_query ? 0 : is_key ? Q : Q + KV;
            product = dot<DIM>(matrix, row - start);
        } else {
            product = dot<DIM>(lora_a + size_t(row - QKV) * DIM);
        }
        if (lane == 0) qkv[row] = product;
    }
    grid_sync(barrier);

    // Attention: each head's positions in splits, for as many blocks as there are.
    int n_splits = min(min(max(n_blocks / N_HEADS, 1), MAX_SPLITS), offset / 64 + 1);
    for (int item = block; item < N_HEADS * n_splits; item += n_blocks) {
        attention(item / n_splits, item % n_splits, n_splits, qkv, lora_b, ranks, keys, values,
                  frequencies, offset, capacity, splits + item * SPLIT);
    }
    grid_sync(barrier);

    // wo, and the residual connection.
    merge_splits(splits, n_splits);
    sum_chunks<Q>();
    for (int row = first; row < DIM; row += step) {
        float product = dot<Q>(Matrix{wo, wo_scales, wo_biases}, row);
        if (lane == 0) residual[row] = Number(float(in[row]) + product);
    }
    grid_sync(barrier);

    // w1 and w3, and SwiGLU.
    normalize(residual, ffn_norm);
    sum_chunks<DIM>();
    for (int row = first; row < HIDDEN; row += step) {
        float products[2];
        #pragma unroll 1
        for (int i = 0; i < 2; i++) {
            Matrix matrix = i ? Matrix{w3, w3_scales, w3_biases} : Matrix{w1, w1_scales, w1_biases};
            products[i] = dot<DIM>(matrix, row);
        }
        float silu = products[0] / (1 + __expf(-products[0]));
        if (lane == 0) hidden[row] = Number(silu * products[1]);
    }
    grid_sync(barrier);

    // w2, and the residual connection.
    for (int k = threadIdx.x * VECTOR; k < HIDDEN; k += THREADS * VECTOR) {
        reinterpret_cast<uint4&>(input(k)) = __ldcg(reinterpret_cast<const uint4*>(hidden + k));
    }
    sum_chunks<HIDDEN>();
    for (int row = first; row < DIM; row += step) {
        float product = dot<HIDDEN>(Matrix{w2, w2_scales, w2_biases}, row);
        if (lane == 0) out[row] = Number(float(residual[row]) + product);
    }
}
