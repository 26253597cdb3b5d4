#!/usr/bin/env python
# Copyright 2026 The Diff-Instruct* scripts authors. Licensed under the Apache License, Version 2.0.
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "diffusers>=0.39", "transformers>=4.55", "accelerate", "peft",
#                 "datasets"]
# ///
"""Diff-Instruct* (DI*) for FLUX.2 [klein]: post-train its four-step generator.

The four-step model with LoRAs; and all its weights without a reward, which only keeps it near the base model:

    accelerate launch examples/families/train_diff_instruct_star_flux2_klein.py --prompts_file prompts.txt \\
        --mixed_precision bf16 --generator_lora_rank 64 --assistant_lora_rank 64 --shared_base assistant \\
        --gradient_checkpointing

    accelerate launch examples/families/train_diff_instruct_star_flux2_klein.py --prompts_file prompts.txt \\
        --mixed_precision bf16 --recipe sim --cfg_scale 4

The same command with `--resume_from_checkpoint latest` resumes a run.

The method is that of the paper ("David and Goliath", arXiv 2410.20898; docs/method.md), for the forward
process x_t = (1 - sigma) x0 + sigma noise, with t = 1000 sigma and a network that predicts v = noise - x0.
Latents are packed (2 x 2 patches as channels) and normalised by the VAE's batch norm, as in the stock
pipeline. The generator takes Euler steps without new noise, as that pipeline does.

The body is the SD1.5 script's. To copy this file, take
train_diff_instruct_star_sd15.py and utils/flow_matching.py along, in the same folders.
"""

import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from train_diff_instruct_star_sd15 import Family, main, parse_args
from utils.flow_matching import FlowMatching


def unpack(vae, latents):
    """Packed, normalised latents (batch, C, h, w) -> the VAE's own (batch, C / 4, 2 h, 2 w)."""
    std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    latents = latents * std.to(latents) + vae.bn.running_mean.view(1, -1, 1, 1).to(latents)
    return torch.nn.functional.pixel_shuffle(latents, 2)


class Flux2Klein(Family):
    """FLUX.2 [klein]; the default timesteps are the stock pipeline's four at 1024 pixels."""

    name, signature = "FLUX.2 klein", ("Flux2Transformer2DModel", False)
    network_class, network_name = "Flux2Transformer2DModel", "transformer"
    pipeline_class = lora_saver = "Flux2KleinPipeline"
    components = {"vae": "AutoencoderKLFlux2", "text_encoder": "Qwen3ForCausalLM",
                  "tokenizer": "AutoTokenizer", "scheduler": "FlowMatchEulerDiscreteScheduler"}
    defaults = {"pretrained_model_name_or_path": "black-forest-labs/FLUX.2-klein-base-4B",
                "generator_init": "black-forest-labs/FLUX.2-klein-4B",
                "generator_timesteps": [1000.0, 967.38, 908.14, 767.19], "resolution": 1024,
                "timestep_sampling": "logit_normal", "learning_rate": 1e-6,
                "output_dir": "diff-instruct-star-flux2-klein"}
    flags = {"max_sequence_length": {"type": "positive_int", "default": 512,
        "help": "Number of prompt tokens that the language model reads."}}
    lora_targets = ["to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj",
                    "to_add_out", "to_qkv_mlp_proj"]
    sharded_blocks = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")
    pixels_per_latent, packing = 16, 2
    process_class = FlowMatching

    def pipeline_arguments(self, config):
        return {"is_distilled": True}  # else the exported pipeline would guide by default

    def check_pipeline(self, pipeline):
        if not getattr(pipeline.tokenizer, "chat_template", True):
            raise ValueError("its tokenizer lacks a chat template; download the whole folder")

    def prompt_limit(self, pipeline, max_sequence_length):
        """The language model reads the prompt inside its chat template."""
        template = pipeline.tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True,
            enable_thinking=False)
        return pipeline.tokenizer, max(max_sequence_length - len(pipeline.tokenizer(template).input_ids), 0)

    def encode_prompts(self, pipeline, prompts, resolution, null=False, max_sequence_length=512):
        prompts = [*prompts, *[""] * (len(prompts) if null else 0)]
        embeds, ids = pipeline.encode_prompt(
            prompts, device=pipeline.text_encoder.device, max_sequence_length=max_sequence_length)
        return {"encoder_hidden_states": embeds, "txt_ids": ids}

    def architecture(self, config):
        return ((config["_class_name"], config.get("guidance_embeds")),
                (config.get("num_layers"), config.get("joint_attention_dim")))

    def forward(self, network, x_t, timesteps, conditioning):
        """The network's output for latents as tokens with their positions."""
        height, width = x_t.shape[-2:]
        sides = (1, height, width, 1)
        places = torch.cartesian_prod(*(torch.arange(side, device=x_t.device) for side in sides))
        output = network(hidden_states=x_t.flatten(2).transpose(1, 2), timestep=timesteps / 1000,
                         img_ids=places.expand(len(x_t), -1, -1), **conditioning).sample
        return output.transpose(1, 2).unflatten(2, (height, width))

    def decode(self, vae, latents):
        return vae.decode(unpack(vae, latents).to(vae.dtype)).sample.float() / 2 + 0.5


FAMILY = Flux2Klein()

if __name__ == "__main__":
    main(FAMILY, parse_args(FAMILY))
