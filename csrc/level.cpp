// What this CPU can run, and what this library was built from.
#include "native.h"

#ifdef STEPGRAPH_NATIVE
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace stepgraph {

bool tiles_work();

struct Registers {
    unsigned a, b, c, d;
};

static Registers cpuid(unsigned leaf, unsigned subleaf) {
    Registers r{};
    if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) return {};
    return r;
}

// Register state that the operating system keeps; all of AVX, AVX-512 or AMX needs its bits here.
static uint64_t kept_state() {
    uint32_t low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<uint64_t>(high) << 32 | low;
}

static bool has(uint64_t word, uint64_t bits) { return (word & bits) == bits; }

static bool bit(unsigned word, int number) { return word >> number & 1; }

// Linux grants a process the tiles' state only when it is asked to.
static bool tiles_granted() {
#if defined(__linux__)
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

static bool made_by_amd() {
    const Registers r = cpuid(0, 0);
    return r.b == 0x68747541 && r.d == 0x69746e65 && r.c == 0x444d4163;
}

static Level find_level() {
    constexpr uint64_t AVX_STATE = 0x6, AVX512_STATE = 0xe6, TILE_STATE = 0x60000;
    const Registers one = cpuid(1, 0), seven = cpuid(7, 0), more = cpuid(7, 1);
    const bool os_saves = bit(one.c, 27);
    const uint64_t state = os_saves ? kept_state() : 0;
    if (!has(state, AVX_STATE) || !bit(one.c, 12) || !bit(seven.b, 5)) return BASELINE;
    // F, DQ, BW and VL.
    if (!has(state, AVX512_STATE) || !has(seven.b, 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31)) return AVX2;
    if (has(state, TILE_STATE) && bit(seven.d, 22) && bit(seven.d, 24) && tiles_granted() && tiles_work()) return AMX;
    // Intel's dot products of bfloat16 pairs have half the rate of its float32 arithmetic; AMD's have twice the rate.
    return bit(more.a, 5) && made_by_amd() ? AVX512_BF16 : AVX512;
}

}  // namespace stepgraph

STEPGRAPH_EXPORT int64_t stepgraph_level() { return stepgraph::find_level(); }
#else
STEPGRAPH_EXPORT int64_t stepgraph_level() { return stepgraph::NONE; }
#endif

#ifndef STEPGRAPH_SOURCES
#define STEPGRAPH_SOURCES ""
#endif
STEPGRAPH_EXPORT const char* stepgraph_sources() { return STEPGRAPH_SOURCES; }
