#!/usr/bin/env bash
# From registers that were fitted without training onward.
#
#     DATA=photos OUT=out examples/recipes/from_test_time.sh
#     LAUNCH="accelerate launch --num_processes 8 -m register_adapter.train" DATA=photos OUT=out \
#         examples/recipes/from_test_time.sh
#
# The first line is for one GPU (or a CPU), the second for eight. Started again, a run that was stopped goes on from its
# last checkpoint. Further flags of `register-adapter train` are passed on, such as --mixed-precision bf16.
#
# The fit needs no training and removes outliers by itself; then the registers, the strengths of their neurons and the
# head are trained on the classes (a sub-folder each). In the demo (README) that won back more of the accuracy than the
# fit alone, at two of three seeds: compare $OUT.fitted with $OUT. Smoothed targets instead led away from the clean twin.
set -euo pipefail
: "${MODEL:=facebook/dinov2-large}" "${DATA:?name a folder of images}" "${OUT:?name a folder for the result}"
: "${LAUNCH:=register-adapter train}"

# The processes of one machine share the fit: run it once, before.
[ -e "$OUT.fitted/adapter_config.json" ] || register-adapter fit "$MODEL" "$DATA" --out "$OUT.fitted"
# A model without artifacts needs no registers: the fit says so, and writes nothing.
[ -e "$OUT.fitted/adapter_config.json" ] || { echo "error: nothing was fitted, so there is nothing to train from" >&2; exit 1; }

# shellcheck disable=SC2086 # a launcher is several words
$LAUNCH --model-name-or-path "$MODEL" --train-dir "$DATA" --output-dir "$OUT" \
    --objective classification --adapter-name-or-path "$OUT.fitted" \
    --learning-rate 1e-3 --lr-scheduler-type cosine --num-train-epochs 2 --per-device-train-batch-size 16 \
    --checkpointing-steps 200 --checkpoints-total-limit 2 --resume-from-checkpoint latest "$@"
