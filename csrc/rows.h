// The loops of all kernels: over the rows of a tensor on several threads, and along a row by whole vectors and a rest.
//
// Included once per level, so without a guard: what a loop calls can be inlined only into code for the same instructions. The
// loops themselves are always inlined: called once a row, they would read what a kernel captures from memory at every step.
namespace stepgraph::STEPGRAPH_LEVEL {

// f(i) for all i below `count`, shared out to the threads in equal runs.
template <class F>
STEPGRAPH_INLINE void each_of(int64_t count, int64_t threads, F f) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static) firstprivate(f)
    for (int64_t i = 0; i < count; ++i) f(i);
}

// f(row) for all rows, on as many threads as an elementwise pass is worth.
template <class F>
STEPGRAPH_INLINE void each_row(const Common& common, F f) {
    each_of(common.rows(), common.useful_threads(), [=, &common](int64_t i) { f(common.row(i)); });
}

// f(whole, c, left) along a row, STEP elements at a time from c on: `whole` is true, and f is compiled for it, while that many
// are `left`.
template <int64_t STEP, class F>
STEPGRAPH_INLINE void each_part(int64_t length, F f) {
    int64_t c = 0;
    for (; c + STEP <= length; c += STEP) f(std::true_type{}, c, length - c);
    if (c < length) f(std::false_type{}, c, length - c);
}

// Vectors of an elementwise pass that are summed together, so that a term's address is worked out once for all of them.
constexpr int64_t TOGETHER = 4;

}  // namespace stepgraph::STEPGRAPH_LEVEL
