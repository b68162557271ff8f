// Conversions between float and the narrow formats, and functions whose results have the same bits on every device.
//
// "Same bits": built from IEEE operations that round once and are named (__fmaf_rn and its kin are never fused or reordered by
// a compiler) and from integer arithmetic. CUDA's own expf and log1pf promise a bound on the error, not the bits.
#pragma once

#include <cuda_fp8.h>

#include "platform.cuh"

namespace nq {

// To float, exact.
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// From float, to the nearest, ties to even; beyond the range infinity.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// Two values in one register, the first in the low half, as matrix fragments have them.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float first, float second);
template <>
__device__ __forceinline__ uint32_t pack_pair<__half>(float first, float second) {
    const __half2 pair = __floats2half2_rn(first, second);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}
template <>
__device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float first, float second) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}

template <class T>
__device__ __forceinline__ float2 unpack_pair(uint32_t bits);
template <>
__device__ __forceinline__ float2 unpack_pair<__half>(uint32_t bits) {
    __half_raw first, second;
    first.x = static_cast<unsigned short>(bits);
    second.x = static_cast<unsigned short>(bits >> 16);
    return make_float2(__half2float(first), __half2float(second));
}
template <>
__device__ __forceinline__ float2 unpack_pair<__nv_bfloat16>(uint32_t bits) {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000U));
}

// E4M3 codes: max 448, saturating, ties to even.
__device__ __forceinline__ float e4m3_to_float(uint8_t code) {
    return __half2float(__half(__nv_cvt_fp8_to_halfraw(code, __NV_E4M3)));
}
__device__ __forceinline__ uint8_t float_to_e4m3(float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }

// E2M1 codes: 0 0.5 1 1.5 2 3 4 6 and a sign in bit 3.
__device__ __forceinline__ float e2m1_to_float(uint32_t code) {
    constexpr uint32_t DOUBLED = 0xC8643210U;  // a nibble for each magnitude
    const float magnitude = 0.5F * static_cast<float>(DOUBLED >> 4 * (code & 7U) & 15U);
    return code & 8U ? -magnitude : magnitude;
}
// To the nearest, ties to the even code, saturating. A negative that rounds to zero keeps its sign; -0.0 becomes 0.
__device__ __forceinline__ uint32_t float_to_e2m1(float x) {
    const float m = fabsf(x);
    const int code = (m > 0.25F) + (m >= 0.75F) + (m > 1.25F) + (m >= 1.75F) + (m > 2.5F) + (m >= 3.5F) + (m > 5.0F);
    return static_cast<uint32_t>(code) | (x < 0.0F ? 8U : 0U);
}

// exp(x), the same bits on every device; error below two units in the last place. Cody and Waite's reduction, then a polynomial.
__device__ __forceinline__ float steady_exp(float x) {
    if (!(x > -104.0F)) return x != x ? x : 0.0F;  // below the least subnormal
    if (x > 89.0F) return __uint_as_float(0x7f800000U);
    const float n = rintf(__fmul_rn(x, 1.44269504F));
    float r = __fmaf_rn(n, -0.693359375F, x);  // exact: ln 2 in two parts, the first of few bits
    r = __fmaf_rn(n, 2.12194440e-4F, r);
    float p = 1.0F / 5040.0F;  // Taylor's series to r^7; |r| <= 0.347, so that the rest is below 6e-9
    p = __fmaf_rn(p, r, 1.0F / 720.0F);
    p = __fmaf_rn(p, r, 1.0F / 120.0F);
    p = __fmaf_rn(p, r, 1.0F / 24.0F);
    p = __fmaf_rn(p, r, 1.0F / 6.0F);
    p = __fmaf_rn(p, r, 0.5F);
    p = __fmaf_rn(__fmul_rn(p, r), r, r);
    p = __fadd_rn(p, 1.0F);
    const int whole = static_cast<int>(n), half = whole / 2;  // two factors: 2^n alone may lie outside float's range
    const float first = __uint_as_float(static_cast<uint32_t>(half + 127) << 23);
    const float second = __uint_as_float(static_cast<uint32_t>(whole - half + 127) << 23);
    return __fmul_rn(__fmul_rn(p, first), second);
}

// log(1 + u) for 0 <= u <= 1, the same bits on every device: 2 artanh(u / (2 + u)) by its series.
__device__ __forceinline__ float steady_log1p(float u) {
    const float s = __fdiv_rn(u, __fadd_rn(2.0F, u)), square = __fmul_rn(s, s);  // s <= 1/3
    float p = 1.0F / 15.0F;
    p = __fmaf_rn(p, square, 1.0F / 13.0F);
    p = __fmaf_rn(p, square, 1.0F / 11.0F);
    p = __fmaf_rn(p, square, 1.0F / 9.0F);
    p = __fmaf_rn(p, square, 1.0F / 7.0F);
    p = __fmaf_rn(p, square, 1.0F / 5.0F);
    p = __fmaf_rn(p, square, 1.0F / 3.0F);
    const float twice = __fadd_rn(s, s);
    return __fmaf_rn(__fmul_rn(p, square), twice, twice);
}

// log(1 + exp(x)), accurate for very negative x too, where it is exp(x).
__device__ __forceinline__ float steady_softplus(float x) {
    const float tail = steady_log1p(steady_exp(-fabsf(x)));
    return x > 0.0F ? __fadd_rn(x, tail) : tail;
}

// 2^x by the device's own instruction: two units in the last place, zero below 2^-126. Not the same bits everywhere.
__device__ __forceinline__ float quick_exp2(float x) {
#if defined(NQ_HOST)
    return x < -126.0F ? 0.0F : exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// To float16 by chance: up with the probability of the distance, from 32 random bits, so that the mean is x. Bits of the result.
//
// The kept part is floor(|x| / ulp + random / 2^32) in 64-bit integers; ulp is 2^-24 for subnormals. What the sum carries over
// 65504 is infinity, NaN stays NaN. An |x| below 2^-55 becomes zero: its chance is below 2^-31 of one ulp.
__device__ __forceinline__ uint16_t half_by_chance(float x, uint32_t random) {
    const uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000U;
    const int exponent = static_cast<int>(bits >> 23 & 0xffU);
    if (exponent == 0xff) return static_cast<uint16_t>(sign | ((bits & 0x7fffffU) ? 0x7e00U : 0x7c00U));
    if (exponent >= 143) return static_cast<uint16_t>(sign | 0x7c00U);  // 2^16 and more
    if (exponent < 72) return static_cast<uint16_t>(sign);
    const uint64_t significand = static_cast<uint64_t>((bits & 0x7fffffU) | 0x800000U) << 32;
    const bool normal = exponent >= 113;  // 2^-14 and more
    const uint32_t kept = static_cast<uint32_t>(((significand >> (normal ? 13 : 126 - exponent)) + random) >> 32);
    const uint32_t code = kept + (normal ? static_cast<uint32_t>(exponent - 113) << 10 : 0U);  // kept has the leading one
    return static_cast<uint16_t>(sign | code);
}

// Two values by chance, the first in the low half. Built with NQ_CVT_RS for sm_100a or sm_103a (sm_100f lacks it), their conversion
// instruction takes its place, which knows 13 random bits a value: other bits than everywhere else, the same mean to 2^-13 of an ulp.
__device__ __forceinline__ uint32_t half_pair_by_chance(float first, float second, uint32_t random_first, uint32_t random_second) {
#if defined(NQ_CVT_RS) && (defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM103_ALL))
    uint32_t pair;
    const uint32_t random = (random_second >> 19) << 16 | random_first >> 19;  // bits 28 to 16 are the high half's, 12 to 0 the low one's
    asm("cvt.rs.f16x2.f32 %0, %1, %2, %3;" : "=r"(pair) : "f"(second), "f"(first), "r"(random));
    return pair;
#else
    return half_by_chance(first, random_first) | static_cast<uint32_t>(half_by_chance(second, random_second)) << 16;
#endif
}

}  // namespace nq
