#!/usr/bin/env bash
# Post-train a one-step Stable Diffusion 1.5 on one GPU of at least 40 GB.
#
#   bash examples/sd15.sh align     # starts from DMD2's one-step model, whose licence is non-commercial
#   bash examples/sd15.sh distil    # makes a start of your own instead, then:
#   bash examples/sd15.sh align --generator_init outputs/sd15-distil
#
# `python examples/prepare_prompts.py` writes the prompts. They are read in the working directory, and results
# are written there.
# Further flags are appended and take precedence.
set -euo pipefail
root=$(dirname "$0")/..
dmd2=tianweiy/DMD2/model/sdv1.5/laion6.25_sd_baseline_8node_guidance1.75_lr5e-7_seed10_dfake10_diffusion1000
dmd2+=_gan1e-3_resume_fid8.35_checkpoint_model_041000/pytorch_model.bin
case "${1:-}" in
  distil) stage=(--recipe sim --generator_init reference --max_train_steps 20000) ;;
  align) stage=(--recipe di_star_in --generator_init "$dmd2" --max_train_steps 2000) ;;
  *) echo "error: usage: bash examples/sd15.sh distil|align [flags]" >&2; exit 2 ;;
esac

exec accelerate launch "$root/train_diff_instruct_star_sd15.py" \
  "${stage[@]}" \
  --prompts_file prompts.parquet \
  --output_dir "outputs/sd15-$1" \
  --train_batch_size 4 --gradient_accumulation_steps 8 \
  --mixed_precision bf16 --gradient_checkpointing --use_ema --offload_ema \
  --checkpointing_steps 500 --checkpoints_total_limit 3 \
  --validation_prompts "a raccoon in a spacesuit, oil painting" "a lighthouse in a storm" \
  --validation_steps 100 \
  "${@:2}"
