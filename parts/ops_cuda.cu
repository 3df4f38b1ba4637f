// The kernels of training. Each does in one pass over memory what MLX computes in several.
// ops_cuda.py launches them.
//
// Macros, which ops_cuda.py defines:
//   Number   type of all arrays: float, Float16 or Bfloat16 (numbers.cuh)
//
// A thread computes 8 neighbouring numbers, or with others of its warp a row. No memory is shared.

struct alignas(8 * sizeof(Number)) Packed8 { Number values[8]; };

// The gradients of gate and up in silu(gate) * up.
extern "C" __global__ void swiglu_gradients(
    const Packed8* gates, const Packed8* ups, const Packed8* cotangents,
    Packed8* gate_gradients, Packed8* up_gradients, unsigned n_threads
) {
    unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= n_threads) return;
    Packed8 gate = gates[at], up = ups[at], cotangent = cotangents[at], gate_gradient, up_gradient;
    for (int i = 0; i < 8; i++) {
        float x = gate.values[i], weight = cotangent.values[i], sigmoid = 1 / (1 + __expf(-x));
        float slope = sigmoid + x * sigmoid * (1 - sigmoid);
        gate_gradient.values[i] = Number(weight * float(up.values[i]) * slope);
        up_gradient.values[i] = Number(weight * x * sigmoid);
    }
    gate_gradients[at] = gate_gradient;
    up_gradients[at] = up_gradient;
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

// Rotate pairs of channels of (rows, length, heads, head_dim) by the angles of their positions, or
// back by them where `direction` is -1, times the amplitude: a float, passed as an integer.
// `positions` are those of each row's tokens, or of all: (length) that all rows have in common.
extern "C" __global__ void rope(
    const Packed8* inputs, const float* frequencies, const int* positions, Packed8* outputs,
    unsigned n_threads, int n_positions, int heads, int head_dim, int direction,
    int amplitude_bits
) {
    unsigned at = blockIdx.x * blockDim.x + threadIdx.x, per_head = head_dim / 8;
    if (at >= n_threads) return;
    Packed8 channels = inputs[at];
    int position = positions[at / per_head / heads % n_positions];
    float amplitude = __int_as_float(amplitude_bits);
    for (int i = 0; i < 8; i += 2) {
        float sine, cosine, a = channels.values[i], b = channels.values[i + 1];
        sincosf(position * frequencies[at % per_head * 4 + i / 2], &sine, &cosine);
        sine *= direction * amplitude, cosine *= amplitude;
        channels.values[i] = Number(a * cosine - b * sine);
        channels.values[i + 1] = Number(b * cosine + a * sine);
    }
    outputs[at] = channels;
}
