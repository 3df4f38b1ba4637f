// Weights of 4 bits: in 16 bits; and their products with a few vectors, by tensor cores, for which they
// never lie in memory in 16 bits. quantized_cuda.py launches both.
//
// Macros, which quantized_cuda.py defines:
//   Number       type of vectors, scales, biases and products: Float16 or Bfloat16 (numbers.cuh)
//   GROUP_SIZE   neighbours in a row of weights that share a scale and a bias
//   TILES        of 8 vectors that a block multiplies
//   THREADS      of a block
//
// A block multiplies ROWS rows of weights by TILES * 8 vectors. Its warps split the K numbers of a row:
// they take steps of 64 in turns, and add their sums in the end. Of a step, lane 4 g + q reads numbers
// 16 q to 16 q + 15 of rows g, g + 8, g + 16 and g + 24, and of vectors g, g + 8, ... So both factors
// lie in the lanes as tensor cores want them, but in another order of k, which no sum minds:
//
//   word of weights  | 0 1 2 3 4 5 6 7 |    pairs: 0 4 | 1 5 | 2 6 | 3 7
//   of a vector      | 0 1 | 2 3 | 4 5 | 6 7 |     0 4 | 1 5 | 2 6 | 3 7

constexpr int LANES = 32, WARPS = THREADS / LANES;
constexpr int ROWS = 32, STEP = 64;
constexpr int TILE = 8;  // vectors of one product of the tensor cores, which takes 16 rows

// a * b + c for two numbers of 16 bits in a word.
__device__ unsigned multiply_add(unsigned a, unsigned b, unsigned c) {
    unsigned sum;
    if constexpr (IS_FLOAT16<Number>) {
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    } else {
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    }
    return sum;
}

__device__ unsigned twice(float x) {
    return Number(x).bits * 0x10001u;
}

// Weights i and i + 4 of a word: 16 scales times integer / 16, plus a bias.
__device__ unsigned dequantized_pair(unsigned word, int i, unsigned scales, unsigned biases) {
    unsigned sixteenths = multiply_add(weight_pair(word, i), twice(1), twice(-1));
    return multiply_add(sixteenths, scales, biases);
}

// Weights in 16 bits. Each thread computes 16 neighbours, two times 8.
extern "C" __global__ void dequantize(
    const uint2* words, const Number* scales, const Number* biases, uint4* weights, unsigned n_threads
) {
    unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= n_threads) return;
    size_t group = size_t(at) * 16 / GROUP_SIZE;
    unsigned scale = twice(16 * float(scales[group])), bias = twice(biases[group]);
    uint2 two = words[at];
    for (int j = 0; j < 2; j++) {
        unsigned pairs[4];  // of neighbours 0 and 4, 1 and 5, 2 and 6, 3 and 7
        for (int i = 0; i < 4; i++) pairs[i] = dequantized_pair(j ? two.y : two.x, i, scale, bias);
        weights[size_t(at) * 2 + j] = {
            (pairs[0] & 0xffffu) | pairs[1] << 16, (pairs[2] & 0xffffu) | pairs[3] << 16,
            pairs[0] >> 16 | (pairs[1] & 0xffff0000u), pairs[2] >> 16 | (pairs[3] & 0xffff0000u)
        };
    }
}

// Numbers i and i + 4 of 8 in four words.
__device__ unsigned number_pair(uint4 eight, int i) {
    unsigned low = i < 2 ? eight.x : eight.y, high = i < 2 ? eight.z : eight.w;
    return i % 2 ? low >> 16 | (high & 0xffff0000u) : (low & 0xffffu) | high << 16;
}

// vectors: (n_vectors, K); weights: (n_rows, K) of 4 bits, with scales and biases (n_rows, K /
// GROUP_SIZE); products: (n_vectors, n_rows). Blocks with the same rows follow each other.
extern "C" __global__ __launch_bounds__(THREADS) void quantized_product(
    const Number* vectors, const uint2* weights, const Number* scales, const Number* biases,
    Number* products, int n_vectors, int n_rows, int K
) {
    int n_passes = (n_vectors + TILES * TILE - 1) / (TILES * TILE);
    int first = blockIdx.x % n_passes * TILES * TILE, first_row = blockIdx.x / n_passes * ROWS;
    float sums[ROWS / 16][TILES][4] = {};
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, g = lane / 4, q = lane % 4;
    #pragma unroll 1
    for (int k = warp * STEP + 16 * q; k < K; k += WARPS * STEP) {
        uint2 words[ROWS / 8];
        unsigned scale[ROWS / 8], bias[ROWS / 8];
        #pragma unroll
        for (int i = 0; i < ROWS / 8; i++) {
            size_t at = size_t(first_row + g + 8 * i) * K + k;
            words[i] = __ldcs(weights + at / 16);
            scale[i] = twice(16 * float(scales[at / GROUP_SIZE]));
            bias[i] = twice(float(biases[at / GROUP_SIZE]));
        }
        unsigned some[ROWS / 16][4][4];  // of weights: tile of rows, product, PTX's registers
        #pragma unroll
        for (int i = 0; i < ROWS / 16; i++) {
            #pragma unroll
            for (int p = 0; p < 4; p++) {
                #pragma unroll
                for (int r = 0; r < 4; r++) {
                    int row = 2 * i + r % 2;
                    unsigned word = p < 2 ? words[row].x : words[row].y;
                    some[i][p][r] = dequantized_pair(word, p % 2 * 2 + r / 2, scale[row], bias[row]);
                }
            }
        }
        #pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            int vector = min(first + tile * TILE + g, n_vectors - 1);
            const uint4* numbers = reinterpret_cast<const uint4*>(vectors + size_t(vector) * K + k);
            uint4 eights[2] = {numbers[0], numbers[1]};
            #pragma unroll
            for (int p = 0; p < 4; p++) {
                unsigned pair = number_pair(eights[p / 2], p % 2 * 2);
                unsigned next = number_pair(eights[p / 2], p % 2 * 2 + 1);
                #pragma unroll
                for (int i = 0; i < ROWS / 16; i++) multiply_add(sums[i][tile], some[i][p], pair, next);
            }
        }
    }
    // Add the warps' sums, tile by tile.
    __shared__ float partial[WARPS][TILE][ROWS];
    #pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        #pragma unroll
        for (int i = 0; i < ROWS / 16; i++) {
            #pragma unroll
            for (int r = 0; r < 4; r++) {
                partial[warp][2 * q + r % 2][16 * i + r / 2 * 8 + g] = sums[i][tile][r];
            }
        }
        __syncthreads();
        for (int at = threadIdx.x; at < TILE * ROWS; at += THREADS) {
            int vector = first + tile * TILE + at / ROWS, row = at % ROWS;
            float sum = 0;
            for (int w = 0; w < WARPS; w++) sum += partial[w][at / ROWS][row];
            if (vector < n_vectors) products[size_t(vector) * n_rows + first_row + row] = Number(sum);
        }
        __syncthreads();
    }
}
