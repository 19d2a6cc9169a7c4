// Matrix products of a block of rows with a packed weight, for vectors of one level.
//
// The block lies in chunks [K / CHUNK, rows, CHUNK], the weight in panels [columns / 16, K, 16] (bfloat16 in pairs:
// [columns / 16, K / 2, 16, 2]), both padded with zeros to whole chunks of K, of which only tiles read all. Every element of a
// product is summed in one register in the order of K, whatever the block's shape is: so that equal rows give equal bits in
// every call.
namespace stepgraph::STEPGRAPH_LEVEL {

constexpr int64_t VECTORS = PANEL / W;

// Weights as they are read: W columns at one k, or for bfloat16 at the even and the odd k of a pair.
static inline void columns(const float* w, int64_t k, int64_t v, V& even, V& odd) {
    even = load(w + k * PANEL + v * W);
    odd = load(w + (k + 1) * PANEL + v * W);
}

static inline void columns(const bf16* w, int64_t k, int64_t v, V& even, V& odd) {
    U pair;
    std::memcpy(&pair, w + k * PANEL + 2 * v * W, sizeof pair);
    even = (V)(pair << 16);
    odd = (V)(pair & 0xffff0000u);
}

// c [MR, 16 P] = x [MR, K] w [K, 16 P]; x's chunks lie `x_stride` elements apart, w's panels `w_stride`.
template <class T, int MR, int P>
__attribute__((noinline)) static void fma_kernel(const float* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t length,
                                                 float* c, int64_t c_stride) {
    V total[MR][P * VECTORS] = {};
    for (; length > 0; length -= CHUNK<T>, x += x_stride, w += CHUNK<T> * PANEL)
        for (int64_t k = 0; k < (length < CHUNK<T> ? length : CHUNK<T>); k += 2) {
            V even[P * VECTORS], odd[P * VECTORS];
#pragma GCC unroll 8
            for (int v = 0; v < P * VECTORS; ++v) columns(w + v / VECTORS * w_stride, k, v % VECTORS, even[v], odd[v]);
#pragma GCC unroll 16
            for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
                for (int v = 0; v < P * VECTORS; ++v)
                    total[i][v] = multiply_add(all(x[i * CHUNK<T> + k]), even[v], total[i][v]);
#pragma GCC unroll 16
            for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
                for (int v = 0; v < P * VECTORS; ++v)
                    total[i][v] = multiply_add(all(x[i * CHUNK<T> + k + 1]), odd[v], total[i][v]);
        }
    for (int i = 0; i < MR; ++i)
        for (int v = 0; v < P * VECTORS; ++v) store(c + i * c_stride + v * W, total[i][v]);
}

#if STEPGRAPH_DOT
// The same for bfloat16 on both sides, by the CPU's dot products of pairs.
template <int MR, int P>
__attribute__((noinline)) static void dot_kernel(const bf16* x, int64_t x_stride, const bf16* w, int64_t w_stride, int64_t length,
                                                 float* c, int64_t c_stride) {
    __m512 total[MR][P] = {};
    for (; length > 0; length -= CHUNK<bf16>, x += x_stride, w += CHUNK<bf16> * PANEL)
        for (int64_t k = 0; k < (length < CHUNK<bf16> ? length : CHUNK<bf16>); k += 2) {
            __m512i pairs[P];
#pragma GCC unroll 8
            for (int v = 0; v < P; ++v) pairs[v] = _mm512_loadu_si512(w + v * w_stride + k * PANEL);
#pragma GCC unroll 16
            for (int i = 0; i < MR; ++i) {
                int32_t pair;
                std::memcpy(&pair, x + i * CHUNK<bf16> + k, sizeof pair);
                const __m512i both = _mm512_set1_epi32(pair);
#pragma GCC unroll 8
                for (int v = 0; v < P; ++v) total[i][v] = _mm512_dpbf16_ps(total[i][v], (__m512bh)both, (__m512bh)pairs[v]);
            }
        }
    for (int i = 0; i < MR; ++i)
        for (int v = 0; v < P; ++v) _mm512_storeu_ps(c + i * c_stride + v * PANEL, total[i][v]);
}
#endif

// Rows and vectors that fill the registers: 12 x 2 vectors of 32, or 6 x 2 and 3 x 4 of 16.
constexpr int TALL = W == 16 ? 12 : W == 8 ? 6 : 3;

template <class Engine, class T, int P>
static void multiply_panels(const typename Engine::S* x, int64_t x_stride, int64_t rows, const T* w, int64_t w_stride,
                            int64_t length, float* c, int64_t c_stride) {
    int64_t i = 0;
    for (; i + TALL <= rows; i += TALL)
        Engine::template kernel<TALL, P>(x + i * CHUNK<T>, x_stride, w, w_stride, length, c + i * c_stride, c_stride);
    if constexpr (TALL > 4)
        for (; i + 4 <= rows; i += 4)
            Engine::template kernel<4, P>(x + i * CHUNK<T>, x_stride, w, w_stride, length, c + i * c_stride, c_stride);
    for (; i < rows; ++i)
        Engine::template kernel<1, P>(x + i * CHUNK<T>, x_stride, w, w_stride, length, c + i * c_stride, c_stride);
}

template <class Engine, class T>
static void multiply_rows(const typename Engine::S* x, int64_t x_stride, int64_t rows, const T* w, int64_t length, int64_t panels,
                          float* c, int64_t c_stride) {
    const int64_t w_stride = chunks_of(length, CHUNK<T>) * CHUNK<T> * PANEL;
    int64_t p = 0;
    if constexpr (W == 16)
        for (; p + 2 <= panels; p += 2)
            multiply_panels<Engine, T, 2>(x, x_stride, rows, w + p * w_stride, w_stride, length, c + p * PANEL, c_stride);
    for (; p < panels; ++p)
        multiply_panels<Engine, T, 1>(x, x_stride, rows, w + p * w_stride, w_stride, length, c + p * PANEL, c_stride);
}

// Engines: how a block is laid out and multiplied. S is the element of its scratch, ROWS the most rows it has, WIDE the columns
// of a result that are finished together, and `multiply` is c [rows, 16 panels] = x [rows, K] w [K, 16 panels].

template <class T>
struct Fma {
    using S = float;
    static constexpr int64_t ROWS = 48, WIDE = 512;

    template <int MR, int P>
    static void kernel(const S* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t length, float* c, int64_t c_stride) {
        fma_kernel<T, MR, P>(x, x_stride, w, w_stride, length, c, c_stride);
    }
    static void multiply(const S* x, int64_t x_stride, int64_t rows, const T* w, int64_t length, int64_t panels, float* c,
                         int64_t c_stride) {
        multiply_rows<Fma, T>(x, x_stride, rows, w, length, panels, c, c_stride);
    }
};

#if STEPGRAPH_DOT
struct Dot {
    using S = bf16;
    static constexpr int64_t ROWS = 48, WIDE = 512;

    template <int MR, int P>
    static void kernel(const S* x, int64_t x_stride, const S* w, int64_t w_stride, int64_t length, float* c, int64_t c_stride) {
        dot_kernel<MR, P>(x, x_stride, w, w_stride, length, c, c_stride);
    }
    static void multiply(const S* x, int64_t x_stride, int64_t rows, const S* w, int64_t length, int64_t panels, float* c,
                         int64_t c_stride) {
        multiply_rows<Dot, bf16>(x, x_stride, rows, w, length, panels, c, c_stride);
    }
};
#endif

}  // namespace stepgraph::STEPGRAPH_LEVEL
