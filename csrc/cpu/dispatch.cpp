#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fastsam {
namespace {

#if defined(FASTSAM_X86)
bool has_avx2() { return __builtin_cpu_supports("avx2"); }  // with it comes F16C
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

}  // namespace

const Kernels& select_kernels(const char* name) {
  const std::string wanted = name ? name : "";
#if defined(FASTSAM_X86)
  __builtin_cpu_init();
  if ((wanted.empty() || wanted == "avx512") && has_avx512()) return kAvx512;
  if ((wanted.empty() || wanted == "avx2") && has_avx2()) return kAvx2;
#endif
  if (wanted.empty() || wanted == "baseline") return kBaseline;
  throw std::invalid_argument("FASTSAM_ISA=" + wanted +
                              ": this processor or build has no such kernels; use avx512, avx2 or baseline, or leave it unset");
}

}  // namespace fastsam
