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
#include "rows.h"

namespace stepgraph::STEPGRAPH_LEVEL {

template <class T, bool whole>
static inline void add_terms(const GatedResidual& a, Row row, int64_t c, int64_t left) {
    V total[TOGETHER];
    const T* x = a.x.at<T>(row) + c;
    for (int64_t v = 0; v < TOGETHER; ++v) total[v] = load_part<whole>(x + v * W, left - v * W);
    for (const Gated* term = a.terms(); term < a.terms() + a.count; ++term) {
        const T *gate = term->gate.at<T>(row) + c, *value = term->value.at<T>(row) + c;
        for (int64_t v = 0; v < TOGETHER; ++v)
            total[v] = multiply_add(load_part<whole>(gate + v * W, left - v * W), load_part<whole>(value + v * W, left - v * W),
                                    total[v]);
    }
    T* out = a.out.at<T>(row) + c;
    for (int64_t v = 0; v < TOGETHER; ++v) store_part<whole>(out + v * W, total[v], left - v * W);
}

template <class T>
static void gated_residual(const GatedResidual& a) {
    each_row(a.common, [&a](Row row) {
        each_part<TOGETHER * W>(a.common.channels,
                                [&](auto whole, int64_t c, int64_t left) { add_terms<T, whole>(a, row, c, left); });
    });
}

}  // namespace stepgraph::STEPGRAPH_LEVEL
#endif
