#!/usr/bin/env bash
# CLIP or SigLIP, the vision tower alone, with its image embedding preserved.
#
#     DATA=photos OUT=out examples/recipes/clip_preserve.sh
#     LAUNCH="accelerate launch --num_processes 8 -m register_adapter.train" DATA=photos OUT=out \
#         examples/recipes/clip_preserve.sh
#
# The first line is for one GPU (or a CPU), the second for eight. Started again, a run that was stopped goes on from its
# last checkpoint. Further flags of `register-adapter train` are passed on, such as --mixed-precision bf16.
#
# `preserve` keeps zero-shot answers where they were (watch eval_preserve); distillation denoises the patch tokens.
set -euo pipefail
: "${MODEL:=openai/clip-vit-large-patch14}" "${DATA:?name a folder of images}" "${OUT:?name a folder for the result}"
: "${LAUNCH:=register-adapter train}"

# shellcheck disable=SC2086 # a launcher is several words
$LAUNCH --model-name-or-path "$MODEL" --train-dir "$DATA" --output-dir "$OUT" \
    --objective distillation --num-views 10 --preserve 1.0 \
    --num-registers 4 --learning-rate 1e-3 --lr-scheduler-type cosine --num-train-epochs 5 \
    --per-device-train-batch-size 16 \
    --checkpointing-steps 200 --checkpoints-total-limit 2 --resume-from-checkpoint latest "$@"
