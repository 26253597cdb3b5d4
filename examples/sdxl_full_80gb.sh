#!/usr/bin/env bash
# Post-train DMD2's one-step SDXL on one GPU of 80 GB, with all weights of generator and assistant.
#
# `python examples/prepare_prompts.py` writes the prompts. They are read in the working directory, and results
# are written there.
# Further flags are appended and take precedence.
set -euo pipefail
root=$(dirname "$0")/..

exec accelerate launch "$root/train_diff_instruct_star_sdxl.py" \
  --recipe di_star_in \
  --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix \
  --prompts_file prompts.parquet \
  --output_dir outputs/sdxl-full \
  --max_train_steps 1000 \
  --train_batch_size 2 --gradient_accumulation_steps 16 \
  --mixed_precision bf16 --gradient_checkpointing --use_8bit_adam --use_ema --offload_ema \
  --checkpointing_steps 100 --checkpoints_total_limit 2 \
  --validation_prompts "a raccoon in a spacesuit, oil painting" "a lighthouse in a storm" \
  --validation_steps 50 \
  "$@"
