#!/usr/bin/env bash
# Three short runs on one GPU; each needs torch and no network.
#
#   bash benchmarks/gpu_check.sh right      is everything right?  the CUDA tests, at most 200 s
#   bash benchmarks/gpu_check.sh tune       sizes of tiles that the Triton kernels should take
#   bash benchmarks/gpu_check.sh measure    every benchmark: rows, table and plots
#   bash benchmarks/gpu_check.sh MODE --quick    a rehearsal at small sizes, also without a GPU
#   bash benchmarks/gpu_check.sh MODE [--quick] NAME...    these parts only
#
# A part that fails or runs past its limit does not stop the others; the table at the end names it.
# At most eight files are left in ${OUT:-runs/gpu}; all logs are in MODE.tar.gz. BENCHMARK_COMMIT
# names the commit where the copy has no repository.
set -uo pipefail
cd "$(dirname "$0")/.."

usage() {
    sed -n '2,12s/^# \{0,1\}//p' "$0"
    exit 2
}

mode=${1:-}
case $mode in
right | tune | measure) shift ;;
*) usage ;;
esac
quick=()
if [[ ${1:-} == --quick ]]; then
    quick=(--quick)
    shift
fi
only=("$@")

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-$(command -v python || command -v python3)}
out=${OUT:-runs/gpu}
logs=$out/$mode
rows=$out/benchmarks.jsonl
mkdir -p "$logs"

# What is in the folder of logs comes back as one file, also from a run that was stopped.
trap 'tar -czf "$logs.tar.gz" -C "$out" "$mode" && rm -rf "$logs"' EXIT
trap 'exit 143' TERM INT

has() { "$python" -c "import $1" 2>/dev/null; }

summary=()
failed=0
# Lines of the log of a part that failed; the tests' failures are told by benchmarks.checks.
shown=25
[[ $mode == right ]] && shown=6

# Whether a part was asked for, NAME.
wanted() { ((${#only[@]} == 0)) || [[ " ${only[*]} " == *" $1 "* ]]; }

# part NAME SECONDS COMMAND...
part() {
    local name=$1 limit=$2 log="$logs/$1.log" start=$SECONDS code=0
    shift 2
    wanted "$name" || return
    timeout --kill-after=5 "$limit" "$@" >"$log" 2>&1 || code=$?
    summary+=("$(printf '%-22s exit %3d  %4d s' "$name" "$code" $((SECONDS - start)))")
    echo "${summary[-1]}"
    if ((code)); then
        failed=1
        tail -n "$shown" "$log"
    fi
}

# skip NAME REASON
skip() {
    wanted "$1" || return
    summary+=("$(printf '%-22s skipped: %s' "$1" "$2")")
    echo "${summary[-1]}"
}

# bench NAME SECONDS BENCHMARK ARGUMENTS...
bench() {
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" -m benchmarks "$@" --output "$rows" "${quick[@]}"
}

versions() {
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null ||
        echo "no nvidia-smi"
    "$python" - <<'END'
import importlib.metadata as metadata
import platform

print("python", platform.python_version())
for name in ("torch", "triton", "torchvision", "pytest", "pytest-xdist", "matplotlib", "torchjd",
             "pytorch_optimizer", "conflictfree"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "missing")
END
}

# What is seen on a GPU alone, and the Triton kernels; --quick rehearses the former on the CPU, the
# latter are in the slow tests. Processes share the GPU: compiling keeps the CPUs busy, not it.
right() {
    local limit=185 results=$logs/results.xml options=() tests=(tests/gradsurgery/test_cuda.py) file
    if ((${#quick[@]})); then
        limit=580
        export GRADSURGERY_REHEARSAL=1 TRITON_INTERPRET=1
    else
        for file in tests/gradsurgery/test_triton*.py; do
            [[ $file == */test_triton_builds.py ]] || tests+=("$file")
        done
    fi
    if ! has pytest; then
        skip tests "no pytest"
        return
    fi
    has xdist && options+=(-n 8 --dist worksteal)
    has pytest_timeout && options+=(--timeout 120)
    export OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=1
    # Interrupted, not killed: pytest then still writes what it knows.
    local run='import signal, sys, pytest
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(pytest.main(sys.argv[1:]))'
    part tests $((limit + 10)) timeout --signal=INT "$limit" "$python" -c "$run" -q --tb=short \
        -p no:cacheprovider -o addopts= -o filterwarnings=default --maxfail=200 \
        --junitxml "$results" "${options[@]}" "${tests[@]}"
    "$python" -m benchmarks.checks "$results" || failed=1
}

tune() {
    part tune 200 "$python" -m benchmarks.tune "${quick[@]}" --output "$out/tune.jsonl"
}

measure() {
    local images=(--batch 256 --pixels 224 --amp) many=(--tasks 2,4,8,16,32,40) models trunk
    if ((${#quick[@]})); then
        images=(--batch 2 --pixels 32 --amp)
        many=()
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
        part plots 60 "$python" -m benchmarks plot "$rows" --output-dir "$logs/plots"
    else
        skip plots "no matplotlib"
    fi
    if [[ -f $rows ]]; then
        "$python" -m benchmarks table "$rows" | tee "$out/table.md" || failed=1
    fi
}

versions
case $mode in
right) right ;;
tune) tune ;;
measure) measure ;;
esac
printf '\n'
printf '%s\n' "${summary[@]}"
exit "$failed"
