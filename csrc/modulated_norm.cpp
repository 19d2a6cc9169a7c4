// modulated_norm: LayerNorm without affine parameters and adaLN modulation in one pass over memory.
#ifndef STEPGRAPH_LEVEL
#include "native.h"
#ifdef STEPGRAPH_NATIVE

namespace stepgraph {

struct ModulatedNorm {
    Common common;
    Rows out, x, scale, shift;
};

}  // namespace stepgraph

#define STEPGRAPH_KERNELS "modulated_norm.cpp"
#include "each_level.h"

STEPGRAPH_EXPORT void stepgraph_modulated_norm(const stepgraph::ModulatedNorm* a, double eps) {
    using namespace stepgraph;
    STEPGRAPH_RUN(a->common, modulated_norm, *a, static_cast<float>(eps));
}

#endif
#else
#include "vector.h"
#include "normalise.h"

namespace stepgraph::STEPGRAPH_LEVEL {

template <class T>
static void modulated_norm(const ModulatedNorm& a, float eps) {
    const int64_t rows = a.common.rows(), threads = a.common.useful_threads();
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t b = row / a.common.tokens, n = row % a.common.tokens;
        normalise<T>(a.x.at<T>(b, n), a.scale.at<T>(b, n), a.shift.at<T>(b, n), eps, a.common.channels, a.out.at<T>(b, n),
                     CHUNK<T>);
    }
}

}  // namespace stepgraph::STEPGRAPH_LEVEL
#endif
