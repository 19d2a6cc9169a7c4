// What all kernels share: levels of instruction sets, dtypes, and how tensors reach them.
//
// The library has a plain C interface and knows nothing of torch: the arguments of a kernel are one block of 64-bit words,
// which a struct of this file or of the kernel's names. B batches, N tokens, C channels, R ranks of all maps together.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__)
#define STEPGRAPH_NATIVE 1
#include <immintrin.h>
#define STEPGRAPH_EXPORT extern "C" __attribute__((visibility("default")))
#elif defined(_WIN32)
#define STEPGRAPH_EXPORT extern "C" __declspec(dllexport)
#else
#define STEPGRAPH_EXPORT extern "C" __attribute__((visibility("default")))
#endif

#define STEPGRAPH_INLINE __attribute__((always_inline)) static inline

namespace stepgraph {

// In the order of csrc/library.py's LEVELS. The last computes what AMX tiles would, in plain C++, for the tests.
enum Level : int64_t { NONE, BASELINE, AVX2, AVX512, AVX512_BF16, AMX, EMULATED_TILES };

enum Dtype : int64_t { FLOAT32, BFLOAT16 };

struct bf16 {
    uint16_t bits;
};

// Elements of a row that stand together where rows of a block are laid out for a matrix product: one cache line.
template <class T>
constexpr int64_t CHUNK = 64 / sizeof(T);

// Columns of a weight that stand together where it is packed.
constexpr int64_t PANEL = 16;

inline int64_t chunks_of(int64_t length, int64_t chunk) { return (length + chunk - 1) / chunk; }

// Which batch and which token of it a row is.
struct Row {
    int64_t batch, token;
};

// A tensor [B, N, C] whose channels are contiguous; strides are in elements and 0 where it is broadcast.
struct Rows {
    char* data;
    int64_t batch, token;

    template <class T>
    T* at(Row row) const {
        return reinterpret_cast<T*>(data) + row.batch * batch + row.token * token;
    }
};

// What every operation begins with.
struct Common {
    int64_t level, dtype, threads, batches, tokens, channels;

    int64_t rows() const { return batches * tokens; }
    Row row(int64_t i) const { return {i / tokens, i % tokens}; }
    // Threads worth waking for an elementwise pass of so many rows.
    int64_t useful_threads() const {
        const int64_t most = 1 + rows() * channels / 32768;
        return threads < most ? threads : most;
    }
};

}  // namespace stepgraph
