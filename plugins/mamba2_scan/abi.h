/* The selective scan of Mamba-2 (Dao and Gu 2024, arXiv:2405.21060), for every head with its group's B and C:
 *
 *     dt_t = clamp(softplus(dt_t + dt_bias), dt_min, dt_max)
 *     state_t = exp(dt_t A) state_{t-1} + dt_t x_t (outer) B_t
 *     y_t = state_t C_t + D x_t
 */
#pragma once

#include "../common/abi.h"

#ifdef __cplusplus
extern "C" {
#endif

enum nemoquant_rounding {
    NEMOQUANT_NEAREST = 0,   /* ties to even */
    NEMOQUANT_STOCHASTIC = 1 /* float16 states only; see seed */
};

/* What is written overlaps nothing else, but for state_out, which may be state_in. */
typedef struct nemoquant_mamba2_scan_args {
    /* x [batch, length, heads, head_dim], b and c [batch, length, groups, state]: float32, float16 or bfloat16, all three the same.
     * Positions and rows lie apart by strides (in elements, multiples of 8); what belongs to one position is contiguous. */
    const void* x;
    const void* b;
    const void* c;
    const void* dt;       /* [batch, length, heads], float32, float16 or bfloat16 */
    const float* a;       /* [heads], negative */
    const float* d;       /* [heads], or null: no skip */
    const float* dt_bias; /* [heads], or null: 0 */
    const void* state_in; /* [batch, heads, head_dim, state] in the state's dtype, or null: zeros. May be state_out. */
    void* y;              /* [batch, length, heads, head_dim], contiguous; float32, float16 or bfloat16 */
    void* state_out;      /* like state_in: after the last position, rounded once */

    /* Stochastic rounding: one int64 on the device. Element i of the flat state_out is rounded with word i % 4 of
     * Philox4x32(counter = (i / 4, step), key = seed), each 64 bits as two words, the low one first. A caller gives each call another
     * pair of seed and step; repeating a pair repeats the bits. */
    const int64_t* seed;
    int64_t step;

    void* workspace; /* of nemoquant_mamba2_scan_workspace(args) bytes, aligned to 16; null if that is 0 */

    int64_t batch, length, heads, head_dim, groups, state;
    int64_t x_batch_stride, x_position_stride;
    int64_t b_batch_stride, b_position_stride;
    int64_t c_batch_stride, c_position_stride;
    int64_t dt_batch_stride, dt_position_stride;

    int32_t dtype, dt_dtype, y_dtype, state_dtype; /* enum nemoquant_dtype */
    int32_t rounding;                              /* enum nemoquant_rounding */
    int32_t philox_rounds;
    int32_t segments; /* parts of the sequence that run side by side, for few heads and long sequences; 0: chosen from the sizes */
    float dt_min, dt_max;
} nemoquant_mamba2_scan_args;

/* Never falls when a size grows (with segments 0). 0 for arguments that the launcher would refuse. */
NEMOQUANT_API size_t nemoquant_mamba2_scan_workspace(const nemoquant_mamba2_scan_args* args);

NEMOQUANT_API int nemoquant_mamba2_scan(const nemoquant_mamba2_scan_args* args, void* stream);

#ifdef __cplusplus
}
#endif
