#!/usr/bin/env bash
# All that wants a GPU, in nine minutes at most: bash tests/benchmarks/gpu.sh FOLDER_FOR_LOGS
# What fails or takes too long is left behind for the next. The whole job at Kvasir's size is a call of its own,
# of about eight minutes: python tests/benchmarks/whole_job.py --output FOLDER_FOR_LOGS/whole_job.json
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:?a folder for the logs}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
step() { # name, seconds, command
    echo "== $1"
    timeout "$2" "${@:3}" >"$out/$1.log" 2>&1
    echo "status $?"
    tail -n 50 "$out/$1.log"
}
speed=("${PYTHON:-python3}" tests/benchmarks/speed.py --vit_b --repeats 3)
step tests 100 "${PYTHON:-python3}" -m pytest -q -rP -n 5 -k "not memory" tests/test_gpu.py
step memory 60 "${PYTHON:-python3}" -m pytest -q -rP -k memory tests/test_gpu.py
step speed 200 "${speed[@]}" --output "$out/speed.json" --images_per_step 8 16 32 64 128 --steps 30 \
    --parts prepare iterate train profile evaluate predict augment tutorial
step adamw 50 "${speed[@]}" --output "$out/adamw.json" --images_per_step 8 64 --steps 30 --parts train --optim adamw_torch
step compile 100 "${speed[@]}" --output "$out/compile.json" --images_per_step 64 --steps 30 --parts train --torch_compile true
