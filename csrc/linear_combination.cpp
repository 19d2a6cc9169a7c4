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

namespace stepgraph::STEPGRAPH_LEVEL {

// Vectors that are summed together, so that a value's address is worked out once for all of them.
constexpr int64_t TOGETHER = 4;

template <bool whole>
static inline V coefficient(const LinearCombination& a, int64_t i, int64_t c, int64_t left) {
    const float* from = a.coefficients + i * a.across;
    return a.per_channel ? load_part<whole>(from + c, left) : all(*from);
}

template <class T, bool whole>
static inline void add_values(const LinearCombination& a, int64_t b, int64_t n, int64_t c, int64_t left) {
    V total[TOGETHER] = {};
    if (a.constant)
        for (int64_t v = 0; v < TOGETHER; ++v) total[v] = coefficient<whole>(a, a.count, c + v * W, left - v * W);
    for (int64_t i = 0; i < a.count; ++i) {
        const T* value = a.values()[i].at<T>(b, n) + c;
        for (int64_t v = 0; v < TOGETHER; ++v)
            total[v] = multiply_add(coefficient<whole>(a, i, c + v * W, left - v * W),
                                    load_part<whole>(value + v * W, left - v * W), total[v]);
    }
    T* out = a.out.at<T>(b, n) + c;
    for (int64_t v = 0; v < TOGETHER; ++v) store_part<whole>(out + v * W, total[v], left - v * W);
}

template <class T>
static void linear_combination(const LinearCombination& a) {
    const int64_t rows = a.common.rows(), threads = a.common.useful_threads(), channels = a.common.channels;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t b = row / a.common.tokens, n = row % a.common.tokens;
        int64_t c = 0;
        for (; c + TOGETHER * W <= channels; c += TOGETHER * W) add_values<T, true>(a, b, n, c, channels - c);
        if (c < channels) add_values<T, false>(a, b, n, c, channels - c);
    }
}

}  // namespace stepgraph::STEPGRAPH_LEVEL
#endif
