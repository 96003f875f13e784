#define FASTSAM_ISA avx512
#include "kernels_impl.h"

namespace fastsam {
const Kernels kAvx512 = avx512::make("avx512");
}
