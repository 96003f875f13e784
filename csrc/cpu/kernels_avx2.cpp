#define FASTSAM_ISA avx2
#include "kernels_impl.h"

namespace fastsam {
const Kernels kAvx2 = avx2::make("avx2");
}
