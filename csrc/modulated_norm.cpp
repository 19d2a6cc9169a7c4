// modulated_norm: LayerNorm without affine parameters and adaLN modulation in one pass over memory.
#ifndef STEPGRAPH_LEVEL
#include "native.h"
#ifdef STEPGRAPH_NATIVE

namespace stepgraph {

struct ModulatedNorm {
    Common common;
    Rows out, x, scale, shift;
};

}  // namespace stepgraph

#define STEPGRAPH_KERNELS "modulated_norm.cpp"
#include "each_level.h"

STEPGRAPH_EXPORT void stepgraph_modulated_norm(const stepgraph::ModulatedNorm* a, double eps) {
    using namespace stepgraph;
    STEPGRAPH_RUN(a->common, modulated_norm, *a, static_cast<float>(eps));
}

#endif
#else
#include "vector.h"
#include "rows.h"
#include "normalise.h"

namespace stepgraph::STEPGRAPH_LEVEL {

template <class T>
static void modulated_norm(const ModulatedNorm& a, float eps) {
    each_row(a.common, [&a, eps](Row row) {
        normalise<T>(a.x.at<T>(row), a.scale.at<T>(row), a.shift.at<T>(row), eps, a.common.channels, a.out.at<T>(row), CHUNK<T>);
    });
}

}  // namespace stepgraph::STEPGRAPH_LEVEL
#endif
