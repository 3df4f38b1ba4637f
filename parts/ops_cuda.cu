// The kernels of training. Each does in one pass over memory what MLX computes in several.
// ops_cuda.py launches them.
//
// Macros, which ops_cuda.py defines:
//   Number   type of all arrays: float, Float16 or Bfloat16 (numbers.cuh)
//
// A thread computes 8 neighbouring numbers, or with others of its warp a row. No memory is shared.

struct alignas(8 * sizeof(Number)) Packed8 { Number values[8]; };

// The gradients of gate and up in silu(gate) * up. The first takes the cotangent's place.
__device__ Packed8 swiglu_gradient(Packed8& cotangent, const Packed8& gate, const Packed8& up) {
    Packed8 up_gradient;
    for (int i = 0; i < 8; i++) {
        float x = gate.values[i], weight = cotangent.values[i], sigmoid = 1 / (1 + __expf(-x));
        float slope = sigmoid + x * sigmoid * (1 - sigmoid);
        cotangent.values[i] = Number(weight * float(up.values[i]) * slope);
        up_gradient.values[i] = Number(weight * x * sigmoid);
    }
    return up_gradient;
}

extern "C" __global__ void swiglu_gradients(
    const Packed8* gates, const Packed8* ups, const Packed8* cotangents,
    Packed8* gate_gradients, Packed8* up_gradients, unsigned n_threads
) {
    unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= n_threads) return;
    Packed8 gradient = cotangents[at];
    up_gradients[at] = swiglu_gradient(gradient, gates[at], ups[at]);
    gate_gradients[at] = gradient;
}

// The same where a row holds its gates, then its ups: (rows, 2, 8 * size).
extern "C" __global__ void joined_swiglu(
    const Packed8* inputs, Packed8* outputs, unsigned n_threads, int size
) {
    unsigned at = blockIdx.x * blockDim.x + threadIdx.x, gate_at = at + at / size * size;
    if (at >= n_threads) return;
    Packed8 gate = inputs[gate_at], up = inputs[gate_at + size];
    for (int i = 0; i < 8; i++) {
        float x = gate.values[i];
        up.values[i] = Number(x / (1 + __expf(-x)) * float(up.values[i]));
    }
    outputs[at] = up;
}

extern "C" __global__ void joined_swiglu_gradient(
    const Packed8* inputs, const Packed8* cotangents, Packed8* gradients,
    unsigned n_threads, int size
) {
    unsigned at = blockIdx.x * blockDim.x + threadIdx.x, gate_at = at + at / size * size;
    if (at >= n_threads) return;
    Packed8 gradient = cotangents[at];
    gradients[gate_at + size] = swiglu_gradient(gradient, inputs[gate_at], inputs[gate_at + size]);
    gradients[gate_at] = gradient;
}

__device__ float sum_of_warp(float x) {
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

// The products of LoRA, whose matrices have few rows: (ranks, 8 * size), packed. A library's product
// would take the processor several times as long to launch.

// inputs (N, 8 * size) times the transpose of the matrix: (N, ranks). Each warp computes 8 numbers of
// a row.
extern "C" __global__ void lora_inner(
    const Packed8* inputs, const Packed8* matrix, Number* outputs,
    unsigned n_threads, int size, int ranks
) {
    unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= n_threads) return;
    int n_groups = (ranks + 7) / 8, lane = at % 32, row = at / 32 / n_groups;
    int first = at / 32 % n_groups * 8;
    float sums[8] = {};
    for (int k = lane; k < size; k += 32) {
        Packed8 input = inputs[row * size + k];
        for (int r = 0; r < 8; r++) {
            if (first + r >= ranks) break;
            Packed8 weight = matrix[(first + r) * size + k];
            for (int i = 0; i < 8; i++)
                sums[r] += float(input.values[i]) * float(weight.values[i]);
        }
    }
    for (int r = 0; r < 8; r++) {
        float sum = sum_of_warp(sums[r]);
        if (lane == r && first + r < ranks) outputs[row * ranks + first + r] = Number(sum);
    }
}

// addends (N, 8 * size), plus inner (N, ranks) times the matrix.
extern "C" __global__ void lora_add(
    const Packed8* addends, const Number* inner, const Packed8* matrix, Packed8* outputs,
    unsigned n_threads, int size, int ranks
) {
    unsigned at = blockIdx.x * blockDim.x + threadIdx.x, row = at / size;
    if (at >= n_threads) return;
    Packed8 addend = addends[at];
    float sums[8];
    for (int i = 0; i < 8; i++) sums[i] = addend.values[i];
    for (int r = 0; r < ranks; r++) {
        float factor = inner[row * ranks + r];
        Packed8 weight = matrix[r * size + at % size];
        for (int i = 0; i < 8; i++) sums[i] += factor * float(weight.values[i]);
    }
    for (int i = 0; i < 8; i++) addend.values[i] = Number(sums[i]);
    outputs[at] = addend;
}

// The gradients of both matrices of a pair: the transpose of `inner_gradients` (N, ranks) times
// inputs (N, 8 * size_a), and that of `inner` times cotangents (N, 8 * size_b). Each warp computes
// 8 neighbours of 4 rows, its lanes some of the N each.
extern "C" __global__ void lora_gradients(
    const Packed8* inputs, const Number* inner_gradients,
    const Packed8* cotangents, const Number* inner, Packed8* gradient_a, Packed8* gradient_b,
    unsigned n_threads, int rows, int size_a, int size_b, int ranks
) {
    unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= n_threads) return;
    int lane = at % 32, k = at / 32 % (size_a + size_b), first = at / 32 / (size_a + size_b) * 4;
    bool is_b = k >= size_a;
    int size = is_b ? size_b : size_a, n = min(ranks - first, 4);
    if (is_b) k -= size_a;
    const Packed8* vectors = is_b ? cotangents : inputs;
    const Number* factors = (is_b ? inner : inner_gradients) + first;
    float sums[4][8] = {};
    for (int row = lane; row < rows; row += 32) {
        Packed8 vector = vectors[row * size + k];
        for (int r = 0; r < 4; r++) {
            float factor = r < n ? float(factors[row * ranks + r]) : 0;
            for (int i = 0; i < 8; i++) sums[r][i] += factor * float(vector.values[i]);
        }
    }
    for (int r = 0; r < 4; r++) {
        Packed8 gradient;
        for (int i = 0; i < 8; i++) gradient.values[i] = Number(sum_of_warp(sums[r][i]));
        if (lane == r && r < n) (is_b ? gradient_b : gradient_a)[(first + r) * size + k] = gradient;
    }
}

// Concatenate the numbers of 32 arrays; `ends` are where each ends in the output, in Packed8.
extern "C" __global__ void concatenate(
    const Packed8* in0, const Packed8* in1, const Packed8* in2, const Packed8* in3,
    const Packed8* in4, const Packed8* in5, const Packed8* in6, const Packed8* in7,
    const Packed8* in8, const Packed8* in9, const Packed8* in10, const Packed8* in11,
    const Packed8* in12, const Packed8* in13, const Packed8* in14, const Packed8* in15,
    const Packed8* in16, const Packed8* in17, const Packed8* in18, const Packed8* in19,
    const Packed8* in20, const Packed8* in21, const Packed8* in22, const Packed8* in23,
    const Packed8* in24, const Packed8* in25, const Packed8* in26, const Packed8* in27,
    const Packed8* in28, const Packed8* in29, const Packed8* in30, const Packed8* in31,
    const int* ends, Packed8* outputs, unsigned n_threads
) {
    const Packed8* inputs[] = {
        in0, in1, in2, in3, in4, in5, in6, in7, in8, in9, in10, in11, in12, in13, in14, in15,
        in16, in17, in18, in19, in20, in21, in22, in23, in24, in25, in26, in27, in28, in29, in30, in31
    };
    unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= n_threads) return;
    int array = 0;
    for (int step = 16; step > 0; step /= 2)
        if (at >= ends[array + step - 1]) array += step;
    outputs[at] = inputs[array][at - (array > 0 ? ends[array - 1] : 0)];
}

// The gradient of RMSNorm's input, plus `residuals`, that of the residual connection. Each warp
// computes a row. `epsilon_bits` is a float, passed as an integer.
extern "C" __global__ void rms_norm_gradient(
    const Packed8* inputs, const Packed8* weights,
    const Packed8* residuals, const Packed8* cotangents,
    Packed8* gradients, unsigned n_threads, int dim, int epsilon_bits
) {
    unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= n_threads) return;
    unsigned lane = at % 32, size = dim / 8, row = at / 32 * size;
    float squares = 0, products = 0;
    for (unsigned k = lane; k < size; k += 32) {
        Packed8 input = inputs[row + k], weight = weights[k], cotangent = cotangents[row + k];
        for (int i = 0; i < 8; i++) {
            float x = input.values[i];
            squares += x * x;
            products += x * float(weight.values[i]) * float(cotangent.values[i]);
        }
    }
    for (int distance = 16; distance > 0; distance /= 2) {
        squares += __shfl_xor_sync(~0u, squares, distance);
        products += __shfl_xor_sync(~0u, products, distance);
    }
    float scale = rsqrtf(squares / dim + __int_as_float(epsilon_bits));
    float pull = products / dim * scale * scale * scale;
    for (unsigned k = lane; k < size; k += 32) {
        Packed8 input = inputs[row + k], weight = weights[k], cotangent = cotangents[row + k];
        Packed8 gradient = residuals[row + k];
        for (int i = 0; i < 8; i++) {
            float through = float(weight.values[i]) * float(cotangent.values[i]) * scale;
            through -= float(input.values[i]) * pull;
            gradient.values[i] = Number(float(gradient.values[i]) + through);
        }
        gradients[row + k] = gradient;
    }
}

// Rotate pairs of channels by their angles at a position, or back by them where `direction` is -1,
// times the amplitude.
__device__ void rotate(
    Packed8& channels, const float* frequencies, int position, int direction, float amplitude
) {
    for (int i = 0; i < 8; i += 2) {
        float sine, cosine, a = channels.values[i], b = channels.values[i + 1];
        sincosf(position * frequencies[i / 2], &sine, &cosine);
        sine *= direction * amplitude, cosine *= amplitude;
        channels.values[i] = Number(a * cosine - b * sine);
        channels.values[i + 1] = Number(b * cosine + a * sine);
    }
}

// Rotate the heads of (rows, length, heads, head_dim). `amplitude_bits` is a float. `positions` are
// those of each row's tokens, or of all: (length) that all rows have in common.
extern "C" __global__ void rope(
    const Packed8* inputs, const float* frequencies, const int* positions, Packed8* outputs,
    unsigned n_threads, int n_positions, int heads, int head_dim, int direction,
    int amplitude_bits
) {
    unsigned at = blockIdx.x * blockDim.x + threadIdx.x, per_head = head_dim / 8;
    if (at >= n_threads) return;
    Packed8 channels = inputs[at];
    int position = positions[at / per_head / heads % n_positions];
    const float* own = frequencies + at % per_head * 4;
    rotate(channels, own, position, direction, __int_as_float(amplitude_bits));
    outputs[at] = channels;
}

// Where a number of (rows, length, heads + 2 * key_heads, head_dim), packed, is among queries
// (rows, length, heads, head_dim), keys and values (rows, key_heads, length, head_dim), which are
// arrays of their own; and the number's token, of all rows.
struct Place { int array; unsigned at, token; };

__device__ Place split(unsigned at, int length, int heads, int key_heads, int per_head) {
    unsigned channel = at % per_head, n_heads = heads + 2 * key_heads, head = at / per_head;
    unsigned token = head / n_heads;
    head %= n_heads;
    if (head < heads) return {0, (token * heads + head) * per_head + channel, token};
    head -= heads;
    unsigned row = token / length * key_heads + head % key_heads;
    return {1 + int(head / key_heads), (row * length + token % length) * per_head + channel, token};
}

// The sum over the threads of a head: so many, a power of two, neighbours in a warp.
__device__ float sum_of_head(float x, int per_head) {
    for (int distance = per_head / 2; distance > 0; distance /= 2)
        x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

// Split the heads of a product, and rotate queries and keys, which are normalised before where
// `normed`, by weights (queries, then keys) of `norms`. `positions` are those of all tokens, or of a
// row's, which all rows have in common. `epsilon_bits` is a float, too.
extern "C" __global__ void split_heads(
    const Packed8* inputs, const float* frequencies, const int* positions, const Packed8* norms,
    Packed8* queries, Packed8* keys, Packed8* values,
    unsigned n_threads, int n_positions, int length, int heads, int key_heads, int head_dim,
    int amplitude_bits, int normed, int epsilon_bits
) {
    unsigned thread = blockIdx.x * blockDim.x + threadIdx.x, per_head = head_dim / 8;
    unsigned at = min(thread, n_threads - 1);  // all threads of a warp take part in its sums
    Packed8 channels = inputs[at];
    Place place = split(at, length, heads, key_heads, per_head);
    if (normed) {
        float squares = 0;
        for (int i = 0; i < 8; i++) squares += float(channels.values[i]) * float(channels.values[i]);
        squares = sum_of_head(squares, per_head);
        float scale = rsqrtf(squares / head_dim + __int_as_float(epsilon_bits));
        if (place.array < 2) {
            Packed8 weight = norms[place.array * per_head + at % per_head];
            for (int i = 0; i < 8; i++)
                channels.values[i] = Number(float(channels.values[i]) * scale * float(weight.values[i]));
        }
    }
    if (thread >= n_threads) return;
    const float* own = frequencies + at % per_head * 4;
    int position = positions[place.token % n_positions];
    if (place.array < 2) rotate(channels, own, position, 1, __int_as_float(amplitude_bits));
    (place.array == 0 ? queries : place.array == 1 ? keys : values)[place.at] = channels;
}

// The gradient of its input, for those of its outputs. `products` are its inputs, where `normed`.
extern "C" __global__ void join_heads(
    const Packed8* queries, const Packed8* keys, const Packed8* values,
    const float* frequencies, const int* positions, const Packed8* products, const Packed8* norms,
    Packed8* outputs,
    unsigned n_threads, int n_positions, int length, int heads, int key_heads, int head_dim,
    int amplitude_bits, int normed, int epsilon_bits
) {
    unsigned thread = blockIdx.x * blockDim.x + threadIdx.x, per_head = head_dim / 8;
    unsigned at = min(thread, n_threads - 1);
    Place place = split(at, length, heads, key_heads, per_head);
    Packed8 channels = (place.array == 0 ? queries : place.array == 1 ? keys : values)[place.at];
    const float* own = frequencies + at % per_head * 4;
    int position = positions[place.token % n_positions];
    if (place.array < 2) rotate(channels, own, position, -1, __int_as_float(amplitude_bits));
    if (normed) {
        Packed8 product = products[at], weight = norms[place.array % 2 * per_head + at % per_head];
        float squares = 0, dots = 0;
        for (int i = 0; i < 8; i++) {
            float x = product.values[i];
            squares += x * x;
            dots += x * float(weight.values[i]) * float(channels.values[i]);
        }
        squares = sum_of_head(squares, per_head), dots = sum_of_head(dots, per_head);
        float scale = rsqrtf(squares / head_dim + __int_as_float(epsilon_bits));
        float pull = dots / head_dim * scale * scale * scale;
        for (int i = 0; i < 8 && place.array < 2; i++) {
            float through = float(weight.values[i]) * float(channels.values[i]) * scale;
            channels.values[i] = Number(through - float(product.values[i]) * pull);
        }
    }
    if (thread < n_threads) outputs[at] = channels;
}
