// linear_combination: sum_i c_i * value_i, with or without a constant, in one pass over memory.
#ifndef STEPGRAPH_LEVEL
#include "native.h"
#ifdef STEPGRAPH_NATIVE

namespace stepgraph {

// Coefficients are float, `across` apart from one value to the next: [k] or, `per_channel`, [k, C]. The places of `count`
// values follow in memory.
struct LinearCombination {
    Common common;
    Rows out;
    const float* coefficients;
    int64_t across, per_channel, constant, count;

    const Rows* values() const { return reinterpret_cast<const Rows*>(this + 1); }
};

}  // namespace stepgraph

#define STEPGRAPH_KERNELS "linear_combination.cpp"
#include "each_level.h"

STEPGRAPH_EXPORT void stepgraph_linear_combination(const stepgraph::LinearCombination* a) {
    using namespace stepgraph;
    STEPGRAPH_RUN(a->common, linear_combination, *a);
}

#endif
#else
#include "vector.h"
#include "rows.h"

namespace stepgraph::STEPGRAPH_LEVEL {

// Where the coefficients of value i are, from the channel c on where there is one `per_channel`.
static inline const float* coefficients(const LinearCombination& a, int64_t i, int64_t c) {
    return a.coefficients + i * a.across + (a.per_channel ? c : 0);
}

template <bool whole>
static inline V coefficient(const LinearCombination& a, const float* from, int64_t v, int64_t left) {
    return a.per_channel ? load_part<whole>(from + v * W, left - v * W) : all(*from);
}

template <class T, bool whole>
static inline void add_values(const LinearCombination& a, Row row, int64_t c, int64_t left) {
    V total[TOGETHER] = {};
    if (a.constant)
        for (int64_t v = 0; v < TOGETHER; ++v) total[v] = coefficient<whole>(a, coefficients(a, a.count, c), v, left);
    for (int64_t i = 0; i < a.count; ++i) {
        const float* from = coefficients(a, i, c);
        const T* value = a.values()[i].at<T>(row) + c;
        for (int64_t v = 0; v < TOGETHER; ++v)
            total[v] = multiply_add(coefficient<whole>(a, from, v, left), load_part<whole>(value + v * W, left - v * W), total[v]);
    }
    T* out = a.out.at<T>(row) + c;
    for (int64_t v = 0; v < TOGETHER; ++v) store_part<whole>(out + v * W, total[v], left - v * W);
}

template <class T>
static void linear_combination(const LinearCombination& a) {
    each_row(a.common, [&a](Row row) {
        each_part<TOGETHER * W>(a.common.channels,
                                [&](auto whole, int64_t c, int64_t left) { add_values<T, whole>(a, row, c, left); });
    });
}

}  // namespace stepgraph::STEPGRAPH_LEVEL
#endif
