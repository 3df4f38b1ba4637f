// Products by tensor cores, and weights of 4 bits made fit for them. `Number`, a macro, is the type of
// what they multiply: Float16 or Bfloat16 (numbers.cuh).

// Add to c (16 x 8) the product of a (16 x 16) and b (16 x 8): PTX's mma.m16n8k16, whose manual says
// which lane holds what.
__device__ void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    if constexpr (IS_FLOAT16<Number>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// Weights i and i + 4 of the 8 in a word, each 1 + integer / 16, as two numbers of 16 bits.
__device__ unsigned weight_pair(unsigned word, int i) {
    constexpr int START = IS_FLOAT16<Number> ? 6 : 3;  // of the four highest bits of the fraction
    constexpr unsigned ONES = IS_FLOAT16<Number> ? 0x3c003c00 : 0x3f803f80;
    word = 4 * i < START ? word << (START - 4 * i) : word >> (4 * i - START);
    return ONES | (word & 0x000f000fu << START);
}
