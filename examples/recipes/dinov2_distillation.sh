#!/usr/bin/env bash
# DINOv2 on any folder of images: towards its own features, averaged over shifted and flipped views.
#
#     DATA=photos OUT=out examples/recipes/dinov2_distillation.sh
#     LAUNCH="accelerate launch --num_processes 8 -m register_adapter.train" DATA=photos OUT=out \
#         examples/recipes/dinov2_distillation.sh
#
# The first line is for one GPU (or a CPU), the second for eight. Started again, a run that was stopped goes on from its
# last checkpoint. Further flags of `register-adapter train` are passed on, such as --mixed-precision bf16.
#
# Registers move, everything else is frozen; targets are computed once, into $OUT.targets. The published method (arXiv
# 2505.21501) moves more than registers, and reports ADE20k 47.8 -> 48.7 for DINOv2-B; registers alone repair less: see
# docs/results.md for what each choice does on models whose truth is known. Measure with `register-adapter audit`.
set -euo pipefail
: "${MODEL:=facebook/dinov2-base}" "${DATA:?name a folder of images}" "${OUT:?name a folder for the result}"
: "${LAUNCH:=register-adapter train}"

# shellcheck disable=SC2086 # a launcher is several words
$LAUNCH --model-name-or-path "$MODEL" --train-dir "$DATA" --output-dir "$OUT" \
    --objective distillation --num-views 10 --num-registers 16 \
    --target-store "$OUT.targets" --learning-rate 1e-3 --lr-scheduler-type cosine --num-train-epochs 5 \
    --per-device-train-batch-size 16 \
    --checkpointing-steps 200 --checkpoints-total-limit 2 --resume-from-checkpoint latest "$@"
