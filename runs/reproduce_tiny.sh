#!/usr/bin/env bash
# `tiny` from nothing: cohort -> prepare -> phases -> evaluation. Two CPU cores, no data, no GPU, six hours.
# Stop it whenever you like and start it again: every step goes on where it stopped. What it came to is in docs/tiny_run.md;
# the weights of the package come from the longer runs/tiny_weights.sh.
#
#   runs/reproduce_tiny.sh [WORK]        WORK is a folder with 6 GB to spare; runs/tiny by default
set -euo pipefail
set -m # a background job is a process group, which is stopped whole
cd "$(dirname "$0")/.."
WORK=${1:-runs/tiny}
PYTHON=${PYTHON:-.venv/bin/python}
VLM3D="$PYTHON -m vlm3d"
mkdir -p "$WORK"
exec > >(tee -a "$WORK/log.txt") 2>&1
stamp() { echo "== $(date -u +%FT%TZ) $*"; }
stamp "$(nproc) cores, $($VLM3D --version)"

JOBS_NOW=()
stopped() {
    stamp "stopped"
    if ((${#JOBS_NOW[@]})); then kill -- "${JOBS_NOW[@]/#/-}" 2> /dev/null; fi
}
trap stopped EXIT
side_by_side() { # two functions, a core each
    local job failed=0
    for lane in "$@"; do
        OMP_NUM_THREADS=1 "$lane" &
        JOBS_NOW+=($!)
    done
    for job in "${JOBS_NOW[@]}"; do wait "$job" || failed=1; done
    JOBS_NOW=()
    if ((failed)); then return 1; fi
    stamp "$* done"
}

# Seeds of the splits lie far apart: no phantom is in two of them. The shifted cohort comes from other kernels, spacing,
# noise and motion than any training phantom; the augmentation of masks moves scans as far. Each evaluation reads its own
# store, so that nothing can leak. All anatomy is searched, as in a user's scan.
COMMON="prevalence_scale=1.6"
prepare() { # OUT, PHANTOMS...
    local out=$1
    shift
    $VLM3D prepare "${@/%/,$COMMON}" --config tiny --anatomy "${ANATOMY:-classical}" --jobs "${JOBS:-1}" --out "$WORK/$out"
}
JOBS=2 prepare store phantom:1040-1540:split=train phantom:1540-1650:split=train,spacing=5x0.9x0.9 \
    phantom:1650-1890:split=train phantom:100000-100064:split=valid
stamp "store done"

# 16 bits of a number where the processor multiplies them: `training.precision` in docs/training.md.
PRECISION=fp32
if grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then PRECISION=bf16; fi
# Memory of a step is kept for the next one, in large pages.
KEPT=(MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 MALLOC_TOP_PAD_=268435456
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1)
train() { # OUT, SETTINGS...
    local out=$1
    shift
    env "${KEPT[@]}" $VLM3D train tiny --out "$WORK/$out" --data "$WORK/store" training.precision=$PRECISION \
        model.localizer.read_mirrored=true training.augmentation.flip_probability=0.5 "$@"
}
PHASES=training.phases

# Encoder and classifier, while the other cohorts are made.
look() {
    train look --phase local --phase classification training.seed=1 $PHASES.local.steps=2400
}
cohorts() {
    prepare validate phantom:100000-100100:split=valid
    prepare test phantom:200000-200200:split=test
    prepare shifted phantom:300000-300100:split=test,protocol=shifted,spacing=4x1.2x1.2
    ANATOMY=given prepare given phantom:200000-200100:split=test
}
side_by_side look cohorts

# Masks in boxes, and words: each trains a part that the other leaves alone.
AUGMENT=training.augmentation
VARIED=("$AUGMENT.noise_hu=45" "$AUGMENT.noise_probability=0.4" "$AUGMENT.blur_mm=1.2" "$AUGMENT.blur_probability=0.5"
    "$AUGMENT.lowres_probability=0.35" "$AUGMENT.motion_probability=0.4" "$AUGMENT.breath_mm=8" "$AUGMENT.heartbeat_mm=6")
WHOLE=("$PHASES.joint.unfreeze_blocks=[[0, 0]]" "$PHASES.joint.without_regions=0" "$PHASES.joint.warmup_steps=10")
boxes() {
    train boxes --from "$WORK/look/final" --phase localization training.seed=2 "${VARIED[@]}" $PHASES.localization.steps=2600
}
words() {
    train words --from "$WORK/look/final" --phase alignment --phase joint training.seed=3 "${WHOLE[@]}" \
        training.augmentation.flip_probability=0 \
        "$PHASES.joint.tasks={generation: 1.0}" $PHASES.joint.steps=900
}
side_by_side boxes words

# Masks in whole scans: two courses from one start and their mean, three times.
course() { # OUT, FROM, SEED, STEPS, SETTINGS...
    train "$1" --from "$WORK/$2" --phase joint training.seed="$3" "${VARIED[@]}" "${WHOLE[@]}" \
        "$PHASES.joint.tasks={localization: 1.0}" $PHASES.joint.lr=8e-4 $PHASES.joint.steps="$4" "${@:5}"
}
mean() { # OUT, RUNS...
    local out=$1
    shift
    test -d "$WORK/$out" || $PYTHON runs/mean_weights.py "$WORK/$out" "${@/#/$WORK/}"
}
first() { course course1 boxes/final 4 900; }
second() { course course2 boxes/final 5 900; }
side_by_side first second
mean mean1 course1/final course2/final
# The later pairs are validated on few cases, to spare time; nothing is chosen by it.
third() { course course3 mean1 6 940 training.validation_cases=8; }
fourth() { course course4 mean1 7 940 training.validation_cases=8; }
side_by_side third fourth
mean mean2 course3/final course4/final
fifth() { course course5 mean2 8 300 training.validation_cases=8; }
sixth() { course course6 mean2 9 300 training.validation_cases=8; }
side_by_side fifth sixth
mean mean3 course5/final course6/final
test -d "$WORK/final" || $PYTHON runs/join_weights.py "$WORK/final" "$WORK/look/final" "$WORK/mean3" "$WORK/words/final"
test -f "$WORK/final/thresholds.json" || $VLM3D tune "$WORK/final" --data "$WORK/validate"
stamp "tune done"

# Judged as a user meets it, with searched regions; and once with exact ones, to tell the two apart.
evaluate() { # STORE, SETTINGS...
    local store=$1
    shift
    $VLM3D evaluate --checkpoint "$WORK/final" --page --overwrite --data "$WORK/$store" --out "$WORK/evaluation_$store" "$@"
}
judge() { evaluate test --report; }
judge_apart() {
    evaluate shifted
    evaluate given
}
side_by_side judge judge_apart
stamp "done: $WORK/final, $WORK/evaluation_{test,shifted,given}"
trap - EXIT
