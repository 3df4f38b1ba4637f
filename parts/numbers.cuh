// The 16-bit types of kernels, as classes that convert from and to float. `Number` of a kernel is
// one of them, or float. CUDA's own headers for them take long to compile.

struct Float16 {
    unsigned short bits;
    __device__ Float16() {}
    __device__ Float16(float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
    __device__ operator float() const {
        float x;
        asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
        return x;
    }
};

struct Bfloat16 {
    unsigned short bits;
    __device__ Bfloat16() {}
    __device__ Bfloat16(float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
    __device__ operator float() const { return __uint_as_float(unsigned(bits) << 16); }
};

template <class T> constexpr bool IS_FLOAT16 = false;
template <> constexpr bool IS_FLOAT16<Float16> = true;
