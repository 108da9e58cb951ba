#!/usr/bin/env bash
# On a machine with an NVIDIA (or AMD) GPU, no network needed: builds what is missing, runs the GPU tests, measures the machine's
# own ceilings and the benchmark matrix with a cold L2 cache, reads the hardware counters, compares the CUDA C++ kernels with
# Triton's, and lets compute-sanitizer's four tools watch small calls. Written as it goes to bench/results/<device>/, and into
# $OUT where that is set: <commit>.json profile-<commit>.json backends-<commit>.json gpu-tests.txt gpu-sanitize.txt
#
#   bench/gpu.sh                     everything, the quick matrix, within 8 minutes
#   bench/gpu.sh --long              more sizes, a sweep over kernel configurations, more repetitions; about half an hour
#   bench/gpu.sh tests matrix        only these of: build tests matrix profile backends sanitize
#   PYTHON=python3.12 COMMIT=abc123 SECONDS_IN_ALL=570 bench/gpu.sh
#
# Runbook for a lease of 30 minutes, 10 a command (H100 or H200). Before it, here: wheels of what that machine lacks (tomlkit, or
# nothing imports; the peers torchjd and liger-kernel) into .whl; the library for that GPU alone:
#   TORCH_CUDA_ARCH_LIST=9.0a ENTANGLE_FAST_REQUIRE_EXT=1 ENTANGLE_FAST_CUDA=1 python setup.py build_ext --inplace
# Each call carries .whl and entangle_fast/_C.abi3.so (a library that does not load is built there, 1-2 minutes) and begins with
# COMMIT=$(git rev-parse --short=12 HEAD), filled in here: there is no .git there.
#   1  SECONDS_IN_ALL=330 bash bench/gpu.sh tests                         2-4 min. First failures: $OUT/gpu-tests.txt
#        all fail alike? mend that alone, again. "built without CUDA"? Triton goes on: calls 2 and 3 still measure it
#   2  SECONDS_IN_ALL=560 bash bench/gpu.sh matrix profile backends       7-9 min. Put 1's gpu-tests.xml into build/, carry it too
#        WRONG in the table: no time is given; a kernel that hangs or faults costs its job alone; no counters: the profile says why
#   3  SECONDS_IN_ALL=400 bash bench/gpu.sh sanitize                      3-6 min. A tool that runs out of time says what it had run
#   4  what is left: the mended tests alone, python3 -m pytest tests/gpu -k NAME, then the matrix again
# A Triton kernel that is wrong: run its call on the CPU by tests/ptx (gpu.running("sm_90")): wrong there too, or only on the device?
# First suspects where a number falls short, by what was counted from SASS, in this order: the ncu metric that would show it; the mend
#   gram tiles, triton   2 launches a chunk from Python, 25 at n 64 t 197 768×3072: gaps between kernels (nsys)  CUDA graph, or cuda
#                        widths no multiple of 16: loads of 2 bytes, 8 requests for a line (tests/ptx counts them): zeros behind the rows
#   gram tiles, cuda     a hang: an mbarrier's phase, or a cluster that never runs whole; wrong sums in some blocks: a multicast's mask.
#                        many <= 1 and no rows of 256 in gram_sm90_launch.cuh's Plan take the clusters out: is it they?
#                        form_wgmma by count: 51 % of the bf16 rate at n 128 t 197 d 768, 70 to 76 at t 1024: lts__throughput
#                        .avg.pct_of_peak_sustained_elapsed > 80: that is its limit
#                        dram__bytes_write.sum far above the result's: the scratch leaves the L2   kScratch 32 → 24 MiB
#                        launch__cluster_max_active of 4 blocks far below 33: multiprocessors idle   many <= 2
#                        wrong sums in some runs only, or a graph that does not capture: `if (early)` in common.cuh's Config made
#                        `if (false)` takes programmatic dependent launch out: is it that?
#                        below, with tensor < 60: gaps between 19 (n 64) or 37 (n 128) launches at 768×3072 (nsys; ncu runs each kernel
#                        alone)   form's first copies before its wait
#   gram rows            64 FLOP a byte of L2, 350 TFLOP/s at 5.5 TB/s: 1.2 ms where 5× the loop would be 0.6   clusters: not Triton
#   project_random       by count, n 128 t 196 768² k 512, H100 (2x of materialise-then-project would be about 0.17 ms with its basis
#                        lying ready, 0.6 GB; drawn each time, 5 more passes over that, about 0.7):
#                        triton: 37 k programs' rounds of 312 instructions a thread, 0.10 ms, beside forming, 30 GF through L2
#                        cuda: 106 instructions for 16 mma.sync, 0.14 ms; by count 18 passes over shared memory's banks beside them;
#                        gradients formed ceil(k/256) = 2 times, 59 GF:
#                        sm__inst_issued.avg.pct_of_peak_sustained_active > 80   wgmma with signs in shared memory, 512 directions a block
#   linear_sample_loss   4 products of n·t·d·V where Liger has 3, 88 and 67 ms at 790 TFLOP/s; but Liger adds its weight gradient up once
#                        for n·t·d/V rows, here 32 times: 69 to 137 GB, 20 to 41 ms. About even by count
#   step_update, triton  44 registers, so 4 waits for DRAM a block of 1024: smsp__average_warp_latency_issue_stalled_long_scoreboard
#                        multi.WAVES 8 → 11, or 2 blocks' loads at once
#   step_gram            registers 126 (triton), 115 (cuda): 49 KB in flight: dram__throughput < 85   waves, kThreads
#   sample_loss 50257    rows that begin anywhere: Triton loads 2 bytes: l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld
#                        .ratio ~ 2   peel to 16 bytes as sample_loss.cu does
#   w2 moments n 1e6     2 kernels of 3 µs each, of 7.6 allowed: gpu__time_duration   one kernel with a last block
# Then copy $OUT/results into bench/results/, python bench/dispatch_table.py, commit.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
COMMIT=${COMMIT:-$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)}
[ -n "$(git status --porcelain 2>/dev/null | head -1)" ] && COMMIT="$COMMIT-changed"
LONG=
STAGES=
for word in "$@"; do
  case "$word" in
    --long) LONG=--long ;;
    build | tests | matrix | profile | backends | sanitize) STAGES="$STAGES $word" ;;
    *) echo "bench/gpu.sh: $word is not one of --long build tests matrix profile backends sanitize" >&2; exit 2 ;;
  esac
done
STAGES=${STAGES:-build tests matrix profile backends sanitize}
END=$((SECONDS + ${SECONDS_IN_ALL:-$([ -n "$LONG" ] && echo 3300 || echo 465)}))
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
unset TRITON_INTERPRET ENTANGLE_FAST_BACKEND

left() { echo $((END - SECONDS > 1 ? END - SECONDS : 1)); }
least() { echo $(($1 < $2 ? $1 : $2)); }
wanted() { case " $STAGES " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

if compgen -G ".whl/*.whl" >/dev/null; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$WORK/site" .whl/*.whl || exit 3
  export PYTHONPATH="$WORK/site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

if ! "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "bench/gpu.sh: no GPU that $PYTHON's torch can use on this machine; nothing was run and nothing written" >&2
  exit 3
fi
for package in triton pytest entangle_fast; do
  "$PYTHON" -c "import $package" 2>"$WORK/import.txt" && continue
  echo "bench/gpu.sh: $PYTHON cannot import $package: $(tail -1 "$WORK/import.txt"); put the wheel of what is missing into .whl" >&2
  exit 3
done

# the CUDA kernels for the GPU at hand only: a third of the time
TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print({8: "8.0", 9: "9.0a"}.get(major, f"{major}.{minor}"))')}
export TORCH_CUDA_ARCH_LIST
BUILT='
import torch
from entangle_fast import dispatch
assert dispatch.EXTENSION is None, dispatch.EXTENSION
assert torch.version.hip or torch._C._dispatch_has_kernel_for_dispatch_key("entangle_fast_cuda::step_gram", "CUDA"), "built without CUDA"'
built() { "$PYTHON" -c "$BUILT" 2>"$WORK/built.txt"; }
if ! built || { wanted build && [ -n "$(find csrc setup.py -newer entangle_fast/_C.abi3.so 2>/dev/null | head -1)" ]; }; then
  timeout "$(least 150 "$(left)")" "$PYTHON" setup.py --quiet build_ext --inplace
  built || echo "bench/gpu.sh: no CUDA C++ kernels ($(tail -1 "$WORK/built.txt")); Triton's are measured, the others are not" >&2
  echo "bench/gpu.sh: built, $(left) s left"
fi

# at_most SECONDS STAGE: what it may take, kept in LIMIT; false and one line where too little is left
at_most() {
  LIMIT=$(least "$1" "$(left)")
  [ "$LIMIT" -ge 20 ] || { echo "bench/gpu.sh: no time left for $2" >&2; return 1; }
}

# run_tests LOG EXTRA...: none begins in the last fifth of LIMIT, so that pytest ends by itself; killed with its workers at LIMIT
run_tests() {
  local log=$1 workers=()
  shift
  if "$PYTHON" -c 'import xdist' 2>/dev/null; then workers=(-n "$(least "$(nproc)" 12)" --dist worksteal); fi
  # a kernel that hangs ends its worker
  if "$PYTHON" -c 'import pytest_timeout' 2>/dev/null; then workers+=(--timeout "$((LIMIT * 9 / 10))" --timeout-method thread); fi
  ENTANGLE_FAST_GPU_TESTS_END=$(($(date +%s) + LIMIT * 4 / 5)) timeout -s INT -k 15 "$LIMIT" \
    "$PYTHON" -m pytest tests/gpu "${workers[@]}" "$@" >"$log" 2>&1
  local code=$?
  tail -40 "$log"
  [ "$code" = 124 ] && echo "bench/gpu.sh: the tests ran past $LIMIT s" >&2
  return "$code"
}

# measure SCRIPT ARGUMENTS...: again in a new process where a kernel hung or broke the device for the old one
measure() {
  local stop=$((SECONDS + LIMIT)) script=$1 code again=
  shift
  while :; do
    LIMIT=$((stop - SECONDS))
    [ "$LIMIT" -ge 20 ] || return 1
    timeout -k 10 "$LIMIT" "$PYTHON" "bench/$script" --commit "$COMMIT" --budget $((LIMIT - 15)) "$@" $again
    code=$?
    [ "$code" = 75 ] || return "$code"
    again=--again
  done
}

FAILED=0
SAVE=${OUT:-$WORK}
mkdir -p build  # what the tests found stays there for a later call on the same machine
if wanted tests && at_most "$([ -n "$LONG" ] && echo 1500 || echo 240)" tests; then
  run_tests "$SAVE/gpu-tests.txt" -k "not sanitizer" --junitxml build/gpu-tests.xml || FAILED=1
  [ -z "${OUT:-}" ] || cp build/gpu-tests.xml "$OUT" 2>/dev/null
  echo "bench/gpu.sh: tested, $(left) s left"
fi
if wanted matrix && at_most "$([ -n "$LONG" ] && echo 1200 || echo $(($(left) * 45 / 100)))" matrix; then
  measure gpu_matrix.py --tests build/gpu-tests.xml $LONG || FAILED=1
  echo "bench/gpu.sh: matrix done, $(left) s left"
fi
if wanted profile && at_most 90 profile; then
  timeout -k 10 "$LIMIT" "$PYTHON" bench/gpu_profile.py --commit "$COMMIT" --budget $((LIMIT - 10)) || FAILED=1
fi
if wanted backends && at_most 600 backends; then
  measure gpu_backends.py || FAILED=1
  echo "bench/gpu.sh: then python bench/dispatch_table.py makes what was faster the default"
fi
if wanted sanitize && at_most 600 sanitize; then
  run_tests "$SAVE/gpu-sanitize.txt" -k sanitizer || FAILED=1
fi
exit "$FAILED"
