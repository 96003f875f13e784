#!/usr/bin/env bash
# Build, test and measure on a GPU, without a network, in two calls that each run alone and in any order:
#
#   benchmarks/gpu.sh OUTDIR --check      build, tests of both backends, time of each kernel: some 200 s, at most 290
#   benchmarks/gpu.sh OUTDIR --measure    the benchmark, on the build that is there: some 480 s, at most 530
#   benchmarks/gpu.sh OUTDIR              the one, then the other
#
# needs a Python with torch, pybind11 and setuptools, a C++ compiler, nvcc for the CUDA kernels and pytest for the tests.
# What is missing is said, and the rest is done without: without nvcc the Triton kernels are tested and measured. Each
# backend has processes of its own, so that a fault of one leaves the other's results. Writes into OUTDIR, over what an
# earlier run left there:
#
#   --check      build.log, tests-cuda.log, tests-triton.log, kernels.md
#   --measure    gpu.json (the numbers), gpu.md (tables, with what must be reached), benchmark.log
#
# Ends with 1 if the build, a test or a measurement failed or could not run; a target that is missed is no failure.
#
#   PYTHON=python3              the interpreter
#   FASTSAM_BENCH_DEVICE=cpu    a stand-in: every line runs on a CPU, at tiny sizes, and no number means anything
set -uo pipefail

usage() {
  echo "usage: benchmarks/gpu.sh OUTDIR [--check | --measure]" >&2
  exit 2
}
[[ $# -ge 1 && $# -le 2 && $1 != -* ]] || usage
case ${2:-both} in
both) parts=(check measure) ;;
--check | --measure) parts=("${2#--}") ;;
*) usage ;;
esac
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2

PYTHON=${PYTHON:-python3}
export FASTSAM_BENCH_DEVICE=${FASTSAM_BENCH_DEVICE:-cuda}
export PYTHONPATH=$PWD:$PWD/tests PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
CHECKED=$PWD/build/gpu-check.txt # what --check found, for the report of --measure
failed=0
slow=1
[[ $FASTSAM_BENCH_DEVICE == cpu ]] && slow=4

"$PYTHON" -c 'import torch' || exit 2
has() { "$PYTHON" -c "import $1" 2>/dev/null; }

# log FILE: what comes in goes into FILE and on; a disk that is full costs the file.
log() { tee "$OUT/$1" 2>/dev/null; }

# within SECONDS: these, or fewer if the whole of --check would outlast END.
within() {
  local left=$((END - SECONDS))
  echo $((left < $1 * slow ? (left > 1 ? left : 1) : $1 * slow))
}

# Only this GPU's architecture: the others are compiled, and read, where there is no GPU. Where this nvcc does not know
# it, those it knows, of which a newer GPU takes the PTX.
choose_architecture() {
  local found arch name nvcc=${CUDACXX:-nvcc}
  found=$("$PYTHON" -c '
import torch
from benchmarks import workers
print(workers.no_gpu() or "sm_%d%d %s" % (*torch.cuda.get_device_capability(), torch.cuda.get_device_name()))')
  read -r arch name <<<"$found"
  if [[ $arch != sm_* ]]; then
    echo "no GPU: $found; built for every architecture, nothing is measured"
    failed=1
    return 1
  fi
  echo "GPU: $name, $arch"
  command -v "$nvcc" >/dev/null || nvcc=${CUDA_HOME:-/usr/local/cuda}/bin/nvcc
  if "$nvcc" --list-gpu-arch 2>/dev/null | grep -qx "compute_${arch#sm_}"; then
    export FASTSAM_CUDA_ARCHS=${FASTSAM_CUDA_ARCHS:-${arch#sm_}}
  elif command -v "$nvcc" >/dev/null; then
    echo "$nvcc does not compile for $arch: built for the architectures it knows"
  fi
}

build() {
  local command=("$PYTHON" -m benchmarks.build) seconds status
  has 'setup; setup.find_ninja()' && command=("$PYTHON" setup.py --quiet build_ext --inplace)
  seconds=$(within 100)
  timeout "$seconds" "${command[@]}" 2>&1
  status=$?
  # setuptools may refuse pyproject.toml: the compilers need it not.
  [[ $status -eq 0 || $status -eq 124 ]] || timeout "$(within 100)" "$PYTHON" -m benchmarks.build 2>&1 || status=$?
  [[ $status -ne 124 ]] || echo "fastsam: the build was cut off after $seconds s"
}

# run_tests BACKEND EXPRESSION SECONDS: the end of pytest's output, and how it ended. Stopped by Ctrl-C, pytest still says
# what failed; a shell's background jobs ignore Ctrl-C, unless they ask for it.
run_tests() {
  timeout -s INT -k 10 "$3" "$PYTHON" -c '
import signal, sys, pytest
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(pytest.main(sys.argv[1:]))' tests/gpu/test_gpu.py tests/gpu/test_graphs_on_gpu.py -q -p no:cacheprovider \
    "${options[@]}" -k "$2" 2>&1 | log "tests-$1.log" | tail -n 40
  echo "exit status ${PIPESTATUS[0]}"
}

# summary BACKEND OUTPUT: a line.
summary() {
  local fault
  fault=$(grep -ohE 'CUDA error: an? [a-z ]+|illegal memory access|misaligned address|Segmentation fault' <<<"$2" |
    head -n 1) || true
  echo "$1: $(tail -n 1 <<<"$2"), $(tail -n 2 <<<"$2" | head -n 1)${fault:+ (a fault: $fault)}"
}

check() {
  local END=$((SECONDS + 270 * slow)) options=(--maxfail=20) output cuda triton
  rm -f "$OUT"/{build.log,tests-cuda.log,tests-triton.log,kernels.md}
  mkdir -p "$(dirname "$CHECKED")"
  if [[ $FASTSAM_BENCH_DEVICE == cuda ]]; then choose_architecture; fi

  if has pytest; then
    has hypothesis || options+=(--noconftest) # tests/conftest.py sets hypothesis up for others
    has xdist && options+=(-n 3)
    exec 3< <(run_tests triton triton "$(within 180)") # while the host compiles
  fi
  echo "build, $SECONDS s"
  output=$(build | log build.log | grep '^fastsam:')
  grep -q '^fastsam: cuda extension' <<<"$output" || output+=$'\n'"the build failed: build.log"
  echo "$output"
  # setup.py goes on without what it cannot build
  grep -qE 'compiler failed|build failed|was cut off' <<<"$output" && failed=1
  echo "Build: ${output//$'\n'/; }." >"$CHECKED"

  echo "tests, $SECONDS s"
  if has pytest; then
    cuda=$(run_tests cuda 'not triton' "$(within 120)")
    triton=$(cat <&3)
    exec 3<&-
    output="$(summary cuda "$cuda"); $(summary triton "$triton")"
    [[ $(grep -cx 'exit status 0' <<<"$cuda"$'\n'"$triton") -eq 2 ]] || failed=1
  else
    output="no pytest: no test was run"
    failed=1
  fi
  echo "$output"
  echo "Tests on the GPU, $(date -u +%F): $output." >>"$CHECKED"

  echo "kernels, $SECONDS s"
  output=$(timeout "$(within 65)" "$PYTHON" -m benchmarks.gpu_kernels "$OUT" --seconds $(($(within 65) - 5)) 2>&1) || {
    echo "the kernels' times ended with exit status $?"
    tail -n 12 <<<"$output"
    failed=1
  }
  grep -hE '^(FAILED|ERROR)' <<<"${cuda:-}"$'\n'"${triton:-}" | head -n 20
  cat "$OUT/kernels.md" 2>/dev/null
  cat "$CHECKED"
}

measure() {
  local notes=() status line
  rm -f "$OUT"/{gpu.json,gpu.md,benchmark.log}
  if [[ -f $CHECKED ]]; then
    while read -r line; do notes+=(--note "$line"); done <"$CHECKED"
  else
    notes=(--note "No --check came before this: neither built nor tested here.")
  fi
  echo "benchmark, $SECONDS s"
  timeout -k 5 $((525 * slow)) "$PYTHON" -m benchmarks.gpu "$OUT" --seconds $((480 * slow)) "${notes[@]}" 2>&1 |
    log benchmark.log | tail -n 300 >"$TAIL"
  status=${PIPESTATUS[0]}
  if [[ $status -ne 0 ]]; then
    echo "the benchmark ended with exit status $status: $OUT/benchmark.log"
    tail -n 12 "$TAIL"
    failed=1
  fi
  if [[ -f $OUT/gpu.md ]]; then sed -n '/^| must reach/,/^$/p' "$OUT/gpu.md"; else sed -n '/^| must reach/,/^$/p' "$TAIL"; fi
}

TAIL=$(mktemp)
trap 'rm -f "$TAIL"' EXIT
for part in "${parts[@]}"; do "$part"; done
echo "$SECONDS s; in $OUT: $(ls "$OUT" | tr '\n' ' ')"
exit $failed
