#!/usr/bin/env bash
# One command on a machine with an NVIDIA (or AMD) GPU, no network needed: builds what is missing, runs the GPU tests,
# measures the machine's own ceilings, runs the benchmark matrix with a cold L2 cache and writes
# bench/results/<device>/<commit>.json (also into $OUT where that is set). Done within 8 minutes.
#   bench/gpu.sh            tests and the quick matrix
#   bench/gpu.sh --long     every dtype and size, a sweep over kernel configurations, more repetitions
#   PYTHON=python3.12 COMMIT=abc123 bench/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
COMMIT=${COMMIT:-$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)}
[ -n "$(git status --porcelain 2>/dev/null | head -1)" ] && COMMIT="$COMMIT-changed"
LONG=; [ "${1:-}" = "--long" ] && LONG=--long
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET

if ! "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "bench/gpu.sh: no GPU that $PYTHON's torch can use on this machine; nothing was run and nothing written" >&2
  exit 3
fi
"$PYTHON" -c 'import triton' 2>/dev/null || { echo "bench/gpu.sh: triton is not installed for $PYTHON" >&2; exit 3; }
"$PYTHON" -c 'from entangle_fast import _C' 2>/dev/null || "$PYTHON" setup.py --quiet build_ext --inplace \
  || echo "bench/gpu.sh: no compiled library; the CPU side runs on the reference" >&2

WORK=$(mktemp -d); trap 'rm -rf "$WORK"' EXIT
LIMIT=$([ -n "$LONG" ] && echo 1800 || echo 260)
timeout "$LIMIT" "$PYTHON" -m pytest tests/gpu --junitxml "$WORK/tests.xml" 2>&1 | tee "$WORK/tests.txt" | tail -25
TESTS=${PIPESTATUS[0]}
[ "$TESTS" = 124 ] && echo "bench/gpu.sh: the GPU tests ran past $LIMIT s" >&2

LIMIT=$([ -n "$LONG" ] && echo 3600 || echo 190)
timeout "$LIMIT" "$PYTHON" bench/gpu_matrix.py --commit "$COMMIT" --tests "$WORK/tests.xml" --budget $((LIMIT - 20)) $LONG
BENCH=$?
exit $((TESTS != 0 || BENCH != 0))
