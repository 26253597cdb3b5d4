"""Several images of a prompt, diversity, distances, sweeps, marks and the page of eval_benchmarks.py."""

import importlib.machinery
import json
import re
import shutil
import subprocess
import sys
import types

import numpy
import pandas
import pytest
import torch
from cleanfid.resize import build_resizer
from PIL import Image
from test_eval import PROMPTS, evaluation, extractor, flags, images, refused, run
from test_rewards import places, written
from torchvision.transforms.functional import pil_to_tensor

from utils import benchmarks, diversity, fid, report


def results_of(folder):
    return json.loads((folder / "results.json").read_text())["models"]


def geneval(path, prompts=553):
    tags = ("single_object", "two_object", "counting")
    lines = [{"tag": tags[index % 3], "include": [{"class": "cat", "count": 1}], "prompt": f"a photo {index}"}
             for index in range(prompts)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


# ------------------------------------------------------------------------------------------- prompt sets


def test_geneval_is_read_with_its_metadata(tmp_path):
    lines = geneval(tmp_path / "metadata.jsonl")
    prompts = benchmarks.load_benchmark("geneval", tmp_path / "metadata.jsonl")
    assert [prompt.text for prompt in prompts] == [line["prompt"] for line in lines]
    assert prompts[1].group == "two_object" and json.loads(prompts[5].item) == lines[5]
    for name, wrong in (("list", "[]\n" * 553), ("empty", "{}"), ("text", "a cat")):
        (tmp_path / name).write_text(wrong)
        with pytest.raises(ValueError, match="is not GenEval's"):
            benchmarks.load_benchmark("geneval", tmp_path / name)
    geneval(tmp_path / "few.jsonl", 552)
    with pytest.raises(ValueError, match="552 prompts"):
        benchmarks.load_benchmark("geneval", tmp_path / "few.jsonl")


def test_dpg_bench_is_a_folder_of_texts(tmp_path):
    for index in range(1065):
        (tmp_path / f"{index}.txt").write_text(f"a long text {index}\n")
    prompts = benchmarks.load_benchmark("dpg", tmp_path)
    assert [(prompt.text, prompt.item) for prompt in prompts] == [
        (f"a long text {index}", str(index)) for index in range(1065)]
    (tmp_path / "3.txt").unlink()
    with pytest.raises(ValueError, match="1064 prompts"):
        benchmarks.load_benchmark("dpg", tmp_path)


def test_drawbench_and_pick_a_pic_are_tables(tmp_path, monkeypatch):
    texts = [f"prompt {index}" for index in range(200)]
    table = pandas.DataFrame({"Prompts": texts, "Category": ["Colors", "Text"] * 100})
    table.to_csv(tmp_path / "drawbench.csv", index=False)
    prompts = benchmarks.load_benchmark("drawbench", tmp_path / "drawbench.csv")
    assert (prompts[3].text, prompts[3].group, len(prompts)) == ("prompt 3", "Text", 200)
    captions = pandas.DataFrame({"caption": [f"caption {i}" for i in range(500)], "label_0": 1.0})
    captions.to_parquet(tmp_path / "test.parquet")
    asked = []

    def fetched(repository, file, repo_type):
        asked.append((repository, file, repo_type))
        return str(tmp_path / "test.parquet")
    monkeypatch.setattr(benchmarks, "hf_hub_download", fetched)
    local = benchmarks.load_benchmark("pickapic", tmp_path / "test.parquet")
    assert benchmarks.load_benchmark("pickapic") == local and local[7].text == "caption 7"
    assert asked == [("yuvalkirstain/pickapic_v1_no_images", benchmarks.PICKAPIC, "dataset")]


# ----------------------------------------------------------------------------------------- several images


def test_images_of_a_prompt_are_functions_of_seed_prompt_and_number(run, tiny, tmp_path):
    one = run(tmp_path / "one", save_images=True)
    three = run(tmp_path / "three", save_images=True, images_per_prompt=3)
    batch = run(tmp_path / "batch", save_images=True, images_per_prompt=3, batch_size=4, limit=3)
    names = sorted(path.name for path in (three / "tiny" / "images").iterdir())
    assert len(names) == 21 and names[:3] == ["00000-1.png", "00000-2.png", "00000.png"]
    for path in (one / "tiny" / "images").iterdir():
        assert path.read_bytes() == (three / "tiny" / "images" / path.name).read_bytes()
    kept = list((batch / "tiny" / "images").iterdir())
    assert len(kept) == 9 and all(
        numpy.abs(numpy.array(Image.open(path), int) - numpy.array(
            Image.open(three / "tiny" / "images" / path.name))).max() <= 1 for path in kept)
    assert len({(three / "tiny" / "images" / name).read_bytes() for name in names}) == 21
    held = results_of(three)["tiny"]
    assert (held["prompts"], held["images"]) == (7, 21)

    from utils.rewards import load_reward
    reward = load_reward(f"pickscore:{tiny['clip']}")
    expected = []
    for index in range(7):
        opened = torch.stack([pil_to_tensor(Image.open(three / "tiny" / "images" / name)) for name in (
            f"{index:05d}.png", f"{index:05d}-1.png", f"{index:05d}-2.png")]) / 255
        model, pixels = reward.model, (reward.preprocess(opened) - reward.mean) / reward.std
        vectors = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        cosine = torch.nn.functional.cosine_similarity(vectors[[0, 0, 1]], vectors[[1, 2, 2]])
        expected.append((1 - cosine).mean().item())
    found = held["scores"][f"diversity:pickscore:{tiny['clip']}"]
    assert found["mean"] == pytest.approx(numpy.mean(expected), abs=1e-6)
    assert (found["low"], found["high"]) == pytest.approx(report.mean_interval(expected), abs=1e-6)
    assert found["prompts"] == 7 and "Diversity (PickScore (clip))" in (three / "results.md").read_text()


def test_diversity_of_known_vectors():
    angle = numpy.pi / 3
    pair = [[1, 0], [numpy.cos(angle), numpy.sin(angle)]]
    assert diversity.cosine_distance(pair) == pytest.approx(0.5)
    assert diversity.cosine_distance([[0, 1]] * 4) == pytest.approx(0)
    assert diversity.cosine_distance([[1, 0], [-1, 0]]) == pytest.approx(2)


def test_a_prompt_counts_once_however_many_images_it_has(tmp_path):
    """Scores differ between the prompts alone: the interval is that of two values, not of four."""
    records = {(index, image): {"scores": {"clip": float(index)}, "seconds": None, "memory": None,
                                "features": ("0", 0)} for index in (0, 1) for image in (0, 1)}
    models = {"one": {"records": records, "facts": {}, "settings": {}, "folder": tmp_path}}
    prompts = [benchmarks.Prompt(index, "", image=image) for index, image in records]
    found = report.summarize(models, [*prompts], {}, None)["one"]
    assert found["scores"]["clip"] == report.summary([0.0, 1.0]) | {"groups": {}}
    assert (found["prompts"], found["images"]) == (2, 4)


def test_lpips_is_measured_where_it_is_installed(run, tmp_path, monkeypatch):
    calls = []

    class Network(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()

        def forward(self, one, other):
            assert one.shape == (1, 3, 512, 512) and one.min() >= -1 and one.max() <= 1
            calls.append(1)
            return (one - other).abs().mean()
    module = types.ModuleType("lpips")
    module.LPIPS, module.__spec__ = Network, importlib.machinery.ModuleSpec("lpips", None)
    monkeypatch.setitem(sys.modules, "lpips", module)
    more = {"images_per_prompt": 3, "save_images": True, "limit": 2}
    out = run(tmp_path / "out", **more)
    expected = []
    for name in ("00000", "00003"):
        three = [torch.from_numpy(numpy.array(fid.square(Image.open(
            out / "tiny" / "images" / f"{name}{end}.png"), 512))).double() for end in ("", "-1", "-2")]
        expected.append(numpy.mean([(three[a] - three[b]).abs().mean().item() / 127.5
                                    for a, b in ((0, 1), (0, 2), (1, 2))]))
    assert results_of(out)["tiny"]["scores"]["lpips"]["mean"] == pytest.approx(numpy.mean(expected), rel=1e-5)
    run(out, **more)
    assert len(calls) == 6, "what is measured is not measured again"


def test_the_geneval_program_finds_what_it_reads(run, tmp_path, capsys):
    """The published program's walk: folders by number, their metadata and samples."""
    lines = geneval(tmp_path / "metadata.jsonl")
    more = {"benchmark": "geneval", "prompts_file": tmp_path / "metadata.jsonl", "limit": 3,
            "export": "geneval"}
    out = run(tmp_path / "out", **more)
    command = re.search(r"evaluation/evaluate_images.py (\S+) --outfile (\S+)", capsys.readouterr().out)
    root = out / "tiny" / "geneval"
    assert command[1] == str(root.resolve())
    found = {}
    for folder in root.iterdir():
        assert folder.is_dir() and folder.name.isdigit()
        metadata = json.loads((folder / "metadata.jsonl").read_text())
        samples = sorted((folder / "samples").iterdir())
        assert all(re.fullmatch(r"\d+\.png", path.name) for path in samples)
        found[int(folder.name)] = metadata, [path.read_bytes() for path in samples]
    assert sorted(found) == [0, 184, 368]
    for index, (metadata, samples) in found.items():
        assert metadata == lines[index] and len(samples) == 4
        for number, sample in enumerate(samples):
            name = f"{index:05d}" + f"-{number}" * bool(number)
            assert sample == (out / "tiny" / "images" / f"{name}.png").read_bytes()
    (out / "tiny" / "images" / "00184-2.png").unlink()  # was not kept, or is lost
    (root / "00001" / "samples").mkdir(parents=True)  # of an earlier export
    (root / "results.txt").write_text("scores")
    run(out, **more)
    assert (root / "00184" / "samples" / "0002.png").read_bytes() == found[184][1][2]
    assert not (root / "00001").exists() and (root / "results.txt").exists()


def test_dpg_bench_grids_are_cut_where_its_program_cuts(run, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    for index in range(1065):
        (tmp_path / "texts" / f"item{index:04d}.txt").write_text(f"text {index}")
    out = run(tmp_path / "out", benchmark="dpg", prompts_file=tmp_path / "texts", limit=2, export="dpg")
    assert f"dist_eval.sh {(out / 'tiny' / 'dpg').resolve()} 16" in capsys.readouterr().out
    for index in (0, 532):
        grid = Image.open(out / "tiny" / "dpg" / f"item{index:04d}.png")
        for number, (left, top) in enumerate([(0, 0), (16, 0), (0, 16), (16, 16)]):
            name = f"{index:05d}" + f"-{number}" * bool(number)
            whole = Image.open(out / "tiny" / "images" / f"{name}.png")
            assert grid.crop((left, top, left + 16, top + 16)).tobytes() == whole.convert("RGB").tobytes()


# ---------------------------------------------------------------------------------------------- distances


@pytest.mark.slow
def test_the_distance_to_a_teacher_is_to_its_images(run, tiny, tmp_path, extractor, capsys):
    more = {"fid_real": "teacher", "inception": extractor, "fid_size": 32, "patch_fid": True,
            "save_images": True, "name": None, "num_inference_steps": None}
    models = ["teacher --num_inference_steps 3", "one --num_inference_steps 1"]
    out = run(tmp_path / "out", model=models, **more)
    held, network = results_of(out), torch.jit.load(str(extractor))
    resize = build_resizer("clean")

    def features(name, crop):
        paths = sorted((out / name / "images").iterdir())
        arrays = [resize(numpy.array(crop(Image.open(path).convert("RGB")))) for path in paths]
        return network(torch.from_numpy(numpy.stack(arrays)).permute(0, 3, 1, 2).float())

    def resized(image):
        return image.resize((32, 32), Image.LANCZOS)
    whole = [features(name, resized) for name in ("one", "teacher")]
    patch = [features(name, lambda image: image) for name in ("one", "teacher")]  # 16 pixels, below 299
    assert held["teacher"]["fid"] is None and held["teacher"]["patch_fid"] is None
    for key, pair in (("fid", whole), ("patch_fid", patch)):
        expected = fid.frechet_distance(*map(fid.statistics, pair))
        assert held["one"][key] == pytest.approx(expected, rel=1e-4, abs=1e-6) and expected > 0
    text = (out / "results.md").read_text()
    assert "FID to teacher" in text and "patch FID to teacher" in text
    for name in ("one", out / "one"):  # by its name or its folder
        again = run(out, **more | {"model": ["two! --num_inference_steps 2"], "fid_real": name})
        assert results_of(again)["one"]["fid"] is None, "another teacher, without sampling anything anew"
        assert results_of(again)["teacher"]["fid"] == pytest.approx(held["one"]["fid"], rel=1e-4)
    assert results_of(run(out, **more | {"fid_real": "two!", "model": models}))["one"]["fid"] > 0
    capsys.readouterr()
    alone = run(tmp_path / "alone", **more | {"model": models[:1], "fid_real": models[0].split()[0]})
    assert "FID is not measured yet" in capsys.readouterr().out and (alone / "results.md").exists()
    few = run(out, **more | {"model": ["few --num_inference_steps 4"], "fid_real": "few", "limit": 3})
    assert results_of(few)["one"]["fid"] > 0
    wider = results_of(run(out, **more | {"model": models, "fid_real": "few"}))
    assert wider["one"]["fid"] is None, "a teacher with fewer images is no measure"
    elsewhere = tmp_path / "elsewhere"
    assert "--fid_real" in refused(capsys, lambda: run(elsewhere, **more | {
        "model": models, "fid_real": out / "one"}))


def test_patches_are_the_middle_and_keep_their_pixels():
    values = numpy.random.default_rng(0).integers(0, 256, (400, 512, 3), dtype=numpy.uint8)
    patch = fid.prepare_patch(Image.fromarray(values))
    expected = values[50:349, 106:405]  # as torchvision rounds, and DMD2 with it
    assert numpy.abs(patch.permute(1, 2, 0).numpy() - expected).max() < 1e-3


@pytest.mark.parametrize("height, width", [(298, 512), (512, 298), (100, 120)])
def test_an_image_with_a_side_below_the_patch_is_not_cropped(height, width):
    values = numpy.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    patch = fid.prepare_patch(Image.fromarray(values)).permute(1, 2, 0).numpy()
    assert numpy.array_equal(patch, build_resizer("clean")(values)) and patch.shape == (299, 299, 3)


# ------------------------------------------------------------------------------------- sweeps, marks, rows


@pytest.mark.slow
def test_a_sweep_has_a_row_and_a_point_for_each_value(run, tmp_path, evaluation):
    out = run(tmp_path / "out", guidance_scale=[0, 3.5], num_inference_steps=[1, 2])
    held = results_of(out)
    assert list(held) == [f"tiny, guidance {scale}, {steps} steps"
                          for scale in ("0", "3.5") for steps in (1, 2)]
    assert [entry["facts"]["steps"] for entry in held.values()] == [1, 2, 1, 2]
    means = {next(iter(entry["scores"].values()))["mean"] for entry in held.values()}
    assert len(means) == 4 and "sweep.png" in (out / "report.html").read_text()
    assert Image.open(out / "sweep.png").width > 300
    assert "![sweep](sweep.png)" in (out / "results.md").read_text()
    plain = run(tmp_path / "plain", guidance_scale=[3.5])
    assert list(results_of(plain)) == ["tiny"] and not (plain / "sweep.png").exists()
    best = held["tiny, guidance 3.5, 2 steps"]["scores"]
    assert results_of(plain)["tiny"]["scores"] == {key: {name: value for name, value in one.items(
        ) if name != "difference"} for key, one in best.items()}


def test_flags_of_a_sweep_are_not_of_images_that_exist(run, tiny, tmp_path, images):
    out = run(tmp_path / "out", name=None, pretrained_model_name_or_path=None, guidance_scale=[1, 2],
              num_inference_steps=[1], limit=3, model=[
                  f"swept --pretrained_model_name_or_path {tiny['pipeline']}", f"made --images {images}"])
    assert list(results_of(out)) == ["swept, guidance 1", "swept, guidance 2", "made"]
    assert (out / "sweep.png").exists()


def test_a_sweep_is_drawn_of_what_is_there(tmp_path):
    """A row without the score of the others, one without seconds: they are left out."""
    def entry(scale, steps, seconds, **scores):
        settings = {"sweep": "one", "guidance_scale": scale, "num_inference_steps": steps}
        return {"settings": {"model": settings}, "seconds_per_10": seconds,
                "scores": {key: {"mean": value} for key, value in scores.items()}}
    rows = [entry(1, 2, 1.0, clip=1), entry(1, 4, None, clip=2), entry(3, 2, 2.0, clip=1, lpips=2)]
    assert report.plot_sweeps(dict(enumerate(rows)), tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").exists()
    assert not report.plot_sweeps({0: {"settings": {"model": {}}}}, tmp_path / "none.png")


def test_latency_is_of_images_alone_with_and_without_their_decoding(run, tmp_path):
    alone, batched = run(tmp_path / "alone"), run(tmp_path / "batched", batch_size=3)
    held = results_of(alone)["tiny"]["latency"]
    for quantile in ("0.5", "0.9", "0.99"):
        assert 0 < held["without decoder"][quantile] < held["whole"][quantile]
    assert list(held["whole"].values()) == sorted(held["whole"].values())
    assert "Milliseconds of one image" in (alone / "results.md").read_text()
    assert "Milliseconds" not in (batched / "results.md").read_text()
    records = {(index, 0): {"batch": 1, "seconds": float(index), "decoder_seconds": 0.5}
               for index in range(1, 102)}
    found = report.latency(records)
    assert found["whole"]["0.5"] == 51 and found["without decoder"]["0.9"] == 90.5


@pytest.mark.parametrize("told", ["args", "card"])
def test_the_reward_that_a_model_was_trained_on_is_marked(run, tiny, tmp_path, told):
    trained = shutil.copytree(tiny["pipeline"], tmp_path / "trained")
    if told == "args":
        (trained / "args.json").write_text(json.dumps({"reward": {f"pickscore:{tiny['clip']}": 25.0}}))
    else:
        (trained / "README.md").write_text("---\nreward:\n- pickscore\n---\nA card.\n")
    out = run(tmp_path / "out", name=None, pretrained_model_name_or_path=None, model=[
        f"before --pretrained_model_name_or_path {tiny['pipeline']}",
        f"after --pretrained_model_name_or_path {trained}"],
        scores=[f"pickscore:{tiny['clip']}", f"clip:{tiny['clip']}"])
    assert json.loads((out / "before" / "rewards.json").read_text()) == []
    held_out, homework = "CLIP score (clip)", "PickScore (clip), trained on by after"
    header = next(line for line in (out / "results.md").read_text().splitlines() if "parameters" in line)
    assert header.index(held_out) < header.index(homework)
    page = (out / "report.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["scores"] == [held_out, homework] and f"<th>{homework}</th>" in page
    table = pandas.read_parquet(out / "per_prompt.parquet")
    assert data["values"][0][0] == pytest.approx(
        [table[f"{kind}:{tiny['clip']}"][0] for kind in ("clip", "pickscore")], abs=1e-4)


@pytest.mark.parametrize("flag, place", [
    ("pretrained_model_name_or_path", ""), ("lora", ""), ("lora", "pytorch_lora_weights.safetensors"),
    ("unet", "unet"), ("unet", "checkpoint-5/unet"), ("unet", "unet/diffusion_pytorch_model.safetensors")])
def test_the_rewards_of_a_run_are_found_from_any_part_of_it(evaluation, tmp_path, flag, place):
    path = tmp_path / "run" / place
    path.mkdir(parents=True) if not path.suffix else path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    (tmp_path / "run" / "args.json").write_text('{"reward": {"pickscore": 25.0, "clip": 1.0}}')
    model = types.SimpleNamespace(
        **dict.fromkeys(("pretrained_model_name_or_path", "lora", "unet")) | {flag: str(path)})
    assert evaluation.rewards_of(model) == ["pickscore", "clip"]
    (tmp_path / "run" / "args.json").unlink()
    assert evaluation.rewards_of(model) == []


def test_published_rows_appear_only_with_the_scorers_of_the_paper():
    score = {"mean": 0.2, "low": 0.1, "high": 0.3, "groups": {}}

    def rows(benchmark, *keys, **more):
        entry = {"prompts": 10, "images": 10, "facts": {}, "scores": dict.fromkeys(keys, score),
                 "seconds_per_10": None, "peak_memory": None, "settings": {"fid": [512, False, ""]}, **more}
        header, rows = report.main_table({"ours": entry}, benchmark, 10)
        return header, [row for row in rows if "(published)" in row[0]]
    assert rows("parti", "pickscore:elsewhere")[1] == []
    assert rows("hpsv2", "hpsv2.1:elsewhere")[1] == [] and len(rows("hpsv2", "official:hpsv2.1")[1]) == 11
    assert rows("geneval", "pickscore")[1] == []
    header, published = rows("parti", "pickscore:elsewhere", "imagereward", "clip")
    last = dict(zip(header, published[-1]))
    assert (last["PickScore (elsewhere)"], last["ImageReward"]) == ("", "1.210")
    assert last["CLIP score (CLIP-ViT-g-14-laion2B-s12B-b42K)"] == "32.91 (?)"
    header, published = rows("parti", "clip-dmd2")
    assert dict(zip(header, published[-1]))[
        "CLIP score of DMD2 (CLIP-ViT-g-14-laion2B-s12B-b42K)"] == "32.91 (?)"


def test_hpsv2_reads_the_images_as_jpeg_files(run, places, tmp_path, images, evaluation, capsys):
    """As Pillow saves them by default; other scores read them as they are, and so is a JPEG file read."""
    from utils.rewards import from_image, load_reward

    keys = [f"{name}:{places[name]}" for name in ("hpsv2.1", "pickscore")]
    (tmp_path / "jpegs").mkdir()
    for path in images.iterdir():
        Image.open(path).save(tmp_path / "jpegs" / f"{path.stem}.jpg")
    jpeg = {"images": images, "scores": keys, "hps_jpeg": True}
    table = {name: pandas.read_parquet(run(tmp_path / name, **jpeg | more) / "per_prompt.parquet")
             for name, more in {"jpeg": {}, "files": {"images": tmp_path / "jpegs"}}.items()}
    hps, pickscore = map(load_reward, keys)
    for index, path in enumerate(sorted(images.iterdir())):
        read = Image.open(tmp_path / "jpegs" / f"{path.stem}.jpg")
        expected = [scorer(from_image(scorer, image)[None], [PROMPTS[index]]).item() for scorer, image in (
            (hps, read), (pickscore, Image.open(path)), (hps, Image.open(path)))]
        assert table["jpeg"][keys[0]][index] == table["files"][keys[0]][index]
        assert table["jpeg"][keys].loc[index].tolist() == pytest.approx(expected[:2], abs=1e-5)
        assert abs(expected[0] - expected[2]) > 1e-3
    assert "hpsv2 scores are of JPEGs" in (tmp_path / "jpeg" / "results.md").read_text()
    for name in ("tiny", "another"):
        line = refused(capsys, lambda: run(tmp_path / "jpeg", **jpeg | {"hps_jpeg": False, "name": name}))
        assert "another --hps_jpeg" in line
    assert evaluation.is_hps("official:hpsv2.0:folder") and not evaluation.is_hps("clip")


@pytest.mark.parametrize("benchmark, size, real, count, rows", [
    ("coco30k", 256, 40_504, 30_000, {"DMD2-SD1.5": "8.35"}),
    ("coco10k", 512, 10_000, 10_000, {"DMD2-SDXL": "19.32"})])
@pytest.mark.parametrize("change", [
    {}, {"settings": {"fid": [300, False, ""]}}, {"facts": {"nvidia_inception": False}},
    {"real_images": 5000}, {"real_images": None}, {"images": 100, "prompts": 100}, {"prompts": 5000}])
def test_a_published_fid_is_marked_unless_ours_has_its_protocol(benchmark, size, real, count, rows, change):
    """The first change is none. The last two are --limit, and --limit with several images of each caption."""
    score = {"mean": 0.2, "low": 0.1, "high": 0.3, "groups": {}}
    entry = {"prompts": count, "images": count, "facts": {"nvidia_inception": True}, "real_images": real,
             "settings": {"fid": [size, False, ""]}, "fid": 20.0, "scores": {"pickscore": score},
             "seconds_per_10": None, "peak_memory": None} | change
    header, table = report.main_table({"ours": entry, "without": entry | {"fid": None}}, benchmark, count)
    held = {row[0]: dict(zip(header, row))["FID"] for row in table}
    marked = " (?)" if change else ""
    for name, published in rows.items():
        assert held[f"{name} (published)"] == published + marked
    if benchmark == "coco30k":  # the paper does not say how it measures its own
        assert held["DMD2-SDXL (published)"] == "15.80 (?)" and held["SDXL-base (published)"] == "15.89 (?)"
    assert len(set(map(len, [header, *table]))) == 1
    header, table = report.main_table({"ours": entry}, benchmark, count, teacher="other")
    assert not any("DMD2-SD1.5" in row[0] or "(?)" in str(row[-1]) for row in table)


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("more, words", [
    ({"export": "geneval"}, "--export geneval needs --benchmark geneval"),
    ({"patch_fid": True}, "--patch_fid has no effect without"),
    ({"hps_jpeg": True}, "--hps_jpeg has no effect without an hpsv2 score"),
    ({"fid_size": 512}, "--fid_size has no effect without"),
    ({"fid_real": "nobody", "inception": __file__}, "--fid_real nobody is neither a folder of images nor"),
    ({"fid_real": __file__, "inception": __file__, "patch_fid": True}, "--patch_fid needs images"),
    ({"images_per_prompt": 0}, "0 is not a whole number above 0"),
    ({"num_inference_steps": [1, 2], "timesteps": [999]}, "--num_inference_steps 1 2 contradicts"),
])
def test_flags_that_contradict_each_other_are_refused(evaluation, flags, tmp_path, capsys, more, words):
    assert words in refused(capsys, lambda: evaluation.parse_args(flags(tmp_path / "out", **more)))


def test_one_folder_is_of_one_image_each_or_of_several(run, tmp_path, capsys):
    out = run(tmp_path / "out", limit=2)
    assert "--images_per_prompt" in refused(capsys, lambda: run(out, limit=2, images_per_prompt=2))
    several = run(tmp_path / "several", limit=2, images_per_prompt=2)
    assert results_of(run(several, limit=2, images_per_prompt=3))["tiny"]["images"] == 6


# ------------------------------------------------------------------------------------------------ the page


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def made_up(folder, models, prompts):
    """A comparison's page of made-up scores, with thumbnails; the names of the prompts tell them apart."""
    generator, held, keys = numpy.random.default_rng(0), {}, ("imagereward", "aesthetic", "pickscore", "clip")
    for number in range(models):
        own = folder / f"model_{number}"
        (own / "thumbnails").mkdir(parents=True)
        for index in range(min(prompts, 200)):
            Image.new("RGB", (8, 8), (index, 40 * number, 0)).save(own / "thumbnails" / f"{index:05d}.jpg")
        values = generator.normal(size=(prompts, 4))
        held[f"model {number}"] = {"folder": own, "values": {}, "records": {
            (index, 0): {"scores": dict(zip(keys, row.tolist()))} for index, row in enumerate(values)}}
    chosen = [benchmarks.Prompt(index, f"thing {index} " + "of a long prompt " * 3,
                                ("odd", "even")[index % 2]) for index in range(prompts)]
    report.write_page(folder / "report.html", "parti", "", ["model"], [[name] for name in held], "", held,
                      dict.fromkeys(keys, []), chosen)
    return folder / "report.html", held


def opened(page, view=""):
    """The document as Chromium shows it, after its script has run."""
    ended = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                            f"file://{page}{view}"], capture_output=True, text=True, timeout=120)
    return ended.stdout


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium")
def test_the_page_searches_sorts_and_shows_side_by_side(tmp_path):
    page, held = made_up(tmp_path, 2, 200)
    plain = opened(page)
    shown = re.findall(r"<article>.*?</article>", plain, re.S)
    assert "200 of 200 prompts" in plain and len(shown) == 24
    assert [f"model_{number}/thumbnails/00000.jpg" in shown[0] for number in (0, 1)] == [True, True]
    expected = [index for index in range(200) if "17" in str(index) and index % 2]
    found = opened(page, "#q=17+even")  # "even" is the group of the odd ones
    assert f"{len(expected)} of 200 prompts" in found
    assert list(map(int, re.findall(r"<small>#(\d+)", found))) == expected
    options = dict(re.findall(r'<option value="(\d+)">([^<]*)</option>', plain))
    order, = (value for value, words in options.items()
              if words == "PickScore: largest lead of model 1 over model 0")
    differences = {index: held["model 1"]["records"][index, 0]["scores"]["pickscore"]
                   - held["model 0"]["records"][index, 0]["scores"]["pickscore"] for index in range(200)}
    expected = sorted(differences, key=lambda index: -differences[index])[:24]
    found = re.findall(r"<small>#(\d+)", opened(page, f"#sort={order}"))
    assert list(map(int, found)) == expected


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium")
def test_a_page_of_six_models_on_parti_is_small_and_opens_fast(tmp_path):
    page, _ = made_up(tmp_path, 6, 1632)
    assert page.stat().st_size < 5e6
    text = page.read_text().replace("</html>", "<script>document.title = performance.now();</script></html>")
    page.write_text(text)
    milliseconds = float(re.search(r"<title>([\d.]+)</title>", opened(page))[1])
    assert milliseconds < 3000
