/* The C interface of RoutedExperts. Plain C. T tokens, k experts of a token, E experts, I input, M width. */
#pragma once

#include "../common/abi.h"

#ifdef __cplusplus
extern "C" {
#endif

/* In the order of spec.yaml. */
enum nemoquant_experts_format {
    NEMOQUANT_EXPERTS_BF16 = 0,
    NEMOQUANT_EXPERTS_FP8 = 1,   /* E4M3 weights, inputs through E4M3 */
    NEMOQUANT_EXPERTS_W8A16 = 2, /* E4M3 weights */
    NEMOQUANT_EXPERTS_NVFP4 = 3, /* E2M1 weights in blocks of 16, inputs through the same */
    NEMOQUANT_EXPERTS_W4A16 = 4  /* E2M1 weights in blocks of 16 */
};

/* y[t] = sum over j of expert_weights[t, j] * down_e(relu(up_e(x[t]))^2), e = expert_ids[t, j].
 * An id outside 0 to E - 1 is skipped: it adds nothing, and is counted in ``skipped``.
 * All arrays are contiguous, at multiples of 16 bytes; x, y and workspace overlap with nothing. */
typedef struct nemoquant_routed_experts_args {
    const void* x;               /* [T, I] of dtype */
    const int64_t* expert_ids;   /* [T, k] */
    const float* expert_weights; /* [T, k] */
    const void* up;              /* [E, M, I] bfloat16, or E4M3 codes, or [E, M, I / 2] pairs of E2M1 codes */
    const void* up_block_scales; /* E4M3 codes [E, M, I / 16]; nvfp4 and w4a16 only, else not read */
    const float* up_global_scale; /* [E]; not read for bf16 */
    const float* up_input_scale;  /* [E]; fp8 and nvfp4 only, else not read */
    const void* down;            /* [E, I, M], as up */
    const void* down_block_scales;
    const float* down_global_scale;
    const float* down_input_scale;
    void* y;                     /* [T, I] of dtype */
    void* workspace;
    int32_t* skipped;            /* [1]: how many ids were out of range; or null */
    int64_t tokens, top_k, experts, input, width;
    int32_t dtype;               /* enum nemoquant_dtype of x and y: float32, float16 or bfloat16 */
    int32_t format;              /* enum nemoquant_experts_format */
    int32_t activation;          /* 0: relu squared */
} nemoquant_routed_experts_args;

/* 0, or an error of enum nemoquant_error. */
NEMOQUANT_API int nemoquant_routed_experts(const nemoquant_routed_experts_args* args, void* stream);

/* Bytes of workspace, at a multiple of 16 bytes. Does not grow beyond the tokens that one pass takes (98,304 / k). 0 for bad sizes. */
NEMOQUANT_API size_t nemoquant_routed_experts_workspace(const nemoquant_routed_experts_args* args);

#ifdef __cplusplus
}
#endif
