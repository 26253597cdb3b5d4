#!/usr/bin/env bash
# Post-train DMD2's one-step SDXL on one GPU of 24 GB, with LoRAs for generator and assistant. The assistant
# shares its frozen weights with the reference; the generator has its own, because it starts from others. The
# learning rates are not in the paper: ten times those of full weights, a factor found on the shapes world.
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
  --output_dir outputs/sdxl-lora \
  --generator_lora_rank 64 --assistant_lora_rank 64 --shared_base assistant \
  --learning_rate 5e-6 --assistant_learning_rate 2e-5 \
  --max_train_steps 1000 \
  --train_batch_size 1 --gradient_accumulation_steps 16 \
  --mixed_precision bf16 --gradient_checkpointing --enable_vae_tiling --offload \
  --checkpointing_steps 100 --checkpoints_total_limit 3 \
  --validation_prompts "a raccoon in a spacesuit, oil painting" "a lighthouse in a storm" \
  --validation_steps 50 \
  "$@"
