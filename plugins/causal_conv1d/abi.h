/* The C interface of CausalConv1d. Plain C. B batch, L length, C channels, K taps. */
#pragma once

#include "../common/abi.h"

#ifdef __cplusplus
extern "C" {
#endif

/* y[b, l, c] = silu(bias[c] + sum over j of weight[c, j] * full[b, l + j, c]), full = state_in (as [B, K - 1, C]) before x;
 * state_out = the last K - 1 positions of full. All arrays are contiguous but x, whose rows may lie further apart.
 * What is written overlaps nothing else; but for up to 4 positions state_out may be state_in. */
typedef struct nemoquant_causal_conv1d_args {
    const void* x;         /* [B, L, C] of dtype; row (b, l) begins at (b * L + l) * x_stride */
    const float* weight;   /* [C, K]; the last tap meets the current position */
    const float* bias;     /* [C], or null: zeros */
    const void* state_in;  /* [B, C, K - 1] of dtype, oldest first */
    void* y;               /* [B, L, C] of y_dtype */
    void* state_out;       /* [B, C, K - 1] of dtype */
    int64_t batch, length, channels, kernel; /* B, L, C >= 1; K 2 to 4 */
    int64_t x_stride;      /* elements, >= C; 0 stands for C */
    int32_t dtype;         /* enum nemoquant_dtype: float32, float16 or bfloat16 */
    int32_t y_dtype;       /* float32, or dtype */
    int32_t activation;    /* 0: silu */
} nemoquant_causal_conv1d_args;

/* 0, or an error of enum nemoquant_error. */
NEMOQUANT_API int nemoquant_causal_conv1d(const nemoquant_causal_conv1d_args* args, void* stream);

/* Bytes of workspace: none. */
NEMOQUANT_API size_t nemoquant_causal_conv1d_workspace(const nemoquant_causal_conv1d_args* args);

#ifdef __cplusplus
}
#endif
