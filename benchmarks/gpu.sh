#!/usr/bin/env bash
# Build, test and measure on a GPU, within eight minutes and without a network:
#
#   benchmarks/gpu.sh OUTDIR
#
# needs a Python with torch, pybind11 and setuptools, a C++ compiler, nvcc for the CUDA kernels and pytest for the tests.
# Without nvcc the Triton kernels are tested and measured. Writes into OUTDIR: gpu.json (the numbers), gpu.md (a table,
# with what must be reached), kernels.md (the time of each kernel), and the logs of build, tests and benchmark. Ends with
# 1 if the build, a test or a measurement failed or could not run; a target that is missed is no failure.
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
# setuptools may refuse pyproject.toml: the compilers need it not.
timeout 200 "${build[@]}" >"$OUT/build.log" 2>&1 ||
  timeout 200 "$PYTHON" -m benchmarks.build >>"$OUT/build.log" 2>&1 || failed=1
grep '^fastsam:' "$OUT/build.log" | tee "$OUT/built" || echo "the build failed: $OUT/build.log"
built=$(tr '\n' ' ' <"$OUT/built")
[[ $built != *"the compiler failed"* ]] || failed=1 # setup.py goes on without
rm "$OUT/built"

echo "tests, $(left) s left"
options=(-q -p no:cacheprovider)
"$PYTHON" -c 'import hypothesis' 2>/dev/null || options+=(--noconftest) # tests/conftest.py sets hypothesis up for others
"$PYTHON" -c 'import xdist' 2>/dev/null && options+=(-n 3)
seconds=$(($(left) * 4 / 10))
# A process for each backend: after an illegal access nothing runs in the one that made it. Stopped by Ctrl-C, pytest
# still says what failed.
run_tests() {
  timeout -s INT -k 10 "$seconds" "$PYTHON" -m pytest tests/gpu "${options[@]}" -k "$2" >"$OUT/tests-$1.log" 2>&1
}
set -m # or jobs in the background ignore Ctrl-C
run_tests cuda 'not triton' &
pids=($!)
run_tests triton triton &
pids+=($!)
set +m
tests=""
for backend in cuda triton; do
  status=0
  wait "${pids[0]}" || status=$?
  pids=("${pids[@]:1}")
  [[ $status -eq 0 ]] || failed=1
  tests+="$backend: exit status $status, $(tail -n 1 "$OUT/tests-$backend.log"); "
done
echo "$tests"
grep -h '^FAILED' "$OUT"/tests-*.log | head -n 20 || true

echo "kernels, $(left) s left"
timeout 70 "$PYTHON" -m benchmarks.gpu_kernels "$OUT" --seconds 40 >"$OUT/benchmark.log" 2>&1 || {
  echo "the kernels' times stopped with exit status $?: $OUT/benchmark.log"
  failed=1
}

echo "benchmark, $(left) s left"
seconds=$(($(left) - 15))
timeout $((seconds + 10)) "$PYTHON" -m benchmarks.gpu "$OUT" --seconds "$seconds" \
  --note "Build: $built" --note "Tests on the GPU: $tests" \
  >>"$OUT/benchmark.log" 2>&1 || {
  echo "the benchmark stopped with exit status $?: $OUT/benchmark.log"
  tail -n 5 "$OUT/benchmark.log"
  failed=1
}
[[ -f $OUT/gpu.md ]] && sed -n '/^| must reach/,/^$/p' "$OUT/gpu.md"
echo "$SECONDS s; in $OUT: $(cd "$OUT" && ls | tr '\n' ' ')"
exit $failed
