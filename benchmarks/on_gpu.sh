#!/usr/bin/env bash
# Everything that wants a GPU, in about ten minutes, the most telling first; what fails is noted and the rest goes on.
#   benchmarks/on_gpu.sh                 into benchmarks/results/gpu_*.json, with a summary in gpu_summary.txt
#   benchmarks/on_gpu.sh --rehearse      the same on the pretend device of the tests, small, into a temporary folder
#   benchmarks/on_gpu.sh kernels million only these steps, by their names in the summary
# scvi-tools is timed beside it where it can be imported. No network is needed.
set -u
cd "$(dirname "$0")/.."
rehearse=()
out=benchmarks/results
if [ "${1:-}" = "--rehearse" ]; then
  rehearse=(--rehearse)
  out=$(mktemp -d)
  shift
fi
only=" $* "
python=${PYTHON:-python}
export PYTHONFAULTHANDLER=1 # a crash says where
mkdir -p "$out"
summary=$out/gpu_summary.txt
echo "step seconds status" > "$summary"

step() { # NAME LIMIT_SECONDS COMMAND...
  local name=$1 limit=$2 begun=$SECONDS status=ok
  [ "$only" = "  " ] || [[ "$only" == *" $name "* ]] || return 0
  shift 2
  [ ${#rehearse[@]} -gt 0 ] && limit=900 # a rehearsal takes the time of a CPU, which may be busy
  echo "== $name: $*"
  timeout -s INT -k 10 "$limit" "$@" > "$out/gpu_$name.log" 2>&1 || status="failed ($?)"
  tail -n 12 "$out/gpu_$name.log"
  echo "$name $((SECONDS - begun)) $status" | tee -a "$summary"
}

"$python" - <<'P' || [ ${#rehearse[@]} -gt 0 ] || exit 1
import sys
import torch

sys.exit(None if torch.cuda.is_available() else "torch sees no CUDA device; --rehearse runs without")
P
peer=()
"$python" -c "import scvi" 2> /dev/null || peer=(--no-peer)
[ ${#rehearse[@]} -gt 0 ] && peer=(--no-peer)

if [ ${#rehearse[@]} -gt 0 ]; then
  step tests 900 "$python" -m pytest -q -x -p no:cacheprovider tests/test_gpu.py -k "replays_are_eager and scvi and plain"
else
  step tests 240 "$python" -m pytest -q -m gpu --tb=short -p no:cacheprovider
fi
step kernels 90 "$python" benchmarks/on_gpu.py kernels "${rehearse[@]}" --out "$out/gpu_kernels.json"
beside() { # BATCH_SIZE
  local size=$1
  for model in totalanvi scanvi totalvi scvi; do
    small=()
    [ ${#rehearse[@]} -gt 0 ] && small=(--cells 300 --genes 60 --proteins 12 --labels 4 --epochs 1)
    step "${model}_$size" 90 "$python" benchmarks/on_gpu.py script "${rehearse[@]}" -- benchmarks/vs_scvi.py \
      --device cuda --model "$model" --batch-size "$size" "${peer[@]}" "${small[@]}" --out "$out/gpu_${model}_$size.json"
  done
}
beside 128
step million 150 "$python" benchmarks/on_gpu.py million "${rehearse[@]}" --out "$out/gpu_million.json"
step fit 120 "$python" benchmarks/on_gpu.py fit "${rehearse[@]}" --out "$out/gpu_fit.json"
step queries 90 "$python" benchmarks/on_gpu.py queries "${rehearse[@]}" --out "$out/gpu_queries.json"
if [ ${#peer[@]} -eq 0 ]; then
  step queries_beside 120 "$python" benchmarks/queries.py --accelerator gpu --repeats 2 --out "$out/gpu_queries_beside.json"
fi
beside 1024
step growth 150 "$python" benchmarks/on_gpu.py growth "${rehearse[@]}" --out "$out/gpu_growth.json"
if command -v compute-sanitizer > /dev/null; then
  step sanitizer 120 compute-sanitizer --error-exitcode 1 "$python" benchmarks/on_gpu.py steps
elif [ ${#rehearse[@]} -gt 0 ]; then
  step steps 120 "$python" benchmarks/on_gpu.py steps --rehearse
fi
echo
cat "$summary"
echo "in $out, after $SECONDS s"
! grep -q failed "$summary"
