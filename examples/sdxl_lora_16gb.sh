#!/usr/bin/env bash
# Post-train DMD2's four-step SDXL on one GPU of 16 GB: training continues DMD2's LoRA, and generator, assistant
# and reference share SDXL's frozen weights. Each update trains one of the four steps; only images of the last step
# are rewarded.
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
  --output_dir outputs/sdxl-4step-lora \
  --generator_init tianweiy/DMD2/dmd2_sdxl_4step_lora_fp16.safetensors --generator_timesteps 999 749 499 249 \
  --generator_lora_rank 64 --assistant_lora_rank 64 --shared_base \
  --learning_rate 5e-6 --assistant_learning_rate 2e-5 \
  --max_train_steps 1000 \
  --train_batch_size 1 --gradient_accumulation_steps 16 \
  --mixed_precision bf16 --gradient_checkpointing --enable_vae_tiling --offload \
  --checkpointing_steps 100 --checkpoints_total_limit 3 \
  --validation_prompts "a raccoon in a spacesuit, oil painting" "a lighthouse in a storm" \
  --validation_steps 50 \
  "$@"
