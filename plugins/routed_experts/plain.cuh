// Everything that grouped products (grouped.hpp) leave to others, in plain row-major layouts:
//
//     gather     rows of x, sorted by expert, rounded as the format has it
//     swizzle    the block scales of NVFP4 weights, in the order in which tensor cores take them; weights stay as they are
//     describe   sizes, addresses and strides of each expert's product, from the sorted tiles: the host does not wait for counts
//     square     relu squared of the sums of up, rounded to NVFP4: the inputs of down. The other operands leave up's product so.
//
// Sums are dequantized where they are read: by ``square``, and by ``combine`` of kernel.cuh. Rounding is that of routing.cuh.
#pragma once

#include "grouped_layer.cuh"

namespace nq::experts {

constexpr int PLAIN_THREADS = 256;

// The group of a slot; false where no pair has it.
__device__ __forceinline__ bool find_group(const Groups& all, int64_t slot, int& group, Tile& tile) {
    int below = 0, count = *all.count;
    while (count > 0) {  // the last that begins at or before it
        const int half = count / 2;
        if (all.tiles[below + half].first <= slot) {
            below += half + 1;
            count -= half + 1;
        } else {
            count = half;
        }
    }
    if (below == 0) return false;
    group = below - 1;
    tile = all.tiles[group];
    return slot < tile.first + tile.count;
}

// The inputs of a product, a group's rows one after another.
struct Sorted {
    unsigned char* codes;   // [slots, size]
    unsigned char* scales;  // nvfp4: swizzled, see scale_row
    int32_t size;
};

// Block ``block`` of a slot: 16 values, rounded to the operands. ``scale``: the expert's input scale.
template <Operands O>
__device__ __forceinline__ void store_sorted(const Sorted& to, int64_t slot, int block, int group, const Tile& tile, const float (&values)[BLOCK], float scale) {
    unsigned char* const at = to.codes + (slot * (to.size / BLOCK) + block) * block_bytes(O);
    if constexpr (O == Operands::bf16) {
        uint32_t pairs[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) pairs[i] = pack_pair<__nv_bfloat16>(values[2 * i], values[2 * i + 1]);
        store_as(at, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
        store_as(at + 16, make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]));
    } else if constexpr (O == Operands::e4m3) {
        uint32_t words[4] = {};
#pragma unroll
        for (int i = 0; i < BLOCK; ++i) words[i / 4] |= static_cast<uint32_t>(float_to_e4m3(__fdiv_rn(values[i], scale))) << i % 4 * 8;
        store_as(at, make_uint4(words[0], words[1], words[2], words[3]));
    } else {
        const uint8_t code = block_scale_code(amax_bits(values), scale);
        const float unit = e4m3_to_float(code);
        uint32_t words[2] = {};
#pragma unroll
        for (int i = 0; i < BLOCK; ++i) words[i / 8] |= e2m1_code(values[i], unit, scale) << i % 8 * 4;
        store_as(at, make_uint2(words[0], words[1]));
        unsigned char* const scales = to.scales + swizzled_bytes(scale_row(group, tile.first), to.size);
        const int64_t row = slot - tile.first;
        scales[swizzled(row, block, to.size)] = code;
        if (block == to.size / BLOCK - 1)
            for (int beyond = block + 1; beyond % SCALE_BLOCKS; ++beyond) scales[swizzled(row, beyond, to.size)] = 0;
    }
}

struct Gather {
    Groups groups;
    const int32_t* order;  // slot -> pair
    int32_t* slots;        // pair -> slot
    const void* x;         // [tokens, size]
    const float* scale;    // [experts], if inputs are rounded
    Sorted to;
    int64_t pairs;
    int32_t dtype, chosen;
};

// 16 values from the ``i``th on, a multiple of 16.
__device__ __forceinline__ void load_block(const void* x, int32_t dtype, int64_t i, float (&values)[BLOCK]) {
    if (dtype == NEMOQUANT_FLOAT32) {
#pragma unroll
        for (int k = 0; k < BLOCK; k += 4) {
            const float4 four = load_as<float4>(static_cast<const float*>(x) + i + k);
            values[k] = four.x, values[k + 1] = four.y, values[k + 2] = four.z, values[k + 3] = four.w;
        }
        return;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint4 bits = load_as<uint4>(static_cast<const uint16_t*>(x) + i + half * 8);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const float2 pair = dtype == NEMOQUANT_BFLOAT16 ? unpack_pair<__nv_bfloat16>(word(bits, w)) : unpack_pair<__half>(word(bits, w));
            values[half * 8 + 2 * w] = pair.x, values[half * 8 + 2 * w + 1] = pair.y;
        }
    }
}

// A thread has one block of 16 inputs of one slot.
template <Operands O>
__global__ void __launch_bounds__(PLAIN_THREADS) gather(Gather p) {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * PLAIN_THREADS + threadIdx.x;
    const int blocks = p.to.size / BLOCK, block = static_cast<int>(thread % blocks);
    const int64_t slot = thread / blocks;
    int group = 0;
    Tile tile{};
    if (slot >= p.pairs || !find_group(p.groups, slot, group, tile)) return;
    const int pair = p.order[slot];
    if (block == 0) p.slots[pair] = static_cast<int32_t>(slot);
    float values[BLOCK];
    load_block(p.x, p.dtype, static_cast<int64_t>(pair / p.chosen) * p.to.size + block * BLOCK, values);
    store_sorted<O>(p.to, slot, block, group, tile, values, p.scale ? p.scale[tile.expert] : 1.0F);
}

struct Square {
    Groups groups;
    const float* sums;  // [slots, size]
    const float *global_scale, *input_scale, *next_scale;  // [experts]; next: of the inputs of down
    Sorted to;
    int64_t pairs;
};

// A thread has one block of 16 sums of one slot.
__global__ void __launch_bounds__(PLAIN_THREADS) square(Square p) {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * PLAIN_THREADS + threadIdx.x;
    const int blocks = p.to.size / BLOCK, block = static_cast<int>(thread % blocks);
    const int64_t slot = thread / blocks;
    int group = 0;
    Tile tile{};
    if (slot >= p.pairs || !find_group(p.groups, slot, group, tile)) return;
    const float scale = __fmul_rn(p.global_scale[tile.expert], p.input_scale[tile.expert]);
    float values[BLOCK];
    load_block(p.sums, NEMOQUANT_FLOAT32, slot * p.to.size + block * BLOCK, values);
#pragma unroll
    for (int i = 0; i < BLOCK; ++i) {
        const float value = __fmul_rn(values[i], scale), positive = value < 0.0F ? 0.0F : value;  // NaN stays
        values[i] = __fmul_rn(positive, positive);
    }
    store_sorted<Operands::nvfp4>(p.to, slot, block, group, tile, values, p.next_scale[tile.expert]);
}

struct Swizzle {
    Groups groups;
    const unsigned char* from;  // [experts, rows, size / 16]
    unsigned char* to;          // [experts] of swizzled_bytes
    int32_t rows, size;
};

// A thread has four neighbouring blocks of one row, grid y the group: experts without tokens are left out.
__global__ void __launch_bounds__(PLAIN_THREADS) swizzle(Swizzle p) {
    if (static_cast<int32_t>(blockIdx.y) >= *p.groups.count) return;
    const int64_t expert = p.groups.tiles[blockIdx.y].expert, bytes = swizzled_bytes(p.rows, p.size);
    const int64_t at = (static_cast<int64_t>(blockIdx.x) * PLAIN_THREADS + threadIdx.x) * SCALE_BLOCKS;
    if (at >= bytes) return;
    const int blocks = p.size / BLOCK, across = (blocks + SCALE_BLOCKS - 1) / SCALE_BLOCKS;
    const int tile = static_cast<int>(at / (SCALE_ROWS * SCALE_BLOCKS)), in = static_cast<int>(at % (SCALE_ROWS * SCALE_BLOCKS));
    const int row = tile / across * SCALE_ROWS + in / 16 + in % 16 / 4 * 32, block = tile % across * SCALE_BLOCKS;
    uint32_t word = 0;
    if (row < p.rows) {
        const unsigned char* const from = p.from + (expert * p.rows + row) * blocks + block;  // blocks are even in number
        word = load_as<uint16_t>(from);
        if (block + 2 < blocks) word |= static_cast<uint32_t>(load_as<uint16_t>(from + 2)) << 16;
    }
    store_as(p.to + expert * bytes + at, word);
}

// Of one projection: what the arrays of Grouped are made of, and where they go.
struct Describe {
    Groups groups;
    int32_t most;  // groups, those without tokens among them
    int32_t rows, size;
    int64_t weight_bytes, input_bytes, output_bytes;  // of an expert's weight, of a row of inputs and of outputs
    const unsigned char *weights, *inputs, *weight_scales, *input_scales;  // scales: nvfp4, else null
    unsigned char* outputs;
    const float *global_scale, *input_scale, *next_scale;  // [experts]; squares in e4m3, else null
    int32_t* sizes;
    const unsigned char **weight_at, **input_at, **weight_scale_at, **input_scale_at;
    void** output_at;
    int64_t *operand_strides, *output_strides;
    float *scales, *next_scales;
};

__global__ void __launch_bounds__(PLAIN_THREADS) describe(Describe p) {
    const int g = static_cast<int>(blockIdx.x) * PLAIN_THREADS + static_cast<int>(threadIdx.x);
    if (g >= p.most) return;
    const Tile tile = g < *p.groups.count ? p.groups.tiles[g] : Tile{};
    p.sizes[3 * g] = p.rows, p.sizes[3 * g + 1] = tile.count, p.sizes[3 * g + 2] = p.size;
    p.weight_at[g] = p.weights + tile.expert * p.weight_bytes;
    p.input_at[g] = p.inputs + tile.first * p.input_bytes;
    if (p.weight_scales) {
        p.weight_scale_at[g] = p.weight_scales + tile.expert * swizzled_bytes(p.rows, p.size);
        p.input_scale_at[g] = p.input_scales + (tile.count ? swizzled_bytes(scale_row(g, tile.first), p.size) : 0);
    }
    p.output_at[g] = p.outputs + tile.first * p.output_bytes;
    p.operand_strides[g] = p.size;
    p.output_strides[g] = p.rows;
    if (p.next_scale) {
        p.scales[g] = __fmul_rn(p.global_scale[tile.expert], p.input_scale[tile.expert]);
        p.next_scales[g] = p.next_scale[tile.expert];
    }
}

}  // namespace nq::experts
