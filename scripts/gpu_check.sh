#!/usr/bin/env bash
# Everything that a machine with a GPU is for, in one command: gpu_check.sh OUTDIR [MINUTES].
# Builds, tests, runs the sanitizer, trains and measures with that machine's own python3, torch and
# nvcc, without a network. Writes as it goes into at most 8 files in OUTDIR, so that a cut-off run
# keeps what it has, and prints a table of the stages last. Exit status 1 if a stage failed that
# must not: a tool that does not work on the machine is reported, not fatal.
# LSTMX_TEXT=DIR: train.txt, valid.txt and test.txt for the language model. GPU_PROBE=DIR also runs
# DIR/run.sh. LSTMX_COMMIT says what was measured, where the tree has come without its history.
# LSTMX_DRY_RUN=1 goes through the stages without a GPU.
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
  printf '%-26s %4s s  %s\n' "$name" $((SECONDS - start)) "$result" | tee -a "$summary"
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
  local more=(--benchmark-disable)
  "$python" -c 'import xdist' 2>/dev/null && more+=(-n 8)
  [ "$dry" = 1 ] && more=(--collect-only)
  "$python" -m pytest -q -m gpu -p no:cacheprovider "${more[@]}" tests/test_cuda.py tests/test_gpu.py
}
sanitize() {  # sanitize TOOL TESTS
  on_device compute-sanitizer --tool "$1" --error-exitcode 1 "$work/primitives" &&
    on_device compute-sanitizer --tool "$1" --error-exitcode 1 "$python" -m pytest -q -m gpu \
      -p no:cacheprovider -p no:faulthandler tests/test_cuda.py -k "$2"
}
step_profile() {
  on_device "$python" -m benchmarks.step_profile --json "$out/step-profile.json"
}
chapter() {
  on_device "$python" -c 'from lstmx.cli import app; app()' chapter --models 7,7-gru \
    --accelerator gpu --json "$out/chapter.json"
}
language_model() {
  on_device "$python" -m benchmarks.language_model speed "${LSTMX_TEXT:-tests/data/kjv}" \
    --work "$work/text" --preset merity_ptb --batch-size 80 --bptt 70 --device cuda --threads 1 \
    --precision float32 --precision bf16-mixed --json "$out/language-model.json"
}
benchmark() {  # benchmark OPTIONS...
  local device=(--device cuda --seconds 0.05)
  [ "$dry" = 1 ] && device=(--shape 2,2,4,4 --seconds 0.01 --provider torch --provider lstmx)
  "$python" -m benchmarks "${device[@]}" --threads 1 --json "$out/benchmarks.json" "$@"
}

export out python dry work
export -f describe build compile_primitives on_device tests sanitize step_profile chapter
export -f language_model benchmark

stage describe 30 reported describe
stage build 240 fatal build || { cat "$summary"; exit 1; }
stage "compile primitives" 60 fatal compile_primitives &&
  stage primitives 30 fatal on_device "$work/primitives"
stage tests 240 fatal tests
stage memcheck 60 reported sanitize memcheck "tf32_follows or empty_batch or 16_bit"
stage racecheck 60 reported sanitize racecheck "tf32_follows or empty_batch"
if [ -n "${GPU_PROBE:-}" ]; then
  stage probe 470 reported on_device env PYTHON="$python" bash "$GPU_PROBE/run.sh" "$work/probe"
  cp "$work/probe/"*.jsonl "$out" 2>>"$log"
fi
both=() dropped=() long=() short=() some=() tf32=float32
if [ "$dry" = 0 ]; then
  tf32=tf32
  both=(--provider torch --provider torch+graph --provider lstmx --provider lstmx+graph)
  # torch's dropout does not go into a graph with functional_call.
  dropped=(--provider torch --provider torch+reassigned --provider lstmx --provider lstmx+graph)
  for shape in 512,16,1024,1024 1024,16,768,768; do long+=(--shape "$shape"); done
  for shape in 70,80,1150,1150 70,80,1152,1152 35,20,650,650 128,64,512,512 16,64,64,64; do
    some+=(--shape "$shape")
  done
  short=("${some[@]}")
  for shape in 70,80,400,1150 70,80,1150,400 1,64,512,512 33,7,77,131; do
    short+=(--shape "$shape")
  done
fi
stage "bf16" 120 fatal benchmark --dtype bfloat16 --mode training --mode forward \
  "${both[@]}" "${short[@]}"
stage "bf16, dropout" 100 fatal benchmark --dtype bfloat16 --mode dropout "${dropped[@]}" \
  "${short[@]}"
stage "profile of a step" 60 reported step_profile
stage chapter 60 reported chapter
stage "language model" 60 reported language_model
stage "bf16, long" 60 fatal benchmark --dtype bfloat16 --mode training --mode forward \
  "${both[@]}" "${long[@]}"
stage "bf16, long, dropout" 60 fatal benchmark --dtype bfloat16 --mode dropout "${dropped[@]}" \
  "${long[@]}"
stage "TF32, fp32, fp16" 150 fatal benchmark --dtype $tf32 --dtype float32 --dtype float16 \
  --mode training --mode forward "${both[@]}" "${some[@]}"
stage "TF32, fp32, fp16, dropout" 60 fatal benchmark --dtype $tf32 --dtype float32 \
  --dtype float16 --mode dropout "${dropped[@]}" "${some[@]}"
stage "fp16, long" 60 fatal benchmark --dtype float16 --mode training --mode forward "${both[@]}" \
  "${long[@]}"

echo
cat "$summary"
exit $failed
