#!/usr/bin/env bash
# Everything that needs a GPU, in one command of less than nine minutes:
#
#     bash scripts/gpu_check.sh OUT [--device cpu] [--data-dir FOLDER]
#
# Each part is a process with a limit of time, so that one that fails or hangs stops none of the
# others; the most valuable come first. In the folder OUT, as they come:
#
#     summary.md       every part and the last line of what it prints; more of some and of failures
#     checks.log       all that the parts print
#     benchmarks.*     what pytest-benchmark measured, and a table of it
#     training.*       the epochs of the training run, and their curves
#     counters.json    what Nsight Compute read
#
# --device cpu runs the same parts, but those for a GPU alone, on small work. The exit status is 0 if
# no part failed; parts whose program is not installed are skipped. It takes Python with the packages
# of `pip install '.[test]'`, GNU's timeout and no network; the project need not be installed.
set -u

SECONDS=0
total=535 grace=15 # seconds, for everything, and for a part that is asked to stop
root=$(cd "$(dirname "$0")/.." && pwd) || exit 2
work=$(mktemp -d) || exit 2
running='' failed=0
trap 'rm -rf "$work"' EXIT
trap 'kill "$running" 2> /dev/null; exit 143' INT TERM

fail() {
    echo "gpu_check.sh: $*" >&2
    exit 2
}

# NAME LIMIT LINES COMMAND...: a process, its limit in seconds, and how many lines of the end of its
# output the summary shows.
part() {
    local name=$1 limit=$2 lines=$3 begin=$SECONDS left=$((total - grace - SECONDS))
    local result=FAILED took=0 offset status says
    shift 3
    if ((limit > left)); then limit=$left; fi
    printf '\n######## %s: %s\n' "$name" "$*" >> "$out/checks.log"
    offset=$(wc -c < "$out/checks.log")
    if ((left < 10)); then
        echo "no time was left" >> "$out/checks.log"
        status=77
    else
        # On SIGINT, which a script's background ignores, pytest and train.py sum up.
        env --default-signal=INT timeout --signal=INT --kill-after="$grace" "$limit" "$@" \
            < /dev/null >> "$out/checks.log" 2>&1 &
        running=$!
        wait "$running"
        status=$?
        took=$((SECONDS - begin))
        kill -KILL -- "-$running" 2> /dev/null # what it has started and left
    fi
    tail -c "+$((offset + 1))" "$out/checks.log" | tr '\r' '\n' | grep '[^ ]' > "$work/output"
    says=$(tail -n 1 "$work/output")
    if ((status == 0)); then
        result=passed
    elif ((status == 77 || status == 127)); then # of what cannot run, and of what is not installed
        result=skipped
    else
        failed=$((failed + 1))
        if ((took >= limit)); then says="stopped at its limit of $limit s: $says"; fi
        if ((lines < 20)); then lines=20; fi
    fi
    echo "| $name | $result | $took | ${says//|/\\|} |" | tee -a "$work/table"
    if ((lines > 1)) && [ "$result" != skipped ]; then
        { printf '\n## %s\n\n```\n' "$name" && tail -n "$lines" "$work/output" && echo '```'; } \
            >> "$work/ends"
    fi
    {
        printf '# GPU check\n\n| part | result | seconds | what it says |\n|---|---|---|---|\n'
        cat "$work/table"
        printf '\nParts that failed: %s.\n' "$failed"
        cat "$work/ends"
    } > "$out/summary.md"
}

out='' device=cuda data=synthetic
for folder in ../shared/flowers shared/flowers datasets; do
    if [ -d "$root/$folder/train_data" ]; then data=$root/$folder; fi
done
while (($#)); do
    case $1 in
        --device) device=${2:-} && shift ;;
        --data-dir) data=$(cd "${2:-}" && pwd) && shift || fail "--data-dir: no folder ${2:-}" ;;
        -*) fail "no option $1; it takes OUT [--device cuda|cpu] [--data-dir FOLDER]" ;;
        *) out=$1 ;;
    esac
    shift
done
[ -n "$out" ] || fail "name the folder OUT for the results"
[[ $device = cuda || $device = cpu ]] || fail "--device is cuda or cpu, not $device"
python=${PYTHON:-$(command -v python3 || command -v python)}
"$python" -c 'import torch' || fail "no Python with torch here; PYTHON=... names one"
command -v timeout > /dev/null || fail "no timeout here, which is part of GNU coreutils"
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$root" || exit 2
: | tee "$out/checks.log" "$work/table" > "$work/ends"
export PYTHONPATH=$root/kernels:$root:${PYTHONPATH:-} PYTHONUNBUFFERED=1
export PATH=$PATH:/usr/local/cuda/bin # where the CUDA toolkit has its tools
# The tests choose the interpreter where they need it; a forced backend would hide another.
unset TRITON_INTERPRET STOCHASTIC_POOLING_BACKEND
if [ "$device" = cpu ]; then
    export CUDA_VISIBLE_DEVICES=
elif ! "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
    fail "no CUDA here; --device cpu runs the same parts, small"
fi

# ---------------------------------------------------------------- the parts

# Without the project's own options, which may be those of a plugin that is not here.
pytest=("$python" -m pytest -q -rfEs --tb=short -o addopts=--strict-markers -p no:cacheprovider)
train=("$python" scripts/train.py --amp --recipe paper --data-dir "$data" --output-dir)
# The four functions against the reference.
smoke=("${pytest[@]}" -x tests/test_kernels.py -k)
smoke+=("(sample or expectation) and overlapping and float16 and not bfloat16")
# The tests whose tensors lie on the GPU when there is one, the most telling first. Left out: what
# compiles for other GPUs, runs onnxruntime or starts processes that train on CPUs.
tests=(tests/test_{kernels,properties,extremes,pooling,in_pytorch,volumes}.py)
tests+=(tests/test_memory.py::test_account_agrees_with_a_gpu tests/test_{transforms,compile,augment}.py)
# Test by test, so that those that failed are known if the part meets its limit.
tests+=(-vv --durations=15 --continue-on-collection-errors -k)
bench=("${pytest[@]}" bench/ --benchmark-only --benchmark-json "$out/benchmarks.json")
parallel=
if [ "$device" = cuda ]; then
    tests+=("not (onnx or data_parallel or numba)")
    if "$python" -c 'import xdist'; then parallel='-n auto'; fi # they compile kernels side by side
    # Compiling is most of it. All of bench/ takes longer than there is here.
    few="(network and float16 and not avg and not compiled) or (operator and fp16 and"
    few+=" (cnnsp_pool1 or ((cnnsp or resnet_stem) and (training or evaluation)))"
    few+=" and not (avg or gist))"
    bench+=(-k "$few" --benchmark-max-time 0.5)
    small=(-b 256 --gpu-memory-gb 6)
else
    tests+=("any_strides or same_cells or a_volume_of_one_slice or agrees_with_a_gpu")
    bench+=(-k cnnsp_pool3to5)
    small=(-b 8 --max-steps 2)
fi
# There are more synthetic flowers than photographs: as many images an epoch in the end.
if [ "$data" = synthetic ]; then epochs=6; else epochs=20; fi

part commit 20 1 git describe --always --dirty
part conditions 60 99 "$python" -m torch.utils.collect_env
if [ "$device" = cuda ]; then
    query=name,driver_version,memory.used,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit
    query+=,temperature.gpu,mig.mode.current
    part card 20 2 nvidia-smi --query-gpu="$query" --format=csv --id=0
fi
PYTEST_ADDOPTS=$parallel part smoke 90 1 "${smoke[@]}"
if [ "$device" = cuda ]; then
    part counters 75 20 "$python" bench/gpu_counters.py --json "$out/counters.json"
fi
part benchmarks 120 1 "${bench[@]}"
part "table of the benchmarks" 30 1 "$python" bench/report.py "$out/benchmarks.json"
part training 75 4 "${train[@]}" "$work/training" "${small[@]}" --epochs "$epochs"
cp "$work/training/summary.csv" "$out/training.csv" 2> /dev/null
cp "$work/training/curves.png" "$out/training.png" 2> /dev/null
part memory 50 99 "$python" -m cnnsp.training.memory -b 256 --gpu-memory-gb 6
PYTEST_ADDOPTS=$parallel part tests 200 20 "${pytest[@]}" "${tests[@]}"
if [ "$device" = cuda ]; then
    part "batch 1024 in 6 GB" 40 4 \
        "${train[@]}" "$work/1024" "${small[@]}" -b 1024 --max-steps 3
    part "CUDA graphs" 75 4 \
        "${train[@]}" "$work/graphs" "${small[@]}" --epochs 3 --torchcompile reduce-overhead
    # It sees every allocation, not PyTorch's large ones alone.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 part memcheck 60 1 \
        compute-sanitizer --error-exitcode 9 "${smoke[@]} and channels_last"
fi
part "max pooling" 45 4 "${train[@]}" "$work/max" "${small[@]}" --pool max --epochs $((epochs / 5))
printf '\n' && cat "$out/summary.md"
((failed == 0))
