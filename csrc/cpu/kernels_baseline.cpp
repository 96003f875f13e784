#define FASTSAM_ISA baseline
#include "kernels_impl.h"

namespace fastsam {
const Kernels kBaseline = baseline::make("baseline");
}
