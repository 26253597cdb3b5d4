"""Publishing: the card, the upload to a stand-in of the hub, and drawing with what was uploaded."""

import importlib
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
from conftest import REPOSITORY, load_script
from hub import Hub, check_card
from huggingface_hub import ModelCard
from PIL import Image


sys.path.insert(0, str(REPOSITORY / "examples"))
generate, push, app = map(importlib.import_module, ("generate", "push", "app"))
WATCHED = {"validation_prompts": ["a cat", "a dog"], "num_validation_images": 2}


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


def assert_nowhere(token, folder, hub, *processes):
    """Neither in a file of the folder or on the hub, nor in what was printed."""
    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    published = [content for files in hub.files.values() for content in files.values()]
    printed = [text.encode() for process in processes for text in (process.stdout, process.stderr)]
    assert len(written) > 5
    assert not any(token.encode() in content for content in [*written, *published, *printed])


def code_of(card):
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


def licensed(pipeline, licence):
    (pipeline / "README.md").write_text(f"---\nlicense: {licence}\n---\n# base\n")


# -------------------------------------------------------------------------------------------------- card


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("more", [
    WATCHED, {"recipe": "sim"}, WATCHED | {"generator_lora_rank": 2, "generator_init": "reference"}],
    ids=["watched", "plain", "lora"])
def test_the_card_says_all_and_is_valid(train, tmp_path, more):
    out = train(tmp_path / "run", **more)
    card = (out / "README.md").read_text()
    assert check_card(card) == ([], [])
    for word in ("TODO", "None", "{", "}}", str(tmp_path.parent)):
        assert word not in card.split("```bibtex")[0], word
    data = ModelCard(card).data.to_dict()
    assert (data["resolution"], data["pipeline_tag"]) == (16, "text-to-image")
    assert ("lora" in data["tags"]) == ("generator_lora_rank" in more)
    for words in (f"recipe `{more.get('recipe', 'di_star_in')}`", "13 prompts of\n`prompts.txt`", "# run",
                  "--learning_rate 0.001", "## Limits", "## Licence", "@article{luo2024david"):
        assert words.replace("\n", " ") in card.replace("\n", " ")
    pictures = {path.name for path in (out / "pictures").iterdir()}
    shown = set(re.findall(r"\(pictures/(.*?)\)", card))
    assert shown == pictures == {"curves.png", *([] if "recipe" in more else ["before.png", "after.png"])}
    assert Image.open(out / "pictures" / "curves.png").size[0] == 760


@pytest.mark.parametrize("licences, expected", [
    (("openrail++", "openrail++"), "openrail++"), (("openrail++", "cc-by-nc-4.0"), "other"),
    (("openrail++", None), "other")])
def test_the_licence_is_that_of_what_it_derives_from(script, tmp_path, monkeypatch, licences, expected):
    for name, licence in zip(("base", "start"), licences):
        (tmp_path / name).mkdir()
        if licence:
            licensed(tmp_path / name, licence)
    assert tuple(script.licence_of(str(tmp_path / name)) for name in ("base", "start")) == licences
    base, start = tmp_path / "base", tmp_path / "start"
    args = script.parse_args(["--dry_run", f"--output_dir={tmp_path}", f"--generator_init={start}",
                              f"--pretrained_model_name_or_path={base}"])
    monkeypatch.setattr(script, "save_pictures", lambda trainer: [])
    monkeypatch.setattr(script, "card_text", lambda *given: f"# of {given[-1]}\n")
    script.write_card(SimpleNamespace(args=args), "x")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == expected and f"# of {list(zip(('base', 'start'), licences))}" in card.text


# ------------------------------------------------------------------------------------------------ upload


def test_a_run_is_published_without_checkpoints_and_logs_and_its_lines_draw(
        script, flags, client, hub, tmp_path):
    command = [script.__file__, *flags("run", push_to_hub=True, checkpointing_steps=1, **WATCHED)]
    ran = client(*command, HF_TOKEN=hub.token)
    assert ran.returncode == 0, ran.stderr[-2000:]
    files = hub.files["somebody/run"]
    assert {path.partition("/")[0] for path in files} == {
        "README.md", "model_index.json", "pictures", "scheduler", "text_encoder", "tokenizer", "unet", "vae"}
    assert (tmp_path / "run" / "checkpoint-1").is_dir() and len(hub.commits) == 1
    card = files["README.md"].decode()
    assert "# somebody/run" in card and check_card(card) == ([], [])
    drawn = client("-c", code_of(card))
    assert drawn.returncode == 0, drawn.stderr[-2000:]
    assert Image.open(tmp_path / "picture.png").size == (16, 16)
    drawn = client(REPOSITORY / "examples" / "generate.py", "--pretrained_model_name_or_path", "somebody/run",
                   "--prompts", "a cat", "a dog", "--num_images_per_prompt=3", "--grid", "--output_dir=drawn")
    assert drawn.returncode == 0 and "6 pictures in" in drawn.stdout, drawn.stderr[-2000:]
    assert Image.open(tmp_path / "drawn" / "grid.png").size == (3 * 16, 2 * 16)
    assert_nowhere(hub.token, tmp_path, hub, ran, drawn)


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
        "run", push_to_hub=True, hub_token=hub.token, hub_model_id="somebody/lora", generator_lora_rank=2,
        generator_init="reference", pretrained_model_name_or_path="somebody/base", **WATCHED)]
    cut = client(*command)
    (line,) = [line for line in cut.stderr.splitlines() if line.startswith("error: ")]
    assert cut.returncode == 2 and "--push_to_hub" in line and "--resume_from_checkpoint latest" in line
    assert "Traceback" not in cut.stderr and not hub.files["somebody/lora"]
    hub.fail_after = None
    whole = client(*command, "--resume_from_checkpoint=latest")
    assert whole.returncode == 0, whole.stderr[-2000:]
    files = hub.files["somebody/lora"]
    assert {path.partition("/")[0] for path in files} == {
        "README.md", "pictures", "pytorch_lora_weights.safetensors", "scheduler"}
    sent = hub.uploads[held:]
    assert len(set(sent)) == len(sent), "what the hub had was not sent again"
    data = ModelCard(files["README.md"].decode()).data
    assert (data.license, data.base_model) == ("openrail++", "somebody/base")
    drawn = client(REPOSITORY / "examples" / "generate.py", "--prompts", "a cat",
                   "--pretrained_model_name_or_path", "somebody/lora")
    assert drawn.returncode == 0, drawn.stderr[-2000:]
    lines = client("-c", code_of(files["README.md"].decode()))
    assert lines.returncode == 0, lines.stderr[-2000:]
    assert_nowhere(hub.token, tmp_path, hub, cut, whole, drawn)


def test_push_publishes_a_finished_run_with_its_evaluation(train, client, hub, tmp_path):
    out = train(tmp_path / "run", **WATCHED)
    (out / "notes.txt").write_text("mine")
    (tmp_path / "parti").mkdir()
    (tmp_path / "parti" / "results.md").write_text("# parti\n\n| model | score |\n\n## Differences\n\nmany\n")
    command = [REPOSITORY / "examples" / "push.py", "--output_dir=run", "--hub_model_id=somebody/best",
               "--evaluation=parti"]
    for _ in range(2):
        pushed = client(*command, HF_TOKEN=hub.token)
        assert pushed.returncode == 0 and "published as somebody/best" in pushed.stdout, pushed.stderr[-2000:]
    files = hub.files["somebody/best"]
    assert not {"notes.txt", "args.json", "metrics.jsonl"} & set(files) and "model_index.json" in files
    assert len(hub.commits) == 1, "the second time there is nothing new"
    card = files["README.md"].decode()
    assert card.count("## Evaluation") == card.count("### parti\n\n| model | score |") == 1
    assert "many" not in card
    assert "# somebody/best" in card and "from_pretrained('somebody/best')" in card and "'run'" not in card
    assert ("POST", "/api/validate-yaml") in hub.requests
    assert_nowhere(hub.token, tmp_path, hub, pushed)


@pytest.mark.parametrize("more, words", [
    ({"hub_token": "hf_wrong"}, "no repository run"),
    ({"hub_model_id": "else/x"}, "no repository else/x"), ({}, "hf auth login")])
def test_what_the_hub_does_not_take_is_said_before_a_model_loads(
        script, flags, client, hub, tmp_path, more, words):
    environment = {"HF_TOKEN": hub.token} if "hub_model_id" in more else {}
    ran = client(script.__file__, *flags("run", push_to_hub=True, **more), **environment)
    assert ran.returncode == 2 and words in ran.stderr.splitlines()[-1] and "hf_wrong" not in ran.stderr
    assert "Loading" not in ran.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", [
    ["--push_to_hub", "hf_planted42"], ["--push_to_hub=hf_planted42"],
    ["--push_to_hub", "--hub_token", "hf_planted42", "stray"],
    ["--push_to_hub", "--hub_token", "hf_planted42 x"]])
def test_a_token_is_in_no_message(script, capsys, given):
    with pytest.raises(SystemExit):
        script.parse_args(given)
    line = capsys.readouterr().err
    assert line.startswith("error: ") and "planted" not in line


def test_a_token_is_taken_out_of_the_command_line(script, flags, tmp_path, monkeypatch):
    """Trackers keep sys.argv, and the settings that they are given."""
    given = flags(tmp_path / "run", push_to_hub=True, hub_token="hf_secret")
    monkeypatch.setattr(sys, "argv", ["train.py", *given])
    args = script.parse_args()
    assert args.hub_token == "hf_secret" and "hf_secret" not in str(sys.argv)
    assert "hf_secret" not in json.dumps(script.saved_args(args))


# ---------------------------------------------------------------------------------------------- examples


@pytest.mark.parametrize("given, words", [
    ([], "exactly one of --prompts"), (["--prompts", ""], "is empty"),
    (["--prompts_file=absent.txt"], "absent.txt"),
    (["--prompts=a", "--batch_size=0"], "--batch_size"), (["--prompts=a", "--sed=1"], "did you mean --seed?"),
    (["--prompts=a", "--output_dir={out}/pictures"], "has 00000.png already"),
    (["--prompts=a", "--base_model_name_or_path=/absent"], "/absent"),
    (["--prompts=a"], "give --base_model_name_or_path")])
def test_generate_refuses(tmp_path, capsys, given, words):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "00000.png").write_text("")
    with pytest.raises(SystemExit) as ending:
        generate.main(generate.parse_args([
            f"--pretrained_model_name_or_path={tmp_path}", f"--output_dir={tmp_path / 'new'}",
            *(word.format(out=tmp_path) for word in given)]))
    line = capsys.readouterr().err.splitlines()[-1]
    assert ending.value.code == 2 and line.startswith("error: ") and words in line
    assert not (tmp_path / "new").exists()


def test_generate_draws_a_picture_from_its_seed_alone(train, tmp_path, capsys):
    out = train(tmp_path / "run", generator_timestep=700)
    for name, more in {"one": ["--batch_size=1"], "four": [], "later": ["--seed=2"]}.items():
        generate.main(generate.parse_args([
            f"--pretrained_model_name_or_path={out}", "--prompts=a cat", "--num_images_per_prompt=4",
            f"--output_dir={tmp_path / name}", *more]))
    pixels = {name: [numpy.asarray(Image.open(tmp_path / name / f"{index:05d}.png")).astype(int)
                     for index in range(4)] for name in ("one", "four", "later")}
    assert numpy.abs(numpy.subtract(pixels["one"], pixels["four"])).max() <= 1
    assert numpy.abs(numpy.subtract(pixels["one"][2:], pixels["later"][:2])).max() <= 1
    assert numpy.abs(numpy.subtract(pixels["one"][0], pixels["one"][1])).max() > 10
    assert "4 pictures in" in capsys.readouterr().out


@pytest.mark.parametrize("given, words", [
    (["--output_dir={out}"], "holds no finished run: "),
    (["--output_dir={out}/run"], "is not such a run's card"),
    (["--output_dir={out}/run", "--hub_model_id="], "--hub_model_id is empty"),
    (["--output_dir={out}/run", "--hub_token=two words"], "--hub_token"),
    (["--output_dir={out}/run", "--evaluation", "{out}"], "holds no results.md")])
def test_push_refuses(tmp_path, capsys, given, words):
    (tmp_path / "run").mkdir()
    front = "---\ntags:\n- diff-instruct-star\n---\n" if "--evaluation" in given else ""
    (tmp_path / "run" / "README.md").write_text(f"{front}# run\n\n## Limits\n")
    with pytest.raises(SystemExit) as ending:
        push.parse_args([word.format(out=tmp_path) for word in given])
    assert ending.value.code == 2 and words in capsys.readouterr().err


def test_the_app_draws_each_model_from_one_seed(tiny, capsys):
    """With gradio where it is installed; its settings are those of the evaluation."""
    place = f"--pretrained_model_name_or_path {tiny['pipeline']}"
    with pytest.raises(SystemExit):
        app.parse_args(["--model", "a --images x"])
    assert "--images" in capsys.readouterr().err
    gradio = pytest.importorskip("gradio")
    args = app.parse_args(["--resolution=16", "--timesteps", "999", "--guidance_scale=0",
                           f"--model=a {place}", f"--model=b {place} --unet {tiny['unet']}"])
    evaluation = load_script("eval_benchmarks")
    painters = {name: evaluation.Painter(model, 0, torch.device("cpu"))
                for name, model in args.models.items()}
    assert isinstance(app.build(painters, "a cat"), gradio.Blocks)
