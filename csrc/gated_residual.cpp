// gated_residual: x + sum_i gate_i * value_i in one pass over memory.
#ifndef STEPGRAPH_LEVEL
#include "native.h"
#ifdef STEPGRAPH_NATIVE

namespace stepgraph {

struct Gated {
    Rows gate, value;
};

// `count` pairs of gate and value follow in memory.
struct GatedResidual {
    Common common;
    Rows out, x;
    int64_t count;

    const Gated* terms() const { return reinterpret_cast<const Gated*>(this + 1); }
};

}  // namespace stepgraph

#define STEPGRAPH_KERNELS "gated_residual.cpp"
#include "each_level.h"

STEPGRAPH_EXPORT void stepgraph_gated_residual(const stepgraph::GatedResidual* a) {
    using namespace stepgraph;
    STEPGRAPH_RUN(a->common, gated_residual, *a);
}

#endif
#else
#include "vector.h"

namespace stepgraph::STEPGRAPH_LEVEL {

template <class T>
static void gated_residual(const GatedResidual& a) {
    const int64_t rows = a.common.rows(), threads = a.common.useful_threads(), channels = a.common.channels;
    const Gated* terms = a.terms();
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t b = row / a.common.tokens, n = row % a.common.tokens;
        const T* x = a.x.at<T>(b, n);
        T* out = a.out.at<T>(b, n);
        for (int64_t c = 0; c < channels; c += W) {
            V total = load(x + c, channels - c);
            for (int64_t i = 0; i < a.count; ++i)
                total += load(terms[i].gate.at<T>(b, n) + c, channels - c) * load(terms[i].value.at<T>(b, n) + c, channels - c);
            store(out + c, total, channels - c);
        }
    }
}

}  // namespace stepgraph::STEPGRAPH_LEVEL
#endif
