#!/usr/bin/env bash
# A ViT or DeiT on a folder of images with one sub-folder a class: registers and the head move.
#
#     DATA=photos OUT=out examples/recipes/vit_classification.sh
#     LAUNCH="accelerate launch --num_processes 8 -m register_adapter.train" DATA=photos OUT=out \
#         examples/recipes/vit_classification.sh
#
# The first line is for one GPU (or a CPU), the second for eight. Started again, a run that was stopped goes on from its
# last checkpoint. Further flags of `register-adapter train` are passed on, such as --mixed-precision bf16.
#
# The summary at the end compares the registers with the same head without them (eval_registers_off_accuracy): no
# published result shows a gain from registers alone on a frozen backbone, so look at both.
set -euo pipefail
: "${MODEL:=facebook/deit-base-patch16-224}" "${DATA:?name a folder of images}" "${OUT:?name a folder for the result}"
: "${LAUNCH:=register-adapter train}"

# shellcheck disable=SC2086 # a launcher is several words
$LAUNCH --model-name-or-path "$MODEL" --train-dir "$DATA" --output-dir "$OUT" \
    --objective classification --num-registers 4 \
    --learning-rate 1e-3 --lr-scheduler-type cosine --num-train-epochs 3 --eval-steps epoch --load-best-model-at-end \
    --per-device-train-batch-size 32 \
    --checkpointing-steps 200 --checkpoints-total-limit 2 --resume-from-checkpoint latest "$@"
