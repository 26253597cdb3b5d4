"""Train the shapes world's models from scratch, in the formats of the real models, and measure them.

    python examples/shapes/build_pipelines.py                  # all stages, in order
    python examples/shapes/build_pipelines.py --stages check   # measure the files in assets/

A stage whose output exists is skipped, so the same command continues an interrupted run. The stages:

    images     a pool of rendered images, pairs that share a random training caption
    clip       a small contrastive CLIP; its text half becomes the pipeline's text encoder
    vae        an AutoencoderKL, 4x, 4 latent channels
    teacher    a UNet2DConditionModel with guidance dropout -> assets/teacher, a StableDiffusionPipeline
    reward     the CLIP tuned on pairs with noisy labels by the true rule -> assets/reward
    one_step   the teacher distilled by train_diff_instruct_star_sd15.py --recipe sim -> assets/one_step
    check      measurements against bars by the ground truth, on held-out captions and noise

the same world in the format of SDXL (VAE, reward and first text encoder are shared):

    clip_2         a second CLIP, wider; its text half becomes the second text encoder
    teacher_sdxl   -> assets/teacher_sdxl, a StableDiffusionXLPipeline
    one_step_sdxl  distilled by train_diff_instruct_star_sdxl.py -> assets/one_step_sdxl
    check_sdxl

a reference that prefers light from above by itself, without a reward model:

    teacher_dpo    the teacher's UNet tuned on labelled pairs by Diffusion-DPO -> assets/teacher_dpo

a generator of four steps:

    four_step      the teacher distilled by train_diff_instruct_star_sd15.py --recipe sim -> assets/four_step

a second reward of the same kind, on which no model is trained:

    reward_2       -> assets/reward_2

the same world in the format of SD3, a flow-matching transformer:

    teacher_sd3    -> assets/teacher_sd3, a StableDiffusion3Pipeline without T5
    one_step_sd3   distilled by examples/families/train_diff_instruct_star_sd3.py -> assets/one_step_sd3
    check_sd3
"""

import argparse
import contextlib
import functools
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import logging
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

import world


REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.append(str(REPOSITORY))
from utils.cli import load_pipeline, network_of, steps_at  # noqa: E402


logging.set_verbosity_error()  # hides a warning at every cast to float32
ASSETS = Path(__file__).parent / "assets"
TOKENS = 16  # captions have 12 tokens, including start and end
GENERATOR_TIMESTEP = 999
FIRST_TIMESTEP = {"sd15": GENERATOR_TIMESTEP, "sdxl": GENERATOR_TIMESTEP, "sd3": 1000}
CHECKED = (world.HELD_OUT_CAPTIONS * 16)[:1000]  # captions of the checks
FOUR_TIMESTEPS = [999, 749, 499, 249]
UNET = {"sample_size": world.RESOLUTION // 4, "in_channels": 4, "out_channels": 4,
        "block_out_channels": (64, 64), "layers_per_block": 2, "attention_head_dim": 4, "norm_num_groups": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
COMMAND = "python examples/shapes/build_pipelines.py"


def train(model, loss_of_step, steps, learning_rate, desc, ema=None, weight_decay=0.01):
    """Minimise `loss_of_step(step)` with AdamW, warm-up, cosine decay and gradient clipping at 1."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
    model.train()
    progress = tqdm(range(steps), desc=desc, mininterval=5)
    for step in progress:
        loss = loss_of_step(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.step(parameters)
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    model.eval()


@contextlib.contextmanager
def empty_tokens_as_one(count=256):
    """Train an SD3 without T5 three times as fast, to the same figures.

    If T5 is absent, the stock pipeline appends `count` empty tokens to a caption. They are equal in every
    layer, and equal keys weigh as much as a single key whose logit is higher by log(count).
    """
    call, attend = JointAttnProcessor2_0.__call__, F.scaled_dot_product_attention
    encode = StableDiffusion3Pipeline._get_t5_prompt_embeds

    def weighted(query, key, value, **settings):
        bias = torch.zeros(key.shape[-2], dtype=query.dtype, device=query.device)
        bias[-1] = math.log(count)
        return attend(query, key, value, attn_mask=bias.expand(query.shape[-2], -1), **settings)

    @functools.wraps(call)  # diffusers inspects its signature
    def joint(*given, **settings):
        with_text = settings.get("encoder_hidden_states") is not None
        with mock.patch.object(F, "scaled_dot_product_attention", weighted if with_text else attend):
            return call(*given, **settings)

    def one_token(*given, **settings):
        return encode(*given, **settings | {"max_sequence_length": 1})

    with (mock.patch.object(JointAttnProcessor2_0, "__call__", joint),
          mock.patch.object(StableDiffusion3Pipeline, "_get_t5_prompt_embeds", one_token)):
        yield


def launch(script, *flags):
    """Launch a script of the repository as a user does, on all cores; returns its exit status."""
    return subprocess.run([
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1",
        f"--num_cpu_threads_per_process={os.cpu_count()}", "--mixed_precision=no", "--dynamo_backend=no",
        str(REPOSITORY / script), f"--resolution={world.RESOLUTION}", *flags]).returncode


def launch_training(family, *flags):
    return launch(script_of(family), f"--generator_timesteps={FIRST_TIMESTEP[family]}", *flags)


def script_of(family):
    script = f"train_diff_instruct_star_{family}.py"
    return script if (REPOSITORY / script).exists() else f"examples/families/{script}"


class Builder:
    """Run the stages, which pass intermediate results to each other as files in `work`."""

    def __init__(self, args):
        self.seed, self.device = args.seed, args.device
        self.work = Path(args.work_dir)
        self.assets = Path(args.output_dir)
        self.work.mkdir(parents=True, exist_ok=True)

    def generator(self, stage):
        return torch.Generator().manual_seed(self.seed * 1000 + STAGES.index(stage))

    # ------------------------------------------------------------------------------------------ images

    def images(self, pairs=12_000):
        path = self.work / "images.pt"
        if path.exists():
            return
        generator = self.generator("images")
        captions = torch.randint(len(world.TRAIN_CAPTIONS), (pairs,), generator=generator)
        images, lighting = [], []
        for half in range(2):
            for start in tqdm(range(0, pairs, 500), desc=f"images {half + 1}/2"):
                names = [world.TRAIN_CAPTIONS[i] for i in captions[start:start + 500]]
                rendered, truth = world.render(names, generator)
                images.append((rendered * 255).round().byte())
                lighting.append(truth["lighting"])
        torch.save({"captions": captions, "images": torch.cat(images).unflatten(0, (2, pairs)),
                    "lighting": torch.cat(lighting).unflatten(0, (2, pairs))}, path)

    def pool(self):
        """Load captions (pairs,) as indices, images (2, pairs, 3, 40, 40) as uint8, lighting (2, pairs)."""
        return torch.load(self.work / "images.pt", weights_only=True)

    # ------------------------------------------------------------------------------------------ CLIP

    def tokenizer(self, **settings):
        folder = self.work / "tokenizer"
        if not folder.exists():
            raw = RawTokenizer(models.BPE(end_of_word_suffix="</w>"))
            raw.pre_tokenizer = pre_tokenizers.Whitespace()
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            trainer = trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>",
                                          initial_alphabet=alphabet, show_progress=False)
            raw.train_from_iterator(world.TRAIN_CAPTIONS, trainer)
            learned = json.loads(raw.to_str())["model"]
            merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in learned["merges"]]
            # CLIP's order: bytes, bytes that end a word, merges, two special tokens.
            vocabulary = sorted(alphabet) + [letter + "</w>" for letter in sorted(alphabet)]
            vocabulary += [merge.replace(" ", "") for merge in merges]
            vocabulary = list(dict.fromkeys(vocabulary)) + ["<|startoftext|>", "<|endoftext|>"]
            folder.mkdir()
            (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
            (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
            settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "do_lower_case": True,
                        "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
                        "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
            (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
        return CLIPTokenizer.from_pretrained(folder, **settings)

    def keep_old_format(self, folder):
        """Copy the tokenizer files that transformers 4 reads beside those that transformers 5 writes."""
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(self.work / "tokenizer" / name, folder)

    def processor(self):
        side = world.RESOLUTION
        crop = {"height": side, "width": side}
        image_processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=crop)
        return CLIPProcessor(image_processor=image_processor, tokenizer=self.tokenizer())

    def normalize(self, images):
        """Normalise images, uint8 or in [0, 1], for the CLIP."""
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        statistics = self.processor().image_processor
        mean, std = [torch.tensor(v, device=images.device).view(3, 1, 1)
                     for v in (statistics.image_mean, statistics.image_std)]
        return (images - mean) / std

    def tokens(self, captions, **settings):
        return self.tokenizer(**settings)(captions, padding="max_length", max_length=TOKENS, truncation=True,
                                return_tensors="pt").input_ids.to(self.device)

    def clip(self):
        self.train_clip("clip", {"hidden_size": 64, "num_hidden_layers": 2, "projection_dim": 64})

    def clip_2(self):
        """Train the CLIP of the second text encoder, which is wider and pads with "!", as in SDXL."""
        self.train_clip("clip_2", {"hidden_size": 96, "num_hidden_layers": 3, "projection_dim": 96},
                        pad_token="!")

    def train_clip(self, stage, text_sizes, steps=2000, batch=128, **settings):
        folder = self.work / stage
        if folder.exists():
            return
        torch.manual_seed(self.seed)
        tokenizer = self.tokenizer(**settings)
        special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
                   "pad_token_id": tokenizer.pad_token_id}
        width = text_sizes["projection_dim"]
        text = {"vocab_size": len(tokenizer), "intermediate_size": 2 * text_sizes["hidden_size"],
                "num_attention_heads": 4, "max_position_embeddings": TOKENS, **text_sizes, **special}
        vision = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4,
                  "num_attention_heads": 4, "image_size": world.RESOLUTION, "patch_size": 8,
                  "projection_dim": width}
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)
        model = CLIPModel(config).to(self.device)
        generator, pool = self.generator(stage), self.pool()
        token_ids = self.tokens(world.TRAIN_CAPTIONS, **settings)
        images = self.normalize(pool["images"].flatten(0, 1))
        captions = pool["captions"].repeat(2)
        by_caption = [torch.nonzero(captions == i)[:, 0] for i in range(len(world.TRAIN_CAPTIONS))]

        def loss_of_step(step):
            chosen = torch.randperm(len(by_caption), generator=generator)[:batch]  # distinct captions
            rows = torch.stack([by_caption[i][torch.randint(len(by_caption[i]), (), generator=generator)]
                                for i in chosen])
            return model(input_ids=token_ids[chosen.to(self.device)],
                         pixel_values=images[rows].to(self.device), return_loss=True).loss

        train(model, loss_of_step, steps, 1e-3, stage, weight_decay=0.05)
        model.save_pretrained(folder)

    # ------------------------------------------------------------------------------------------ VAE

    def vae(self, steps=2000, batch=32):
        folder = self.work / "vae"
        if folder.exists():
            return
        torch.manual_seed(self.seed)
        model = AutoencoderKL(
            block_out_channels=(32, 48, 64), layers_per_block=1, latent_channels=4, norm_num_groups=16,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            sample_size=world.RESOLUTION,
        ).to(self.device, memory_format=torch.channels_last)
        generator, images = self.generator("vae"), self.pool()["images"].flatten(0, 1)

        def batch_of(rows):
            x = images[rows].to(self.device).float() / 127.5 - 1
            return x.contiguous(memory_format=torch.channels_last)

        def loss_of_step(step):
            x = batch_of(torch.randint(len(images), (batch,), generator=generator))
            posterior = model.encode(x).latent_dist
            decoded = model.decode(posterior.sample()).sample
            kl = posterior.kl().mean() / posterior.mean[0].numel()
            return F.l1_loss(decoded, x) + F.mse_loss(decoded, x) + 1e-4 * kl

        train(model, loss_of_step, steps, 1.5e-3, "vae")
        with torch.no_grad():
            latents = torch.cat([model.encode(batch_of(slice(i, i + 250))).latent_dist.mean
                                 for i in range(0, 4000, 250)])
        model.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        model.save_pretrained(folder)

    def finished_vae(self):
        own, shipped = self.work / "vae", self.assets / "teacher" / "vae"
        return AutoencoderKL.from_pretrained(own if own.exists() else shipped).to(self.device).float().eval()

    @torch.no_grad()
    def moments(self):
        """Return mean and standard deviation of the pool's scaled latents, (2 * pairs, 4, 10, 10) each."""
        path = self.work / "latents.pt"
        if not path.exists():
            vae = self.finished_vae()
            images = self.pool()["images"].flatten(0, 1)
            means, stds = [], []
            for start in tqdm(range(0, len(images), 250), desc="latents"):
                x = images[start:start + 250].to(self.device).float() / 127.5 - 1
                posterior = vae.encode(x).latent_dist
                means.append(posterior.mean.cpu() * vae.config.scaling_factor)
                stds.append(posterior.std.cpu() * vae.config.scaling_factor)
            torch.save({"mean": torch.cat(means), "std": torch.cat(stds)}, path)
        saved = torch.load(path, weights_only=True)
        return saved["mean"], saved["std"]

    # ------------------------------------------------------------------------------------------ teacher

    def teacher(self):
        text_encoder = CLIPTextModel.from_pretrained(self.work / "clip")
        torch.manual_seed(self.seed)
        self.train_teacher("teacher", StableDiffusionPipeline(
            text_encoder=text_encoder, unet=UNet2DConditionModel(cross_attention_dim=64, **UNET),
            tokenizer=self.tokenizer(), **self.vae_and_scheduler(), safety_checker=None,
            feature_extractor=None, requires_safety_checker=False))

    def teacher_sdxl(self):
        text_encoder = CLIPTextModel.from_pretrained(self.work / "clip")
        text_encoder_2 = CLIPTextModelWithProjection.from_pretrained(self.work / "clip_2")
        torch.manual_seed(self.seed)
        unet = UNet2DConditionModel(
            cross_attention_dim=64 + 96, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=96 + 6 * 8, use_linear_projection=True, **UNET)
        self.train_teacher("teacher_sdxl", StableDiffusionXLPipeline(
            text_encoder=text_encoder, text_encoder_2=text_encoder_2, unet=unet,
            tokenizer=self.tokenizer(), tokenizer_2=self.tokenizer(pad_token="!"),
            **self.vae_and_scheduler(), add_watermarker=False))

    def teacher_sd3(self):
        """Train SD3 without T5, with the text encoders of the reward and of the SDXL sibling (the second)."""
        clip, vae = CLIPTextModelWithProjection, self.finished_vae()
        vae.register_to_config(shift_factor=0.0)
        torch.manual_seed(self.seed)
        side, width = world.RESOLUTION // 4, 64 + 96
        transformer = SD3Transformer2DModel(
            sample_size=side, pos_embed_max_size=side, patch_size=1, in_channels=4, out_channels=4,
            num_layers=3, attention_head_dim=20, num_attention_heads=4, caption_projection_dim=80,
            qk_norm="rms_norm", joint_attention_dim=width, pooled_projection_dim=width)
        pipeline = StableDiffusion3Pipeline(
            vae=vae, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(),
            text_encoder=clip.from_pretrained(self.assets / "reward").float(), text_encoder_3=None,
            text_encoder_2=clip.from_pretrained(self.assets / "teacher_sdxl" / "text_encoder_2").float(),
            tokenizer_3=None, tokenizer=self.tokenizer(), tokenizer_2=self.tokenizer(pad_token="!"))
        with empty_tokens_as_one():
            self.train_teacher("teacher_sd3", pipeline, learning_rate=3e-3)

    def vae_and_scheduler(self):
        return {"vae": self.finished_vae(),
                "scheduler": DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                           clip_sample=False, steps_offset=1)}

    @torch.no_grad()
    def conditioning(self, pipeline, captions):
        """Return a map of rows to the network's keyword arguments; the row after the last caption is null."""
        if isinstance(pipeline, StableDiffusion3Pipeline):
            embeds, nulls, pooled, null_pooled = pipeline.encode_prompt(captions, None, None)
            embeds, pooled = torch.cat([embeds, nulls[:1]]), torch.cat([pooled, null_pooled[:1]])
            return lambda rows: {"encoder_hidden_states": embeds[rows], "pooled_projections": pooled[rows]}
        encoded = pipeline.encode_prompt(captions, device=self.device, num_images_per_prompt=1,
                                         do_classifier_free_guidance=True)
        embeds = torch.cat([encoded[0], encoded[1][:1]])
        if len(encoded) == 2:  # SD 1.5
            return lambda rows: {"encoder_hidden_states": embeds[rows]}
        pooled, side = torch.cat([encoded[2], encoded[3][:1]]), world.RESOLUTION
        time_ids = torch.tensor([[side, side, 0, 0, side, side]], device=self.device)
        return lambda rows: {
            "encoder_hidden_states": embeds[rows],
            "added_cond_kwargs": {"text_embeds": pooled[rows], "time_ids": time_ids.expand(len(rows), -1)}}

    def train_teacher(self, stage, pipeline, steps=8000, batch=64, learning_rate=1e-3):
        folder = self.assets / stage
        if folder.exists():
            return
        flow, scheduler = isinstance(pipeline, StableDiffusion3Pipeline), pipeline.scheduler
        network = pipeline.transformer if flow else pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.to(self.device)
        generator = self.generator(stage)
        mean, std = self.moments()
        captions = self.pool()["captions"].repeat(2)
        conditioning = self.conditioning(pipeline, world.TRAIN_CAPTIONS)

        def loss_of_step(step):
            rows = torch.randint(len(mean), (batch,), generator=generator)
            x0 = mean[rows] + std[rows] * torch.randn(mean[rows].shape, generator=generator)
            noise = torch.randn(x0.shape, generator=generator)
            timesteps = (1000 * torch.sigmoid(torch.randn(batch, generator=generator)) if flow  # as in SD3
                         else torch.randint(1000, (batch,), generator=generator))
            dropped = torch.rand(batch, generator=generator) < 0.1
            named = torch.where(dropped, len(world.TRAIN_CAPTIONS), captions[rows])
            more = {"timestep": timesteps.to(self.device), **conditioning(named.to(self.device))}
            if flow:
                x_t = torch.lerp(x0, noise, timesteps.view(-1, 1, 1, 1) / 1000)
                return F.mse_loss(network(x_t.to(self.device), **more).sample, (noise - x0).to(self.device))
            x_t = scheduler.add_noise(x0, noise, timesteps).to(self.device, memory_format=torch.channels_last)
            return F.mse_loss(network(x_t, **more).sample, noise.to(self.device))

        ema = EMAModel(network.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
        train(network, loss_of_step, steps, learning_rate, stage, ema)
        ema.copy_to(network.parameters())
        pipeline.to(torch.float16).save_pretrained(folder)
        for tokenizer in folder.glob("tokenizer*"):
            self.keep_old_format(tokenizer)
        for path in folder.glob("vae/config.json"):  # it names a path of this machine
            path.write_text(re.sub(r' *"_name_or_path": .*\n', "", path.read_text()))
        for path in folder.glob("text_encoder*/config.json"):  # load in float32, as diffusers loads the UNet
            path.write_text(path.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
        card(folder, stage, f"A small latent diffusion model, a stock `{type(pipeline).__name__}`.")

    def teacher_dpo(self, steps=1000, batch=32, beta=500):
        """Tune the teacher by Diffusion-DPO (arXiv 2311.12908, equation 14) on the labels of the reward.

        The loss is -log sigmoid(-beta / 2 ((|e_w|^2 - |e_ref,w|^2) - (|e_l|^2 - |e_ref,l|^2))); here |e|^2 is
        the mean squared error of the predicted noise for the preferred (w) and the other image (l) of a pair,
        at the same timestep and noise. beta is not in the paper.
        """
        folder = self.assets / "teacher_dpo"
        if folder.exists():
            return
        pipeline = StableDiffusionPipeline.from_pretrained(self.assets / "teacher").to(torch.float32)
        pipeline.to(self.device)
        reference, scheduler = pipeline.unet.eval().requires_grad_(False), pipeline.scheduler
        unet = UNet2DConditionModel(cross_attention_dim=64, **UNET).to(self.device)
        unet.load_state_dict(reference.state_dict())
        generator, pool, pairs = self.generator("teacher_dpo"), self.pool(), 8000
        mean, _ = self.moments()
        latents = mean.unflatten(0, (2, -1))[:, :pairs]
        lighting = pool["lighting"][:, :pairs]
        prefers_first = preference_labels(lighting[0], lighting[1], self.generator("reward")).bool()
        conditioning = self.conditioning(pipeline, world.TRAIN_CAPTIONS)

        def loss_of_step(step):
            rows = torch.randint(pairs, (batch,), generator=generator)
            first = prefers_first[rows].view(-1, 1, 1, 1)
            one, other = latents[0, rows], latents[1, rows]
            x0 = torch.cat([torch.where(first, one, other), torch.where(first, other, one)])
            noise = torch.randn(one.shape, generator=generator).repeat(2, 1, 1, 1)
            timesteps = torch.randint(1000, (batch,), generator=generator).repeat(2)
            x_t = scheduler.add_noise(x0, noise, timesteps).to(self.device)
            given = conditioning(pool["captions"][rows].repeat(2).to(self.device))
            errors = []
            for network in (unet, reference):
                predicted = network(x_t, timesteps.to(self.device), **given).sample
                errors.append((predicted - noise.to(self.device)).square().mean((1, 2, 3)))
            preferred, rejected = (errors[0] - errors[1]).chunk(2)
            return -F.logsigmoid(-beta / 2 * (preferred - rejected)).mean()

        ema = EMAModel(unet.parameters(), decay=0.99, use_ema_warmup=True, power=0.75)
        train(unet, loss_of_step, steps, 1e-4, "teacher_dpo", ema, weight_decay=0.0)
        ema.copy_to(unet.parameters())
        unet.half().save_pretrained(folder)
        card(folder, "teacher_dpo", "The teacher's UNet tuned on pairs by Diffusion-DPO: it prefers light"
             " from above, and no reward model took part.")

    # ------------------------------------------------------------------------------------------ reward

    def reward_2(self):
        """Train a held-out reward as good as the first, with pairs, labels and weights of another seed."""
        args = argparse.Namespace(seed=self.seed + 1, device=self.device, work_dir=self.work / "second",
                                  output_dir=self.assets)
        second = Builder(args)
        second.images()
        second.clip()
        second.reward("reward_2")

    def reward(self, name="reward", steps=900, batch=64, pairs=8000):
        folder = self.assets / name
        if folder.exists():
            return
        torch.manual_seed(self.seed)
        model = CLIPModel.from_pretrained(self.work / "clip").to(self.device)
        generator, pool, vae = self.generator("reward"), self.pool(), self.finished_vae()
        mean, _ = self.moments()
        mean = mean.unflatten(0, (2, -1))[:, :pairs].flatten(0, 1)
        decoded = []
        with torch.no_grad():  # images that people compared for PickScore were decoded from latents too
            for start in tqdm(range(0, len(mean), 250), desc="decoded pairs"):
                x = vae.decode(mean[start:start + 250].to(self.device) / vae.config.scaling_factor).sample
                decoded.append((x / 2 + 0.5).clamp(0, 1).cpu())
        images = torch.cat(decoded).unflatten(0, (2, pairs))
        token_ids = self.tokens(world.TRAIN_CAPTIONS)
        lighting = pool["lighting"][:, :pairs]
        prefers_first = preference_labels(lighting[0], lighting[1], generator)
        model.logit_scale.data.fill_(math.log(100.0))  # as in PickScore; scores stay plain cosines
        model.logit_scale.requires_grad_(False)

        def loss_of_step(step):
            rows = torch.randint(pairs, (batch,), generator=generator)
            pixel_values = self.normalize(images[:, rows].flatten(0, 1)).to(self.device)
            shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
            pixel_values = pixel_values.roll(shift, (2, 3))
            input_ids = token_ids[pool["captions"][rows].to(self.device)]
            output = model(input_ids=input_ids, pixel_values=pixel_values)
            cosine = (output.image_embeds.unflatten(0, (2, batch)) * output.text_embeds).sum(-1)
            logit = model.logit_scale.exp() * (cosine[0] - cosine[1])
            return F.binary_cross_entropy_with_logits(logit, prefers_first[rows].to(self.device))

        train(model, loss_of_step, steps, 5e-4, "reward")
        model.half().save_pretrained(folder)
        for part in (self.tokenizer(), self.processor().image_processor):  # files that all releases read
            part.save_pretrained(folder)
        self.keep_old_format(folder)
        card(folder, name, "A preference model, a stock `CLIPModel`: the score of an image is the cosine"
             " of its embedding and its caption's. It was trained on pairs labelled by light from above, with"
             " noise in the labels.")

    # ------------------------------------------------------------------------------------------ one step

    def one_step(self):
        self.distil("sd15", "one_step", self.assets / "teacher")

    def one_step_sdxl(self):
        self.distil("sdxl", "one_step_sdxl", self.assets / "teacher_sdxl")

    def one_step_sd3(self):
        self.distil("sd3", "one_step_sd3", self.assets / "teacher_sd3")

    def four_step(self):
        self.distil("sd15", "four_step", self.assets / "teacher", FOUR_TIMESTEPS)

    def distil(self, family, stage, teacher, timesteps=None):
        folder = self.assets / stage
        if folder.exists():
            return
        output = self.work / f"distillation_{stage}"
        timesteps = list(map(str, timesteps or [FIRST_TIMESTEP[family]]))
        flags = [f"--pretrained_model_name_or_path={teacher}", "--generator_init=reference",
                 f"--prompts_file={world.CAPTIONS_FILE}", f"--output_dir={output}", "--recipe=sim",
                 f"--seed={self.seed}", *DISTILLATION, "--generator_timesteps", *timesteps]
        if family == "sd3":  # in this process, where empty_tokens_as_one applies
            words = [str(REPOSITORY / script_of(family)), f"--resolution={world.RESOLUTION}", *flags]
            with empty_tokens_as_one(), mock.patch.object(sys, "argv", words):
                runpy.run_path(words[0], run_name="__main__")
        elif status := launch_training(family, *flags):
            raise SystemExit(status)
        _, network = network_of(load_pipeline(output))
        network.half().save_pretrained(folder)
        card(folder, stage, f"The teacher distilled by `train_diff_instruct_star_{family}.py --recipe sim`,"
             f" for the timesteps {', '.join(timesteps)} of the teacher's pipeline.",
             f"generator_timesteps: [{', '.join(timesteps)}]\nresolution: {world.RESOLUTION}\n")

    # ------------------------------------------------------------------------------------------ check

    @torch.no_grad()
    def check(self):
        generator = self.generator("check")
        rendered, _ = world.render(CHECKED, generator)
        vae = AutoencoderKL.from_pretrained(self.assets / "teacher" / "vae").to(self.device).float()
        decoded = torch.cat([vae(part.to(self.device) * 2 - 1).sample.cpu() for part in rendered.split(250)])
        error = ((decoded / 2 + 0.5).clamp(0, 1) - rendered).square().mean((1, 2, 3))
        print(f"vae: PSNR {(-10 * error.log10()).mean():.1f} dB (bar 27)")
        print(line("rendered images through the vae", (decoded / 2 + 0.5), CHECKED))

        first, truth_first = world.render(CHECKED, generator)
        second, truth_second = world.render(CHECKED, generator)
        model = CLIPModel.from_pretrained(self.assets / "reward").to(self.device).float()
        output = model(input_ids=self.tokens(CHECKED),
                       pixel_values=self.normalize(torch.cat([first, second])).to(self.device))
        scores = (output.image_embeds.unflatten(0, (2, -1)) * output.text_embeds).sum(-1).cpu()
        agrees = (scores[0] > scores[1]) == (truth_first["lighting"] > truth_second["lighting"])
        print(f"reward: agrees with the true preference on {agrees.float().mean():.1%} of"
              f" {len(CHECKED)} held-out pairs (bar 80%)")
        self.check_pipelines("teacher", "one_step", generator)

    def check_sdxl(self):
        self.check_pipelines("teacher_sdxl", "one_step_sdxl", self.generator("check_sdxl"))

    def check_sd3(self):
        with empty_tokens_as_one():
            self.check_pipelines("teacher_sd3", "one_step_sd3", self.generator("check_sd3"),
                                 FIRST_TIMESTEP["sd3"])

    @torch.no_grad()
    def check_pipelines(self, teacher, start, generator, timestep=GENERATOR_TIMESTEP):
        noise = torch.randn(1000, 4, world.RESOLUTION // 4, world.RESOLUTION // 4, generator=generator)
        pipeline = load_pipeline(self.assets / teacher).to(torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(self.device)
        part, plain = network_of(pipeline)
        if part == "unet":
            pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        for guidance in (1, 2, 3):
            images = sample(pipeline, CHECKED, noise, num_inference_steps=25, guidance_scale=guidance)
            print(line(f"{teacher}, 25 steps, guidance {guidance}", images, CHECKED), flush=True)
        tuned = self.assets / f"{teacher}_dpo"
        if tuned.exists():
            pipeline.unet = UNet2DConditionModel.from_pretrained(tuned).to(self.device).float()
            images = sample(pipeline, CHECKED, noise, num_inference_steps=25, guidance_scale=2)
            print(line(f"{tuned.name}, 25 steps, guidance 2", images, CHECKED), flush=True)
            pipeline.unet = plain
        if part == "unet":
            pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
        one_step = {"num_inference_steps": 1, "guidance_scale": 0, **steps_at(pipeline, [timestep])}
        print(line("undistilled start, 1 step", sample(pipeline, CHECKED, noise, **one_step), CHECKED))
        if (self.assets / start).exists():
            distilled = type(plain).from_pretrained(self.assets / start)
            setattr(pipeline, part, distilled.to(self.device).float())
            print(line(f"{start}, distilled", sample(pipeline, CHECKED, noise, **one_step), CHECKED))
        if teacher == "teacher" and (self.assets / "four_step").exists():
            unet = UNet2DConditionModel.from_pretrained(self.assets / "four_step")
            pipeline.unet = unet.to(self.device).float()
            images = sample(pipeline, CHECKED, noise, timesteps=FOUR_TIMESTEPS, guidance_scale=0,
                            generator=generator)
            print(line("four_step, distilled", images, CHECKED))
        size = sum(path.stat().st_size for path in self.assets.rglob("*") if path.is_file())
        print(f"assets: {size / 1e6:.2f} MB (bar 40 MB)")


def preference_labels(first, second, generator, temperature=0.3, flips=0.1):
    """Return 1. where the first image is preferred: Bradley-Terry on lighting, with some labels flipped."""
    prefers = torch.rand(first.shape, generator=generator) < torch.sigmoid((first - second) / temperature)
    return (prefers ^ (torch.rand(first.shape, generator=generator) < flips)).float()


def sample(pipeline, captions, noise, batch=125, desc=None, **settings):
    """Generate images (captions, 3, H, W) in [0, 1], on the CPU; `desc` names a progress bar."""
    images = []
    for start in tqdm(range(0, len(captions), batch), desc=desc, disable=desc is None):
        part = slice(start, start + batch)
        latents = noise[part].to(pipeline.device, pipeline.dtype)
        images.append(pipeline(captions[part], latents=latents, output_type="pt", height=world.RESOLUTION,
                               width=world.RESOLUTION, **settings).images.float().cpu())
    return torch.cat(images)


def line(name, images, captions):
    """Return one line of measurements by the ground truth."""
    reading = world.read(images)
    right = {key: value.float().mean().item() for key, value in world.alignment(reading, captions).items()}
    spread = world.diversity(reading, captions)
    lighting = world.true_preference(reading)
    return (f"{name}: alignment {sum(right.values()) / len(right):.1%} ("
            + ", ".join(f"{key} {value:.0%}" for key, value in right.items())
            + f"), shape found {reading['found'].float().mean():.1%}, lighting {lighting.nanmean():+.3f},"
            + " diversity "
            + ", ".join(f"{key} {value:.2f}" for key, value in spread.items()))


def card(folder, name, text, more=""):
    """Write the model card of a folder; `more` are further lines of its metadata."""
    (folder / "README.md").write_text(
        f"---\nlicense: apache-2.0\n{more}---\n\n# Shapes world: {name}\n\n{text}\n\nTrained from scratch,"
        f" without outside data or weights, by\n\n```bash\n{COMMAND}\n```\n")


DISTILLATION = ["--cfg_scale=2", "--max_train_steps=1000", "--train_batch_size=32", "--learning_rate=2e-4",
                "--assistant_learning_rate=4e-4", "--lr_scheduler=cosine", "--use_ema", "--ema_decay=0.99",
                "--checkpointing_steps=250", "--checkpoints_total_limit=1", "--resume_from_checkpoint=latest"]
STAGES = ["images", "clip", "vae", "teacher", "reward", "one_step", "check",
          "clip_2", "teacher_sdxl", "one_step_sdxl", "check_sdxl", "teacher_dpo", "four_step", "reward_2",
          "teacher_sd3", "one_step_sd3", "check_sd3"]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stages", nargs="+", choices=STAGES, default=STAGES, help="Run only these stages.")
    add("--output_dir", default=ASSETS, help="Folder for the finished models.")
    add("--work_dir", default="outputs/shapes_build", help="Folder for intermediate results.")
    add("--seed", type=int, default=0, help="Seed of all stages.")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="Device to use.")
    args = parser.parse_args()
    builder = Builder(args)
    for stage in args.stages:
        getattr(builder, stage)()


if __name__ == "__main__":
    main()
