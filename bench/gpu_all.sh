#!/usr/bin/env bash
# All that a machine with an NVIDIA card can add, in order of importance, within 8 minutes: bench/gpu_all.sh [OUTDIR]
#
# Needs torch with CUDA in $PYTHON (default: python3). The libraries are built with nvcc, or taken from
# $PALP_FAST_LIBRARIES, a folder that holds them ready-made. Wheels in wheels/ beside the checkout or in
# $PALP_FAST_WHEELS are installed without network. Results and logs go to OUTDIR (default: runs/gpu), also when stopped.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=$(mkdir -p "${1:-runs/gpu}" && cd "${1:-runs/gpu}" && pwd)
WHEELS=${PALP_FAST_WHEELS:-wheels}
LIMIT=${PALP_FAST_SECONDS:-470}
GPU_TESTS=(tests/test_{optim_cuda,add_noise,sampler,renoise,score_residual,group_norm,layer_norm,triton_cuda}.py)
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

if ! "$PYTHON" -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
  echo "no CUDA device (or no torch with CUDA in $PYTHON): nothing to measure" | tee "$OUT/summary.txt"
  exit 0
fi

SECONDS=0
printf '%-34s %-8s %s\n' step result seconds > "$OUT/steps.txt"
finish() {
  trap - EXIT INT TERM
  [ -z "${running:-}" ] || kill -- "-$running" 2>/dev/null
  mkdir -p "$OUT/results" && cp bench/results/*.csv "$OUT/results/" 2>/dev/null
  { cat "$OUT/steps.txt"; echo; "$PYTHON" -m bench.report --show cuda 2>/dev/null; } | tee "$OUT/summary.txt"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# step NAME SECONDS COMMAND...: in a process group of its own, cut off at its share or at the end of the time
step() {
  local name=$1 share=$2 left=$((LIMIT - SECONDS)) start=$SECONDS status result; shift 2
  [ "$share" -lt "$left" ] || share=$left
  if [ "$share" -lt 5 ]; then printf '%-34s %-8s\n' "$name" "no time" >> "$OUT/steps.txt"; return 1; fi
  echo "== $name"
  setsid timeout -k 5 "$share" "$@" > "$OUT/${name// /-}.log" 2>&1 & running=$!
  wait "$running"; status=$?; running=
  case $status in 0) result=ok ;; 124 | 137) result=cut ;; *) result="rc $status" ;; esac
  printf '%-34s %-8s %s\n' "$name" "$result" $((SECONDS - start)) >> "$OUT/steps.txt"
  tail -n 3 "$OUT/${name// /-}.log"
  return $status
}

if [ -d "$WHEELS" ]; then
  step "install wheels" 90 "$PYTHON" -m pip install --no-index --no-deps --find-links "$WHEELS" "$WHEELS"/*.whl
fi
if [ -n "${PALP_FAST_LIBRARIES:-}" ]; then
  mkdir -p palp_fast/lib && cp "$PALP_FAST_LIBRARIES"/* palp_fast/lib/
else
  PALP_FAST_CUDA=1 step "build libraries" 180 "$PYTHON" setup.py build_ext --inplace
fi
# Without an installation the kernels are found here.
[ -e palp_fast/kernels ] || "$PYTHON" -c "import palp_fast.kernels" 2>/dev/null || { ln -s ../kernels/palp palp_fast/kernels; }

export PALP_FAST_NEED_GPU=1
step "operators quick" 100 "$PYTHON" -m bench.run --quick --record
step "step sd15" 90 "$PYTHON" -m bench.end_to_end --model sd15 --rounds 5 --record --provider palp_fast --provider plain --provider dreambooth --provider "tuned eager"
step "gpu tests" 60 "$PYTHON" -m pytest -q -x "${GPU_TESTS[@]}" -k cuda
step "graph tests" 60 "$PYTHON" -m pytest -q tests/test_graph_cuda.py
step "step sdxl" 120 "$PYTHON" -m bench.end_to_end --model sdxl --rounds 3 --sequential --record --provider palp_fast --provider plain
step "lora emoji-64" 40 "$PYTHON" -m bench.end_to_end --rounds 20 --lora-steps 50 --record --provider palp_fast --provider plain --provider dreambooth
step "step sd15 compiled" 150 "$PYTHON" -m bench.end_to_end --model sd15 --rounds 5 --sequential --start-limit 80 --record --provider "tuned blocks" --provider "tuned whole" --provider "tuned reduce"
if command -v compute-sanitizer > /dev/null; then
  step "sanitizer memcheck" 60 compute-sanitizer --tool memcheck --error-exitcode 1 "$PYTHON" -m pytest -q -x tests/test_score_residual.py tests/test_optim_cuda.py -k cuda
  step "sanitizer racecheck" 60 compute-sanitizer --tool racecheck --error-exitcode 1 "$PYTHON" -m pytest -q -x tests/test_score_residual.py tests/test_optim_cuda.py -k cuda
fi
step "model" 40 "$PYTHON" -m bench.model --record
step "operators full" 300 "$PYTHON" -m bench.run --seconds 0.5 --record
