#!/usr/bin/env bash
# Everything that a machine with a GPU is for, in one command: gpu_check.sh OUTDIR [MINUTES].
# Builds, tests, runs the sanitizer and the benchmarks with that machine's own python3, torch and
# nvcc, without a network. Writes as it goes into at most 8 files in OUTDIR, so that a cut-off run
# keeps what it has, and prints a table of the stages last. Exit status 1 if a stage failed that
# must not: a tool that does not work on the machine is reported, not fatal.
# GPU_PROBE=DIR also runs DIR/run.sh. LSTMX_DRY_RUN=1 goes through the stages without a GPU.
set -u
if [ $# -lt 1 ]; then echo "usage: gpu_check.sh OUTDIR [MINUTES]" >&2; exit 64; fi
mkdir -p "$1" || exit 64
out=$(cd "$1" && pwd)
end=$((SECONDS + ${2:-9} * 60))
cd "$(dirname "$0")/.." || exit 64
python=${PYTHON:-python3}
dry=${LSTMX_DRY_RUN:-0}
log=$out/log.txt summary=$out/summary.txt work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
: >"$log" >"$summary"
failed=0

# stage NAME SECONDS fatal|reported COMMAND...: with its own time limit, and never past the end.
stage() {
  local name=$1 limit=$2 weight=$3 start=$SECONDS result left=$((end - SECONDS))
  shift 3
  [ "$left" -lt "$limit" ] && limit=$left
  printf '\n=== %s\n' "$name" >>"$log"
  if [ "$limit" -lt 5 ]; then
    result="no time left"
  elif timeout -k 5 "$limit" bash -c '"$@"' stage "$@" >>"$log" 2>&1; then
    result=ok
  else
    result="FAILED ($?)"
  fi
  [ "$result" = ok ] || [ "$weight" = reported ] || failed=1
  printf '%-24s %4s s  %s\n' "$name" $((SECONDS - start)) "$result" | tee -a "$summary"
  [ "$result" = ok ]
}

describe() {
  nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv
  nvcc --version | tail -2
  "$python" -c 'import sys, torch; print(sys.version, torch.__version__, torch.version.cuda)'
}
build() {
  LSTMX_CUDA=$([ "$dry" = 1 ] && echo 0 || echo 1) "$python" setup.py build_ext --inplace
}
compile_primitives() {
  local arch=${CUDA_ARCH:-native}
  [ "$dry" = 1 ] && arch=sm_90
  nvcc -std=c++20 -O1 -lineinfo -arch="$arch" -Icsrc -Itests/cpp tests/emulator/test_primitives.cu \
    -o "$work/primitives"
}
on_device() {  # a program that needs the device
  if [ "$dry" = 1 ]; then echo "not run: $*"; else "$@"; fi
}
tests() {
  local collect=()
  [ "$dry" = 1 ] && collect=(--collect-only)
  "$python" -m pytest -q -m gpu -p no:cacheprovider --junitxml="$out/tests.xml" "${collect[@]}" \
    tests/test_cuda.py tests/test_gpu.py
}
benchmark() {  # benchmark FILE OPTIONS...
  local file=$1 device=(--device cuda --provider torch --provider lstmx --provider lstmx+graph)
  shift
  [ "$dry" = 1 ] && device=(--shape 2,2,4,4 --seconds 0.01)
  "$python" -m benchmarks "${device[@]}" --threads 1 --json "$out/$file" "$@"
}
sanitize() {  # sanitize TOOL
  on_device compute-sanitizer --tool "$1" --error-exitcode 1 "$work/primitives" &&
    on_device compute-sanitizer --tool "$1" --error-exitcode 1 "$python" -m pytest -q -m gpu \
      -p no:cacheprovider -p no:faulthandler tests/test_cuda.py -k "tf32_follows or empty_batch"
}

export out python dry work
export -f describe build compile_primitives on_device tests benchmark sanitize

stage describe 30 reported describe
stage build 240 fatal build || { cat "$summary"; exit 1; }
stage "compile primitives" 60 fatal compile_primitives &&
  stage primitives 30 fatal on_device "$work/primitives"
stage tests 240 fatal tests
if [ -n "${GPU_PROBE:-}" ]; then
  stage probe 470 reported on_device env PYTHON="$python" bash "$GPU_PROBE/run.sh" "$work/probe"
  cp "$work/probe/"*.jsonl "$out" 2>>"$log"
fi
stage "benchmark bf16" 150 fatal benchmark bfloat16.json --dtype bfloat16 \
  --mode forward --mode training --seconds 0.2
stage "benchmark dropout" 100 fatal benchmark bfloat16-dropout.json --dtype bfloat16 \
  --mode dropout --seconds 0.2
stage "benchmark fp32" 100 fatal benchmark float32.json --dtype float32 --mode training --seconds 0.2
stage memcheck 90 reported sanitize memcheck
stage racecheck 90 reported sanitize racecheck

echo
cat "$summary"
exit $failed
