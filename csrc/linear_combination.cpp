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

static inline V coefficient(const LinearCombination& a, int64_t i, int64_t c) {
    const float* from = a.coefficients + i * a.across;
    return a.per_channel ? load(from + c, a.common.channels - c) : all(*from);
}

template <class T>
static void linear_combination(const LinearCombination& a) {
    const int64_t rows = a.common.rows(), threads = a.common.useful_threads(), channels = a.common.channels;
    const Rows* values = a.values();
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t b = row / a.common.tokens, n = row % a.common.tokens;
        T* out = a.out.at<T>(b, n);
        for (int64_t c = 0; c < channels; c += W) {
            V total = a.constant ? coefficient(a, a.count, c) : V{};
            for (int64_t i = 0; i < a.count; ++i) total += coefficient(a, i, c) * load(values[i].at<T>(b, n) + c, channels - c);
            store(out + c, total, channels - c);
        }
    }
}

}  // namespace stepgraph::STEPGRAPH_LEVEL
#endif
