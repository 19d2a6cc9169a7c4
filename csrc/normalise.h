// LayerNorm and modulation of one row: what `modulated_norm` and the prologue of `lowrank_delta` share to the last bit.
namespace stepgraph::STEPGRAPH_LEVEL {

// Store a row's values in chunks that lie `stride` elements apart; a row in one piece has the stride CHUNK<T>.
// Scratch may be float where the dtype is bfloat16: its values are rounded all the same.
template <class T, class S>
static inline void put(S* out, int64_t stride, int64_t c, V value, int64_t n) {
    S* to = out + c / CHUNK<T> * stride + c % CHUNK<T>;
    if constexpr (sizeof(T) < sizeof(S))
        store(to, widen(narrow(value)), n);
    else
        store(to, value, n);
}

// norm(x) * (1 + scale) + shift, rounded to T.
template <class T, class S>
static inline void normalise(const T* x, const T* scale, const T* shift, float eps, int64_t channels, S* out, int64_t stride) {
    const float mean = sum_row(channels, [&](int64_t c, int64_t n) { return load(x + c, n); }) / channels;
    const float variance = sum_row(channels, [&](int64_t c, int64_t n) {
                               const V centred = load(x + c, n, mean) - mean;
                               return centred * centred;
                           }) / channels;
    const float inverse = 1 / __builtin_sqrtf(variance + eps);
    for (int64_t c = 0; c < channels; c += W) {
        const int64_t n = channels - c;
        const V normal = (load(x + c, n) - mean) * inverse;
        put<T>(out, stride, c, normal * (load(scale + c, n) + 1) + load(shift + c, n), n);
    }
}

}  // namespace stepgraph::STEPGRAPH_LEVEL
