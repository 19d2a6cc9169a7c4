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
    each_part<W>(channels, [&](auto whole, int64_t c, int64_t left) {
        const V normal = (load_part<whole>(x + c, left) - mean) * inverse;
        const V value = multiply_add(normal, load_part<whole>(scale + c, left) + 1, load_part<whole>(shift + c, left));
        put<T, whole>(out, stride, c, value, left);
    });
}

}  // namespace stepgraph::STEPGRAPH_LEVEL
