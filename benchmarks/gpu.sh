#!/usr/bin/env bash
# Build, test and measure on a GPU, within eight minutes and without a network:
#
#   benchmarks/gpu.sh OUTDIR
#
# needs a Python with torch, pybind11 and setuptools, a C++ compiler, nvcc for the CUDA kernels and pytest for the tests.
# Without nvcc the Triton kernels are tested and measured. Writes into OUTDIR: gpu.json (the numbers), gpu.md (a table,
# with what must be reached), build.log, tests.log and benchmark.log. Ends with 1 if the build, a test or the benchmark
# failed or could not run; a target that is missed is no failure.
#
#   PYTHON=python3              the interpreter
#   SECONDS_IN_ALL=470          the whole time
#   FASTSAM_BENCH_DEVICE=cpu    a stand-in: every line runs on a CPU, at tiny sizes, and no number means anything
set -euo pipefail

if [[ $# -ne 1 ]]; then
  echo "usage: benchmarks/gpu.sh OUTDIR" >&2
  exit 2
fi
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-470}
export FASTSAM_BENCH_DEVICE=${FASTSAM_BENCH_DEVICE:-cuda}
export PYTHONPATH=$PWD:$PWD/tests PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
left() { echo $((SECONDS_IN_ALL - SECONDS)); }
failed=0

"$PYTHON" -c 'import pybind11, setuptools, torch'
if [[ $FASTSAM_BENCH_DEVICE == cuda ]]; then
  # Only this GPU's architecture: the others are compiled, and read, where there is no GPU.
  arch=$("$PYTHON" -c '
import sys, torch
if not torch.cuda.is_available():
    sys.exit("torch finds no GPU; FASTSAM_BENCH_DEVICE=cpu tries every line without one")
print("%d%d" % torch.cuda.get_device_capability())')
  export FASTSAM_CUDA_ARCHS=${FASTSAM_CUDA_ARCHS:-$arch}
fi

echo "build, $(left) s left"
if "$PYTHON" -c 'import setup; setup.find_ninja()' 2>/dev/null; then
  build=("$PYTHON" setup.py --quiet build_ext --inplace)
else
  build=("$PYTHON" -m benchmarks.build)
fi
timeout 200 "${build[@]}" >"$OUT/build.log" 2>&1 || failed=1
grep '^fastsam:' "$OUT/build.log" | tee "$OUT/built" || echo "the build failed: $OUT/build.log"
built=$(tr '\n' ' ' <"$OUT/built")
rm "$OUT/built"

echo "tests, $(left) s left"
plain=()
"$PYTHON" -c 'import hypothesis' 2>/dev/null || plain=(--noconftest) # tests/conftest.py sets hypothesis up for others
seconds=$(($(left) * 4 / 10))
status=0
timeout "$seconds" "$PYTHON" -m pytest tests/gpu -q -p no:cacheprovider "${plain[@]}" >"$OUT/tests.log" 2>&1 ||
  status=$?
tests=$(tail -n 1 "$OUT/tests.log")
[[ $status -eq 124 ]] && tests="stopped after $seconds s; before: $tests"
[[ $status -eq 0 ]] || failed=1
echo "$tests"

echo "benchmark, $(left) s left"
seconds=$(($(left) - 15))
timeout $((seconds + 10)) "$PYTHON" -m benchmarks.gpu "$OUT" --seconds "$seconds" \
  --note "Build: $built" --note "Tests on the GPU (exit status $status): $tests" \
  >"$OUT/benchmark.log" 2>&1 || {
  echo "the benchmark stopped with exit status $?: $OUT/benchmark.log"
  tail -n 5 "$OUT/benchmark.log"
  failed=1
}
[[ -f $OUT/gpu.md ]] && sed -n '/^| must reach/,/^$/p' "$OUT/gpu.md"
echo "$SECONDS s; in $OUT: $(cd "$OUT" && ls | tr '\n' ' ')"
exit $failed
