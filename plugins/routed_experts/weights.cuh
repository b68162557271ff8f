// How a matrix product here reads weights and activations: which lane holds which values, and how codes become bfloat16.
//
// Products are m16n8k16 of bfloat16, or m16n8k32 of E4M3 where both operands are codes: sixteen rows of an expert's weight (A) by
// eight tokens (B), k along the input. A chunk is 128 inputs.
// Of a chunk, lane t of the four that share a row holds 32 inputs, in both operands the same ones, so that which they are is free:
// a weight's bytes are read in pieces of 16, lane t taking the pieces t, t + 4, ... of the chunk, and stay in registers until they
// are decoded there. What the activations must be to fit is ``place``: they are written once in that order, then copied.
//
// Every value is exact in bfloat16: E4M3 codes have 4 significant bits, an E2M1 code times its E4M3 block scale has 6. The scale of
// the whole expert multiplies the float32 sums.
#pragma once

#include "../common/mma.cuh"

namespace nq::experts {

constexpr int CHUNK = 128;           // inputs
constexpr int LANE = CHUNK / 4;  // of them, a lane's
constexpr int BLOCK = 16;        // of NVFP4

// fp8: E4M3 by E4M3; fp4: E2M1 by E2M1, both with block scales. The others' activations are bfloat16.
enum class Weights { bf16, e4m3, e2m1, fp8, fp4 };

// Values in a piece of 16 bytes, and a lane's pieces of a chunk.
template <Weights F>
constexpr int VALUES = F == Weights::bf16 ? 8 : F == Weights::e2m1 ? 32 : 16;
template <Weights F>
constexpr int PIECES = LANE / VALUES<F>;

// Of the activations: bytes of a value, values in a part of 16 bytes, a lane's parts of a chunk. A part serves two products.
template <Weights F>
constexpr int BYTES = F == Weights::fp8 ? 1 : 2;
template <Weights F>
constexpr int PART = 16 / BYTES<F>;
template <Weights F>
constexpr int PARTS = LANE / PART<F>;

// Where input ``i`` of a chunk stands among a row's activations of that chunk: part * 4 + lane, PART values each. Within a piece the
// order is the one in which two masks take pairs out of 32 bits: for bytes 0 2 1 3, for nibbles 0 4 1 5 2 6 3 7.
template <Weights F>
__host__ __device__ constexpr int place(int i) {
    const int piece = i / VALUES<F>, lane = piece % 4, in = i % VALUES<F>;
    const int at = F == Weights::e4m3   ? in / 4 * 4 + in % 2 * 2 + in / 2 % 2
                   : F == Weights::e2m1 ? in / 8 * 8 + in % 4 * 2 + in / 4 % 2
                                        : in;
    const int sequence = piece / 4 * VALUES<F> + at;
    return (sequence / PART<F> * 4 + lane) * PART<F> + sequence % PART<F>;
}

// The first input of a chunk's part ``i`` = part * 4 + lane, of those in its piece: inputs come in multiples of 32, so that a piece is
// there or not as a whole.
template <Weights F>
__device__ __forceinline__ int piece_begin(int i) {
    return (i / 4 / (PARTS<F> / PIECES<F>)*4 + i % 4) * VALUES<F>;
}

// For products of FP4 a row's activations lie in groups of two chunks, the last one filled up with zeros: each chunk's codes, two a byte, by
// lane, and then the E4M3 scales of the blocks. native.cuh says why in this order.
constexpr int GROUP = 2 * CHUNK, GROUP_BYTES = GROUP / 2 + GROUP / BLOCK;

// Where the eight codes of ``half`` of a row's block lie, four bytes, the first in the lowest bits; and where its scale does.
__host__ __device__ constexpr int half_at(int block, int half) {
    const int group = block / (GROUP / BLOCK), chunk = block / (CHUNK / BLOCK) % 2, in = block % (CHUNK / BLOCK);
    return group * GROUP_BYTES + chunk * (CHUNK / 2) + (in / 4 * 2 + half) * 16 + in % 4 * 4;
}
__host__ __device__ constexpr int scale_at(int block) {
    const int group = block / (GROUP / BLOCK), chunk = block / (CHUNK / BLOCK) % 2, in = block % (CHUNK / BLOCK);
    return group * GROUP_BYTES + GROUP / 2 + chunk * (CHUNK / BLOCK) + in % 4 / 2 * 4 + in % 2 * 2 + in / 4;
}

// 16 bytes that are read once: past the first cache.
__device__ __forceinline__ uint4 load_once(const void* at) {
#if defined(NQ_HOST)
    return load_as<uint4>(at);
#else
    uint4 bits;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "l"(at));
    return bits;
#endif
}

// A lane's weights of one chunk: ``N`` rows.
template <Weights F, int N>
struct Held {
    uint4 bits[PIECES<F>][N];
    uint16_t scales[F == Weights::e2m1 ? N : 1];  // of its two blocks a row
};

// One expert's weight, seen from a lane: its first row, and those that are 8, 16 and 24 further. An expert has less than 2^32 bytes, so
// that offsets inside it need one register.
template <Weights F>
struct View {
    const unsigned char* codes;         // the row, and the lane's first piece
    const unsigned char* block_scales;  // the row, and the lane's first block
    uint32_t eight_rows, eight_blocks;  // bytes
    int inputs;                         // from the lane's first piece on

    __device__ __forceinline__ View(const void* all_codes, const void* all_scales, int64_t row, int width, int t) {
        const uint32_t row_bytes = static_cast<uint32_t>(width) / VALUES<F> * 16, row_blocks = static_cast<uint32_t>(width) / BLOCK;
        codes = static_cast<const unsigned char*>(all_codes) + row * row_bytes + t * 16;
        block_scales = F == Weights::e2m1 ? static_cast<const unsigned char*>(all_scales) + row * row_blocks + t * 2 : nullptr;
        eight_rows = 8 * row_bytes;
        eight_blocks = 8 * row_blocks;
        inputs = width - t * VALUES<F>;
    }

    // Chunk ``c``.
    template <int N>
    __device__ __forceinline__ void load(Held<F, N>& held, int c) const {
#pragma unroll
        for (int j = 0; j < PIECES<F>; ++j) load(held, j, c);
    }

    // Piece ``j`` of chunk ``c``; zeros beyond the end of a row.
    template <int N>
    __device__ __forceinline__ void load(Held<F, N>& held, int j, int c) const {
        const bool wanted = c * CHUNK + j * 4 * VALUES<F> < inputs;
        const uint32_t at = static_cast<uint32_t>(c * PIECES<F> + j) * 64;
#pragma unroll
        for (int r = 0; r < N; ++r) {
            held.bits[j][r] = wanted ? load_once(codes + (at + r * eight_rows)) : make_uint4(0, 0, 0, 0);
            if constexpr (F == Weights::e2m1)
                held.scales[r] = wanted ? load_as<uint16_t>(block_scales + (static_cast<uint32_t>(c) * (CHUNK / BLOCK) + r * eight_blocks)) : uint16_t{0};
        }
    }
};

__device__ __forceinline__ uint32_t word(const uint4& bits, int i) { return i == 0 ? bits.x : i == 1 ? bits.y : i == 2 ? bits.z : bits.w; }

// What stands in for the powers of two that decoding leaves out: sums are multiplied by it.
template <Weights F>
constexpr float LEFT_OUT = F == Weights::e2m1 ? 256.0F : 1.0F;

// A block scale as a pair of bfloat16, times 2^118: 2^126 for the exponents' biases, of which 2^8 are left out to stay below 2^128.
__device__ __forceinline__ uint32_t scale_pair(uint32_t code) {
    constexpr float UP = 0x1p127F, REST = 0x1p111F;  // the bits below are the value times 2^-120
    const float value = __uint_as_float((code & 0x7fU) << 20 | (code & 0x80U) << 24) * UP * REST;
    return pack_pair<__nv_bfloat16>(value, value);
}

// The two registers of one row of A that product ``s`` of a piece wants. ``scale`` of scale_pair, E2M1 alone. See e4m3_to_bf16 for how.
template <Weights F>
__device__ __forceinline__ uint2 decode(const uint4& bits, int s, uint32_t scale) {
    if constexpr (F == Weights::e4m3) {
        return e4m3_to_bf16(word(bits, s));
    } else if constexpr (F == Weights::e2m1) {
        constexpr uint32_t SIGN = 0x80008000U, REST = 0x01c001c0U;
        const uint32_t w = word(bits, s / 2) >> s % 2 * 8;  // codes 0, 1 and 4, 5 of what is left
        return make_uint2(multiply_pairs((w << 12 & SIGN) | (w << 6 & REST), scale), multiply_pairs((w << 8 & SIGN) | (w << 2 & REST), scale));
    } else {
        return make_uint2(word(bits, 2 * s), word(bits, 2 * s + 1));
    }
}

}  // namespace nq::experts
