#!/usr/bin/env bash
# The CUDA tests and every benchmark on one GPU, in at most 25 minutes; needs torch and no network.
#
#   bash benchmarks/gpu_check.sh            rows, logs, table and plots under ${OUT:-runs/gpu}
#   bash benchmarks/gpu_check.sh --quick    the same parts at small sizes, also without a GPU
#   bash benchmarks/gpu_check.sh [--quick] tests scaling    these parts only
#
# A part that fails or runs past its limit does not stop the others. BENCHMARK_COMMIT names the
# commit where the copy has no repository.
set -uo pipefail
cd "$(dirname "$0")/.."

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-$(command -v python || command -v python3)}
out=${OUT:-runs/gpu}
rows=$out/benchmarks.jsonl
mkdir -p "$out/logs"

all=(--output "$rows")
images=(--batch 256 --pixels 224 --amp)
many=(--tasks 2,4,8,16,32,40)
if [[ ${1:-} == --quick ]]; then
    all+=(--quick)
    images=(--batch 2 --pixels 32 --amp)
    many=()
    shift
fi
only=("$@")

has() { "$python" -c "import $1" 2>/dev/null; }

summary=()
failed=0

# part NAME SECONDS COMMAND...
part() {
    local name=$1 limit=$2 log="$out/logs/$1.log" start=$SECONDS code=0
    shift 2
    if ((${#only[@]})) && [[ " ${only[*]} " != *" $name "* ]]; then
        return
    fi
    timeout --kill-after=5 "$limit" "$@" >"$log" 2>&1 || code=$?
    summary+=("$(printf '%-22s exit %3d  %4d s' "$name" "$code" $((SECONDS - start)))")
    echo "${summary[-1]}"
    if ((code)); then
        failed=1
        tail -n 25 "$log"
    fi
}

skip() {
    summary+=("$(printf '%-22s skipped: %s' "$1" "$2")")
    echo "${summary[-1]}"
}

bench() {
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" -m benchmarks "$@" "${all[@]}"
}

nvidia-smi || echo "no nvidia-smi"
"$python" - <<'END'
import importlib.metadata as metadata
import platform

print("python", platform.python_version())
for name in ("torch", "triton", "torchvision", "pytest", "matplotlib", "torchjd",
             "pytorch_optimizer", "conflictfree"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "missing")
END

tests=()
for file in tests/gradsurgery/test_cuda.py tests/gradsurgery/test_triton.py; do
    [[ -f $file ]] && tests+=("$file")
done
if has pytest && ((${#tests[@]})); then
    part tests 240 "$python" -m pytest -q -p no:cacheprovider \
        -o filterwarnings=default -o addopts= "${tests[@]}"
else
    skip tests "no pytest, or no tests"
fi

bench projection-float32 90 projection "${many[@]}"
bench projection-bfloat16 90 projection --dtype bfloat16 "${many[@]}"
if has torchvision; then
    bench step-images 240 step --models resnet18 "${images[@]}"
    models=mlp,resnet18
    trunk=resnet18
else
    skip step-images "no torchvision"
    models=mlp,transformer
    trunk=transformer
fi
bench step-transformer 60 step --models transformer --amp
bench step-mlp 60 step --models mlp
bench overhead 60 overhead
bench scaling 210 scaling --models "$models"
bench memory 150 memory --models "$trunk"
if [[ $("$python" -c 'import torch; print(torch.cuda.device_count())') -gt 1 ]]; then
    bench processes 120 processes --ranks 2
else
    skip processes "fewer than two GPUs"
fi
bench peers 180 peers --models "$models"
if has matplotlib; then
    part plots 60 "$python" -m benchmarks plot "$rows" --output-dir "$out/plots"
else
    skip plots "no matplotlib"
fi

if [[ -f $rows ]]; then
    "$python" -m benchmarks table "$rows" | tee "$out/table.md" || failed=1
fi
printf '\n'
printf '%s\n' "${summary[@]}"
exit "$failed"
