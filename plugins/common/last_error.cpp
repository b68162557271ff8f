#include "last_error.hpp"

#include <cstdarg>
#include <cstdio>

namespace {
thread_local char reason[512];
}

int nq::fail(int code, const char* format, ...) {
    va_list values;
    va_start(values, format);
    std::vsnprintf(reason, sizeof reason, format, values);
    va_end(values);
    return code;
}

extern "C" const char* nemoquant_last_error(void) { return reason; }
