#!/usr/bin/env bash
# `tiny` from nothing: cohort -> prepare -> phases -> evaluation. Two CPU cores, no data, no GPU.
# Stop it whenever you like and start it again: every step goes on where it stopped.
#
#   runs/reproduce_tiny.sh [WORK]        WORK is a folder with 4 GB to spare; runs/tiny by default
set -euo pipefail
cd "$(dirname "$0")/.."
WORK=${1:-runs/tiny}
VLM3D="${PYTHON:-.venv/bin/python} -m vlm3d"
COMMON="prevalence_scale=1.6"
mkdir -p "$WORK"
exec > >(tee -a "$WORK/log.txt") 2>&1
echo "== $(date -u +%FT%TZ) $(nproc) cores, $($VLM3D --version)"

# Seeds of the splits lie far apart: no phantom is in two of them. The shifted cohort comes from other kernels, spacing,
# noise and motion than any training case. Each evaluation reads its own store, so that nothing can leak.
$VLM3D prepare "phantom:0-640:$COMMON,split=train" "phantom:100000-100064:$COMMON,split=valid" \
    --config tiny --anatomy given --out "$WORK/store"
$VLM3D train tiny --data "$WORK/store" --out "$WORK/run"

$VLM3D prepare "phantom:200000-200200:$COMMON,split=test" --config tiny --anatomy given --out "$WORK/test"
$VLM3D prepare "phantom:300000-300200:$COMMON,split=test,protocol=shifted,spacing=4x1.2x1.2" \
    --config tiny --anatomy given --out "$WORK/shifted"
$VLM3D tune "$WORK/run/final" --data "$WORK/store"
EVALUATE="$VLM3D evaluate --checkpoint $WORK/run/final --page --overwrite"
$EVALUATE --data "$WORK/test" --out "$WORK/evaluation_test" --report
$EVALUATE --data "$WORK/shifted" --out "$WORK/evaluation_shifted"
# The phantoms' own anatomy is better than any that a user has: what is left with that which `vlm3d predict` finds?
$VLM3D prepare "phantom:200000-200040:$COMMON,split=test" --config tiny --anatomy classical --out "$WORK/searched"
$EVALUATE --data "$WORK/searched" --out "$WORK/evaluation_searched"
echo "== $(date -u +%FT%TZ) done: $WORK/run/final, $WORK/evaluation_{test,shifted,searched}"
