// Attention of the newest token of each row of a batch to the columns of its row in the cache, into
// which its key and value are written. decoder_batch_cuda.py launches it.
//
// Macros, which decoder_batch_cuda.py defines:
//   Number         type of all arrays but the frequencies: float, Float16 or Bfloat16 (numbers.cuh)
//   HEAD_DIM       channels of a head
//   N_KV_HEADS     key-value heads
//   GROUP          query heads that share one of them
//   HAS_HEAD_NORM  whether each head of queries and keys is normalised, with EPSILON
//   AMPLITUDE      of the cosines and sines of RoPE
//   THREADS        of a block
//
// A block computes the heads of a row that share a key-value head: each key and value is read once.
// A warp's halves take columns in turns, of which each lane has PER channels, and keep a softmax of
// their own (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018). In the end
// they are merged in shared memory.

constexpr int LANES = 16, HALVES = THREADS / LANES, PER = HEAD_DIM / LANES;
constexpr int AT_ONCE = 4;  // columns of a half whose loads wait together
constexpr float LOWEST = -1e30f;

static_assert(HEAD_DIM % (2 * LANES) == 0, "each lane takes pairs of channels");
static_assert(PER <= 16 && GROUP <= 8, "the registers are few");

constexpr int ALIGNMENT = (PER % 8 == 0 ? 8 : PER % 4 == 0 ? 4 : 2);
struct alignas(ALIGNMENT * sizeof(Number)) Channels { Number values[PER]; };

// The sum over the lanes of a half.
__device__ float sum_of_half(float x) {
    #pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2)
        x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

// projected: (B, (GROUP + 2) * N_KV_HEADS, HEAD_DIM), the heads of queries, keys and values of each
// row; place: their position, and their column in the cache; starts: (B,), the first column that a
// row sees, up to its own; keys, values: (B, N_KV_HEADS, capacity, HEAD_DIM); query_norm, key_norm:
// (HEAD_DIM,); frequencies: (HEAD_DIM / 2,). outputs: (B, N_KV_HEADS * GROUP, HEAD_DIM).
// `scale_bits` is a float, passed as an integer: that of the scores, times log2(e).
extern "C" __global__ void rows_attention(
    const Number* projected, const int* place, const int* starts, Number* keys, Number* values,
    const Number* query_norm, const Number* key_norm, const float* frequencies,
    Number* outputs, int capacity, int scale_bits
) {
    __shared__ float maxima[HALVES][GROUP], sums[HALVES][GROUP], parts[HALVES][GROUP][HEAD_DIM];
    int half = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    int row = blockIdx.x / N_KV_HEADS, kv_head = blockIdx.x % N_KV_HEADS;
    int column = place[1], end = column + 1;
    const Channels* heads = reinterpret_cast<const Channels*>(projected)
        + size_t(row) * (GROUP + 2) * N_KV_HEADS * LANES + lane;

    // Angles of this lane's pairs of channels.
    float cosines[PER / 2], sines[PER / 2];
    for (int i = 0; i < PER / 2; i++)
        sincosf(place[0] * frequencies[lane * PER / 2 + i], &sines[i], &cosines[i]);
    auto prepare = [&](Channels from, const Number* norm, float scale, float* to) {
        float squares = 0;
        for (int i = 0; i < PER; i++) {
            to[i] = float(from.values[i]);
            squares += to[i] * to[i];
        }
        if (HAS_HEAD_NORM) {
            float factor = rsqrtf(sum_of_half(squares) / HEAD_DIM + float(EPSILON));
            for (int i = 0; i < PER; i++) to[i] *= factor * float(norm[lane * PER + i]);
        }
        scale *= float(AMPLITUDE);
        for (int i = 0; i < PER; i += 2) {
            float a = to[i], b = to[i + 1], cosine = cosines[i / 2], sine = sines[i / 2];
            to[i] = (a * cosine - b * sine) * scale;
            to[i + 1] = (b * cosine + a * sine) * scale;
        }
    };

    // The new key and value go into the cache.
    const size_t first_column = size_t(blockIdx.x) * capacity * LANES;
    Channels* key_columns = reinterpret_cast<Channels*>(keys) + first_column;
    Channels* value_columns = reinterpret_cast<Channels*>(values) + first_column;
    float key_channels[PER];
    prepare(heads[(GROUP * N_KV_HEADS + kv_head) * LANES], key_norm, 1, key_channels);
    if (half == 0) {
        Channels key;
        for (int i = 0; i < PER; i++) key.values[i] = Number(key_channels[i]);
        key_columns[size_t(column) * LANES + lane] = key;
        value_columns[size_t(column) * LANES + lane]
            = heads[((GROUP + 1) * N_KV_HEADS + kv_head) * LANES];
    }

    // The queries' channels of this lane.
    float query[GROUP][PER], total[GROUP][PER], maximum[GROUP], sum[GROUP];
    for (int g = 0; g < GROUP; g++) {
        prepare(heads[(kv_head * GROUP + g) * LANES], query_norm, __int_as_float(scale_bits),
                query[g]);
        for (int i = 0; i < PER; i++) total[g][i] = 0;
        maximum[g] = LOWEST;
        sum[g] = 0;
    }
    __syncthreads();

    // The columns, AT_ONCE of a half at a time.
    for (int at = max(0, starts[row]); at < end; at += HALVES * AT_ONCE) {
        Channels key[AT_ONCE], value[AT_ONCE];
        #pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            size_t column = min(at + j * HALVES + half, end - 1);
            key[j] = key_columns[column * LANES + lane];
            value[j] = value_columns[column * LANES + lane];
        }
        #pragma unroll
        for (int g = 0; g < GROUP; g++) {
            float score[AT_ONCE], highest = maximum[g];
            #pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                float dot = 0;
                #pragma unroll
                for (int i = 0; i < PER; i++) dot += query[g][i] * float(key[j].values[i]);
                dot = sum_of_half(dot);
                score[j] = at + j * HALVES + half < end ? dot : LOWEST;
                highest = max(highest, score[j]);
            }
            float factor = exp2f(maximum[g] - highest);
            maximum[g] = highest;
            sum[g] *= factor;
            #pragma unroll
            for (int i = 0; i < PER; i++) total[g][i] *= factor;
            #pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                float weight = score[j] == LOWEST ? 0 : exp2f(score[j] - highest);
                sum[g] += weight;
                #pragma unroll
                for (int i = 0; i < PER; i++) total[g][i] += weight * float(value[j].values[i]);
            }
        }
    }

    // Merge what the halves have.
    for (int g = 0; g < GROUP; g++) {
        maxima[half][g] = maximum[g];
        sums[half][g] = sum[g];
        for (int i = 0; i < PER; i++) parts[half][g][lane * PER + i] = total[g][i];
    }
    __syncthreads();
    for (int at = threadIdx.x; at < GROUP * HEAD_DIM; at += THREADS) {
        int g = at / HEAD_DIM, channel = at % HEAD_DIM;
        float highest = LOWEST, whole = 0, divisor = 0;
        for (int h = 0; h < HALVES; h++) highest = max(highest, maxima[h][g]);
        for (int h = 0; h < HALVES; h++) {
            float factor = exp2f(maxima[h][g] - highest);
            divisor += sums[h][g] * factor;
            whole += parts[h][g][channel] * factor;
        }
        outputs[size_t(blockIdx.x) * GROUP * HEAD_DIM + at] = Number(whole / divisor);
    }
}
