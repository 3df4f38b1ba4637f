// Attention of the newest token of each row of a batch to the columns of its row in the cache.
// decoder_batch.py launches it.
//
// Macros, which decoder_batch.py defines:
//   Number     type of all arrays: float, Float16 or Bfloat16 (numbers.cuh)
//   HEAD_DIM   channels of a head
//   GROUP      query heads that share a key-value head
//
// A block computes the heads of a row that share a key-value head: each key and value is read once.
// A warp's halves take columns in turns, of which each lane has PER channels, and keep a softmax of
// their own (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018). In the end
// they are merged in shared memory.

constexpr int THREADS = 128, LANES = 16, HALVES = THREADS / LANES, PER = HEAD_DIM / LANES;
constexpr int AT_ONCE = 4;  // columns of a half whose loads wait together
constexpr float LOWEST = -1e30f;

static_assert(HEAD_DIM % LANES == 0 && PER <= 16 && GROUP <= 8, "the registers are few");

constexpr int ALIGNMENT = (PER % 8 == 0 ? 8 : PER % 4 == 0 ? 4 : PER % 2 == 0 ? 2 : 1);
struct alignas(ALIGNMENT * sizeof(Number)) Channels { Number values[PER]; };

// queries, outputs: (B, n_kv_heads * GROUP, HEAD_DIM); keys, values: (B, n_kv_heads, capacity,
// HEAD_DIM); starts: (B,), the first column that a row sees, of those from 0 to `end` - 1.
// `scale_bits` is a float, passed as an integer: that of the scores, times log2(e).
extern "C" __global__ void rows_attention(
    const Number* queries, const Number* keys, const Number* values, const int* starts,
    Number* outputs, int n_kv_heads, int capacity, int end, int scale_bits
) {
    __shared__ float maxima[HALVES][GROUP], sums[HALVES][GROUP], parts[HALVES][GROUP][HEAD_DIM];
    int half = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    float scale = __int_as_float(scale_bits);

    // The queries' channels of this lane.
    float query[GROUP][PER], total[GROUP][PER], maximum[GROUP], sum[GROUP];
    for (int g = 0; g < GROUP; g++) {
        Channels own = reinterpret_cast<const Channels*>(
            queries + (size_t(blockIdx.x) * GROUP + g) * HEAD_DIM)[lane];
        for (int i = 0; i < PER; i++) {
            query[g][i] = float(own.values[i]) * scale;
            total[g][i] = 0;
        }
        maximum[g] = LOWEST;
        sum[g] = 0;
    }

    // The columns, AT_ONCE of a half at a time.
    const size_t first_column = size_t(blockIdx.x) * capacity * LANES;
    const Channels* key_columns = reinterpret_cast<const Channels*>(keys) + first_column;
    const Channels* value_columns = reinterpret_cast<const Channels*>(values) + first_column;
    for (int at = max(0, starts[blockIdx.x / n_kv_heads]); at < end; at += HALVES * AT_ONCE) {
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
                #pragma unroll
                for (int distance = LANES / 2; distance > 0; distance /= 2)
                    dot += __shfl_xor_sync(~0u, dot, distance);
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
