// Which kernel a product takes. One source file a weight format includes it, so that they compile side by side.
#pragma once

#include "kernel.cuh"

namespace nq::experts {

enum class Size : int32_t { few, some, many };  // tokens of an expert

constexpr int SOME = 4;  // columns of 8 tokens

inline int tile_of(Size size) { return size == Size::few ? 8 : size == Size::some ? 8 * SOME : LARGE_TOKENS; }

// ``tiles``: at most so many.
template <class W>
int run_product(Product p, Size size, int64_t tiles, void* stream) {
    p.tile = tile_of(size);
    if (size == Size::many) {
        p.row_blocks = (p.out + LARGE_ROWS - 1) / LARGE_ROWS;
        return NQ_LAUNCH((product_large<W>), dim3(static_cast<unsigned>(tiles * p.row_blocks)), dim3(32 * WARPS), LARGE_SHARED, stream, p);
    }
    const int64_t wanted = 8LL * (multiprocessors() > 0 ? multiprocessors() : 1);  // blocks, so that every multiprocessor is busy
    const auto blocks = [&](int split) { return (p.out + ROWS * WARPS / split - 1) / (ROWS * WARPS / split); };
    p.split = 1;
    while (p.split < WARPS && tiles * blocks(p.split) < wanted && p.in > 2 * p.split * 4 * W::VALUES) p.split *= 2;
    p.row_blocks = blocks(p.split);
    const dim3 grid(static_cast<unsigned>(tiles * p.row_blocks)), block(32 * WARPS);
    const bool single = p.planes == 1;
    if (size == Size::few)
        return single ? NQ_LAUNCH((product_small<W, 1, true>), grid, block, 0, stream, p) : NQ_LAUNCH((product_small<W, 1, false>), grid, block, 0, stream, p);
    return single ? NQ_LAUNCH((product_small<W, SOME, true>), grid, block, 0, stream, p) : NQ_LAUNCH((product_small<W, SOME, false>), grid, block, 0, stream, p);
}

extern template int run_product<Bfloat16>(Product, Size, int64_t, void*);
extern template int run_product<E4m3>(Product, Size, int64_t, void*);
extern template int run_product<E2m1>(Product, Size, int64_t, void*);

}  // namespace nq::experts
