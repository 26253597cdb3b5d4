#!/usr/bin/env python
# Copyright 2026 The Diff-Instruct* scripts authors. Licensed under the Apache License, Version 2.0.
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "diffusers>=0.39", "transformers>=4.55", "accelerate", "peft",
#                 "datasets", "sentencepiece", "protobuf"]
# ///
"""Diff-Instruct* (DI*) for Stable Diffusion 3 and 3.5: post-train a few-step flow-matching generator.

SD3.5 Large Turbo's four steps with LoRAs; and a distillation of SD3.5 Medium to a one-step start:

    accelerate launch examples/families/train_diff_instruct_star_sd3.py --prompts_file prompts.txt \\
        --pretrained_model_name_or_path stabilityai/stable-diffusion-3.5-large --reward_steps all \\
        --generator_init stabilityai/stable-diffusion-3.5-large-turbo --mixed_precision bf16 \\
        --generator_lora_rank 64 --assistant_lora_rank 64 --shared_base assistant --gradient_checkpointing

    accelerate launch examples/families/train_diff_instruct_star_sd3.py --recipe sim --prompts_file p.txt

The same command with `--resume_from_checkpoint latest` resumes a run.

The method is that of the paper ("David and Goliath", arXiv 2410.20898; docs/method.md), for the forward
process x_t = (1 - sigma) x0 + sigma noise, with t = 1000 sigma and a network that predicts v = noise - x0.
The generator reads its noise at sigma = 1, where x0 = z - v(z). Several steps are Euler steps without new
noise, because the stock pipeline passes no random generator to its scheduler.

The body is the SD1.5 script's. To copy this file, take
train_diff_instruct_star_sd15.py and utils/flow_matching.py along, in the same folders.
"""

import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from train_diff_instruct_star_sd15 import Family, main, parse_args
from utils.flow_matching import FlowMatching


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5; a pipeline without T5, the third text encoder, runs without it."""

    name, signature = "Stable Diffusion 3", ("SD3Transformer2DModel",)
    network_class, network_name = "SD3Transformer2DModel", "transformer"
    pipeline_class = lora_saver = "StableDiffusion3Pipeline"
    components = {"vae": "AutoencoderKL", "text_encoder": "CLIPTextModelWithProjection",
                  "text_encoder_2": "CLIPTextModelWithProjection", "text_encoder_3": "T5EncoderModel",
                  "tokenizer": "CLIPTokenizer", "tokenizer_2": "CLIPTokenizer",
                  "tokenizer_3": "T5TokenizerFast", "scheduler": "FlowMatchEulerDiscreteScheduler"}
    defaults = {"pretrained_model_name_or_path": "stabilityai/stable-diffusion-3.5-medium",
                "generator_init": "reference", "generator_timesteps": [1000.0], "resolution": 1024,
                "timestep_sampling": "logit_normal", "learning_rate": 1e-6,
                "output_dir": "diff-instruct-star-sd3"}
    flags = {"max_sequence_length": {"type": "positive_int", "default": 256,
        "help": "Number of prompt tokens that T5 reads."}}
    lora_targets = ["to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj",
                    "to_add_out"]
    sharded_blocks = ("JointTransformerBlock",)
    process_class = FlowMatching

    def encode_prompts(self, pipeline, prompts, resolution, null=False, max_sequence_length=256):
        embeds, null_embeds, pooled, null_pooled = pipeline.encode_prompt(
            list(prompts), None, None, device=pipeline.text_encoder.device, num_images_per_prompt=1,
            do_classifier_free_guidance=null, max_sequence_length=max_sequence_length)
        if null:
            embeds, pooled = torch.cat([embeds, null_embeds]), torch.cat([pooled, null_pooled])
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def prompt_limit(self, pipeline, max_sequence_length):
        """T5 has the largest limit, if the pipeline has T5."""
        if pipeline.tokenizer_3 is None:
            return pipeline.tokenizer, pipeline.tokenizer.model_max_length
        return pipeline.tokenizer_3, max_sequence_length

    def architecture(self, config):
        return (config["_class_name"],), (config.get("num_layers"), config.get("joint_attention_dim"))

    def forward(self, network, x_t, timesteps, conditioning):
        return network(x_t, timestep=timesteps, **conditioning).sample

    def decode(self, vae, latents):
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        images = vae.decode((latents / vae.config.scaling_factor + shift).to(vae.dtype)).sample
        return images.float() / 2 + 0.5


FAMILY = StableDiffusion3()

if __name__ == "__main__":
    main(FAMILY, parse_args(FAMILY))
