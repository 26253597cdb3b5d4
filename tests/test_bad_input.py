"""Bad input ends a run with one line that names the flag or file and the remedy, before a model loads."""

import json
import os
import shutil

import pytest
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from conftest import load_script, tiny_unet, write_state
from PIL import Image


ABSENT_TRACKER = next(kind.value for kind in LoggerType
                      if kind.value not in ("all", *map(str, get_available_trackers())))
RUN, LATEST = "{place}/run", {"resume_from_checkpoint": "latest"}

# (condition, flags, words of the line); {place} is a folder with what the fixture writes. A condition is
# listed once, whichever flags can be in it; no two are one check of the code for two flags.
TRAINING = [
    # the command line
    ("a flag that does not exist", {"zzz": 1}, "unrecognized arguments: --zzz=1; see --help"),
    ("a switch with a value after =", {"use_ema": "False"}, "--use_ema"),
    ("a flag without its value", ["--seed"], "--seed: expected one argument"),
    ("an empty value", {"caption_column": ""}, "--caption_column is empty"),
    ("text for a whole number", {"seed": "one"}, "--seed"),
    ("a fraction for a whole number", {"train_batch_size": 1.5}, "--train_batch_size"),
    ("text for a number", {"learning_rate": "small"}, "--learning_rate"),
    ("a negative whole number", {"seed": -1}, "--seed: -1 is not a whole number from 0"),
    ("a whole number beyond 32 bits", {"seed": 2**32}, "--seed"),
    ("nothing of what must be something", {"max_train_steps": 0}, "--max_train_steps"),
    ("a negative number", {"cfg_scale": -1}, "--cfg_scale"),
    ("not a number", {"reward_scale": "nan"}, "--reward_scale"),
    ("an infinite number", {"learning_rate": "inf"}, "--learning_rate"),
    ("zero where nothing would be learned", {"max_grad_norm": 0}, "--max_grad_norm: 0 is not a finite"),
    ("a fraction that is the whole", {"ema_decay": 1}, "--ema_decay: 1 is not a fraction"),
    ("a value that is none of the choices", {"recipe": "di_star"}, "--recipe"),
    ("a precision in which gradients underflow", {"mixed_precision": "fp16"}, "--mixed_precision"),
    # flags against each other
    ("a flag without the one it needs", {"shared_base": True}, "--shared_base needs --assistant_lora_rank"),
    ("timesteps in the wrong order", {"min_timestep": 700, "max_timestep": 600}, "--min_timestep 700"),
    ("steps that rise", {"generator_timesteps": [249, 999]}, "--generator_timesteps 249 999 must fall"),
    ("a step that is repeated", {"generator_timesteps": [999, 499, 499]}, "999 499 499 must fall"),
    ("no steps", ["--generator_timesteps"], "--generator_timesteps: expected at least"),
    ("a step without noise", {"generator_timesteps": [999, 0]}, "0 is not a whole number above 0"),
    ("a first step after the schedule's last", {"generator_timesteps": [1000, 499]},
     "--generator_timesteps 1000 is outside"),
    ("a watched reward without images", {"validation_reward": "clip"}, "needs --validation_prompts"),
    ("a watched reward that is trained", {"validation_prompts": ["a"], "validation_reward": "pickscore"},
     "--reward pickscore is given twice"),
    ("a preference model that is absent", {"preference_unet": "{place}/absent.safetensors"},
     "--preference_unet"),
    ("no preference", {"preference_unet": "reference"}, "reference prefers nothing"),
    ("a preference model of another family", {"preference_unet": "{place}/other_unet"},
     "other families have"),
    ("a preference without weight", {"preference_scale": 0}, "--preference_scale: 0 is not a finite"),
    ("a distance without a derivative", {"pseudo_huber_c": 0}, "0 is not a finite number above 0"),
    ("a warm-up that never ends", {"lr_warmup_steps": 3}, "--lr_warmup_steps 3 leaves no step"),
    ("a polynomial that has no step", {"lr_warmup_steps": 2, "lr_scheduler": "polynomial"},
     "--lr_warmup_steps 2 leaves no step of --max_train_steps to --lr_scheduler polynomial"),
    ("a polynomial below its end", {"learning_rate": 1e-8, "lr_scheduler": "polynomial"},
     "--lr_scheduler polynomial ends at 1e-7"),
    ("a weights file that is no place of the hub either", {"generator_init": "absent.safetensors"},
     "there is no such file"),
    ("the diversity of one image", {"validation_prompts": ["a"], "num_validation_images": 1,
                                          "min_diversity": 0.5}, "needs more than one image"),
    ("what cannot be sharded", {"sharding": "fsdp", "generator_lora_rank": 4}, "--generator_lora_rank"),
    ("a resolution that the VAE does not divide", {"resolution": 20}, "--resolution 20"),
    # prompts
    ("no prompts", {"prompts_file": None}, "exactly one of --dataset_name and --prompts_file"),
    ("prompts from two places", {"dataset_name": "some/captions"}, "exactly one of"),
    ("a prompts file that is absent", {"prompts_file": "{place}/absent.txt"},
     "absent.txt: there is no such file"),
    ("a prompts file of an unknown kind", {"prompts_file": "{place}/prompts.docx"}, "none of .txt"),
    ("a prompts file without a prompt", {"prompts_file": "{place}/blank.txt"}, "has no prompts"),
    ("a prompts file that is not UTF-8", {"prompts_file": "{place}/latin.txt"},
     "latin.txt: 'utf-8' codec can't decode"),
    ("a table that is cut short", {"prompts_file": "{place}/cut.jsonl"}, "cut.jsonl cannot be read"),
    ("a file that is not what its name says", {"prompts_file": "{place}/no.parquet"},
     "no.parquet cannot be read"),
    ("a table without the column", {"prompts_file": "{place}/caption.csv"}, "--caption_column text"),
    ("a column of missing values", {"prompts_file": "{place}/null.jsonl"}, "has no prompts"),
    ("a column of lists", {"prompts_file": "{place}/lists.jsonl"}, "holds lists or records, not text"),
    ("rows that are no records", {"prompts_file": "{place}/scalars.jsonl"}, "scalars.jsonl"),
    ("a dataset that is absent", {"prompts_file": None, "dataset_name": "{place}/absent"}, "--dataset_name"),
    ("a dataset without the split", {"prompts_file": None, "dataset_name": "{place}/captions",
                                      "dataset_split": "test"}, "--dataset_name"),
    ("a stream without the column", {"prompts_file": None, "dataset_name": "{place}/captions",
                                     "streaming": True}, "--caption_column text"),
    # rewards
    ("a reward that does not exist", {"reward": "no_such_reward"}, "no_such_reward"),
    ("a reward given twice", {"reward": ["pickscore=1", "pickscore=2"]}, "--reward pickscore is given twice"),
    ("a scale that is no number", {"reward": "pickscore=much"}, "invalid name_and_scale value"),
    ("a scale of zero", {"reward": "pickscore", "reward_scale": 0}, "needs a scale of its own"),
    ("a scale meant for another reward", {"reward": "hpsv2.1"}, "needs a scale of its own"),
    ("a reward's weights that are not on the hub", {"reward": "hpsv2.1=1"}, "xswu/HPSv2"),
    ("a reward's weights that are absent", {"reward": "imagereward:/absent=1"}, "/absent"),
    ("a module that is absent", {"reward": "no_such_module:build=1"}, "no_such_module"),
    ("a module without the factory", {"reward": "own_reward:make=1"}, "own_reward"),
    ("a module that raises", {"reward": "broken_reward:build=1"}, "division by zero"),
    # models
    ("a pipeline that is absent", {"pretrained_model_name_or_path": "{place}/absent"},
     "absent: there is no such file or folder"),
    ("a folder without a UNet", {"pretrained_model_name_or_path": "{place}/captions"}, "has no VAE"),
    ("a UNet's configuration that is none", {"reference_unet": "{place}/no_unet"}, "--reference_unet"),
    ("a UNet of another size", {"reference_unet": "{place}/wide_unet"}, "or not of the reference's width"),
    ("a VAE of other latents", {"reward_vae": "{place}/vae"}, "other channels than the reference's"),
    ("a reference that is itself", {"reference_unet": "reference"},
     "--reference_unet reference has no network"),
    ("a reference that is an absent file", {"reference_unet": "{place}/absent.safetensors"},
     "--reference_unet"),
    ("a UNet of another family", {"generator_init": "{place}/other_unet"}, "other families have scripts"),
    ("a weights file that is absent", {"generator_init": "{place}/absent.safetensors"}, "absent.safetensors"),
    ("a model of another kind", {"reward_vae": "{place}/other_unet"}, "--reward_vae"),
    ("a schedule of flow matching", {"pretrained_model_name_or_path": "{place}/flow"},
     "must predict epsilon"),
    ("a kind of prediction that is unknown", {"pretrained_model_name_or_path": "{place}/odd"},
     "must predict epsilon"),
    ("no signal at the generator's timestep", {"pretrained_model_name_or_path": "{place}/zero_snr",
                                                 "generator_timesteps": 999},
     "zero terminal"),
    ("a timestep after the schedule's last", {"max_timestep": 1000}, "--max_timestep 1000 is outside"),
    # where it goes
    ("an output folder that is a file", {"output_dir": "{place}/blank.txt"}, "blank.txt is a file"),
    ("an output folder in a file", {"output_dir": "{place}/blank.txt/new"}, "blank.txt is a file"),
    ("an output folder that is a broken link", {"output_dir": "{place}/broken"}, "is a file, a broken link"),
    ("an output folder with too long a name", {"output_dir": "x" * 300}, "File name too long"),
    ("an output folder with something else", {"output_dir": "{place}/captions"},
     "is not empty and holds no run"),
    ("an output folder with another run", {"output_dir": RUN}, "--resume_from_checkpoint latest"),
    ("a tracker that is not installed", {"report_to": ABSENT_TRACKER}, f"{ABSENT_TRACKER} is not installed"),
    ("a name that the hub does not take", {"push_to_hub": True, "hub_model_id": "a/b/c"}, "--hub_model_id"),
    # going on
    ("a folder that is no checkpoint", {"resume_from_checkpoint": "{place}/captions"},
     "not of a complete checkpoint"),
    ("a checkpoint of other flags", {"output_dir": RUN, "cfg_scale": 3.0} | LATEST,
     "--cfg_scale is 3.0, but"),
    ("a checkpoint of another batch size", {"output_dir": RUN, "train_batch_size": 2} | LATEST,
     "--train_batch_size x gradient_accumulation_steps x processes is 2"),
    ("a checkpoint of more steps", {"output_dir": RUN, "max_train_steps": 1} | LATEST,
     "is at step 2 already; raise it"),
    ("a checkpoint of another version", {"resume_from_checkpoint": "{place}/old"},
     "old: state.json is not of"),
    ("prompts that have changed", {"resume_from_checkpoint": "{place}/changed"}, "the prompts have changed"),
    ("a checkpoint without one of its files", {"resume_from_checkpoint": "{place}/part"},
     "shard-1.safetensors'; take another"),
    ("a checkpoint whose record is damaged", {"resume_from_checkpoint": "{place}/damaged"},
     "damaged: state.json is not of"),
]

EVALUATION = [
    ("no model", {"pretrained_model_name_or_path": None}, "--pretrained_model_name_or_path and --images"),
    ("a model from two places", {"images": "folder"}, "exactly one"),
    ("a pipeline that is absent", {"pretrained_model_name_or_path": "/absent"},
     "/absent: there is no such file or folder"),
    ("a model without a name", {"model": ["--images x"], "name": None}, "must begin with the model's name"),
    ("a name for several models", {"model": ["a"]}, "--name"),
    ("two models of one name", {"model": ["a", "a"], "name": None}, "two models"),
    ("a misspelt flag of one model", {"model": ["a --timestep 3"], "name": None},
     "unrecognized arguments: --timestep 3"),
    ("a quotation mark that stays open", {"model": ["a --lora 'x"], "name": None}, "cannot be split"),
    ("steps that contradict the timesteps", {"timesteps": [399]}, "--num_inference_steps 2 contradicts"),
    ("how to sample images that exist already", {"images": "{place}", "pretrained_model_name_or_path": None},
     "has no effect with --images"),
    ("a scheduler that does not exist", {"scheduler": "NoScheduler"}, "--scheduler NoScheduler"),
    ("a scheduler that is none", {"scheduler": "UNet2DConditionModel"}, "is not a scheduler of diffusers"),
    ("an empty value", {"scheduler": " "}, "--scheduler is empty"),
    ("a UNet that is absent", {"unet": "{place}/absent"}, "--unet"),
    ("a LoRA that is absent", {"lora": "./absent"}, "--lora ./absent: there is no such file"),
    ("no folder of images", {"images": "/absent", "pretrained_model_name_or_path": None, "resolution": None,
                               "num_inference_steps": None}, "--images /absent is not a folder"),
    ("images that are not as many as the prompts", {
        "images": "{place}/photos", "pretrained_model_name_or_path": None, "resolution": None,
        "num_inference_steps": None}, "has 2 images, but the benchmark needs 7"),
    ("a score that does not exist", {"scores": ["no_such_score"]}, "--scores no_such_score"),
    ("a score given twice", {"scores": ["imagereward", "imagereward"]}, "a score is repeated"),
    ("a package's scorer without its file", {"scores": ["official:hpsv2.1:absent.pt"]}, "absent.pt"),
    ("one half of what FID needs", {"inception": "absent.pt"}, "--fid_real"),
    ("FID's files that are absent", {"fid_real": "/absent", "inception": "/absent"},
     "/absent does not exist"),
    ("FID's size without FID", {"fid_size": 64}, "--fid_size has no effect"),
    ("a benchmark without its prompts", {"prompts_file": None}, "no --prompts_file is given"),
    ("prompts of another benchmark", {"benchmark": "parti"}, "Prompt"),
    ("a column for a benchmark with its own", {"benchmark": "hpsv2", "caption_column": "caption"},
     "--caption_column has no effect"),
    ("a folder with something else", {"output_dir": "{place}", "name": "captions"}, "contains no results"),
]


@pytest.fixture
def place(tmp_path, tiny, family, monkeypatch):
    """The folder of the files that are meant above; the working directory too."""
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    for name, content in {
            "prompts.docx": "a cat", "blank.txt": "\n  \n", "latin.txt": "caf\xe9".encode("latin-1"),
            "cut.jsonl": '{"text": \n', "no.parquet": "no parquet", "caption.csv": "caption\na cat\n",
            "lists.jsonl": '{"text": ["a cat"]}\n', "scalars.jsonl": "1\n2\n", "x.safetensors": "",
            "ending_reward.py": "raise SystemExit(0)", "no_unet/config.json": "[]",
            "typed/state.json": '{"step": "2", "files": []}',
            "null.jsonl": '{"text": null}\n',
            "captions/train.jsonl": '{"caption": "a cat"}\n',
            "own_reward.py": "number, build = 3, lambda: lambda images, prompts: images.mean((1, 2, 3))",
            "broken_reward.py": "1 / 0", "old/state.json": '{"step": 1}', "damaged/state.json": "{",
            "part/state.json": "{}", "run/args.json": "{}"}.items():
        write(name, content)
    other = "sdxl" if family == "sd15" else "sd15"
    tiny_unet(other).save_pretrained(tmp_path / "other_unet")
    config = json.loads((tiny["pipeline"] / "scheduler" / "scheduler_config.json").read_text())
    for name, changes in {"flow": {"_class_name": "FlowMatchEulerDiscreteScheduler"},
                          "odd": {"prediction_type": "flow"},
                          "zero_snr": {"rescale_betas_zero_snr": True}}.items():
        shutil.copytree(tiny["pipeline"], tmp_path / name)
        write(f"{name}/scheduler/scheduler_config.json", json.dumps(config | changes))
    tiny_unet(family, cross_attention_dim=48).save_pretrained(tmp_path / "wide_unet")
    vae = json.loads((tiny["pipeline"] / "vae" / "config.json").read_text())
    write("vae/config.json", json.dumps(vae | {"latent_channels": 8}))
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for index in range(2):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "photos" / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def listed(given, place):
    """As a command line has it, after the flags of the run."""
    if isinstance(given, list):
        return given
    return {name: value.format(place=place) if isinstance(value, str) else value
            for name, value in given.items()}


def held(place):
    return {path: path.read_bytes() if path.is_file() else None for path in place.rglob("*")
            if "__pycache__" not in path.parts}


def refused(start, place, words, capfd):
    """One line, status 2, nothing changed."""
    before = held(place)
    capfd.readouterr()
    with pytest.raises(SystemExit) as ending:
        start()
    (line,) = capfd.readouterr().err.splitlines()
    assert ending.value.code == 2 and line.startswith("error: ") and words in line, line
    assert held(place) == before


@pytest.mark.parametrize("condition, given, words", TRAINING, ids=[row[0] for row in TRAINING])
def test_training_refuses(script, flags, place, capfd, monkeypatch, condition, given, words):
    args = script.parse_args(script.FAMILY, flags(place / "new"))
    write_state(script, place / "run" / "checkpoint-2", args, step=2)
    write_state(script, place / "part", args, files={"shard-1.safetensors": 2})
    write_state(script, place / "changed", args, prompts="others")
    monkeypatch.setattr(script, "load_models", None)
    given = listed(given, place)
    output_dir = given.pop("output_dir", place / "new") if isinstance(given, dict) else place / "new"
    words_given = flags(output_dir, **given) if isinstance(given, dict) else [*flags(output_dir), *given]
    refused(lambda: script.main(script.FAMILY, script.parse_args(script.FAMILY, words_given)), place, words,
            capfd)


@pytest.fixture
def evaluation_flags(tiny, place):
    (place / "prompts.txt").write_text("".join(f"prompt {index}\n" for index in range(7)))
    return {"benchmark": "prompts", "prompts_file": place / "prompts.txt", "output_dir": place / "new",
            "scores": [f"pickscore:{tiny['clip']}"], "num_inference_steps": 2, "resolution": 16,
            "pretrained_model_name_or_path": tiny["pipeline"], "name": "tiny"}


@pytest.mark.parametrize("condition, given, words", EVALUATION, ids=[row[0] for row in EVALUATION])
def test_the_evaluation_refuses(evaluation_flags, place, capfd, monkeypatch, condition, given, words):
    evaluation = load_script("eval_benchmarks")
    for name in ("load_scorers", "load_pipeline"):
        monkeypatch.setattr(evaluation, name, None)
    command = []
    for name, value in (evaluation_flags | listed(given, place)).items():
        if name == "model":
            command += [f"--model={one}" for one in value]
        elif value is not None:
            command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    refused(lambda: evaluation.main(evaluation.parse_args(command)), place, words, capfd)


def test_the_conditions_are_sixty_or_more_of_training_alone():
    assert len({condition for condition, *_ in TRAINING}) == len(TRAINING) >= 60


def test_two_runs_do_not_write_into_one_folder(script, train, flags, tmp_path, monkeypatch, capsys):
    out = train(tmp_path / "run", max_train_steps=1)
    started = []
    train_step = script.train_step

    def meanwhile(trainer):
        if not started:
            started.append(True)
            with pytest.raises(SystemExit):
                train(out, resume_from_checkpoint="latest", max_train_steps=2)
        train_step(trainer)
    monkeypatch.setattr(script, "train_step", meanwhile)
    train(out, resume_from_checkpoint="latest", max_train_steps=2)
    assert "another run is writing into it" in capsys.readouterr().err
    assert os.path.exists(out / "checkpoint-2" / "state.json")


def test_a_run_does_not_start_over_one_that_came_and_went_meanwhile(script, train, flags, tmp_path, capsys):
    args = script.parse_args(script.FAMILY, flags(tmp_path / "run", max_train_steps=1))
    train(tmp_path / "run", max_train_steps=1)
    before = held(tmp_path / "run")
    with pytest.raises(SystemExit) as ending:
        script.main(script.FAMILY, args)
    assert ending.value.code == 2 and "another run has been there" in capsys.readouterr().err
    assert held(tmp_path / "run") == before


def test_a_checkpoint_of_a_version_without_a_flag_is_refused(script, flags, tmp_path, capsys):
    args = script.parse_args(script.FAMILY, flags(tmp_path / "run"))
    write_state(script, tmp_path / "run" / "checkpoint-1", args)
    record = tmp_path / "run" / "checkpoint-1" / "state.json"
    state = json.loads(record.read_text())
    del state["args"]["cfg_mode"]
    record.write_text(json.dumps(state))
    (tmp_path / "run" / "args.json").write_text("{}")
    with pytest.raises(SystemExit) as ending:
        script.parse_args(script.FAMILY, flags(tmp_path / "run", resume_from_checkpoint="latest"))
    assert ending.value.code == 2 and "--cfg_mode is in, but" in capsys.readouterr().err
