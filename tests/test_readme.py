"""Every command and program of README.md and docs/ runs in a small form: tiny models, one update."""

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, load_script
from hub import Hub
from PIL import Image
from safetensors.torch import load_file


sys.path.insert(0, str(REPOSITORY / "examples"))
PAGES = {path: path.read_text() for path in (REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/*.md")))}


def blocks(language, pages=PAGES):
    """The code blocks of a language on pages, each once, also those in lists."""
    found = [re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
             for text in map(PAGES.get, pages)]
    return list(dict.fromkeys(textwrap.dedent(block) for page in found for block in page))


def command_lines(pages=PAGES):
    """The commands of pages, each once, as lists of words."""
    lines = [line for block in blocks("bash", pages) for line in block.replace("\\\n", " ").splitlines()]
    found = dict.fromkeys(tuple(shlex.split(line, comments=True)) for line in lines)
    return [list(words) for words in found if words]


COMMANDS, FIRST = command_lines(), command_lines([REPOSITORY / "README.md"])
SATURATION = next(block for block in blocks("python") if block.startswith("# saturation.py"))
OTHERS = {"python -m venv", "accelerate config", "hf auth"}  # of Python, accelerate and the hub themselves


def kind(words):
    """The program of a command line, without what starts it."""
    words = [word for word in words if "=" not in word]
    start = " ".join(words[:3]) if words[:2] == ["python", "-m"] else " ".join(words[:2])
    if start in OTHERS or words[0] == "make":
        return start
    return next(word for word in words if word.endswith((".py", ".sh")))


def commands(*kinds):
    """Those of some programs; the README's are of the quick tests too."""
    return pytest.mark.parametrize("words", [
        pytest.param(words, id=" ".join(words)[-70:], marks=[pytest.mark.slow] * (words not in FIRST))
        for words in COMMANDS if kind(words) in kinds])


SHELL = [f"examples/{name}.sh" for name in ("sdxl_paper", "sdxl_full_80gb", "sdxl_lora_24gb", "sd15")]
TRAINING = [f"train_diff_instruct_star_{family}.py" for family in ("sd15", "sdxl")]
CODE = "".join(path.read_text() for path in (REPOSITORY / TRAINING[0], *REPOSITORY.glob("utils/**/*.py")))
FAMILIES = [f"examples/families/train_diff_instruct_star_{family}.py" for family in ("flux2_klein", "sd3")]


def test_no_command_is_without_a_test():
    tested = {*OTHERS, *SHELL, *TRAINING, *FAMILIES, "eval_benchmarks.py", "make quickstart", "make test",
              "examples/reproduce_table1.sh",
              *(f"examples/{name}.py" for name in ("prepare_prompts", "generate", "export", "app", "push",
                                                   "shapes/quickstart"))}
    assert {kind(words) for words in COMMANDS} <= tested and len(COMMANDS) > 25


def tracks(text):
    """Commands in running text, `like this`."""
    return re.findall(r"`((?:make|python|accelerate|bash) [^`]+)`", text)


@pytest.mark.parametrize("command", sorted({*tracks(" ".join(PAGES.values())), *(
    " ".join(words) for words in COMMANDS if words[0] == "make")}))
def test_commands_of_the_text_name_what_exists(command):
    words = [word for word in " ".join(command.split()).split() if "=" not in word]
    if words[0] == "make":
        subprocess.run(["make", "--dry-run", words[1]], cwd=REPOSITORY, check=True, capture_output=True)
    for word in words:
        if word.endswith((".py", ".sh")):
            assert (REPOSITORY / word).exists(), word
    flags = [word for word in words if word.startswith("--")]
    if words[0] == "python" and flags:  # the benchmark and the quickstart hand on what is not their own
        text = CODE + (REPOSITORY / words[1]).read_text()
        assert all(f'"{flag}"' in text or f'"{flag[2:]}": {{' in text or flag == "--help" for flag in flags)


@commands("examples/export.py")
def test_export_commands(words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert str(importlib.import_module("export").parse_args(words[2:]).checkpoint).endswith("checkpoint-500")


# ---------------------------------------------------------------------------------------------- training


@pytest.fixture
def launched(tmp_path):
    """What a command gives to `accelerate launch`: (script, flags)."""
    def resolve(words):
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "accelerate").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tmp_path / "bin" / "accelerate").chmod(0o755)
        environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        words = [word for word in words if "ACCELERATE_USE_CPU" not in word]
        result = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        printed = result.stdout.splitlines()
        start = next(index for index, word in enumerate(printed) if word.endswith(".py"))
        if "--config_file" in printed[:start]:
            assert (REPOSITORY / printed[printed.index("--config_file") + 1]).exists()
        return printed[start], printed[start + 1:]
    return resolve


@commands(*SHELL, *TRAINING, *FAMILIES)
def test_training_commands(launched, tiny_families, tmp_path, monkeypatch, capsys, request, words):
    """One update with the command's own flags, then those that make it small; the last of a flag holds."""
    name, given = launched(words)
    family = Path(name).stem.removeprefix("train_diff_instruct_star_")
    tiny, script = tiny_families[family], load_script(Path(name).stem)
    (tmp_path / "saturation.py").write_text(SATURATION)
    (tmp_path / "my_term.py").write_text(next(block for block in blocks("python") if "# my_term.py" in block))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    init = given[given.index("--generator_init") + 1] if "--generator_init" in given else ""
    small = {"pretrained_model_name_or_path": tiny["pipeline"], "output_dir": tmp_path / "run",
             "generator_init": "reference" if init == "reference" else tiny["unet"],
             "resolution": 2 * script.FAMILY.pixels_per_latent, "max_train_steps": 1,
             "gradient_accumulation_steps": 1, "train_batch_size": 2}
    if "--dry_run" not in given:
        small |= {"prompts_file": tiny["prompts"]}
    if "--preference_unet" in given:
        small |= {"preference_unet": tiny["unet"]}
    if "--pretrained_vae_model_name_or_path" in given:
        small |= {"pretrained_vae_model_name_or_path": tiny["pipeline"] / "vae"}
    given = [word for word in given if word != "--use_8bit_adam"]  # of a package for GPUs
    if "imagereward=1" in given:  # its weights are 2 GB
        given[given.index("imagereward=1")] = f"clip:{tiny['clip']}=1"
    if not any("saturation" in word for word in given):
        small |= {"reward_model_name_or_path": tiny["clip"]}
    if "--sharding" in given:
        request.addfinalizer(lambda: torch.distributed.is_initialized()
                             and torch.distributed.destroy_process_group())
    given += [f"--{flag}={value}" for flag, value in small.items()]
    script.main(script.FAMILY, script.parse_args(script.FAMILY, given))
    printed = capsys.readouterr()
    if "--dry_run" in given:
        assert "estimated peak" in printed.out and not (tmp_path / "run").exists()
    else:
        assert "the result is in" in printed.err and (tmp_path / "run" / "README.md").exists()


QUICKSTARTS = [words for words in COMMANDS if kind(words) == "examples/shapes/quickstart.py"]


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("words", [
    ["python", "examples/shapes/quickstart.py"],
    ["python", "examples/shapes/quickstart.py", "--model", "sd3"],
    *QUICKSTARTS], ids=lambda words: words[-1])
def test_quickstart_commands(tmp_path, words):
    """Two updates, and six held-out captions; the first is what `make quickstart` runs."""
    (tmp_path / "saturation.py").write_text(SATURATION)
    code = ("import sys, quickstart, world; sys.argv = sys.argv[1:];"
            " world.HELD_OUT_CAPTIONS = world.HELD_OUT_CAPTIONS[:6]; quickstart.main()")
    result = subprocess.run(
        [sys.executable, "-c", code, *words[1:], "--output_dir=out", "--max_train_steps=2",
         "--train_batch_size=9", "--num_validation_images=1",
         *(["--min_diversity=0.01"] if "--min_diversity" in words else [])],
        cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY / "examples" / "shapes"), "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-3000:]
    assert "| true preference, before → after |" in result.stdout
    for name in ("before_after.png", "curves.png", "report.md", "benchmark/report.html",
                 "pipeline/model_index.json", "pipeline/validation/step-000002.png"):
        assert (tmp_path / "out" / name).exists(), name


# ---------------------------------------------------------------------------------- evaluation, examples


@pytest.fixture
def exported(tiny_families, tmp_path):
    """The folder of a short run of a tiny SDXL."""
    return short_run(tiny_families["sdxl"], tmp_path / "outputs" / "sdxl-paper-short")


def short_run(tiny, folder, *more):
    """A run of one update of a tiny SDXL; returns its folder."""
    script = load_script("train_diff_instruct_star_sdxl")
    script.main(script.FAMILY, script.parse_args(script.FAMILY, [
        f"--pretrained_model_name_or_path={tiny['pipeline']}", f"--generator_init={tiny['unet']}",
        f"--reward_model_name_or_path={tiny['clip']}", f"--prompts_file={tiny['prompts']}", "--resolution=16",
        "--max_train_steps=1", f"--output_dir={folder}", *more]))
    return folder


@pytest.fixture
def small(tiny_families, exported, tmp_path, monkeypatch):
    """A command's words with tiny models in the place of the hub's; the working directory is a user's."""
    unet = load_file(tiny_families["sdxl"]["unet"] / "diffusion_pytorch_model.safetensors")
    torch.save(unet, tmp_path / "unet.bin")
    places = {"stabilityai/stable-diffusion-xl-base-1.0": tiny_families["sdxl"]["pipeline"],
              "stabilityai/stable-diffusion-3.5-large": tiny_families["sd15"]["pipeline"],
              "black-forest-labs/FLUX.1-dev": tiny_families["sd15"]["pipeline"],
              "mhdang/dpo-sdxl-text2image-v1": tiny_families["sdxl"]["unet"],
              "tianweiy/DMD2/dmd2_sdxl_1step_unet_fp16.bin": tmp_path / "unet.bin"}
    monkeypatch.chdir(tmp_path)

    def replaced(words):
        for name, place in places.items():
            words = [word.replace(name, str(place)) for word in words]
        return words
    return replaced


@commands("eval_benchmarks.py")
def test_evaluation_commands(small, tiny_families, tmp_path, words):
    (tmp_path / "captions.txt").write_text("a cat\na dog\n")
    evaluation = load_script("eval_benchmarks")
    given = small(words[words.index("eval_benchmarks.py") + 1:])
    if "--variant" in given:  # tiny models have no second set of weights
        del given[given.index("--variant"):given.index("--variant") + 2]
    if "--export" in given:
        line = {"tag": "counting", "include": [], "prompt": "two cats"}
        (tmp_path / "evaluation_metadata.jsonl").write_text(f"{json.dumps(line)}\n" * 553)
        (tmp_path / "dpg_bench" / "prompts").mkdir(parents=True)
        for index in range(1065):
            (tmp_path / "dpg_bench" / "prompts" / f"{index}.txt").write_text("two cats")
    else:
        given += ["--benchmark=prompts", "--prompts_file=captions.txt"]
    given += ["--output_dir=out", "--resolution=16", "--limit=2", "--scores",
              f"pickscore:{tiny_families['sdxl']['clip']}"]
    evaluation.main(evaluation.parse_args(given))
    assert (tmp_path / "out" / "results.md").exists() and (tmp_path / "out" / "report.html").exists()


@commands("examples/generate.py")
def test_generate_commands(small, tiny_families, tmp_path, words):
    generate = importlib.import_module("generate")
    if "--lora" in words:
        short_run(tiny_families["sdxl"], tmp_path / words[words.index("--lora") + 1],
                  "--generator_lora_rank=2", "--assistant_lora_rank=2")
    generate.main(generate.parse_args(small(words[2:])))
    name, size = ("grid", (4 * 16, 2 * 16)) if "--grid" in words else ("00000", (16, 16))
    assert Image.open(tmp_path / "images" / f"{name}.png").size == size


@commands("examples/app.py")
def test_app_commands(small, monkeypatch, words):
    """The page itself needs gradio, which is optional: its models generate."""
    app, evaluation = importlib.import_module("app"), load_script("eval_benchmarks")
    monkeypatch.setattr(app.importlib.util, "find_spec", lambda name: True)
    args = app.parse_args(small(words[2:]) + ["--resolution=16"])
    assert list(args.models) == ["before", "after"]
    samplers = {name: evaluation.Sampler(model, 0, torch.device("cpu"))
                for name, model in args.models.items()}
    assert [len(images) for images in app.generate(samplers, "a cat", 2, 0).values()] == [2, 2]


@commands("examples/push.py")
def test_push_commands(small, exported, tmp_path, words):
    (tmp_path / "results" / "parti").mkdir(parents=True)
    (tmp_path / "results" / "parti" / "results.md").write_text("# parti\n\n| a | b |\n")
    with Hub() as hub:
        environment = hub.environment(tmp_path / "home") | {"HF_TOKEN": hub.token}
        script = [str(REPOSITORY / word) if word.endswith(".py") else word for word in words[1:]]
        result = subprocess.run([sys.executable, *script], cwd=tmp_path, env=environment, capture_output=True,
                                text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        assert "### parti" in hub.files["somebody/sdxl-paper-short"]["README.md"].decode()


@commands("examples/prepare_prompts.py")
def test_prepare_prompts_commands(tmp_path, monkeypatch, words):
    prepare_prompts = importlib.import_module("prepare_prompts")
    (tmp_path / "captions").mkdir()
    column = words[words.index("--caption_column") + 1] if "--caption_column" in words else "text"
    (tmp_path / "captions" / "train.jsonl").write_text(json.dumps({column: "a red fox at play"}) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [*words[1:], f"--dataset_name={tmp_path / 'captions'}"])
    prepare_prompts.main()
    assert (tmp_path / "prompts.parquet").exists()


# ---------------------------------------------------------------------------------- programs and messages


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.splitlines()[0])
def test_programs(small, tiny_families, tmp_path, block):
    """Lines of Python, with tiny models in the place of the named ones."""
    clip = tiny_families["sdxl"]["clip"]
    text = block.replace('"hpsv2.1", torch.float16).to("cuda")', f'"clip:{clip}")').replace(
        'load_official("hpsv2.1")', "load_official").replace(
        'pipeline("a lighthouse in a storm", ', 'pipeline("a lighthouse in a storm", height=16, width=16, ')
    names = {"torch": torch, "images": torch.rand(2, 3, 16, 16), "prompts": ["a", "b"],
             "pil_images": [Image.new("RGB", (20, 30))] * 2}
    exec(text, names)
    if "# my_term.py" in block:  # test_terms.py trains with it
        assert names["build"](0.5, None, None).weight == 0.5
    elif "saturation" in block:
        assert names["build"]()(torch.eye(3).view(1, 3, 1, 3), ["a"]).item() == 1
    elif "pipeline" in names:
        assert names["image"].size == (16, 16)
    else:
        assert names["scores"].shape == (2,) and names["images"].ndim == 4


def test_the_messages_of_the_troubleshooting_are_those_of_the_code():
    text = PAGES[REPOSITORY / "docs" / "reliability.md"]
    table = text.partition("## Troubleshooting")[2].partition("\n## ")[0]
    messages = re.findall(r"^\| `(.*?)` \|", table, re.MULTILINE)
    ours = re.sub(r'"\n\s+f?"', "", CODE)
    assert len(messages) > 12
    assert {message for message in messages if message not in ours} == {"CUDA out of memory"}


def anchors(text):
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if not link.startswith("http"):
            place, _, anchor = link.partition("#")
            target = (page.parent / place).resolve() if place else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text()), link


def test_the_readme_is_short_and_its_file_map_is_whole():
    readme = PAGES[REPOSITORY / "README.md"]
    assert len(readme.splitlines()) <= 220
    files = [path.name for folder in (".", "utils", "examples") for path in REPOSITORY.glob(f"{folder}/*.py")]
    pages = [f"docs/{path.name}" for path in REPOSITORY.glob("docs/*.md")]
    assert [name for name in [*files, *pages] if name not in readme and name != "__init__.py"] == []


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_header_of_a_script_lists_the_packages_that_it_imports(name):
    """PEP 723, which `uv run` reads; what torch, diffusers and the others bring along is not listed."""
    text = (REPOSITORY / f"train_diff_instruct_star_{name}.py").read_text()
    header = re.search(r"^# /// script\n(.*?)^# ///$", text, re.DOTALL | re.MULTILINE)[1].replace("\n#", "")
    listed = ast.literal_eval(header.partition("dependencies = ")[2].strip())
    brought = {"tqdm": "datasets", "huggingface_hub": "diffusers", "safetensors": "diffusers",
               "PIL": "torchvision"}
    needed = {alias.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import)
              for alias in node.names}
    needed |= {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    needed = {package.partition(".")[0] for package in needed} - {*sys.stdlib_module_names}
    assert {brought.get(package, package) for package in needed} | {"peft"} == {
        re.split("[<>=]", one)[0] for one in listed}, "peft is that of utils/lora.py"
