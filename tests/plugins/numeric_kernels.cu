// The functions of numeric.cuh, philox.cuh and mma.cuh over arrays, for the tests.
#include "../../plugins/common/mma.cuh"
#include "../../plugins/common/philox.cuh"

namespace {

struct Params {
    const void* in;
    const void* more;
    void* out;
    int64_t count;
    int32_t mode;
};

__global__ void numbers(Params p) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= p.count) return;
    const float x = p.mode < 7 ? static_cast<const float*>(p.in)[i] : 0.0F;
    auto* const floats = static_cast<float*>(p.out);
    auto* const bytes = static_cast<uint8_t*>(p.out);
    switch (p.mode) {
        case 0: floats[i] = nq::steady_exp(x); break;
        case 1: floats[i] = nq::steady_log1p(x); break;
        case 2: floats[i] = nq::steady_softplus(x); break;
        case 3: static_cast<uint16_t*>(p.out)[i] = nq::half_by_chance(x, static_cast<const uint32_t*>(p.more)[i]); break;
        case 4: bytes[i] = nq::float_to_e4m3(x); break;
        case 5: bytes[i] = static_cast<uint8_t>(nq::float_to_e2m1(x)); break;
        case 6: static_cast<uint32_t*>(p.out)[i] = nq::pack_pair<__nv_bfloat16>(x, -x); break;
        case 7: floats[i] = nq::e4m3_to_float(static_cast<const uint8_t*>(p.in)[i]); break;
        case 8: floats[i] = nq::e2m1_to_float(static_cast<const uint8_t*>(p.in)[i]); break;
        case 9: static_cast<uint32_t*>(p.out)[i] = __byte_perm(0x33221100U, 0x77665544U, static_cast<const uint32_t*>(p.in)[i]); break;
        default: {  // rounds are mode - 100; a row of six words: counter, key
            const auto* w = static_cast<const uint32_t*>(p.in) + 6 * i;
            const auto made = nq::philox4x32({{w[0], w[1], w[2], w[3]}}, {w[4], w[5]}, p.mode - 100);
            for (int j = 0; j < 4; ++j) static_cast<uint32_t*>(p.out)[4 * i + j] = made.word[j];
        }
    }
}

// out [16, 8] += a [16, 16] b, through shared memory and the fragments; b is [8, 16] (columns) or, transposed, [16, 8] in rows of 16.
template <class T>
__global__ void product(Params p) {
    __shared__ __align__(16) T a[16][16];
    __shared__ __align__(16) T b[16][16];
    const int lane = static_cast<int>(threadIdx.x);
    for (int i = lane; i < 256; i += 32) {
        a[i / 16][i % 16] = static_cast<const T*>(p.in)[i];
        b[i / 16][i % 16] = static_cast<const T*>(p.more)[i];
    }
    __syncwarp();
    uint32_t left[4], right[4];
    nq::load_matrices(left, &a[lane % 16][lane / 16 * 8]);
    if (p.mode)
        nq::load_matrices_transposed(right, &b[lane % 16][lane / 16 * 8]);
    else
        nq::load_matrices(right, &b[lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]);
    float d[4];
    auto* const out = static_cast<float*>(p.out);
    for (int i = 0; i < 4; ++i) d[i] = out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2];
    nq::mma_m16n8k16<T>(d, left, right[0], right[1]);
    for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// out [16, 8] += a b, of E2M1 codes a [16, 64] and b [8, 64] (columns), one a byte, with E4M3 scales of 16: scales [24, 4], those of a first.
// Lanes that the instruction does not ask for a scale pass one of another row.
template <int PAIR, int LANE>
__global__ void scaled_product(Params p, const uint32_t* scales) {
    const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
    const auto pack = [](const void* codes, int row, int k) {
        uint32_t word = 0;
        for (int i = 0; i < 8; ++i) word |= static_cast<uint32_t>(static_cast<const uint8_t*>(codes)[row * 64 + k + i]) << 4 * i;
        return word;
    };
    uint32_t a[4];
    for (int i = 0; i < 4; ++i) a[i] = pack(p.in, g + i % 2 * 8, 8 * t + i / 2 * 32);
    const uint32_t of_a = t / 2 == PAIR ? scales[g + t % 2 * 8] : scales[23 - g], of_b = t == LANE ? scales[16 + g] : scales[(g + t) % 16];
    float d[4];
    auto* const out = static_cast<float*>(p.out);
    for (int i = 0; i < 4; ++i) d[i] = out[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    nq::mma_m16n8k64_nvfp4<PAIR, LANE>(d, a, pack(p.more, g, 8 * t), pack(p.more, g, 8 * t + 32), of_a, of_b);
    for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

}  // namespace

extern "C" NEMOQUANT_API int run_numbers(const void* in, const void* more, void* out, int64_t count, int32_t mode, void* stream) {
    const Params p{in, more, out, count, mode};
    return NQ_LAUNCH(numbers, dim3(static_cast<unsigned>((count + 127) / 128)), dim3(128), 0, stream, p);
}

extern "C" NEMOQUANT_API int run_product(const void* in, const void* more, void* out, int32_t dtype, int32_t mode, void* stream) {
    const Params p{in, more, out, 0, mode};
    if (dtype == NEMOQUANT_FLOAT16) return NQ_LAUNCH((product<__half>), dim3(1), dim3(32), 0, stream, p);
    return NQ_LAUNCH((product<__nv_bfloat16>), dim3(1), dim3(32), 0, stream, p);
}

extern "C" NEMOQUANT_API int run_scaled_product(const void* in, const void* more, const void* scales, void* out, int32_t mode, void* stream) {
    const Params p{in, more, out, 0, mode};
    const auto* const words = static_cast<const uint32_t*>(scales);
    switch (mode) {
        case 0: return NQ_LAUNCH((scaled_product<0, 0>), dim3(1), dim3(32), 0, stream, p, words);
        case 1: return NQ_LAUNCH((scaled_product<1, 1>), dim3(1), dim3(32), 0, stream, p, words);
        case 2: return NQ_LAUNCH((scaled_product<0, 2>), dim3(1), dim3(32), 0, stream, p, words);
        default: return NQ_LAUNCH((scaled_product<1, 3>), dim3(1), dim3(32), 0, stream, p, words);
    }
}
