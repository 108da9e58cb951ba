#!/usr/bin/env bash
# One command on a machine with an NVIDIA (or AMD) GPU, no network needed: builds what is missing, runs the GPU tests (among
# them compute-sanitizer's four tools), measures the machine's own ceilings, runs the benchmark matrix with a cold L2 cache,
# reads the hardware counters, and compares the CUDA C++ kernels with Triton's. Done within 8 minutes; what was measured is
# written as it goes to bench/results/<device>/ (also into $OUT where that is set):
#   <commit>.json  profile-<commit>.json  backends-<commit>.json
#
#   bench/gpu.sh                     everything, the quick matrix
#   bench/gpu.sh --long              more sizes, a sweep over kernel configurations, more repetitions; about half an hour
#   bench/gpu.sh tests matrix        only these of: build tests matrix profile backends
#   PYTHON=python3.12 COMMIT=abc123 SECONDS_IN_ALL=570 bench/gpu.sh
#
# Python packages that the machine lacks (tomlkit, say; the peers liger-kernel and torchjd are optional) can lie as wheels in
# the folder .whl: they are put on the path first.
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
    build | tests | matrix | profile | backends) STAGES="$STAGES $word" ;;
    *) echo "bench/gpu.sh: $word is not one of --long build tests matrix profile backends" >&2; exit 2 ;;
  esac
done
STAGES=${STAGES:-build tests matrix profile backends}
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
if wanted build; then
  if ! "$PYTHON" -c "$BUILT" 2>/dev/null || [ -n "$(find csrc setup.py -newer entangle_fast/_C.abi3.so 2>/dev/null | head -1)" ]; then
    timeout "$(least 150 "$(left)")" "$PYTHON" setup.py --quiet build_ext --inplace
  fi
  "$PYTHON" -c "$BUILT" || echo "bench/gpu.sh: no CUDA C++ kernels (above: why); Triton's are measured, the others are not" >&2
  echo "bench/gpu.sh: built, $(left) s left"
fi

TESTS=0
if wanted tests; then
  WORKERS=()
  if "$PYTHON" -c 'import xdist' 2>/dev/null; then WORKERS=(-n "$(least "$(nproc)" 12)" --dist worksteal); fi
  LIMIT=$([ -n "$LONG" ] && echo 1500 || least 210 "$(left)")
  # interrupted, not killed: pytest then still writes what it found
  timeout -s INT -k 20 "$LIMIT" "$PYTHON" -m pytest tests/gpu "${WORKERS[@]}" --junitxml "$WORK/tests.xml" >"$WORK/tests.txt" 2>&1
  TESTS=$?
  tail -40 "$WORK/tests.txt"
  [ "$TESTS" = 124 ] && echo "bench/gpu.sh: the GPU tests ran past $LIMIT s" >&2
  if [ -n "${OUT:-}" ]; then cp "$WORK/tests.txt" "$OUT/gpu-tests.txt"; fi
  echo "bench/gpu.sh: tested, $(left) s left"
fi

BENCH=0
if wanted matrix; then
  LIMIT=$([ -n "$LONG" ] && echo 1200 || least 170 "$(left)")
  timeout "$LIMIT" "$PYTHON" bench/gpu_matrix.py --commit "$COMMIT" --tests "$WORK/tests.xml" --budget $((LIMIT - 15)) $LONG || BENCH=$?
  echo "bench/gpu.sh: matrix done, $(left) s left"
fi
if wanted profile; then
  LIMIT=$(least 90 "$(left)")
  timeout "$LIMIT" "$PYTHON" bench/gpu_profile.py --commit "$COMMIT" --budget $((LIMIT - 10)) || BENCH=$?
fi
if wanted backends; then
  LIMIT=$(left)
  timeout "$LIMIT" "$PYTHON" bench/gpu_backends.py --commit "$COMMIT" --budget $((LIMIT > 20 ? LIMIT - 15 : 1)) || BENCH=$?
  echo "bench/gpu.sh: then python bench/dispatch_table.py makes what was faster the default"
fi
exit $((TESTS != 0 || BENCH != 0))
