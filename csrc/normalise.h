// LayerNorm and modulation of one row: what `modulated_norm` and the prologue of `lowrank_delta` share to the last bit.
namespace stepgraph::STEPGRAPH_LEVEL {

// Store a row's values in chunks that lie `stride` elements apart; a row in one piece has the stride CHUNK<T>.
// Scratch may be float where the dtype is bfloat16: its values are rounded all the same.
template <class T, bool whole, class S>
static inline void put(S* out, int64_t stride, int64_t c, V value, int64_t left) {
    S* to = out + c / CHUNK<T> * stride + c % CHUNK<T>;
    if constexpr (sizeof(T) < sizeof(S))
        store_part<whole>(to, widen(narrow(value)), left);
    else
        store_part<whole>(to, value, left);
}

// norm(x) * (1 + scale) + shift, rounded to T.
template <class T, class S>
static inline void normalise(const T* x, const T* scale, const T* shift, float eps, int64_t channels, S* out, int64_t stride) {
    const float mean = sum_row(x, channels, 0, [](V value) { return value; }) / channels;
    const float variance = sum_row(x, channels, mean, [=](V value) { return (value - mean) * (value - mean); }) / channels;
    const float inverse = 1 / __builtin_sqrtf(variance + eps);
    int64_t c = 0;
    for (; c + W <= channels; c += W) {
        const V normal = (load(x + c) - mean) * inverse;
        put<T, true>(out, stride, c, multiply_add(normal, load(scale + c) + 1, load(shift + c)), W);
    }
    if (const int64_t left = channels - c; left > 0) {
        const V normal = (load_part(x + c, left) - mean) * inverse;
        put<T, false>(out, stride, c, multiply_add(normal, load_part(scale + c, left) + 1, load_part(shift + c, left)), left);
    }
}

}  // namespace stepgraph::STEPGRAPH_LEVEL
