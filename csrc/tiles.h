// AMX tiles: 16 rows of 64 bytes each. In instructions, and emulated in plain C++ for the tests and the check at start-up.
#pragma once

#include "native.h"

namespace stepgraph {

// The instructions are written out with memory clobbers: the compiler's own intrinsics have none, so it may drop or move stores
// that a tile load or the tile configuration reads.
struct HardwareTiles {
    HardwareTiles() {
        alignas(64) uint8_t config[64] = {1};
        for (int tile = 0; tile < 8; ++tile) {
            config[16 + 2 * tile] = 64;
            config[48 + tile] = 16;
        }
        asm volatile("ldtilecfg (%0)" : : "r"(config) : "memory");
    }
    ~HardwareTiles() { asm volatile("tilerelease" : : : "memory"); }
    HardwareTiles(const HardwareTiles&) = delete;

    template <int T>
    void zero() {
        asm volatile("tilezero %%tmm%c0" : : "i"(T) : "memory");
    }
    template <int T>
    void load(const void* from, int64_t bytes_per_row) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(bytes_per_row), "i"(T) : "memory");
    }
    template <int T>
    void store(void* to, int64_t bytes_per_row) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(bytes_per_row), "i"(T) : "memory");
    }
    // C [16, 16] float += A [16, 32] bfloat16 times B [16 pairs, 16, 2] bfloat16.
    template <int C, int A, int B>
    void dot() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B) : "memory");
    }
};

struct EmulatedTiles {
    char tiles[8][16][64];

    template <int T>
    void zero() {
        std::memset(tiles[T], 0, sizeof tiles[T]);
    }
    template <int T>
    void load(const void* from, int64_t bytes_per_row) {
        for (int i = 0; i < 16; ++i) std::memcpy(tiles[T][i], static_cast<const char*>(from) + i * bytes_per_row, 64);
    }
    template <int T>
    void store(void* to, int64_t bytes_per_row) {
        for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(to) + i * bytes_per_row, tiles[T][i], 64);
    }
    template <int C, int A, int B>
    void dot() {
        for (int i = 0; i < 16; ++i)
            for (int k = 0; k < 16; ++k)
                for (int j = 0; j < 16; ++j)
                    for (int half = 0; half < 2; ++half) add<C>(i, j, widened(tiles[A][i] + 4 * k + 2 * half) *
                                                                          widened(tiles[B][k] + 4 * j + 2 * half));
    }

   private:
    static float widened(const char* from) {
        uint16_t bits;
        std::memcpy(&bits, from, sizeof bits);
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &wide, sizeof value);
        return value;
    }
    template <int C>
    void add(int i, int j, float value) {
        float total;
        std::memcpy(&total, tiles[C][i] + 4 * j, sizeof total);
        total += value;
        std::memcpy(tiles[C][i] + 4 * j, &total, sizeof total);
    }
};

// c [16 or 32, 16 or 32] = x w, see gemm.h; `tall` and `wide` say whether there are two tiles of rows and of columns.
template <bool tall, bool wide, class Tiles>
static void tile_kernel(Tiles& tiles, const bf16* x, int64_t x_stride, const bf16* w, int64_t w_stride, int64_t chunks, float* c,
                        int64_t c_stride) {
    tiles.template zero<0>();
    if constexpr (wide) tiles.template zero<1>();
    if constexpr (tall) tiles.template zero<2>();
    if constexpr (tall && wide) tiles.template zero<3>();
    for (int64_t chunk = 0; chunk < chunks; ++chunk, x += x_stride, w += CHUNK<bf16> * PANEL) {
        tiles.template load<6>(w, 64);
        tiles.template load<4>(x, 64);
        tiles.template dot<0, 4, 6>();
        if constexpr (wide) tiles.template load<7>(w + w_stride, 64);
        if constexpr (wide) tiles.template dot<1, 4, 7>();
        if constexpr (tall) tiles.template load<5>(x + 16 * CHUNK<bf16>, 64);
        if constexpr (tall) tiles.template dot<2, 5, 6>();
        if constexpr (tall && wide) tiles.template dot<3, 5, 7>();
    }
    tiles.template store<0>(c, 4 * c_stride);
    if constexpr (wide) tiles.template store<1>(c + 16, 4 * c_stride);
    if constexpr (tall) tiles.template store<2>(c + 16 * c_stride, 4 * c_stride);
    if constexpr (tall && wide) tiles.template store<3>(c + 16 * c_stride + 16, 4 * c_stride);
}

// An engine, see gemm.h. Rows beyond `rows` are computed too, up to whole tiles: a block's scratch always holds ROWS of them.
template <class Tiles>
struct TileEngine {
    using S = bf16;
    static constexpr int64_t ROWS = 32, WIDE = 128;

    static void multiply(const bf16* x, int64_t x_stride, int64_t rows, const bf16* w, int64_t length, int64_t panels, float* c,
                         int64_t c_stride) {
        const int64_t chunks = chunks_of(length, CHUNK<bf16>), stride = chunks * CHUNK<bf16> * PANEL;
        Tiles tiles;
        for (int64_t p = 0; p < panels; p += 2) {
            const bf16* panel = w + p * stride;
            float* to = c + p * PANEL;
            const bool tall = rows > 16, wide = p + 1 < panels;
            if (tall)
                wide ? tile_kernel<true, true>(tiles, x, x_stride, panel, stride, chunks, to, c_stride)
                     : tile_kernel<true, false>(tiles, x, x_stride, panel, stride, chunks, to, c_stride);
            else
                wide ? tile_kernel<false, true>(tiles, x, x_stride, panel, stride, chunks, to, c_stride)
                     : tile_kernel<false, false>(tiles, x, x_stride, panel, stride, chunks, to, c_stride);
        }
    }
};

}  // namespace stepgraph
