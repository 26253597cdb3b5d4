#!/usr/bin/env bash
# The paper's DI*-SDXL-1step: post-train DMD2's one-step SDXL with 100 x PickScore and *in* guidance at 7.5.
#
#   bash examples/sdxl_paper.sh short   # 256 generator updates, as the name of a released checkpoint suggests
#   bash examples/sdxl_paper.sh long    # 1,485
#
# Written for 8 GPUs of at least 48 GB, which share weights, gradients and optimizer states. Batch size and
# learning rate are not in the paper; they are DMD2's (2 x 8 x 8 GPUs = 128, 5e-7).
# `python examples/prepare_prompts.py` writes the prompts. They are read in the working directory, and results
# are written there.
# Further flags are appended and take precedence.
set -euo pipefail
root=$(dirname "$0")/..
case "${1:-}" in
  short) updates=256 ;;
  long) updates=1485 ;;
  *) echo "error: usage: bash examples/sdxl_paper.sh short|long [flags]" >&2; exit 2 ;;
esac

exec accelerate launch "$root/train_diff_instruct_star_sdxl.py" \
  --recipe di_star_in \
  --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix \
  --prompts_file prompts.parquet \
  --output_dir "outputs/sdxl-paper-$1" \
  --max_train_steps "$updates" \
  --train_batch_size 2 --gradient_accumulation_steps 8 \
  --mixed_precision bf16 --gradient_checkpointing --sharding fsdp \
  --checkpointing_steps 64 --checkpoints_total_limit 3 \
  --validation_prompts "a raccoon in a spacesuit, oil painting" "a lighthouse in a storm" \
    "a robot cooking dinner in the kitchen" "three red cubes on a blue sphere" \
  --validation_steps 32 \
  "${@:2}"
