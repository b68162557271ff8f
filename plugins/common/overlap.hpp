// Whether what a launcher writes lies apart from all else that it was given. Kernels run side by side: where two arrays share bytes, the
// result depends on which thread comes first.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "abi.h"
#include "last_error.hpp"

namespace nq {

using Wide = __int128;  // products of four sizes

struct Region {
    const char* name;
    const void* at;  // null: not given
    Wide bytes;
};

inline bool overlap(const Region& one, const Region& other) {
    if (!one.at || !other.at || one.bytes <= 0 || other.bytes <= 0) return false;
    const Wide first = reinterpret_cast<uintptr_t>(one.at), second = reinterpret_cast<uintptr_t>(other.at);
    return first < second + other.bytes && second < first + one.bytes;
}

// NEMOQUANT_OK, or the refusal of the first output that shares bytes with an input or with another output.
inline int check_apart(const char* op, std::initializer_list<Region> outputs, std::initializer_list<Region> inputs) {
    const auto refused = [&](const Region& one, const Region& other) {
        return fail(NEMOQUANT_BAD_ARGUMENT, "%s: %s at %p overlaps %s at %p; expected memory of its own", op, one.name, one.at, other.name, other.at);
    };
    for (const Region& output : outputs) {
        for (const Region& input : inputs)
            if (overlap(output, input)) return refused(output, input);
        for (const Region& other : outputs) {
            if (&other == &output) break;
            if (overlap(output, other)) return refused(output, other);
        }
    }
    return NEMOQUANT_OK;
}

// Bytes of ``rows`` rows of ``columns`` elements, each ``stride`` elements behind the one before.
inline Wide strided(Wide rows, Wide stride, Wide columns, int item) { return ((rows - 1) * stride + columns) * item; }

}  // namespace nq
