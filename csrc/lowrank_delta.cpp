// lowrank_delta: y_i + A_i (B_i x - p_i) with an optional LayerNorm and modulation before and gate and residual after; and
// lowrank_input, p = B x, which is its first half and must give the same bits.
#ifndef STEPGRAPH_LEVEL
#include "native.h"
#ifdef STEPGRAPH_NATIVE
#include <algorithm>
#include <cstdlib>

#include "tiles.h"

namespace stepgraph {

// A map's A is packed; y and out are [B, N, outputs].
struct Map {
    int64_t outputs, rank;
    const void* weight;
    Rows y, out;
};

// `channels` of common are x's; p is [B, N, ranks] float and, where there is no map, what is written. B is packed; where there
// is none, B x is in `projected`, float like p. `count` maps follow in memory.
struct Lowrank {
    Common common;
    int64_t ranks, normalised, gated, count;
    const void* weight;
    Rows x, scale, shift, projected, p, gate, residual;

    const Map* maps() const { return reinterpret_cast<const Map*>(this + 1); }
};

// Scratch of a thread, kept from call to call: fresh memory would cost a page fault every 4 KiB.
struct Scratch {
    char* data = nullptr;
    size_t size = 0;

    char* at_least(size_t bytes) {
        if (bytes > size) {
            std::free(data);
            size = (bytes + 4095) / 4096 * 4096;
            data = static_cast<char*>(std::aligned_alloc(64, size));
            if (data == nullptr) std::abort();
        }
        return data;
    }
    ~Scratch() { std::free(data); }
};

static thread_local Scratch scratch;

}  // namespace stepgraph

#define STEPGRAPH_KERNELS "lowrank_delta.cpp"
#include "each_level.h"

STEPGRAPH_EXPORT void stepgraph_lowrank(const stepgraph::Lowrank* a, double eps) {
    using namespace stepgraph;
    STEPGRAPH_RUN(a->common, lowrank, *a, static_cast<float>(eps));
}

// Whether the CPU's tiles compute what the emulated ones do; small integers, so that no rounding can differ.
namespace stepgraph {
bool tiles_work() {
    alignas(64) bf16 x[32 * 32], w[2 * 32 * 16];
    alignas(64) float computed[32 * 32], expected[32 * 32];
    // 1, 2, 3 and 4 in the upper half of a float.
    const uint16_t numbers[4] = {0x3f80, 0x4000, 0x4040, 0x4080};
    for (int i = 0; i < 1024; ++i) {
        x[i].bits = numbers[i * 7 / 3 % 4];
        w[i].bits = numbers[i * 5 / 2 % 4];
    }
    TileEngine<HardwareTiles>::multiply(x, 0, 32, w, 32, 2, computed, 32);
    TileEngine<EmulatedTiles>::multiply(x, 0, 32, w, 32, 2, expected, 32);
    return std::memcmp(computed, expected, sizeof computed) == 0;
}
}  // namespace stepgraph

#endif
#else
#include "vector.h"
#include "rows.h"
#include "normalise.h"
#include "gemm.h"

namespace stepgraph::STEPGRAPH_LEVEL {

// One block of rows, from `first` on.
template <class T, class Engine>
struct Block {
    using S = typename Engine::S;
    static constexpr int64_t X_STRIDE = Engine::ROWS * CHUNK<T>;

    const Lowrank& a;
    float eps;
    int64_t rows;
    // x and one map's T in chunks; T of all maps and a part of a result in rows.
    S *x, *z;
    float *t, *c;
    Row places[Engine::ROWS];

    static int64_t padded(int64_t length) { return chunks_of(length, CHUNK<T>) * X_STRIDE; }

    Block(const Lowrank& a, float eps, int64_t first, int64_t rows) : a(a), eps(eps), rows(rows) {
        int64_t most = 0;
        for (int64_t i = 0; i < a.count; ++i) most = std::max(most, a.maps()[i].rank);
        const int64_t x_bytes = padded(a.common.channels) * sizeof(S), z_bytes = padded(most) * sizeof(S);
        const int64_t t_bytes = Engine::ROWS * t_stride() * 4, c_bytes = Engine::ROWS * Engine::WIDE * 4;
        char* data = scratch.at_least(x_bytes + z_bytes + t_bytes + c_bytes);
        x = reinterpret_cast<S*>(data);
        z = reinterpret_cast<S*>(data + x_bytes);
        t = reinterpret_cast<float*>(data + x_bytes + z_bytes);
        c = reinterpret_cast<float*>(data + x_bytes + z_bytes + t_bytes);
        for (int64_t row = 0; row < rows; ++row) places[row] = a.common.row(first + row);
    }

    int64_t t_stride() const { return chunks_of(a.ranks, PANEL) * PANEL; }

    template <class E>
    E* place(const Rows& tensor, int64_t row) const {
        return tensor.at<E>(places[row]);
    }

    // Zeros from `length` to the end of its chunk.
    static void pad(S* row, int64_t length) {
        if (const int64_t used = length % CHUNK<T>)
            std::memset(row + length / CHUNK<T> * X_STRIDE + used, 0, (CHUNK<T> - used) * sizeof(S));
    }

    void copy(const T* from, S* to) const {
        each_part<W>(a.common.channels, [&](auto whole, int64_t k, int64_t left) {
            put<T, whole>(to, X_STRIDE, k, load_part<whole>(from + k, left), left);
        });
    }

    void read_input() {
        const int64_t channels = a.common.channels;
        for (int64_t row = 0; row < rows; ++row) {
            S* to = x + row * CHUNK<T>;
            const T* from = place<T>(a.x, row);
            if (a.normalised)
                normalise<T>(from, place<T>(a.scale, row), place<T>(a.shift, row), eps, channels, to, X_STRIDE);
            else
                copy(from, to);
            pad(to, channels);
        }
    }

    void project() {
        Engine::multiply(x, X_STRIDE, rows, static_cast<const T*>(a.weight), a.common.channels, t_stride() / PANEL, t, t_stride());
    }

    void read_projected() {
        for (int64_t row = 0; row < rows; ++row) std::memcpy(t + row * t_stride(), place<float>(a.projected, row), a.ranks * 4);
    }

    void write_input() const {
        for (int64_t row = 0; row < rows; ++row) std::memcpy(place<float>(a.p, row), t + row * t_stride(), a.ranks * 4);
    }

    // One map's ranks of B x - p, rounded to T.
    void subtract(int64_t rank, int64_t ranks) {
        for (int64_t row = 0; row < rows; ++row) {
            const float *from = t + row * t_stride() + rank, *stored = place<float>(a.p, row) + rank;
            S* to = z + row * CHUNK<T>;
            each_part<W>(ranks, [&](auto whole, int64_t k, int64_t left) {
                put<T, whole>(to, X_STRIDE, k, load_part<whole>(from + k, left) - load_part<whole>(stored + k, left), left);
            });
            pad(to, ranks);
        }
    }

    // W columns of a row from `column` on: y + what is in c, gated and added where asked for.
    template <bool whole>
    void finish_vector(const Map& map, int64_t row, const float* product, int64_t column, int64_t left) const {
        V value = load_part<whole>(place<T>(map.y, row) + column, left) + load(product);
        if (a.gated) {
            const V gate = load_part<whole>(place<T>(a.gate, row) + column, left);
            value = multiply_add(gate, value, load_part<whole>(place<T>(a.residual, row) + column, left));
        }
        store_part<whole>(place<T>(map.out, row) + column, value, left);
    }

    void finish(const Map& map, int64_t column, int64_t n) const {
        for (int64_t row = 0; row < rows; ++row) {
            const float* product = c + row * Engine::WIDE;
            each_part<W>(n, [&](auto whole, int64_t k, int64_t left) {
                finish_vector<whole>(map, row, product + k, column + k, left);
            });
        }
    }

    void run() {
        if (a.weight == nullptr) {
            read_projected();
        } else {
            read_input();
            project();
        }
        if (a.count == 0) return write_input();
        int64_t rank = 0;
        for (const Map* map = a.maps(); map < a.maps() + a.count; rank += map->rank, ++map) {
            subtract(rank, map->rank);
            const int64_t padded_rank = chunks_of(map->rank, CHUNK<T>) * CHUNK<T>;
            for (int64_t column = 0; column < map->outputs; column += Engine::WIDE) {
                const int64_t n = std::min(Engine::WIDE, map->outputs - column);
                Engine::multiply(z, X_STRIDE, rows, static_cast<const T*>(map->weight) + column * padded_rank, map->rank,
                                 chunks_of(n, PANEL), c, Engine::WIDE);
                finish(*map, column, n);
            }
        }
    }
};

template <class T, class Engine>
static void run_blocks(const Lowrank& a, float eps) {
    const int64_t rows = a.common.rows();
    // Fewer rows to a block where threads would be left without one; whole tiles, to waste none.
    const int64_t share = chunks_of(chunks_of(rows, a.common.threads), 16) * 16;
    const int64_t size = std::min(Engine::ROWS, share), blocks = chunks_of(rows, size);
    each_of(blocks, std::min(a.common.threads, blocks), [=, &a](int64_t block) {
        Block<T, Engine>(a, eps, block * size, std::min(size, rows - block * size)).run();
    });
}

template <class T>
static void lowrank(const Lowrank& a, float eps) {
    if constexpr (sizeof(T) == sizeof(bf16)) {
        if (a.common.level == EMULATED_TILES) return run_blocks<T, TileEngine<EmulatedTiles>>(a, eps);
#if STEPGRAPH_DOT
        if (a.common.level == AMX) return run_blocks<T, TileEngine<HardwareTiles>>(a, eps);
        if (a.common.level == AVX512_BF16) return run_blocks<T, Dot>(a, eps);
#endif
    }
    run_blocks<T, Fma<T>>(a, eps);
}

}  // namespace stepgraph::STEPGRAPH_LEVEL
#endif
