#!/usr/bin/env bash
# Evaluate every model of the paper's Table 1 whose weights are public, on one benchmark and one page.
#
#   bash examples/reproduce_table1.sh parti
#   bash examples/reproduce_table1.sh hpsv2
#   bash examples/reproduce_table1.sh coco30k --prompts_file captions.txt
#
# Steps, guidance and float16 are those of the authors' notebook for the models of SDXL's size. The notebook has
# neither SD3.5 nor FLUX, which take steps and guidance from their cards. These two come last: they are the largest,
# and the hub gives them only to those who accepted their terms. docs/table1.md says what to expect.
# Files are read in the working directory, and results are written there, in results/BENCHMARK.
# Further flags are appended; a further --model adds a row.
set -euo pipefail
root=$(dirname "$0")/..
case "${1:-}" in
  "" | -*) echo "error: usage: bash examples/reproduce_table1.sh BENCHMARK [flags]" >&2; exit 2 ;;
esac
sdxl="--pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --variant fp16"
many_steps="$sdxl --num_inference_steps 50 --guidance_scale 7.5"
one_step="$sdxl --scheduler LCMScheduler --timesteps 399 --guidance_scale 0"
sd35="--pretrained_model_name_or_path stabilityai/stable-diffusion-3.5-large"
flux="--pretrained_model_name_or_path black-forest-labs/FLUX.1-dev"

exec accelerate launch "$root/eval_benchmarks.py" --benchmark "$1" --dtype float16 \
  --model "SDXL-base $many_steps" \
  --model "SDXL-DPO $many_steps --unet mhdang/dpo-sdxl-text2image-v1" \
  --model "DMD2-SDXL $one_step --unet tianweiy/DMD2/dmd2_sdxl_1step_unet_fp16.bin" \
  --model "Diff-Instruct $one_step --unet XDG-XHS/diff_instruct_1step" \
  --model "SIM $one_step --unet XDG-XHS/sim_1step" \
  --model "Diff-Instruct++ $one_step --unet XDG-XHS/dipp_1step" \
  --model "DI* $one_step --unet XDG-XHS/distar_short_1step" \
  --model "DI* (long) $one_step --unet XDG-XHS/distar_long_1step" \
  --model "SD3.5-large $sd35 --num_inference_steps 28 --guidance_scale 3.5" \
  --model "FLUX-dev $flux --num_inference_steps 50 --guidance_scale 3.5" \
  "${@:2}"
