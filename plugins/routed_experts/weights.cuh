// Weights as they lie in memory, and how they become pairs of bfloat16 in registers.
//
// Each lane reads 16 bytes of a row at a time, the next lane the 16 bytes behind them: VALUES values a lane, 4 VALUES ("a group") for
// the four lanes that share a row of a matrix fragment. Which values of k meet in one instruction does not matter as long as both
// operands agree: a lane's values 8 c to 8 c + 7 are its chunk c, and both operands are cut that way.
//
// The values of a chunk lie in memory as the instruction wants them but for E2M1, whose codes are cheapest to take four apart: there
// chunks of the other operand are stored as INTERLEAVED says.
//
// What is decoded is exact in bfloat16: an E4M3 value has 4 significant bits, an E2M1 value times an E4M3 block scale at most 6. The
// float32 scales of a whole matrix, and SCALE, are applied to the sums.
#pragma once

#include "../common/numeric.cuh"

namespace nq::experts {

// Weights are read once: through the read-only path.
template <class T>
__device__ __forceinline__ T load_constant(const void* at) {
#if defined(NQ_HOST)
    return load_as<T>(at);
#else
    return __ldg(static_cast<const T*>(at));
#endif
}

// Both bfloat16 of a register by those of another; exact here.
__device__ __forceinline__ uint32_t times(uint32_t pair, uint32_t factors) {
#if defined(NQ_HOST)
    const float2 a = unpack_pair<__nv_bfloat16>(pair), b = unpack_pair<__nv_bfloat16>(factors);
    return pack_pair<__nv_bfloat16>(a.x * b.x, a.y * b.y);
#else
    const __nv_bfloat162 product = __hmul2(reinterpret_cast<const __nv_bfloat162&>(pair), reinterpret_cast<const __nv_bfloat162&>(factors));
    return reinterpret_cast<const uint32_t&>(product);
#endif
}

__device__ __forceinline__ uint32_t word(const uint4& bits, int i) { return i == 0 ? bits.x : i == 1 ? bits.y : i == 2 ? bits.z : bits.w; }

// Bytes 0 and 1, or 2 and 3, to the upper halves of both 16 bits.
__device__ __forceinline__ uint32_t low_bytes(uint32_t x) {
#if defined(NQ_HOST)
    return (x & 0xffU) << 8 | (x & 0xff00U) << 16;
#else
    return __byte_perm(x, 0U, 0x1404U);
#endif
}
__device__ __forceinline__ uint32_t high_bytes(uint32_t x) {
#if defined(NQ_HOST)
    return low_bytes(x >> 16);
#else
    return __byte_perm(x, 0U, 0x3424U);
#endif
}

// Where the weights of one expert begin.
struct Matrix {
    const uint8_t* codes;
    const uint8_t* block_scales;  // of E2M1 codes
};

struct Bfloat16 {
    static constexpr int VALUES = 8;
    static constexpr bool INTERLEAVED = false;
    static constexpr float SCALE = 1.0F;
    struct Raw {
        uint4 bits;
    };
    __device__ static Matrix matrix(const void* codes, const uint8_t*, int64_t rows, int64_t columns) {
        return {static_cast<const uint8_t*>(codes) + rows * columns * 2, nullptr};
    }
    __device__ __forceinline__ static Raw load(const Matrix& m, int64_t row, int k, int columns) {
        return {load_constant<uint4>(m.codes + (row * columns + k) * 2)};
    }
    __device__ __forceinline__ static void decode(const Raw& raw, int, uint32_t (&pairs)[4]) {
        for (int i = 0; i < 4; ++i) pairs[i] = word(raw.bits, i);
    }
};

struct E4m3 {
    static constexpr int VALUES = 16;
    static constexpr bool INTERLEAVED = false;
    static constexpr float SCALE = 1.0F;
    struct Raw {
        uint4 bits;
    };
    __device__ static Matrix matrix(const void* codes, const uint8_t*, int64_t rows, int64_t columns) {
        return {static_cast<const uint8_t*>(codes) + rows * columns, nullptr};
    }
    __device__ __forceinline__ static Raw load(const Matrix& m, int64_t row, int k, int columns) {
        return {load_constant<uint4>(m.codes + row * columns + k)};
    }
    // Exponent and mantissa moved to where bfloat16 has them are the value times 2^-120, subnormal codes too.
    __device__ __forceinline__ static void decode(const Raw& raw, int chunk, uint32_t (&pairs)[4]) {
        constexpr uint32_t BIAS = 0x7b807b80U;  // 2^120 twice
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t apart = i % 2 ? high_bytes(word(raw.bits, 2 * chunk + i / 2)) : low_bytes(word(raw.bits, 2 * chunk + i / 2));
            pairs[i] = times((apart & 0x80008000U) | (apart & 0x7f007f00U) >> 4, BIAS);
        }
    }
};

struct E2m1 {
    static constexpr int VALUES = 32;
    static constexpr bool INTERLEAVED = true;  // 0 4 1 5 2 6 3 7
    static constexpr float SCALE = 128.0F;  // decode leaves out 2^7: the largest block scale times 2^126 is beyond bfloat16
    struct Raw {
        uint4 bits;
        uint32_t scales;  // two E4M3 codes
    };
    __device__ static Matrix matrix(const void* codes, const uint8_t* scales, int64_t rows, int64_t columns) {
        return {static_cast<const uint8_t*>(codes) + rows * columns / 2, scales + rows * columns / 16};
    }
    __device__ __forceinline__ static Raw load(const Matrix& m, int64_t row, int k, int columns) {
        const int64_t at = row * columns + k;
        return {load_constant<uint4>(m.codes + at / 2), load_constant<uint16_t>(m.block_scales + at / 16)};
    }
    // Exponent and mantissa moved to where bfloat16 has them are the value times 2^-126; so are a block scale's times 2^-120, which
    // 2^239 makes the scale times 2^119, in two steps since no bfloat16 is that large.
    __device__ __forceinline__ static void decode(const Raw& raw, int chunk, uint32_t (&pairs)[4]) {
        constexpr uint32_t FIRST = 0x7b807b80U, SECOND = 0x7b007b00U;  // 2^120, 2^119
        const uint32_t code = raw.scales >> 8 * (chunk / 2) & 0xffU;
        const uint32_t scale = times(times((code & 0x7fU) << 4 | (code & 0x7fU) << 20, FIRST), SECOND);
        const uint32_t codes = word(raw.bits, chunk);  // code i in bits 4 i to 4 i + 3, and code i + 4 sixteen above
        pairs[0] = times((codes << 12 & 0x80008000U) | (codes << 6 & 0x01c001c0U), scale);
        pairs[1] = times((codes << 8 & 0x80008000U) | (codes << 2 & 0x01c001c0U), scale);
        pairs[2] = times((codes << 4 & 0x80008000U) | (codes >> 2 & 0x01c001c0U), scale);
        pairs[3] = times((codes & 0x80008000U) | (codes >> 6 & 0x01c001c0U), scale);
    }
};

}  // namespace nq::experts
