#!/usr/bin/env python
# Copyright 2026 The Diff-Instruct* scripts authors. Licensed under the Apache License, Version 2.0.
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "diffusers>=0.39", "transformers>=4.55", "accelerate", "peft",
#                 "datasets", "sentencepiece", "protobuf", "beautifulsoup4", "ftfy"]
# ///
"""Diff-Instruct* (DI*) for PixArt-alpha, the model of the paper's first version.

From DMD's one-step PixArt-alpha at 512 pixels; and the distillation to a one-step start:

    accelerate launch examples/families/train_diff_instruct_star_pixart.py --prompts_file prompts.txt \\
        --mixed_precision bf16 --gradient_checkpointing

    accelerate launch examples/families/train_diff_instruct_star_pixart.py --prompts_file prompts.txt \\
        --recipe sim --generator_init reference

The same command with `--resume_from_checkpoint latest` resumes a run.

PixArt needs packages that requirements.txt leaves out:

    pip install --upgrade sentencepiece protobuf beautifulsoup4 ftfy

pip then says that hpsv2x asks for an older protobuf. hpsv2x works all the same: it never imports protobuf.

The method is that of the paper ("David and Goliath", arXiv 2410.20898; docs/method.md). The transformer also
predicts a variance, in the second half of its output's channels, which nothing here reads or trains.

The body is the SD1.5 script's. To copy this file, take train_diff_instruct_star_sd15.py along,
in the same folders.
"""

import importlib
import sys
from pathlib import Path

import diffusers
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from train_diff_instruct_star_sd15 import Family, main, parse_args


class PixArt(Family):
    """PixArt-alpha."""

    name, signature = "PixArt-alpha", ("PixArtTransformer2DModel", 8)
    network_class, network_name = "PixArtTransformer2DModel", "transformer"
    pipeline_class = "PixArtAlphaPipeline"
    components = {"vae": "AutoencoderKL", "text_encoder": "T5EncoderModel", "tokenizer": "AutoTokenizer",
                  "scheduler": "DDPMScheduler"}
    defaults = {"pretrained_model_name_or_path": "PixArt-alpha/PixArt-XL-2-512x512",
                "generator_init": "PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512", "generator_timesteps": [400],
                "resolution": 512, "learning_rate": 1e-6, "output_dir": "diff-instruct-star-pixart"}
    flags = {"max_sequence_length": {"type": "positive_int", "default": 120,
        "help": "Number of prompt tokens that T5 reads."}}
    lora_targets, lora_saver = ["to_k", "to_q", "to_v", "to_out.0"], "StableDiffusion3Pipeline"
    sharded_blocks = ("BasicTransformerBlock",)

    def check_libraries(self):
        """Require what reads the tokenizer, and what cleans prompts, which diffusers silently does without.

        Also add the LoRA methods that diffusers' PixArt transformer lacks; `lora_saver` writes the file.
        """
        super().check_libraries()
        for name in ("sentencepiece.sentencepiece_model_pb2", "bs4", "ftfy"):
            try:
                importlib.import_module(name)
            except Exception as error:  # of an older protobuf, not always an ImportError
                raise ValueError(f"needs {name.partition('.')[0]} ({error}): pip install --upgrade"
                                 " sentencepiece protobuf beautifulsoup4 ftfy") from error
        mixin = diffusers.loaders.PeftAdapterMixin
        if not issubclass(kind := diffusers.PixArtTransformer2DModel, mixin):
            kind.__bases__ += (mixin,)

    def encode_prompts(self, pipeline, prompts, resolution, null=False, max_sequence_length=120):
        """Only the 1024-pixel models are conditioned on the image's size and aspect ratio."""
        embeds, mask, null_embeds, null_mask = pipeline.encode_prompt(
            list(prompts), null, device=pipeline.text_encoder.device, clean_caption=True,
            max_sequence_length=max_sequence_length)
        if null:
            embeds, mask = torch.cat([embeds, null_embeds]), torch.cat([mask, null_mask])
        conditioning = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
        if pipeline.transformer.config.sample_size == 128:
            conditioning["added_cond_kwargs"] = {"resolution": embeds.new_full((len(embeds), 2), resolution),
                                                 "aspect_ratio": embeds.new_ones(len(embeds), 1)}
        return conditioning

    def architecture(self, config):
        """The hub's files still call the class by its former name, Transformer2DModel."""
        name = config["_class_name"].replace("PixArtT", "T").replace("T", "PixArtT", 1)
        return ((name, config.get("out_channels")),
                (config.get("num_layers"), config.get("caption_channels"), config.get("sample_size")))

    def forward(self, network, x_t, timesteps, conditioning):
        """The network's output without the variance."""
        return network(x_t, timestep=timesteps, **conditioning).sample.chunk(2, dim=1)[0]

    def call_arguments(self, process, timesteps):
        """Generate at the requested size, not at the nearest of the pipeline's resolution bins."""
        return process.call_arguments(timesteps) | {"use_resolution_binning": False}


FAMILY = PixArt()

if __name__ == "__main__":
    main(FAMILY, parse_args(FAMILY))
