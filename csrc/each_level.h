// Compiles the file named by STEPGRAPH_KERNELS once per instruction set, each time in a namespace of its own.
//
// Functions carry their target themselves, so no -march flag is needed and none leaks into code that runs before the CPU was
// looked at. The file is included with STEPGRAPH_LEVEL (the namespace), STEPGRAPH_LANES (floats in a vector) and STEPGRAPH_DOT
// (whether the CPU has instructions for bfloat16) defined.
#if defined(__clang__)
#define STEPGRAPH_TARGET_AVX2 \
    _Pragma("clang attribute push(__attribute__((target(\"avx2,fma\"))), apply_to = function)")
#define STEPGRAPH_TARGET_AVX512 \
    _Pragma("clang attribute push(__attribute__((target(\"avx2,fma,avx512f,avx512bw,avx512dq,avx512vl\"))), apply_to = function)")
#define STEPGRAPH_TARGET_AVX512_BF16 \
    _Pragma("clang attribute push(__attribute__((target(\"avx2,fma,avx512dq,avx512vl,avx512bf16\"))), apply_to = function)")
#define STEPGRAPH_TARGET_END _Pragma("clang attribute pop")
#else
#define STEPGRAPH_TARGET_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma\")")
#define STEPGRAPH_TARGET_AVX512 \
    _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,avx512f,avx512bw,avx512dq,avx512vl\")")
#define STEPGRAPH_TARGET_AVX512_BF16 \
    _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,avx512dq,avx512vl,avx512bf16\")")
#define STEPGRAPH_TARGET_END _Pragma("GCC pop_options")
#endif

#define STEPGRAPH_DOT 0
#define STEPGRAPH_LEVEL baseline
#define STEPGRAPH_LANES 4
#include STEPGRAPH_KERNELS
#undef STEPGRAPH_LEVEL
#undef STEPGRAPH_LANES

#define STEPGRAPH_LEVEL avx2
#define STEPGRAPH_LANES 8
STEPGRAPH_TARGET_AVX2
#include STEPGRAPH_KERNELS
STEPGRAPH_TARGET_END
#undef STEPGRAPH_LEVEL
#undef STEPGRAPH_LANES

#define STEPGRAPH_LEVEL avx512
#define STEPGRAPH_LANES 16
STEPGRAPH_TARGET_AVX512
#include STEPGRAPH_KERNELS
STEPGRAPH_TARGET_END
#undef STEPGRAPH_LEVEL
#undef STEPGRAPH_DOT

#define STEPGRAPH_DOT 1
#define STEPGRAPH_LEVEL avx512_bf16
STEPGRAPH_TARGET_AVX512_BF16
#include STEPGRAPH_KERNELS
STEPGRAPH_TARGET_END
#undef STEPGRAPH_LEVEL
#undef STEPGRAPH_LANES
#undef STEPGRAPH_DOT

// `call` in the namespace that the level asks for, with the type that the dtype asks for.
#define STEPGRAPH_RUN(common, kernel, ...)                                                                  \
    do {                                                                                                    \
        const bool narrow = (common).dtype == ::stepgraph::BFLOAT16;                                        \
        if ((common).level == ::stepgraph::AVX512_BF16 || (common).level == ::stepgraph::AMX)                   \
            narrow ? avx512_bf16::kernel<bf16>(__VA_ARGS__) : avx512_bf16::kernel<float>(__VA_ARGS__);          \
        else if ((common).level >= ::stepgraph::AVX512)                                                     \
            narrow ? avx512::kernel<bf16>(__VA_ARGS__) : avx512::kernel<float>(__VA_ARGS__);                \
        else if ((common).level == ::stepgraph::AVX2)                                                       \
            narrow ? avx2::kernel<bf16>(__VA_ARGS__) : avx2::kernel<float>(__VA_ARGS__);                    \
        else                                                                                                \
            narrow ? baseline::kernel<bf16>(__VA_ARGS__) : baseline::kernel<float>(__VA_ARGS__);            \
    } while (false)
