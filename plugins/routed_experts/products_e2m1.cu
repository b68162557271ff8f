#include "launch.cuh"

template int nq::experts::run_product<nq::experts::E2m1>(Product, Size, int64_t, void*);
