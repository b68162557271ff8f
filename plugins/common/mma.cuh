// The matrix-core instructions that kernels here use, each with two bodies: the instruction, and the same in scalar loops over the
// fragments of a warp's lanes. Nothing else knows how a fragment is laid out over lanes but this header and the kernels.
//
// For lane l, g = l / 4 and t = l % 4 (PTX ISA, "Matrix fragments for mma.m16n8k16"), two values a register, low half first:
//     A [16, 16]   a0: row g, columns 2t, 2t+1    a1: row g+8, the same    a2, a3: columns 2t+8, 2t+9
//     B [16, 8]    b0: rows 2t, 2t+1 of column g  b1: rows 2t+8, 2t+9
//     D [16, 8]    d0, d1: row g, columns 2t, 2t+1    d2, d3: row g+8
#pragma once

#include "numeric.cuh"

namespace nq {

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
