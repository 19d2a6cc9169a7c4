// Vectors of floats of one instruction set, in the compiler's own vector types; included once per level, so without a guard.
namespace stepgraph::STEPGRAPH_LEVEL {

constexpr int64_t W = STEPGRAPH_LANES;
typedef float V __attribute__((vector_size(STEPGRAPH_LANES * 4)));
typedef uint32_t U __attribute__((vector_size(STEPGRAPH_LANES * 4)));
typedef uint16_t H __attribute__((vector_size(STEPGRAPH_LANES * 2)));

static inline V all(float value) { return V{} + value; }

static inline V widen(H bits) { return (V)(__builtin_convertvector(bits, U) << 16); }

// Round to the nearest bfloat16, ties to even; NaN stays NaN.
static inline H narrow(V value) {
    const U bits = (U)value;
    const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const U nan = (U)(value != value);
    return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), H);
}

// The first n of W elements; the others are `rest`.
static inline V load(const float* from, int64_t n = W, float rest = 0) {
    V value = all(rest);
    if (__builtin_expect(n >= W, 1))
        std::memcpy(&value, from, sizeof value);
    else
        for (int64_t i = 0; i < n; ++i) value[i] = from[i];
    return value;
}

static inline V load(const bf16* from, int64_t n = W, float rest = 0) {
    if (__builtin_expect(n >= W, 1)) {
        H bits;
        std::memcpy(&bits, from, sizeof bits);
        return widen(bits);
    }
    H bits{};
    for (int64_t i = 0; i < n; ++i) bits[i] = from[i].bits;
    V value = widen(bits);
    for (int64_t i = n; i < W; ++i) value[i] = rest;
    return value;
}

static inline void store(float* to, V value, int64_t n = W) {
    if (__builtin_expect(n >= W, 1))
        std::memcpy(to, &value, sizeof value);
    else
        for (int64_t i = 0; i < n; ++i) to[i] = value[i];
}

static inline void store(bf16* to, V value, int64_t n = W) {
    const H bits = narrow(value);
    if (__builtin_expect(n >= W, 1))
        std::memcpy(to, &bits, sizeof bits);
    else
        for (int64_t i = 0; i < n; ++i) to[i].bits = bits[i];
}

static inline float sum(V value) {
    for (int64_t half = W / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) value[i] += value[i + half];
    return value[0];
}

// Sum of f(c, n) over a row, n elements at a time; four running sums, because an addition takes several cycles.
template <class F>
static inline float sum_row(int64_t channels, F f) {
    V total[4] = {};
    int64_t c = 0;
    for (; c + 4 * W <= channels; c += 4 * W)
        for (int64_t i = 0; i < 4; ++i) total[i] += f(c + i * W, W);
    for (; c < channels; c += W) total[0] += f(c, channels - c);
    return sum((total[0] + total[1]) + (total[2] + total[3]));
}

}  // namespace stepgraph::STEPGRAPH_LEVEL
