// Philox 4x32 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011), any number of rounds.
//
// A function of (counter, key) to four 32-bit words, in integer arithmetic alone: the same words on every device. Ten rounds are
// the authors' default; seven pass their tests; five are what the published stochastic state caches of this family use.
#pragma once

#include "platform.cuh"

namespace nq {

struct PhiloxKey {
    uint32_t low, high;
};

struct PhiloxWords {
    uint32_t word[4];
};

__device__ __forceinline__ PhiloxKey philox_key(uint64_t seed) {
    return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
}

__device__ __forceinline__ PhiloxWords philox4x32(PhiloxWords counter, PhiloxKey key, int rounds) {
    constexpr uint32_t MULTIPLIER_0 = 0xD2511F53U, MULTIPLIER_1 = 0xCD9E8D57U;
    constexpr uint32_t STEP_LOW = 0x9E3779B9U, STEP_HIGH = 0xBB67AE85U;  // the golden ratio, and sqrt(3) - 1
    for (int round = 0; round < rounds; ++round) {
        const uint32_t(&c)[4] = counter.word;
        const uint32_t high_0 = __umulhi(MULTIPLIER_0, c[0]), low_0 = MULTIPLIER_0 * c[0];
        const uint32_t high_1 = __umulhi(MULTIPLIER_1, c[2]), low_1 = MULTIPLIER_1 * c[2];
        counter = {{high_1 ^ c[1] ^ key.low, low_1, high_0 ^ c[3] ^ key.high, low_0}};
        key.low += STEP_LOW;
        key.high += STEP_HIGH;
    }
    return counter;
}

}  // namespace nq
