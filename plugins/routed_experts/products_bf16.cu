#include "launch.cuh"

template int nq::experts::run_product<nq::experts::Bfloat16>(Product, Size, int64_t, void*);
