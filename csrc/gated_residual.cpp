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

// Vectors that are summed together, so that a term's address is worked out once for all of them.
constexpr int64_t TOGETHER = 4;

template <class T, bool whole>
static inline void add_terms(const GatedResidual& a, int64_t b, int64_t n, int64_t c, int64_t left) {
    V total[TOGETHER];
    const T* x = a.x.at<T>(b, n) + c;
    for (int64_t v = 0; v < TOGETHER; ++v) total[v] = load_part<whole>(x + v * W, left - v * W);
    for (const Gated* term = a.terms(); term < a.terms() + a.count; ++term) {
        const T *gate = term->gate.at<T>(b, n) + c, *value = term->value.at<T>(b, n) + c;
        for (int64_t v = 0; v < TOGETHER; ++v)
            total[v] = multiply_add(load_part<whole>(gate + v * W, left - v * W), load_part<whole>(value + v * W, left - v * W),
                                    total[v]);
    }
    T* out = a.out.at<T>(b, n) + c;
    for (int64_t v = 0; v < TOGETHER; ++v) store_part<whole>(out + v * W, total[v], left - v * W);
}

template <class T>
static void gated_residual(const GatedResidual& a) {
    const int64_t rows = a.common.rows(), threads = a.common.useful_threads(), channels = a.common.channels;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t b = row / a.common.tokens, n = row % a.common.tokens;
        int64_t c = 0;
        for (; c + TOGETHER * W <= channels; c += TOGETHER * W) add_terms<T, true>(a, b, n, c, channels - c);
        if (c < channels) add_terms<T, false>(a, b, n, c, channels - c);
    }
}

}  // namespace stepgraph::STEPGRAPH_LEVEL
#endif
