"""Tiny random pipelines of the real classes, and a way to call the training scripts as their loops do."""

import dataclasses
import functools
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_map


REPOSITORY = Path(__file__).resolve().parents[1]
LORA_FILE = "pytorch_lora_weights.safetensors"
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "examples" / "shapes")]
# Before the libraries below are imported, here and in the processes that tests start: nothing is downloaded.
CACHE = tempfile.TemporaryDirectory()
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": CACHE.name, "TOKENIZERS_PARALLELISM": "false",
               "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
torch.set_num_threads(1)  # the models are tiny, and threads that wait for each other slow a busy machine down


@functools.cache
def load_script(name):
    (path,) = [folder / f"{name}.py" for folder in (REPOSITORY, REPOSITORY / "examples" / "families")
               if (folder / f"{name}.py").exists()]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def family():
    """Of the models: sd15, sdxl, or one of examples/families. Tests of whole runs take several."""
    return "sd15"


def load_family(name):
    """(the module that trains a family, the family): its own script, or the SD1.5 script."""
    body = load_script("train_diff_instruct_star_sd15")
    module = load_script(f"train_diff_instruct_star_{name}")
    return module if hasattr(module, "TrainingRun") else body, module.FAMILY


@pytest.fixture
def script(family, monkeypatch):
    """The module that trains the family, with it as its FAMILY."""
    module, own = load_family(family)
    monkeypatch.setattr(module, "FAMILY", own)
    return module


@pytest.fixture(autouse=True)
def fresh_process():
    """Each test its own accelerate state and signal handlers, which are those of a process."""
    from accelerate.state import AcceleratorState, GradientState

    handlers = {number: signal.getsignal(number) for number in (
        signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def tiny_clip(folder, projection=8):
    """A random CLIPModel with its processor: 16-pixel images, a vocabulary of bytes."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder.mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = alphabet + [letter + "</w>" for letter in alphabet] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 16, "bos_token": "<|startoftext|>",
                "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    special = {"bos_token_id": len(tokenizer) - 2, "eos_token_id": len(tokenizer) - 1}
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 16, "projection_dim": projection, **special}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8, "projection_dim": projection}
    torch.manual_seed(1)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)
    CLIPModel(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    image_processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


# The two families' tiny UNets; SDXL's has two text encoders of widths 16 and 24, the second pooled to 12.
UNETS = {"sd15": {"cross_attention_dim": 16},
         "sdxl": {"cross_attention_dim": 16 + 24, "addition_embed_type": "text_time",
                  "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 12 + 6 * 4}}


def tiny_unet(family="sd15", **changes):
    from diffusers import UNet2DConditionModel

    settings = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16),
                "layers_per_block": 1, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 2,
                "norm_num_groups": 4, **UNETS[family]}
    return UNet2DConditionModel(**(settings | changes))


def tiny_pipeline(folder, clip_folder, prediction_type="epsilon", family="sd15"):
    """A random StableDiffusion(XL)Pipeline: 16-pixel images, 4 x 8 x 8 latents."""
    from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    vae = tiny_vae(4)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              prediction_type=prediction_type, clip_sample=False, steps_offset=1)
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    parts = {"vae": vae, "text_encoder": CLIPTextModel.from_pretrained(clip_folder),
             "unet": tiny_unet(family), "scheduler": scheduler, "tokenizer": tokenizer}
    if family == "sd15":
        pipeline = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None,
                                           requires_safety_checker=False)
    else:
        pipeline = StableDiffusionXLPipeline(
            **parts, tokenizer_2=tokenizer, text_encoder_2=tiny_text_encoder(clip_folder, 24, 12),
            add_watermarker=False)
    pipeline.save_pretrained(folder)
    return folder


def tiny_text_encoder(clip_folder, width, projection):
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    return CLIPTextModelWithProjection(CLIPTextModelWithProjection.config_class(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, projection_dim=projection,
        bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1))


def tiny_vae(channels, **more):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=channels, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **more)


def tiny_sd3_transformer():
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(7)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=40, caption_projection_dim=16, pooled_projection_dim=20,
        out_channels=16, pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,))


def tiny_sd3(folder, clip_folder):
    """A random StableDiffusion3Pipeline without T5: 16-pixel images, 16 x 8 x 8 latents."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    StableDiffusion3Pipeline(
        vae=tiny_vae(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
                     use_post_quant_conv=False),
        text_encoder=tiny_text_encoder(clip_folder, 16, 8), tokenizer=tokenizer,
        text_encoder_2=tiny_text_encoder(clip_folder, 24, 12), tokenizer_2=tokenizer,
        text_encoder_3=None, tokenizer_3=None, transformer=tiny_sd3_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)).save_pretrained(folder)
    return folder


def tiny_t5(folder):
    """(T5 encoder, its tokenizer), its pieces single letters; `folder` gets the files that the hub has."""
    import sentencepiece
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    folder.mkdir(parents=True)
    letters = "".join(map(chr, range(33, 127)))
    with open(folder / "spiece.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([" ".join(letters)]), model_writer=file, max_sentencepiece_length=1,
            vocab_size=len(letters) + 4, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 120, "eos_token": "</s>",
        "pad_token": "<pad>", "unk_token": "<unk>"}))
    tokenizer = T5Tokenizer.from_pretrained(folder)
    torch.manual_seed(3)
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1,
                                   num_heads=2, pad_token_id=0, eos_token_id=1)), tokenizer


def tiny_pixart(folder, sample_size=8):
    """A random PixArtAlphaPipeline: 16-pixel images, 4 x 8 x 8 latents.

    As on the hub, its tokenizer is a `spiece.model` and its transformer has its class's former name.
    """
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    text_encoder, tokenizer = tiny_t5(files := folder.with_name("spiece"))
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=16, sample_size=sample_size, caption_channels=16)
    with torch.no_grad():  # at first it changes nothing
        transformer.proj_out.weight.normal_(std=0.2)
    PixArtAlphaPipeline(
        vae=tiny_vae(4), text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02)).save_pretrained(folder)
    shutil.rmtree(folder / "tokenizer")
    files.rename(folder / "tokenizer")
    for file in (folder / "model_index.json", folder / "transformer" / "config.json"):
        file.write_text(file.read_text().replace("PixArtTransformer2DModel", "Transformer2DModel"))
    return folder


def tiny_klein(folder):
    """A random Flux2KleinPipeline: 32-pixel images, 32 x 8 x 8 packed latents of half-size ones."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = Qwen2TokenizerFast(tokenizer_object=raw, pad_token="<|endoftext|>",
                                   eos_token="<|endoftext|>", unk_token=None, model_max_length=512)
    tokenizer.chat_template = ("{% for message in messages %}{{ message.role }}: {{ message.content }}"
                               "{% endfor %}")
    text_encoder = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=28,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4, max_position_embeddings=512))
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=8, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    vae.bn.running_mean.normal_(std=0.1)
    vae.bn.running_var.uniform_(0.5, 2)
    transformer = Flux2Transformer2DModel(
        in_channels=32, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    Flux2KleinPipeline(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer,
                       scheduler=scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_families(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    clip = tiny_clip(root / "clip")
    (root / "prompts.txt").write_text("\n".join(f"prompt number {index}" for index in range(13)) + "\n")
    others = {"sd3": lambda folder: tiny_sd3(folder, clip), "pixart": tiny_pixart, "flux2_klein": tiny_klein}
    made = {family: {"pipeline": make(root / family / "pipeline"), "clip": clip, "unet": "reference",
                     "prompts": root / "prompts.txt"} for family, make in others.items()}
    for family in UNETS:
        folder = root / family
        torch.manual_seed(7)
        tiny_unet(family).save_pretrained(folder / "unet")
        made[family] = {"pipeline": tiny_pipeline(folder / "pipeline", clip, family=family), "clip": clip,
                        "unet": folder / "unet", "prompts": root / "prompts.txt"}
    return made


@pytest.fixture
def tiny(tiny_families, family):
    """Tiny models: folders `pipeline`, `clip`, `unet` (another start for the generator); a file `prompts`."""
    return tiny_families[family]


@pytest.fixture
def flags(tiny):
    """The flags of a short run on the tiny models; keyword arguments change and add, True without a value."""
    def build(output_dir, **more):
        given = {"pretrained_model_name_or_path": tiny["pipeline"], "reward_model_name_or_path": tiny["clip"],
                 "generator_init": tiny["unet"], "prompts_file": tiny["prompts"], "output_dir": output_dir,
                 "resolution": 16, "train_batch_size": 4, "max_train_steps": 2, "learning_rate": 1e-3,
                 "logging_steps": 1, "mixed_precision": "no"}
        if "pickscore" not in str(more.get("reward", "pickscore")):
            del given["reward_model_name_or_path"]
        given |= more
        listed = []
        for name, value in given.items():
            if value is None or value is False:
                continue
            if isinstance(value, list) and name != "reward":
                listed += [f"--{name}", *map(str, value)]
            else:
                listed += [f"--{name}" if value is True else f"--{name}={one}"
                           for one in (value if isinstance(value, list) else [value])]
        return listed
    return build


@pytest.fixture
def curves():
    """For a test whose runs draw their curves; half a second each time."""


@pytest.fixture(autouse=True)
def without_curves(request, monkeypatch):
    """Runs in this process draw no curves unless the test asks for them."""
    find_spec = importlib.util.find_spec
    if "curves" not in request.fixturenames:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: (
            None if name == "matplotlib" else find_spec(name, *more)))


@pytest.fixture
def train(script, flags):
    """A whole run in this process."""
    def run(output_dir, **more):
        script.main(script.FAMILY, script.parse_args(script.FAMILY, flags(output_dir, **more)))
        return output_dir
    return run


def set_method(script, prepared, **changes):
    """Change settings of the method, and with them the terms."""
    prepared.method = dataclasses.replace(script.method_of(prepared.args), **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "method_of", lambda args: prepared.method)
        prepared.terms, prepared.observers = script.build_terms(prepared.args, prepared.models)


def write_state(script, folder, args, **changes):
    """The record of a checkpoint of these flags, at step 1 unless changed, without its files."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {"step": 1, "prompts_seen": 8, "skipped": {}, "first_diversity": {}, "files": {}, "prompts": None,
             "args": script.saved_args(args)} | changes
    (folder / "state.json").write_text(json.dumps(state))


@pytest.fixture
def load(script, flags, tmp_path):
    """What a run has before its first step: args, accelerator, models; and one batch for it."""
    def run(batch_size=4, **more):
        from accelerate import Accelerator

        family = script.FAMILY
        args = script.parse_args(family, flags(tmp_path / "run", train_batch_size=batch_size, **more))
        process, rewards = script.check_models(family, args), script.find_rewards(args)
        prompts = script.Prompts(script.read_prompts(args), args.seed)
        accelerator = Accelerator(cpu=True, mixed_precision=args.mixed_precision)
        script.set_seed(0)
        models = script.load_models(family, args, process, rewards, accelerator)
        method = script.method_of(args)
        terms, observers = script.build_terms(args, models)
        noise = script.sample_noise(
            args.seed, "generator", 0, range(batch_size), models.latent_shape, method, process, "cpu")
        batch = script.Batch(*noise, [prompts.at(position) for position in range(batch_size)])
        return SimpleNamespace(args=args, accelerator=accelerator, models=models, batch=batch, method=method,
                               terms=terms, observers=observers, prompts=prompts)
    return run


@pytest.fixture
def prepare(load):
    """As the loop has them, the assistant moved away from the reference."""
    def build(**more):
        prepared = load(**more)
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for parameter in prepared.models.assistant.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        return prepared
    return build


def generator_gradient(script, prepared):
    """The flat gradient of what is trained of the generator after one backward of the loop."""
    models = prepared.models
    script.generator_step(models, prepared.batch, prepared.terms, prepared.method, prepared.accelerator)
    parameters = script.trainable_parameters(models.generator).values()
    gradient = torch.cat([parameter.grad.flatten() for parameter in parameters])
    models.generator.zero_grad()
    return gradient


@pytest.fixture
def prepare_double(script, load):
    """`load` in double precision, both trained networks moved away from where they start."""
    def build(**more):
        torch.set_default_dtype(torch.float32)
        prepared = load(**{"batch_size": 2} | more)
        models, process = prepared.models, prepared.models.process
        models.process = script.VariancePreserving(process.alphas_cumprod.double(), process.prediction_type)
        models.generator_process = models.process
        others = [network for term in prepared.terms for network in term.networks.values()]
        for module in (models.reference, models.assistant, models.generator, *others, models.text_encoders):
            module.double()
        for seed, network in enumerate((models.assistant, models.generator)):
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for _, parameter in sorted(script.trainable_parameters(network).items()):
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.double)
        prepared.batch.z, prepared.batch.noise = prepared.batch.z.double(), prepared.batch.noise.double()
        torch.set_default_dtype(torch.float64)  # transformers 4 makes CLIP's causal mask in it
        return prepared
    yield build
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def warm():
    """The process of warm.py."""
    process = subprocess.Popen([sys.executable, REPOSITORY / "tests" / "warm.py"], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    yield process
    process.stdin.close()
    process.wait()


@pytest.fixture
def run_warm(warm, tmp_path):
    """Run a Python program with its arguments as a user does, in so many processes as accelerate starts them.

    Returns the exit statuses, and what was printed to standard output and to standard error, of all.
    """
    def run(*argv, cwd=tmp_path, processes=1, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        several = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        folder = Path(tempfile.mkdtemp(dir=CACHE.name))
        commands = []
        for rank in range(processes):
            more = several | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            commands.append({"argv": list(map(str, argv)), "cwd": str(cwd), "env": more | environment,
                             "stdout": str(folder / f"out-{rank}"), "stderr": str(folder / f"err-{rank}")})
        warm.stdin.write(json.dumps(commands) + "\n")
        warm.stdin.flush()
        statuses = json.loads(warm.stdout.readline())
        printed = ["".join((folder / f"{name}-{rank}").read_text() for rank in range(processes))
                   for name in ("out", "err")]
        return SimpleNamespace(statuses=statuses, returncode=max(statuses, key=abs), stdout=printed[0],
                               stderr=printed[1])
    return run


@pytest.fixture
def own_reward(tmp_path, monkeypatch):
    """A module beside the working directory with the factory `build`; returns its name for --reward.

    Of a value, or of lines that return one; `calls` has an entry for each call.
    """
    def write(body):
        module = "reward_of_" + "".join(letter if letter.isalnum() else "_" for letter in tmp_path.name)
        lines = ["calls.append(1)", *(body.splitlines() if "return" in body else [f"return {body}"])]
        (tmp_path / f"{module}.py").write_text(
            "import os\ncalls = []\ndef build():\n    def reward(images, prompts):\n"
            + "".join(f"        {line}\n" for line in lines) + "    return reward\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        return f"{module}:build"
    return write


def launcher(processes):
    """The command that starts a script in so many processes."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *(several if processes > 1 else [])]


def run_process(command, folder, **more):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", **more}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def assert_same(one, other):
    """Nested dicts and lists of tensors and values, equal to the bit."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other):
            assert_same(*pair)
    else:
        assert one == other


def halves(both):
    """What `encode_prompts(..., null=True)` returns as two: of the prompts, and of as many null prompts."""
    return [tree_map(lambda value: value.chunk(2)[half], both) for half in range(2)]


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds_per_step"} for line in lines]


# For comparing runs that add the same numbers in another order. An Adam whose epsilon is large steps in
# proportion to its gradient; at its usual 1e-8 the sign of a gradient near zero, which rounding decides, is a
# whole step. Late times divide by a small a_t, which magnifies rounding.
WELL_CONDITIONED = {"adam_epsilon": 1.0, "learning_rate": 0.1, "generator_timesteps": 399,
                    "max_timestep": 399}


def validation_images(folder, step):
    """The images (N, H, W, 3) in 0 to 255 in the grid of a validation, in the order of its JSON file."""
    from utils.card import read_validation

    side = json.loads((Path(folder) / "args.json").read_text())["resolution"]
    crops = [image for _, image in read_validation(folder, step)]
    assert all(crop.width % side == 0 for crop in crops), "they are enlarged by a whole number"
    return numpy.stack([numpy.asarray(crop.resize((side, side), Image.Resampling.NEAREST)) for crop in crops])
