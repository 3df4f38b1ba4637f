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
//   HAS_BIAS           1 where wq, wk and wv have biases, else 0
//   HAS_HEAD_NORM      1 where each head of queries and keys is normalised, else 0
//   WINDOW             positions that a query sees, its own included; 0 where it sees all
//   AMPLITUDE          of the cosines and sines of RoPE
//   EPSILON            of RMSNorm
//   THREADS            of a block
//   SHARED_MEMORY      bytes of dynamic shared memory of a block
//   MAX_SPLITS         blocks, at most, that the positions of one head are split among

constexpr int KV = N_KV_HEADS * HEAD_DIM, QKV = Q + 2 * KV;
constexpr int POSITIONS = 4;                // that a warp attends to at once
constexpr int CHANNELS = HEAD_DIM / LANES;  // of a head, a thread's
constexpr int SPLIT = HEAD_DIM + 4;         // floats of a split; the last two are padding
constexpr float LOG2_E = 1.44269504f;

static_assert(HEAD_DIM % (2 * LANES) == 0, "each thread takes pairs of channels");

struct alignas(CHANNELS * sizeof(Number)) Channels { Number values[CHANNELS]; };

// Where the token is: its position in the text, and the first free place of the cache, which it
// gets.
struct Place {
    int position, free;
    // The first place of the cache that it sees.
    __device__ int first() const { return WINDOW ? max(0, free + 1 - WINDOW) : 0; }
};

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
        set_input(k, inputs[n]);
    }
}

// One query head's attention to one split of the positions, as in "Flash-Decoding" (Dao et al.,
// 2023). `out` (SPLIT) gets the sums of weighted values (HEAD_DIM), the maximum logit and the sum
// of exponentials. `qkv` (QKV) holds queries, keys and values of the token, before LoRA, norms and
// rotation. The last split has its position, and writes it to the cache.
__device__ void attention(
    int head, int split, int n_splits, const float* qkv, const Lora& lora,
    const Number* q_norm, const Number* k_norm, Number* keys, Number* values,
    const float* frequencies, Place place, int capacity, float* out
) {
    constexpr int HEADS_PER_KV = N_HEADS / N_KV_HEADS;
    __shared__ float all_sums[WARPS][HEAD_DIM], all_max_logits[WARPS], all_sum_exps[WARPS];
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, kv_head = head / HEADS_PER_KV;
    size_t cached = size_t(kv_head) * capacity * HEAD_DIM + lane * CHANNELS;

    auto load = [&](int matrix, int at, float (&channels)[CHANNELS]) {
        at += lane * CHANNELS;
        for (int i = 0; i < CHANNELS; i++) channels[i] = __ldcg(qkv + at + i);
        add_lora(lora, matrix, at, channels);
    };
    auto norm = [&](float* channels, const Number* weight) {
        if (!HAS_HEAD_NORM) return;
        float sum = 0;
        for (int i = 0; i < CHANNELS; i++) sum += channels[i] * channels[i];
        float factor = rsqrtf(warp_sum(sum) / HEAD_DIM + float(EPSILON));
        for (int i = 0; i < CHANNELS; i++) {
            channels[i] *= factor * float(weight[lane * CHANNELS + i]);
        }
    };
    auto rope = [&](float* channels, float scale) {
        for (int i = 0; i < CHANNELS; i += 2) {
            float sine, cosine, a = channels[i], b = channels[i + 1];
            sincosf(place.position * frequencies[(lane * CHANNELS + i) / 2], &sine, &cosine);
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
    load(0, head * HEAD_DIM, query);
    norm(query, q_norm);
    rope(query, rsqrtf(HEAD_DIM) * LOG2_E * float(AMPLITUDE));
    if (warp == 0 && split == n_splits - 1) {
        float key[CHANNELS];
        Channels new_key, new_value;
        load(1, Q + kv_head * HEAD_DIM, key);
        load(2, Q + KV + kv_head * HEAD_DIM, sums);
        norm(key, k_norm);
        rope(key, AMPLITUDE);
        for (int i = 0; i < CHANNELS; i++) {
            new_key.values[i] = Number(key[i]);
            new_value.values[i] = Number(sums[i]);
        }
        if (head % HEADS_PER_KV == 0) {
            size_t at = cached + size_t(place.free) * HEAD_DIM;
            reinterpret_cast<Channels&>(keys[at]) = new_key;
            reinterpret_cast<Channels&>(values[at]) = new_value;
        }
        max_logit = score(query, new_key);
        sum_exp = 1;
    }
    int per_split = (place.free - place.first() + n_splits - 1) / n_splits;
    int start = place.first() + split * per_split, end = min(start + per_split, place.free);
    for (int p = start + warp * POSITIONS; p < end; p += WARPS * POSITIONS) {
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
        set_input(k, merged);
    }
}

// What a layer makes of the token `in` (DIM), which is at `*place`, into `out` (DIM). LoRA is in
// four groups, each with one input: wq, wk, wv; wo; w1, w3; w2.
extern "C" __global__ __launch_bounds__(THREADS, 1) void decoder_layer(
    const Number* in, const Place* place, const Number* attention_norm, const Number* ffn_norm,
    const Number* q_norm, const Number* k_norm, const Number* qkv_bias,
    const void* wq, const Number* wq_scales, const Number* wq_biases,
    const void* wk, const Number* wk_scales, const Number* wk_biases,
    const void* wv, const Number* wv_scales, const Number* wv_biases,
    const void* wo, const Number* wo_scales, const Number* wo_biases,
    const void* w1, const Number* w1_scales, const Number* w1_biases,
    const void* w2, const Number* w2_scales, const Number* w2_biases,
    const void* w3, const Number* w3_scales, const Number* w3_biases,
    const Number* qkv_a, const Number* qkv_b, const Number* o_a, const Number* o_b,
    const Number* w13_a, const Number* w13_b, const Number* w2_a, const Number* w2_b,
    Number* keys, Number* values, const float* frequencies, Count* barrier, const Number* previous,
    Number* out, float* qkv, float* splits, Number* residual, Number* hidden,
    float* inner, Count* arrived,
    int qkv_rank, int o_rank, int w13_rank, int w2_rank, int capacity
) {
    // `previous`, the output for the last token, is only waited for.
    Place here = *place;
    int block = blockIdx.x, n_blocks = gridDim.x;
    Lora qkv_lora{qkv_a, qkv_b, qkv_rank, 3 * qkv_rank, inner, nullptr};  // grid_sync waits for it
    Lora o_lora{o_a, o_b, o_rank, o_rank, qkv_lora.inner + qkv_lora.rows, arrived};
    Lora w13_lora{w13_a, w13_b, w13_rank, 2 * w13_rank, o_lora.inner + o_lora.rows, arrived + 1};
    Lora w2_lora{w2_a, w2_b, w2_rank, w2_rank, w13_lora.inner + w13_lora.rows, arrived + 2};
    // The first grid_sync lies between these zeros and the first count.
    if (block == 0 && threadIdx.x < 3) arrived[threadIdx.x] = 0;

    // Queries, keys and values.
    normalize(in, attention_norm);
    sum_chunks<DIM>();
    start_lora<DIM>(qkv_lora);
    multiply<DIM, 1>(QKV, [&](int row, int) {
        bool is_query = row < Q, is_key = !is_query && row < Q + KV;
        Matrix matrix = is_query ? Matrix{wq, wq_scales, wq_biases}
                      : is_key   ? Matrix{wk, wk_scales, wk_biases}
                                 : Matrix{wv, wv_scales, wv_biases};
        return row_of<DIM>(matrix, row - (is_query ? 0 : is_key ? Q : Q + KV));
    }, [&](int row, const float* products) {
        qkv[row] = products[0] + (HAS_BIAS ? float(qkv_bias[row]) : 0);
    });
    grid_sync(barrier);

    // Attention: each head's positions in splits, for as many blocks as there are.
    int n_splits = min(max(n_blocks / N_HEADS, 1), MAX_SPLITS);
    n_splits = min(n_splits, (here.free - here.first()) / 64 + 1);
    for (int item = block; item < N_HEADS * n_splits; item += n_blocks) {
        attention(item / n_splits, item % n_splits, n_splits, qkv, qkv_lora, q_norm, k_norm, keys,
                  values, frequencies, here, capacity, splits + item * SPLIT);
    }
    grid_sync(barrier);

    // wo, and the residual connection.
    merge_splits(splits, n_splits);
    sum_chunks<Q>();
    start_lora<Q>(o_lora);
    multiply<Q, 1>(DIM, [&](int row, int) {
        return row_of<Q>(Matrix{wo, wo_scales, wo_biases}, row);
    }, [&](int row, const float* products) {
        float sum[1] = {float(in[row]) + products[0]};
        wait_for(o_lora);
        add_lora(o_lora, 0, row, sum);
        residual[row] = Number(sum[0]);
    });
    grid_sync(barrier);

    // w1 and w3, and SwiGLU.
    normalize(residual, ffn_norm);
    sum_chunks<DIM>();
    start_lora<DIM>(w13_lora);
    multiply<DIM, 2>(HIDDEN, [&](int row, int i) {
        return row_of<DIM>(i ? Matrix{w3, w3_scales, w3_biases} : Matrix{w1, w1_scales, w1_biases},
                           row);
    }, [&](int row, const float* products) {
        float gate[1] = {products[0]}, up[1] = {products[1]};
        wait_for(w13_lora);
        add_lora(w13_lora, 0, row, gate);
        add_lora(w13_lora, 1, HIDDEN + row, up);
        hidden[row] = Number(gate[0] / (1 + __expf(-gate[0])) * up[0]);
    });
    grid_sync(barrier);

    // w2, and the residual connection.
    for (int k = threadIdx.x * VECTOR; k < HIDDEN; k += THREADS * VECTOR) {
        uint4 words = __ldcg(reinterpret_cast<const uint4*>(hidden + k));
        set_input(k, reinterpret_cast<Vector&>(words));
    }
    sum_chunks<HIDDEN>();
    start_lora<HIDDEN>(w2_lora);
    multiply<HIDDEN, 1>(DIM, [&](int row, int) {
        return row_of<HIDDEN>(Matrix{w2, w2_scales, w2_biases}, row);
    }, [&](int row, const float* products) {
        float sum[1] = {float(residual[row]) + products[0]};
        wait_for(w2_lora);
        add_lora(w2_lora, 0, row, sum);
        out[row] = Number(sum[0]);
    });
}
