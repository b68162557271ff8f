// The matrix-core instructions that kernels here use, each with two bodies: the instruction, and the same in scalar loops over the
// fragments of a warp's lanes. Nothing else knows how a fragment is laid out over lanes but this header and the kernels.
//
// For lane l, g = l / 4 and t = l % 4 (PTX ISA, "Matrix fragments for mma.m16n8k16"), two values a register, low half first:
//     A [16, 16]   a0: row g, columns 2t, 2t+1    a1: row g+8, the same    a2, a3: columns 2t+8, 2t+9
//     B [16, 8]    b0: rows 2t, 2t+1 of column g  b1: rows 2t+8, 2t+9
//     D [16, 8]    d0, d1: row g, columns 2t, 2t+1    d2, d3: row g+8
// and for m16n8k32 of E4M3, four values a register:
//     A [16, 32]   a0: row g, columns 4t to 4t+3    a1: row g+8    a2, a3: columns 16 further
//     B [32, 8]    b0: rows 4t to 4t+3 of column g  b1: rows 16 further
// and for m16n8k64 of E2M1 with block scales, eight values a register ("Matrix fragments for mma.m16n8k64", "Block scaling for mma.sync"):
//     A [16, 64]   a0: row g, columns 8t to 8t+7    a1: row g+8    a2, a3: columns 32 further
//     B [64, 8]    b0: rows 8t to 8t+7 of column g  b1: rows 32 further
//     scales of A  a register has the four of a row, of its columns from 0, 16, 32 and 48 on, low byte first. Lanes 0 and 1, or 2 and 3
//                  of the four are asked: the first for row g, the second for row g+8
//     scales of B  those of column g, in whichever lane of the four is asked
#pragma once

#include "numeric.cuh"

namespace nq {

// Two products of bfloat16 pairs.
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
#if defined(NQ_HOST)
    const float2 left = unpack_pair<__nv_bfloat16>(a), right = unpack_pair<__nv_bfloat16>(b);
    return pack_pair<__nv_bfloat16>(left.x * right.x, left.y * right.y);
#else
    __nv_bfloat162 left, right;
    memcpy(&left, &a, sizeof left);
    memcpy(&right, &b, sizeof right);
    left = __hmul2(left, right);
    memcpy(&a, &left, sizeof a);
    return a;
#endif
}

// Four E4M3 codes, none of them NaN, as pairs of bfloat16: codes 0 and 2, and codes 1 and 3.
//
// A code's bits, moved to where bfloat16 has its exponent and mantissa, are the value times 2^-120, and subnormal codes are subnormal
// bfloat16, so that one multiplication makes all of them right.
__device__ __forceinline__ uint2 e4m3_to_bf16(uint32_t codes) {
    constexpr uint32_t SIGN = 0x80008000U, REST = 0x07f007f0U, UP = 0x7b807b80U;  // twice 2^120
    return make_uint2(multiply_pairs((codes << 8 & SIGN) | (codes << 4 & REST), UP), multiply_pairs((codes & SIGN) | (codes >> 4 & REST), UP));
}

#if !defined(NQ_HOST)

// d += A B, products exact, sums in float32 (in an order and with a guard width that are the device's own).
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    static_assert(sizeof(T) == 2, "bfloat16 or half");
    if constexpr (std::is_same_v<T, __half>)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same of E4M3 codes. Before SM89 there is no such instruction: codes become bfloat16, which holds them all. Later devices may keep
// fewer bits of a sum than float32 has, so add up long sums elsewhere.
__device__ __forceinline__ void mma_m16n8k32_e4m3(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 890
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    // Which of the 32 inputs meet in which of the two products is free, as long as A and B agree: each takes one register of a lane.
    const uint2 low[3] = {e4m3_to_bf16(a[0]), e4m3_to_bf16(a[1]), e4m3_to_bf16(b0)};
    const uint32_t first[4] = {low[0].x, low[1].x, low[0].y, low[1].y};
    mma_m16n8k16<__nv_bfloat16>(d, first, low[2].x, low[2].y);
    const uint2 high[3] = {e4m3_to_bf16(a[2]), e4m3_to_bf16(a[3]), e4m3_to_bf16(b1)};
    const uint32_t second[4] = {high[0].x, high[1].x, high[0].y, high[1].y};
    mma_m16n8k16<__nv_bfloat16>(d, second, high[2].x, high[2].y);
#endif
}

// d += A B of E2M1 codes, every 16 along k with an E4M3 scale in A and in B: NVFP4's. The scales are without sign: their top bit is zero.
// ``PAIR``: which lanes of the four have those of A; ``LANE``: which has those of B. For the family of SM120 alone ("sm_120a", "sm_120f"). Like E4M3, long sums
// are added up elsewhere: how many bits of them are kept is not documented.
template <int PAIR, int LANE>
__device__ __forceinline__ void mma_m16n8k64_nvfp4(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, uint32_t scales_a,
                                                   uint32_t scales_b) {
    static_assert(PAIR >= 0 && PAIR < 2 && LANE >= 0 && LANE < 4);
    asm volatile(
        "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, {%10}, {0, %11}, {%12}, {0, %13};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(scales_a), "n"(PAIR), "r"(scales_b), "n"(LANE));
}

// Four 8 x 8 matrices of 16-bit values from shared memory. Lanes 8 i to 8 i + 7 give the rows (16 bytes each, aligned) of matrix i;
// each lane gets, in register i, the values 2t and 2t + 1 of row g of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

// The same transposed: values of column g, rows 2t and 2t + 1.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

#else

namespace host {

struct Product {
    float (&d)[4];
    const uint32_t (&a)[4];
    uint32_t b[2];
};

template <class T>
void multiply(void* const* lanes) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        if (!lanes[lane]) throw std::logic_error("a matrix product that a lane of the warp does not take part in");
        const auto& mine = *static_cast<Product*>(lanes[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack_pair<T>(mine.a[i]);
            a[g + i % 2 * 8][2 * t + i / 2 * 8] = pair.x;
            a[g + i % 2 * 8][2 * t + i / 2 * 8 + 1] = pair.y;
        }
        for (int i = 0; i < 2; ++i) {
            const float2 pair = unpack_pair<T>(mine.b[i]);
            b[2 * t + i * 8][g] = pair.x;
            b[2 * t + i * 8 + 1][g] = pair.y;
        }
    }
    float d[16][8] = {};
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 16; ++k)
            for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i)
            static_cast<Product*>(lanes[lane])->d[i] += d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

inline void multiply_e4m3(void* const* lanes) {
    float a[16][32], b[32][8];
    for (int lane = 0; lane < 32; ++lane) {
        if (!lanes[lane]) throw std::logic_error("a matrix product that a lane of the warp does not take part in");
        const auto& mine = *static_cast<Product*>(lanes[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i)
            for (int k = 0; k < 4; ++k)
                a[g + i % 2 * 8][4 * t + k + i / 2 * 16] = e4m3_to_float(static_cast<uint8_t>(mine.a[i] >> 8 * k));
        for (int i = 0; i < 2; ++i)
            for (int k = 0; k < 4; ++k) b[4 * t + k + i * 16][g] = e4m3_to_float(static_cast<uint8_t>(mine.b[i] >> 8 * k));
    }
    float d[16][8] = {};
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 32; ++k)
            for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i)
            static_cast<Product*>(lanes[lane])->d[i] += d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

struct ScaledProduct {
    float (&d)[4];
    const uint32_t (&a)[4];
    uint32_t b[2], scales_a, scales_b;
};

// Of the four in ``scales``, that of block ``i``.
inline float block_scale_of(uint32_t scales, int i) {
    const auto code = static_cast<uint8_t>(scales >> 8 * i);
    if (code & 0x80U) throw std::logic_error("a block scale with its top bit set, which the instruction does not have");
    return e4m3_to_float(code);
}

template <int PAIR, int LANE>
void multiply_nvfp4(void* const* lanes) {
    float a[16][64], b[64][8];
    for (int lane = 0; lane < 32; ++lane)
        if (!lanes[lane]) throw std::logic_error("a matrix product that a lane of the warp does not take part in");
    const auto of = [&](int lane) -> const ScaledProduct& { return *static_cast<ScaledProduct*>(lanes[lane]); };
    for (int lane = 0; lane < 32; ++lane) {
        const auto& mine = of(lane);
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i)
            for (int k = 0; k < 8; ++k) a[g + i % 2 * 8][8 * t + k + i / 2 * 32] = e2m1_to_float(mine.a[i] >> 4 * k & 15U);
        for (int i = 0; i < 2; ++i)
            for (int k = 0; k < 8; ++k) b[8 * t + k + i * 32][g] = e2m1_to_float(mine.b[i] >> 4 * k & 15U);
    }
    float d[16][8] = {};
    for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 8; ++column)
            for (int block = 0; block < 4; ++block) {
                float sum = 0.0F;  // exact: multiples of 1/4 below 576
                for (int k = 16 * block; k < 16 * block + 16; ++k) sum += a[row][k] * b[k][column];
                const float of_a = block_scale_of(of(row % 8 * 4 + 2 * PAIR + row / 8).scales_a, block);
                const float of_b = block_scale_of(of(column * 4 + LANE).scales_b, block);
                d[row][column] += sum * (of_a * of_b);
            }
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) static_cast<ScaledProduct*>(lanes[lane])->d[i] += d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

struct Matrices {
    uint32_t (&r)[4];
    const void* row;
};

template <bool transposed>
void gather(void* const* lanes) {
    uint16_t values[4][8][8];
    for (int lane = 0; lane < 32; ++lane) {
        if (!lanes[lane]) throw std::logic_error("a matrix load that a lane of the warp does not take part in");
        const void* row = static_cast<Matrices*>(lanes[lane])->row;
        if (reinterpret_cast<uintptr_t>(row) % 16) throw std::logic_error("a matrix row at an address that is no multiple of 16");
        std::memcpy(values[lane / 8][lane % 8], row, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) {
            const auto& m = values[i];
            const uint32_t low = transposed ? m[2 * t][g] : m[g][2 * t], high = transposed ? m[2 * t + 1][g] : m[g][2 * t + 1];
            static_cast<Matrices*>(lanes[lane])->r[i] = low | high << 16;
        }
    }
}

}  // namespace host

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    host::Product mine{d, a, {b0, b1}};
    host::meet(0xffffffffU, &mine, host::multiply<T>);
}

inline void mma_m16n8k32_e4m3(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    host::Product mine{d, a, {b0, b1}};
    host::meet(0xffffffffU, &mine, host::multiply_e4m3);
}

template <int PAIR, int LANE>
void mma_m16n8k64_nvfp4(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, uint32_t scales_a, uint32_t scales_b) {
    host::ScaledProduct mine{d, a, {b0, b1}, scales_a, scales_b};
    host::meet(0xffffffffU, &mine, host::multiply_nvfp4<PAIR, LANE>);
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
    host::Matrices mine{r, row};
    host::meet(0xffffffffU, &mine, host::gather<false>);
}

inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
    host::Matrices mine{r, row};
    host::meet(0xffffffffU, &mine, host::gather<true>);
}

#endif

}  // namespace nq
