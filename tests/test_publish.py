"""Publishing: the short and the rich card, uploads to a stand-in of the hub, generating from there."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy
import pytest
import torch
from conftest import REPOSITORY, assert_same, load_script
from diffusers import DDPMScheduler
from hub import Hub, check_card
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from utils import cli
from utils.card import LORA_FILES, plot_curves, write_rich_card


sys.path.insert(0, str(REPOSITORY / "examples"))
generate, push, app = map(importlib.import_module, ("generate", "push", "app"))
VALIDATED = {"validation_prompts": ["a cat", "a `big` dog"], "num_validation_images": 2}
LORA = {"generator_lora_rank": 2, "assistant_lora_rank": 3, "generator_init": "reference"}
TIMESTEPS = {"sd15": 999, "sdxl": 399}
PUBLISHED = {"README.md", "model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"}


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture
def client(hub, tmp_path):
    """Run Python with the hub as its hub; returns the finished process."""
    def run(*command, **more):
        environment = hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1", **more}
        return subprocess.run([sys.executable, *map(str, command)], cwd=tmp_path, env=environment,
                              capture_output=True, text=True, timeout=300)
    return run


@pytest.fixture
def finished(script, tiny, flags, tmp_path):
    """A finished run's folder as far as its cards are made from it, without the run."""
    def build(before=VALIDATED["validation_prompts"], side=16, steps=4, **more):
        folder = tmp_path / "run"
        args = script.parse_args(script.FAMILY, flags(folder, max_train_steps=steps, **more))
        (folder / "validation").mkdir(parents=True)
        (folder / "args.json").write_text(json.dumps(script.saved_args(args)))
        records = [{"step": step, "loss_assistant": 1 / step, "y_norm": 3.0, "grad_divergence": 2.0,
                    "skipped_assistant": 1, "skipped_generator": 0, "seconds_per_step": 3600}
                   for step in range(1, steps + 1)]
        for record in records if args.reward else []:
            record |= {"reward": 0.1 * record["step"], "grad_reward": 1.0}
        for step, prompts in {0: before, steps: args.validation_prompts}.items():
            if args.validation_prompts:
                path = folder / "validation" / f"step-{step:06d}.png"
                Image.new("RGB", (side, side)).save(path)
                rows = [{"prompt": prompt, "box": [0, 0, 8, 8]} for prompt in prompts for _ in range(2)]
                path.with_suffix(".json").write_text(json.dumps(rows))
                records.append({"step": step, "validation_reward": 0.2 + step})
        records.sort(key=lambda record: record["step"])
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        kind = json.loads((tiny["pipeline"] / "model_index.json").read_text())["_class_name"]
        process = script.FAMILY.process_class.from_scheduler(json.loads(
            (tiny["pipeline"] / "scheduler" / "scheduler_config.json").read_text()))
        script.write_card(SimpleNamespace(
            args=args, step=steps, facts={"hardware": "2 x cpu", "prompts": "13"},
            models=SimpleNamespace(
                pipeline=type(kind, (), {"components": {}, "scheduler": DDPMScheduler()})(),
                family=script.FAMILY, generator_process=process)), "run")
        return folder
    return build


def assert_nowhere(token, folder, hub, *processes):
    """Neither in a file of the folder or on the hub, nor in what was printed."""
    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    published = [content for files in hub.files.values() for content in files.values()]
    printed = [text.encode() for process in processes for text in (process.stdout, process.stderr)]
    assert len(written) > 5
    assert not any(token.encode() in content for content in [*written, *published, *printed])


def error_of(process):
    """The one line with which a process ended for bad input."""
    (line,) = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and "Traceback" not in process.stderr
    return line


def top(files):
    """The files and folders of a repository's root."""
    return {path.partition("/")[0] for path in files}


def code_of(card):
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


def licensed(folder, licence):
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n# base\n")


# ------------------------------------------------------------------------------------------------ cards


VARIANTS = {"validated": (VALIDATED, "100 x pickscore"), "plain": ({"recipe": "sim"}, "none"),
            "lora": (VALIDATED | LORA, "100 x pickscore"), "kl": ({"recipe": "kl_only"}, "none"),
            "own": ({"reward": ["mine:build=2", "pickscore=3"]}, "2 x mine:build + 3 x pickscore")}


def assert_complete(card, name, family, more, reward, tmp_path):
    """What both cards are to be: valid, without gaps, paths and broken code, and true of the run."""
    assert check_card(card) == ([], [])
    for word in ("TODO", "None", "{", "}", str(tmp_path.parent)):
        assert word not in card.split("```bibtex")[0], word
    data = ModelCard(card).data.to_dict()
    assert (data["generator_timesteps"], data["resolution"]) == ([TIMESTEPS[family]], 16)
    assert ("lora" in data["tags"]) == ("generator_lora_rank" in more)
    assert data["reward"] == re.findall(r" x (\S+)", reward)
    text = card.replace("\n", " ")
    for words in (f" # {name} ", f"recipe `{more.get('recipe', 'di_star_in')}`", f"the reward is {reward}.",
                  "for 4 updates on 13 prompts", "the reference is `pipeline`"):
        assert words in text, words
    assert f"Pipeline.from_pretrained('{name}')" in code_of(card)
    compile(code_of(card), "card", "exec")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("more, reward", VARIANTS.values(), ids=VARIANTS)
def test_the_cards_are_complete_and_valid(finished, family, tmp_path, more, reward):
    folder = finished(**more)
    short = (folder / "README.md").read_text()
    assert_complete(short, "run", family, more, reward, tmp_path)
    assert ("StableDiffusionXLPipeline" in short) == (family == "sdxl") and "![" not in short

    write_rich_card(folder, "somebody/best")
    rich = (folder / "README.md").read_text()
    assert_complete(rich, "somebody/best", family, more, reward, tmp_path)
    assert "'run'" not in rich
    shown = set(re.findall(r"(?:\(|url: )images/(.*?png)", rich))
    assert shown == {path.name for path in (folder / "images").iterdir()}
    assert shown == {"curves.png", *(["before.png", "after.png", "gallery-0.png", "gallery-1.png"]
                                     if "validation_prompts" in more else [])}
    assert ("1. `a cat`\n2. `a big dog`\n" in rich) == ("validation_prompts" in more)
    rows = dict(re.findall(r"^\| (.*?) \| (.*?) \|$", rich, re.MULTILINE))
    assert rows["prompts"] == "`prompts.txt`" and rows["generator updates"] == rows["batch size"] == "4"
    assert rows["learning rates, generator and assistant"] == "0.001, 0.001"
    assert rows["skipped updates, generator and assistant"] == "0, 1"
    assert rows["LoRA ranks (0: none), generator and assistant"] == ("2, 3" if "lora" in short else "0, 0")
    assert rows["reward"] == (reward if reward == "none" else f"{reward} (`clip`)")
    assert rows.get("last logged training reward") == (None if reward == "none" else "0.4000")
    assert rows["divergence"] == ("kl" if more.get("recipe") == "kl_only" else "score")
    assert rows.get("distance") == (None if rows["divergence"] == "kl" else "pseudo_huber")
    assert [title in rich for title in ("## Limits", "## Licence", "@article{luo2024david")] == [True] * 3

    write_rich_card(folder, "somebody/best")
    assert (folder / "README.md").read_text() == rich, "a rich card can be made again"


@pytest.mark.parametrize("licences, expected", [
    (("openrail++", "openrail++"), "openrail++"), (("openrail++", "cc-by-nc-4.0"), "other"),
    (("openrail++", None), "other"), (("other", "other"), "other")])
def test_the_licence_is_that_of_the_sources(finished, tmp_path, licences, expected):
    folder = finished()
    args = json.loads((folder / "args.json").read_text())
    for flag, name, licence in zip(("pretrained_model_name_or_path", "generator_init"), ("a", "b"), licences):
        args[flag] = str(tmp_path / name)
        (tmp_path / name).mkdir()
        if licence:
            licensed(tmp_path / name, licence)
    (folder / "args.json").write_text(json.dumps(args))
    write_rich_card(folder, "run")
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == expected
    assert card.data.license_name == ("of-its-sources" if expected == "other" else None)
    assert f"`a` ({licences[0]}), `b` ({licences[1] or 'see there'})" in card.text


def test_the_rich_card_keeps_or_replaces_its_evaluation(finished):
    folder = finished()
    for tables, kept in ((["### one\n\n| a |"], "one"), ([], "one"), (["### two", "### three"], "two")):
        write_rich_card(folder, "run", tables)
        card = (folder / "README.md").read_text()
        assert card.count("## Evaluation") == card.count(f"### {kept}") == 1
        assert card.index("## Evaluation") < card.index("## Limits")
    assert "### one" not in card and "### three" in card


@pytest.mark.parametrize("before, side, shown", [
    (VALIDATED["validation_prompts"], 2000, True), (["other prompts"], 16, False)])
def test_before_and_after_are_thumbnails_of_the_same_prompts(finished, before, side, shown):
    folder = finished(before=before, side=side, **VALIDATED)
    write_rich_card(folder, "run")
    assert ("## Before and after" in (folder / "README.md").read_text()) == shown
    assert (folder / "images" / "before.png").exists() == shown
    if shown:
        assert Image.open(folder / "images" / "after.png").size == (1536, 1536)


def test_curves_show_what_was_logged_and_finite(tmp_path):
    def panels(*records):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        path.unlink(missing_ok=True)
        assert plot_curves(tmp_path / "metrics.jsonl", path) == path.exists()
        width, height = Image.open(path).size if path.exists() else (0, 0)
        return width // 432 * (height // 276)

    path = tmp_path / "curves.png"
    assert panels({"step": 1, "reward": 1.0}) == 0, "one point is no curve"
    assert panels({"step": 1, "y_norm": 1.0}, {"step": 2, "y_norm": float("nan")}) == 0
    assert panels({"step": 1, "y_norm": 0.0}, {"step": 2, "y_norm": 0.0}) == 1
    rewards = {"reward": 0.2, "validation_reward": 0.3, "other": 1.0}
    assert panels({"step": 1, **rewards}, {"step": 2, **rewards}) == 1
    more = {"loss_assistant": 1.0, "grad_divergence": 2.0, "grad_reward": 1.0, "y_norm": 3.0,
            "validation_diversity_over_noise": 0.1, "validation_diversity_over_prompts": 0.2}
    assert panels({"step": 1, **rewards, **more}, {"step": 2, **rewards, **more}) == 6


# ------------------------------------------------------------------------------------------------ uploads


@pytest.mark.slow
def test_a_run_is_published_without_checkpoints_and_logs_and_its_lines_generate(
        script, flags, client, hub, tmp_path):
    command = [script.__file__, *flags("run", push_to_hub=True, checkpointing_steps=1, **VALIDATED)]
    ran = client(*command, HF_TOKEN=hub.token)
    assert ran.returncode == 0, ran.stderr[-2000:]
    files = hub.files["somebody/run"]
    assert top(files) == PUBLISHED | {"before_after.png"}
    assert (tmp_path / "run" / "checkpoint-1").is_dir() and len(hub.commits) == 1
    card = files["README.md"].decode()
    assert "# somebody/run" in card and check_card(card) == ([], [])
    generated = client("-c", code_of(card))
    assert generated.returncode == 0, generated.stderr[-2000:]
    assert Image.open(tmp_path / "image.png").size == (16, 16)
    assert_nowhere(hub.token, tmp_path, hub, ran, generated)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl"])
def test_a_lora_of_a_base_on_the_hub_goes_on_where_its_upload_was_cut_off(
        script, tiny, flags, client, hub, tmp_path):
    licensed(tiny["pipeline"], "openrail++")
    upload = ("from huggingface_hub import *; create_repo('base');"
              f" upload_folder(repo_id='somebody/base', folder_path={str(tiny['pipeline'])!r})")
    assert client("-c", upload, HF_TOKEN=hub.token).returncode == 0
    (tiny["pipeline"] / "README.md").unlink()
    held = len(hub.uploads)
    hub.fail_after = held + 1
    command = [script.__file__, *flags(
        "run", push_to_hub=True, hub_token=hub.token, hub_model_id="somebody/lora",
        pretrained_model_name_or_path="somebody/base", **LORA | VALIDATED)]
    cut = client(*command)
    line = error_of(cut)
    assert "--push_to_hub" in line and "--resume_from_checkpoint latest" in line
    assert not hub.files["somebody/lora"]
    hub.fail_after = None
    whole = client(*command, "--resume_from_checkpoint=latest")
    assert whole.returncode == 0, whole.stderr[-2000:]
    files = hub.files["somebody/lora"]
    assert top(files) == PUBLISHED | {"before_after.png", *LORA_FILES, "text_encoder_2", "tokenizer_2"}
    sent = hub.uploads[held:]
    assert len(set(sent)) == len(sent), "what the hub had was not sent again"
    assert ModelCard(files["README.md"].decode()).data.base_model == "somebody/base"
    pushed = client(REPOSITORY / "examples" / "push.py", "--output_dir=run", "--hub_model_id=somebody/lora",
                    HF_TOKEN=hub.token)
    assert pushed.returncode == 0, pushed.stderr[-2000:]
    card = hub.files["somebody/lora"]["README.md"].decode()
    assert ModelCard(card).data.license == "openrail++" and "`somebody/base` (openrail++)" in card
    generated = client(
        REPOSITORY / "examples" / "generate.py", "--prompts", "a cat", "a dog", "--num_images_per_prompt=3",
        "--grid", "--output_dir=generated", "--pretrained_model_name_or_path", "somebody/lora")
    assert generated.returncode == 0 and "6 images" in generated.stdout, generated.stderr[-2000:]
    assert Image.open(tmp_path / "generated" / "grid.png").size == (3 * 16, 2 * 16)
    lines = client("-c", code_of(card))
    assert lines.returncode == 0, lines.stderr[-2000:]
    assert_nowhere(hub.token, tmp_path, hub, cut, whole, pushed, generated)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("more", [{}, {"mixed_precision": "bf16"}], ids=["no", "bf16"])
def test_other_parts_of_the_pipeline_equal_the_source_to_the_bit(script, train, tiny, tmp_path, more):
    """Float32 weights whose configuration says float16, as those of Stable Diffusion XL on the hub."""
    source = shutil.copytree(tiny["pipeline"], tmp_path / "source")
    parts = [path.parent for path in source.glob("*/config.json") if path.parent.name != "unet"]
    for part in parts:
        config = json.loads((part / "config.json").read_text())
        if "encoder" in part.name:
            config |= {"torch_dtype": "float16", "dtype": "float16"}
        (part / "config.json").write_text(json.dumps(config))
    out = train(tmp_path / "run", max_train_steps=1, pretrained_model_name_or_path=source, **more)
    assert len(parts) == 2 + ("text_encoder_2" in script.FAMILY.components)
    for part in parts:
        (file,) = part.glob("*.safetensors")
        assert_same(load_file(out / part.name / file.name), load_file(file))


def test_push_publishes_a_finished_run_with_its_evaluation(train, client, hub, tmp_path):
    out = train(tmp_path / "run", **VALIDATED | LORA)
    (out / "notes.txt").write_text("mine")
    (tmp_path / "parti").mkdir()
    (tmp_path / "parti" / "results.md").write_text("# parti\n\n| model | score |\n\n## Differences\n\nmany\n")
    command = [REPOSITORY / "examples" / "push.py", "--output_dir=run", "--hub_model_id=somebody/best",
               "--evaluation=parti"]
    hub.fail_after = 1
    cut = client(*command, HF_TOKEN=hub.token)
    assert error_of(cut).endswith("; the same command continues the upload")
    assert not hub.files["somebody/best"]
    hub.fail_after = None
    for _ in range(2):
        pushed = client(*command, HF_TOKEN=hub.token)
        assert pushed.returncode == 0 and "published as somebody/best" in pushed.stdout, pushed.stderr[-2000:]
    assert len(set(hub.uploads)) == len(hub.uploads), "what the hub had was not sent again"
    assert len(hub.commits) == 1, "the second time there is nothing new"
    files = hub.files["somebody/best"]
    assert top(files) == PUBLISHED | {"images", *LORA_FILES}
    card = files["README.md"].decode()
    assert card.count("## Evaluation") == card.count("### parti\n\n| model | score |") == 1
    assert "many" not in card and check_card(card) == ([], [])
    assert "# somebody/best" in card and "from_pretrained('somebody/best')" in card and "'run'" not in card
    assert {f"images/{name}.png" for name in re.findall(r"\(images/(.*?).png\)", card)} <= set(files)
    assert ("POST", "/api/validate-yaml") in hub.requests
    assert_nowhere(hub.token, tmp_path, hub, cut, pushed)


@pytest.mark.slow
def test_push_publishes_a_lora_alone_with_the_code_that_loads_it(train, client, hub, tiny, tmp_path):
    out = train(tmp_path / "run", **VALIDATED | LORA)
    short = (out / "README.md").read_text()
    pushed = client(REPOSITORY / "examples" / "push.py", "--output_dir=run", "--hub_model_id=somebody/lora",
                    "--lora_only", HF_TOKEN=hub.token)
    assert pushed.returncode == 0, pushed.stderr[-2000:]
    files = hub.files["somebody/lora"]
    assert top(files) == {"README.md", "images", "scheduler", *LORA_FILES}
    assert (out / "README.md").read_text() == short and not (out / "images").exists(), "it is left alone"
    card = files["README.md"].decode()
    assert check_card(card) == ([], []) and card.count("```python") == 1
    shutil.copytree(tiny["pipeline"], tmp_path / tiny["pipeline"].name)
    drawn = client("-c", code_of(card))
    assert drawn.returncode == 0, drawn.stderr[-2000:]
    lora = numpy.asarray(Image.open(tmp_path / "image.png"))
    assert lora.shape == (16, 16, 3)


@pytest.mark.parametrize("more, refused", [({}, True), (LORA, False)])
def test_push_refuses_a_lora_where_there_is_none(finished, tiny, capsys, more, refused):
    folder = finished(**more)
    shutil.copytree(tiny["pipeline"], folder, dirs_exist_ok=True)
    if refused:
        with pytest.raises(SystemExit):
            push.parse_args([f"--output_dir={folder}", "--lora_only"])
        assert "its card loads no LoRA, for the run trained whole weights" in capsys.readouterr().err
    else:
        assert push.parse_args([f"--output_dir={folder}", "--lora_only"]).lora_only


def test_the_gallery_has_an_image_of_each_prompt(finished):
    """In the hub's widget format, and the images are cut from the last validation."""
    folder = finished(**VALIDATED, use_ema=True, ema_decay=0.9)
    path = folder / "validation" / "step-000004.json"
    Image.effect_noise((16, 16), 50).convert("RGB").save(path.with_suffix(".png"))
    path.write_text(json.dumps([row | {"box": [4 * index, 0, 4 * index + 4, 8]}
                                for index, row in enumerate(json.loads(path.read_text()))]))
    write_rich_card(folder, "somebody/best")
    card = ModelCard.load(folder / "README.md")
    widget = card.data.to_dict()["widget"]
    assert [one["text"] for one in widget] == VALIDATED["validation_prompts"] and "<Gallery />" in card.text
    rows = dict(re.findall(r"^\| (.*?) \| (.*?) \|$", card.text, re.MULTILINE))
    assert rows["validation reward, before and after"] == "0.2000, 4.2000"
    assert rows["average of the weights (EMA)"] == "decay 0.9" and float(rows["hours of updates"]) == 4
    grid = numpy.asarray(Image.open(path.with_suffix(".png")))
    for one, left in zip(widget, (0, 8), strict=True):
        assert (numpy.asarray(Image.open(folder / one["output"]["url"])) == grid[:8, left:left + 4]).all()


@pytest.fixture
def publishable(finished, tiny):
    """The folder of a finished run with its pipeline, whose network is in shards."""
    folder = finished()
    shutil.copytree(tiny["pipeline"], folder, dirs_exist_ok=True)
    name, network = cli.network_of(cli.load_pipeline(folder))
    shutil.rmtree(folder / name)
    network.save_pretrained(folder / name, max_shard_size="20KB")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "state.json").write_text("{}")
    return folder


NETWORKS = {"sd15": "unet", "sd3": "transformer"}


@pytest.mark.slow
@pytest.mark.parametrize("family", NETWORKS)
def test_push_publishes_every_component_of_the_pipeline(publishable, family, client, hub):
    pushed = client(REPOSITORY / "examples" / "push.py", "--output_dir=run", "--hub_model_id=somebody/whole",
                    HF_TOKEN=hub.token)
    assert pushed.returncode == 0, pushed.stderr[-2000:]
    index = json.loads((publishable / "model_index.json").read_text())
    named = {name for name, part in index.items() if isinstance(part, list) and part[0]}
    assert {NETWORKS[family], "vae", "scheduler", "text_encoder", "tokenizer"} <= named
    files = {str(path.relative_to(publishable)): path.read_bytes() for path in publishable.rglob("*")
             if path.is_file() and path.parent.name in {"run", "images", *named}}
    assert len([name for name in files if name.startswith(f"{NETWORKS[family]}/diffusion")]) > 2, "shards"
    for name in ("args.json", "metrics.jsonl"):
        del files[name]
    assert hub.files["somebody/whole"] == files


DAMAGE = {
    "a missing folder": ("network", shutil.rmtree),
    "a missing configuration": ("network", lambda folder: (folder / "config.json").unlink()),
    "a missing shard": ("network", lambda folder: min(folder.glob("*.safetensors")).unlink()),
    "a missing index": ("network", lambda folder: min(folder.glob("*.index.json")).unlink()),
    "a truncated shard": ("network", lambda folder: truncate(max(folder.glob("*.safetensors")))),
    "missing weights": ("text_encoder", lambda folder: (folder / "model.safetensors").unlink()),
    "truncated weights": ("vae", lambda folder: truncate(min(folder.glob("*.safetensors")))),
    "a damaged configuration": ("text_encoder", lambda folder: truncate(folder / "config.json")),
    "an empty tokenizer": ("tokenizer", lambda folder: (shutil.rmtree(folder), folder.mkdir())),
    "a missing scheduler": ("scheduler", shutil.rmtree),
    "an empty scheduler": ("scheduler", lambda folder: (folder / "scheduler_config.json").write_text("")),
    "a cut tokenizer": ("tokenizer", lambda folder: truncate(folder / "tokenizer_config.json"))}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize("family", NETWORKS)
def test_push_refuses_a_pipeline_that_is_not_whole(publishable, family, monkeypatch, capsys):
    monkeypatch.setattr(push, "create_repo", lambda *_, **__: pytest.fail("nothing may reach the hub"))
    for part, damage in DAMAGE.values():
        part = NETWORKS[family] if part == "network" else part
        shutil.copytree(publishable / part, kept := publishable.with_name("kept"))
        damage(publishable / part)
        with pytest.raises(SystemExit) as ending:
            push.main(push.parse_args([f"--output_dir={publishable}"]))
        line = capsys.readouterr().err
        assert ending.value.code == 2 and line.count("\n") == 1
        assert line.startswith("error: ") and f"cannot be published: {part} is not whole: " in line
        shutil.rmtree(publishable / part, ignore_errors=True)
        kept.rename(publishable / part)
    assert f"{NETWORKS[family]}/*" in push.parse_args([f"--output_dir={publishable}"]).published
    (publishable / "pytorch_lora_weights.safetensors").write_bytes(b"cut")
    with pytest.raises(SystemExit):
        push.parse_args([f"--output_dir={publishable}"])
    assert "pytorch_lora_weights.safetensors is not a whole" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("more, words", [
    ({"hub_token": "hf_wrong"}, "no repository run"),
    pytest.param({"hub_model_id": "else/x"}, "no repository else/x", marks=pytest.mark.slow),
    pytest.param({}, "hf auth login", marks=pytest.mark.slow)])
def test_what_the_hub_does_not_take_is_said_before_a_model_loads(
        script, flags, client, hub, tmp_path, more, words):
    environment = {"HF_TOKEN": hub.token} if "hub_model_id" in more else {}
    ran = client(script.__file__, *flags("run", push_to_hub=True, **more), **environment)
    assert words in error_of(ran) and "hf_wrong" not in ran.stderr
    assert "Loading" not in ran.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", [
    ["--push_to_hub", "hf_planted42"], ["--push_to_hub=hf_planted42"],
    ["--push_to_hub", "--hub_token", "hf_planted42", "stray"], ["--hub_tokn=hf_planted42"]])
def test_a_token_is_in_no_message(script, capsys, given):
    for parse_args in (partial(script.parse_args, script.FAMILY), push.parse_args):
        with pytest.raises(SystemExit):
            parse_args([*given, "--output_dir=hf_planted42"])
        line = capsys.readouterr().err
        assert line.startswith("error: ") and "planted" not in line


def test_a_token_is_taken_out_of_the_command_line(script, flags, tmp_path, monkeypatch):
    """Trackers keep sys.argv, and the settings that they are given."""
    given = flags(tmp_path / "run", push_to_hub=True, hub_token="hf_secret")
    monkeypatch.setattr(sys, "argv", ["train.py", *given])
    args = script.parse_args(script.FAMILY)
    assert args.hub_token == "hf_secret" and "hf_secret" not in str(sys.argv)
    assert "hf_secret" not in json.dumps(script.saved_args(args))


@pytest.mark.parametrize("given, words", [
    (["--output_dir={out}"], "holds no finished run: "),
    (["--output_dir={out}/other"], "is not the card of a finished run"),
    (["--output_dir={out}/run", "--hub_model_id="], "--hub_model_id is empty"),
    (["--output_dir={out}/run", "--evaluation", "{out}"], "holds no results.md")])
def test_push_refuses(finished, tmp_path, capsys, given, words):
    finished()
    licensed(tmp_path / "other", "mit")
    with pytest.raises(SystemExit) as ending:
        push.parse_args([word.format(out=tmp_path) for word in given])
    assert ending.value.code == 2 and words in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- generating


@pytest.mark.parametrize("given, words", [
    ([], "exactly one of --prompts"), (["--prompts", ""], "is empty"),
    (["--prompts_file=absent.txt"], "absent.txt"),
    (["--prompts=a", "--batch_size=0"], "--batch_size"),
    (["--prompts=a", "--output_dir={out}/images"], "already contains 00000.png"),
    (["--prompts=a"], "--pretrained_model_name_or_path")])
def test_generate_refuses(tmp_path, capsys, given, words):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "00000.png").write_text("")
    with pytest.raises(SystemExit) as ending:
        generate.main(generate.parse_args([
            f"--pretrained_model_name_or_path={tmp_path}", f"--output_dir={tmp_path / 'new'}",
            *(word.format(out=tmp_path) for word in given)]))
    line = capsys.readouterr().err.splitlines()[-1]
    assert ending.value.code == 2 and line.startswith("error: ") and words in line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("timesteps", [["400.5"], ["400", "0"], ["300", "400"], ["1000"]])
def test_generate_refuses_times_that_the_schedule_has_not(tiny, tmp_path, capsys, timesteps):
    with pytest.raises(SystemExit):
        generate.main(generate.parse_args([
            f"--pretrained_model_name_or_path={tiny['pipeline']}", f"--output_dir={tmp_path / 'new'}",
            "--prompts=a", "--resolution=16", "--timesteps", *timesteps]))
    assert "--timesteps: [" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_generate_makes_an_image_from_its_seed_alone(train, tmp_path, capsys):
    out = train(tmp_path / "run", generator_timesteps=700)
    for name, more in {"one": ["--batch_size=1"], "four": [], "later": ["--seed=2"]}.items():
        generate.main(generate.parse_args([
            f"--pretrained_model_name_or_path={out}", "--prompts=a cat", "--num_images_per_prompt=4",
            f"--output_dir={tmp_path / name}", *more]))
    pixels = {name: [numpy.asarray(Image.open(tmp_path / name / f"{index:05d}.png")).astype(int)
                     for index in range(4)] for name in ("one", "four", "later")}
    assert numpy.abs(numpy.subtract(pixels["one"], pixels["four"])).max() <= 1
    assert numpy.abs(numpy.subtract(pixels["one"][2:], pixels["later"][:2])).max() <= 1
    assert numpy.abs(numpy.subtract(pixels["one"][0], pixels["one"][1])).max() > 10
    assert "4 images" in capsys.readouterr().out


@pytest.fixture
def compared(tiny):
    """Samplers of the app's models: b has another UNet than a, and c is a once more."""
    place = f"--pretrained_model_name_or_path {tiny['pipeline']}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app.importlib.util, "find_spec", lambda name: True)  # gradio is optional
        args = app.parse_args(["--resolution=16", "--timesteps", "999", "--guidance_scale=0",
                               f"--model=a {place}", f"--model=b {place} --unet {tiny['unet']}",
                               f"--model=c {place}"])
    evaluation = load_script("eval_benchmarks")
    return {name: evaluation.Sampler(model, 0, torch.device("cpu")) for name, model in args.models.items()}


def test_the_noise_of_an_image_of_the_app_depends_only_on_its_seed(compared):
    def pixels(*given):
        return {name: [numpy.asarray(image).astype(int) for image, _ in images]
                for name, images in app.generate(compared, *given).items()}
    three, one = pixels("a cat", 3, 5), pixels("a cat", 1, 6)
    for name in "abc":
        assert numpy.array_equal(three[name][1], one[name][0])
        assert numpy.abs(three[name][0] - three[name][1]).max() > 10
        assert numpy.abs(three[name][1] - three[name][2]).max() > 10
    assert numpy.array_equal(three["a"], three["c"]) and not numpy.array_equal(three["a"], three["b"])
    assert three["a"][0].shape == (480, 480, 3)  # enlarged from 16 pixels


@pytest.mark.parametrize("models", ["abc", "a"])
def test_the_page_of_the_app(compared, monkeypatch, models):
    """With a stand-in for gradio: a gallery under each name, filled by the button and by the examples."""
    gradio = MagicMock()
    gradio.Gallery.side_effect = lambda **settings: MagicMock()
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    app.build({name: compared[name] for name in models}, "a cat", 2)
    assert [call.args[0] for call in gradio.HTML.call_args_list] == [f"<h2>{name}</h2>" for name in models]
    examples, inputs, outputs, show = gradio.Examples.call_args.args
    assert len(examples) >= 5 and gradio.Examples.call_args.kwargs["run_on_click"]
    assert gradio.on.call_args.args[1:] == (show, inputs, outputs) and len(outputs) == len(models)
    assert all(gallery.render.called for gallery in outputs)
    page, random_click = gradio.Blocks.return_value.__enter__.return_value, gradio.Button.return_value.click
    for event in (page.load, random_click.return_value.then):
        event.assert_called_once_with(show, inputs, outputs)
    draw, _, drawn = random_click.call_args.args
    assert drawn is inputs[2] and len({draw() for _ in range(5)}) > 1
    assert gradio.Slider.call_args.args[2] == 2
    for seed, first in ((7, 7), (None, 0)):
        shown = show(*examples[0], 2.0, seed)
        assert list(shown) == outputs
        for images in shown.values():
            assert [caption.split(",")[0] for _, caption in images] == [f"seed {first}", f"seed {first + 1}"]


def test_the_page_of_the_app_is_served_to_this_machine_alone(monkeypatch):
    gradio = MagicMock()
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    app.main(SimpleNamespace(models={}, prompt=None, num_images=4, port=7861))
    page = gradio.Blocks.return_value.__enter__.return_value
    assert page.launch.call_args.kwargs["server_name"] == "127.0.0.1"


def test_the_page_of_the_app_builds_with_gradio(compared):
    gradio = pytest.importorskip("gradio")
    assert isinstance(app.build(compared, "a cat", 4), gradio.Blocks)


def test_the_app_refuses_images_made_elsewhere(capsys):
    with pytest.raises(SystemExit):
        app.parse_args(["--model", "a --images x"])
    assert "--images" in capsys.readouterr().err
