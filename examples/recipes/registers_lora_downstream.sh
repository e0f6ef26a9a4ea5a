#!/usr/bin/env bash
# Registers and LoRA for a downstream task, saved as one folder.
#
#     DATA=photos OUT=out examples/recipes/registers_lora_downstream.sh
#     LAUNCH="accelerate launch --num_processes 8 -m register_adapter.train" DATA=photos OUT=out \
#         examples/recipes/registers_lora_downstream.sh
#
# The first line is for one GPU (or a CPU), the second for eight. Started again, a run that was stopped goes on from its
# last checkpoint. Further flags of `register-adapter train` are passed on, such as --mixed-precision bf16.
#
# Train `--train lora` with another OUT as the control: what LoRA does alone. Both load with `load_adapters`.
set -euo pipefail
: "${MODEL:=facebook/dinov2-base}" "${DATA:?name a folder of images}" "${OUT:?name a folder for the result}"
: "${LAUNCH:=register-adapter train}"

# shellcheck disable=SC2086 # a launcher is several words
$LAUNCH --model-name-or-path "$MODEL" --train-dir "$DATA" --output-dir "$OUT" \
    --objective classification --train registers+lora --lora-r 8 \
    --learning-rate 5e-4 --lr-scheduler-type cosine --num-train-epochs 3 --eval-steps epoch --load-best-model-at-end \
    --per-device-train-batch-size 32 \
    --checkpointing-steps 200 --checkpoints-total-limit 2 --resume-from-checkpoint latest "$@"
