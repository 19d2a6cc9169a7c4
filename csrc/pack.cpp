// Weights laid out as matrix products read them: panels of 16 columns, padded with zeros.
#include "native.h"
#ifdef STEPGRAPH_NATIVE

namespace stepgraph {

// `from` [columns, length] with strides in elements, as nn.Linear keeps weights; `together` neighbours along the length stay
// together. `to` is [columns / 16, length / together, 16, together].
template <class T>
static void pack(const T* from, int64_t columns, int64_t length, int64_t column_stride, int64_t stride, int64_t together, T* to) {
    const int64_t padded = chunks_of(length, CHUNK<T>) * CHUNK<T>;
    for (int64_t first = 0; first < columns; first += PANEL)
        for (int64_t k = 0; k < padded; k += together)
            for (int64_t column = first; column < first + PANEL; ++column)
                for (int64_t i = k; i < k + together; ++i)
                    *to++ = column < columns && i < length ? from[column * column_stride + i * stride] : T{};
}

}  // namespace stepgraph

STEPGRAPH_EXPORT int64_t stepgraph_packed_bytes(int64_t dtype, int64_t columns, int64_t length) {
    using namespace stepgraph;
    const int64_t size = dtype == BFLOAT16 ? sizeof(bf16) : sizeof(float), chunk = 64 / size;
    return chunks_of(columns, PANEL) * PANEL * chunks_of(length, chunk) * chunk * size;
}

STEPGRAPH_EXPORT void stepgraph_pack(int64_t dtype, const void* from, int64_t columns, int64_t length, int64_t column_stride,
                                     int64_t stride, void* to) {
    using namespace stepgraph;
    if (dtype == BFLOAT16)
        pack(static_cast<const bf16*>(from), columns, length, column_stride, stride, 2, static_cast<bf16*>(to));
    else
        pack(static_cast<const float*>(from), columns, length, column_stride, stride, 1, static_cast<float*>(to));
}

#endif
