// The reason of the last failure on this thread, behind nemoquant_last_error().
#pragma once

#include "abi.h"

namespace nq {

// Keeps the formatted reason and returns ``code``, so that a check is one line: return fail(NEMOQUANT_BAD_ARGUMENT, "...").
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
int fail(int code, const char* format, ...);

}  // namespace nq
