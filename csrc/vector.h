// Vectors of floats of one instruction set, in the compiler's own vector types; included once per level, so without a guard.
namespace stepgraph::STEPGRAPH_LEVEL {

constexpr int64_t W = STEPGRAPH_LANES;
typedef float V __attribute__((vector_size(STEPGRAPH_LANES * 4)));
typedef uint32_t U __attribute__((vector_size(STEPGRAPH_LANES * 4)));
typedef uint16_t H __attribute__((vector_size(STEPGRAPH_LANES * 2)));

// Subtracting a zero is no operation, where adding one would turn -0 into 0.
static inline V all(float value) { return value - V{}; }

// a * b + c, in one rounding where the CPU can. The compiler must not contract on its own (-ffp-contract=off): it would do so in
// one function and not in another, and what an operation gives would depend on what it is fused with.
static inline V multiply_add(V a, V b, V c) {
#if STEPGRAPH_LANES == 16
    return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif STEPGRAPH_LANES == 8
    return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// bfloat16 to float and back: rounded to the nearest, ties to even; NaN stays NaN. The CPU's own instruction takes what is
// smaller than the smallest normal number (1.2e-38) for zero.
#if STEPGRAPH_LANES == 16
static inline V widen(H bits) { return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)bits), 16); }
#else
static inline V widen(H bits) { return (V)(__builtin_convertvector(bits, U) << 16); }
#endif

static inline H narrow(V value) {
#if STEPGRAPH_DOT
    return (H)_mm512_cvtneps_pbh((__m512)value);
#else
    const U bits = (U)value;
    const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
#if STEPGRAPH_LANES == 16
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)value, (__m512)value, _CMP_UNORD_Q);
    return (H)_mm512_cvtepi32_epi16(_mm512_mask_mov_epi32((__m512i)rounded, nan, _mm512_set1_epi32(0x7fc0)));
#else
    const U nan = (U)(value != value);
    return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), H);
#endif
#endif
}

static inline V load(const float* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

static inline V load(const bf16* from) {
    H bits;
    std::memcpy(&bits, from, sizeof bits);
    return widen(bits);
}

static inline void store(float* to, V value) { std::memcpy(to, &value, sizeof value); }

static inline void store(bf16* to, V value) {
    const H bits = narrow(value);
    std::memcpy(to, &bits, sizeof bits);
}

// W elements where that many are `left`, else those and `rest` in the place of the others; `whole` promises that they are.
template <bool whole = false, class T>
static inline V load_part(const T* from, int64_t left, float rest = 0) {
    if (whole || left >= W) return load(from);
    V value = all(rest);
    T buffer[W] = {};
    if (left <= 0) return value;
    std::memcpy(buffer, from, left * sizeof(T));
    const V elements = load(buffer);
    for (int64_t i = 0; i < left; ++i) value[i] = elements[i];
    return value;
}

template <bool whole = false, class T>
static inline void store_part(T* to, V value, int64_t left) {
    if (whole || left >= W) return store(to, value);
    T buffer[W];
    store(buffer, value);
    if (left > 0) std::memcpy(to, buffer, left * sizeof(T));
}

static inline float sum(V value) {
    for (int64_t half = W / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) value[i] += value[i + half];
    return value[0];
}

// Sum of f(row's elements from c on) over a row; the last are filled up with `rest`. Four running sums, because an addition
// takes several cycles.
template <class T, class F>
static inline float sum_row(const T* row, int64_t channels, float rest, F f) {
    V total[4] = {};
    int64_t c = 0;
    for (; c + 4 * W <= channels; c += 4 * W)
        for (int64_t i = 0; i < 4; ++i) total[i] += f(load(row + c + i * W));
    for (; c < channels; c += W) total[0] += f(load_part(row + c, channels - c, rest));
    return sum((total[0] + total[1]) + (total[2] + total[3]));
}

}  // namespace stepgraph::STEPGRAPH_LEVEL
