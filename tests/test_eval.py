"""eval_benchmarks.py on tiny pipelines, and the statistics, tables and page of its utils."""

import json
import os
import pickle
import shlex
import shutil
import sys
import types

import numpy
import pandas
import pytest
import torch
from conftest import REPOSITORY, load_script
from PIL import Image

from utils import benchmarks, fid, report


PROMPTS = [f"prompt {index}" for index in range(7)]


@pytest.fixture
def evaluation():
    return load_script("eval_benchmarks")


@pytest.fixture(scope="session")
def extractor(tmp_path_factory):
    """A TorchScript file of six features, in the place of Inception."""
    class Means(torch.nn.Module):
        def forward(self, images):
            return torch.cat([images.mean((2, 3)), images[:, :, :150].mean((2, 3))], 1)
    path = tmp_path_factory.mktemp("extractor") / "extractor.pt"
    torch.jit.trace(Means(), torch.zeros(2, 3, 299, 299)).save(path)
    return path


@pytest.fixture
def images(tmp_path):
    """A folder of 7 images of different sizes."""
    folder = tmp_path / "real"
    folder.mkdir()
    generator = numpy.random.default_rng(0)
    for index in range(7):
        values = generator.integers(0, 256, (20 + index, 24, 3), dtype=numpy.uint8)
        Image.fromarray(values).save(folder / f"{index:05d}.png")
    return folder


@pytest.fixture
def flags(tiny, tmp_path):
    """Of an evaluation of a tiny pipeline; keyword arguments change and add."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")

    def build(output_dir, **more):
        given = {"benchmark": "prompts", "prompts_file": tmp_path / "prompts.txt", "output_dir": output_dir,
                 "scores": [f"pickscore:{tiny['clip']}"], "name": "tiny"}
        if "images" not in more:
            given |= {"num_inference_steps": 2, "resolution": 16,
                      "pretrained_model_name_or_path": tiny["pipeline"]}
        given |= more
        listed = []
        for name, value in given.items():
            if name == "model" and value:
                listed += [f"--model={one}" for one in value]
            elif isinstance(value, list):
                listed += [f"--{name}", *map(str, value)]
            elif value is not None and value is not False:
                listed += [f"--{name}"] if value is True else [f"--{name}={value}"]
        return listed
    return build


@pytest.fixture
def run(evaluation, flags):
    def evaluate(output_dir, **more):
        evaluation.main(evaluation.parse_args(flags(output_dir, **more)))
        return output_dir
    return evaluate


def scores_of(folder):
    table = pandas.read_parquet(folder / "per_prompt.parquet")
    return table.drop(columns="seconds")


def lines_of(folder):
    return [line for path in folder.glob("tiny/scores-*.jsonl") for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ prompts


def parti(path, rows=1632):
    names = ['the word "START"', "42", "0", "null", "a cat"] + [f"prompt {row}" for row in range(rows - 5)]
    lines = [f"{name}\t{'Abstract' if row % 2 else 'Animals'}\tBasic\t" for row, name in enumerate(names)]
    path.write_text("Prompt\tCategory\tChallenge\tNote\n" + "\n".join(lines) + "\n")
    return names


def test_parti_is_read_verbatim(tmp_path):
    names = parti(tmp_path / "parti.tsv")
    prompts = benchmarks.load_benchmark("parti", tmp_path / "parti.tsv")
    assert [prompt.text for prompt in prompts] == names
    assert [prompt.index for prompt in prompts] == list(range(1632))
    assert [prompt.group for prompt in prompts[:3]] == ["Animals", "Abstract", "Animals"]


def test_parti_from_the_hub_is_the_file_with_its_quotation_marks(tmp_path, monkeypatch):
    """Read as CSV, which `datasets` does, the prompt would lose the marks that it begins with."""
    giggle = '"G I G G L E" painted in thick colorful lettering'
    parti(tmp_path / "parti.tsv")
    text = (tmp_path / "parti.tsv").read_text().replace("a cat\t", f"{giggle}\t")
    (tmp_path / "parti.tsv").write_text(text)
    asked = []

    def fetched(repository, file, repo_type):
        asked.append((repository, file, repo_type))
        return str(tmp_path / "parti.tsv")
    monkeypatch.setattr(benchmarks, "hf_hub_download", fetched)
    prompts = benchmarks.load_benchmark("parti")
    assert prompts == benchmarks.load_benchmark("parti", tmp_path / "parti.tsv") and prompts[4].text == giggle
    assert asked == [("nateraw/parti-prompts", "PartiPrompts.tsv", "dataset")]


@pytest.mark.parametrize("name, count", [("coco30k", 30_000), ("coco10k", 10_000)])
def test_captions_of_coco_are_lines_or_the_list_that_dmd2_pickles(tmp_path, name, count):
    captions = [f"caption {index}" for index in range(count)]
    (tmp_path / "captions.txt").write_text("\n".join(captions) + "\n")
    (tmp_path / "captions.pkl").write_bytes(pickle.dumps([f"{caption}\n" for caption in captions]))
    (tmp_path / "code.pkl").write_bytes(pickle.dumps([*captions, os.getcwd]))
    (tmp_path / "few.pkl").write_bytes(pickle.dumps([*captions[:-1], None]))
    (tmp_path / "kind.pkl").write_bytes(pickle.dumps(dict.fromkeys(captions)))
    for suffix in ("txt", "pkl"):
        prompts = benchmarks.load_benchmark(name, tmp_path / f"captions.{suffix}")
        assert [prompt.text for prompt in prompts] == captions
    for file, words in {"code": "only a list of text is read", "few": f"{count - 1} prompts",
                        "kind": "dict"}.items():
        with pytest.raises(ValueError, match=words):
            benchmarks.load_benchmark(name, tmp_path / f"{file}.pkl")


def test_a_part_is_spread_over_the_whole():
    prompts = [benchmarks.Prompt(index, str(index)) for index in range(10)]
    assert [prompt.index for prompt in benchmarks.spread(prompts, 4)] == [0, 2, 5, 7]
    assert benchmarks.spread(prompts, 99) == benchmarks.spread(prompts, None) == prompts


def hpsv2(folder, sizes=(800,) * 4):
    folder.mkdir()
    for style, size in zip(benchmarks.HPS_STYLES, sizes):
        (folder / f"{style}.json").write_text(json.dumps([f"{style} {index}" for index in range(size)]))
    return folder


def test_hpsv2_has_four_styles_in_their_order(tmp_path):
    prompts = benchmarks.load_benchmark("hpsv2", hpsv2(tmp_path / "hpsv2"))
    assert len(prompts) == 3200 and prompts[800] == benchmarks.Prompt(800, "concept-art 0", "concept-art")


@pytest.mark.parametrize("kind", ["few", "style", "size", "json", "list", "column", "type", "coco", "none"])
def test_prompts_that_differ_from_the_benchmark_are_refused(tmp_path, kind):
    parti(tmp_path / "few.tsv", rows=100)
    folder = hpsv2(tmp_path / "hpsv2", (800, 800, 800, 799 if kind == "size" else 800))
    (tmp_path / "lines.txt").write_text("one\ntwo\n")
    if kind == "style":
        (folder / "photo.json").unlink()
    if kind in ("json", "list"):
        (folder / "photo.json").write_text("{" if kind == "json" else '{"a": 1}')
    tsv, txt = tmp_path / "few.tsv", tmp_path / "lines.txt"
    name, place, words = {
        "few": ("parti", tsv, "100 prompts"), "style": ("hpsv2", folder, "photo.json"),
        "size": ("hpsv2", folder, "799"), "json": ("hpsv2", folder, "photo.json"),
        "list": ("hpsv2", folder, "photo.json"), "column": ("parti", txt, "Prompt"),
        "type": ("prompts", tmp_path / "lines.pdf", ".txt"), "coco": ("coco30k", txt, "30000"),
        "none": ("coco30k", None, "--prompts_file")}[kind]
    with pytest.raises(ValueError, match=words):
        benchmarks.load_benchmark(name, place)


# --------------------------------------------------------------------------------------------- statistics


def test_the_deviation_is_taken_over_ten_means_as_in_hpsv2():
    values = numpy.random.default_rng(0).normal(size=800)
    two = values[:160].reshape(2, 80).mean(1).std()
    assert report.chunk_deviation(values[:170]) == pytest.approx(two)
    assert report.chunk_deviation(values[:100]) is None
    assert report.chunk_deviation(values) == pytest.approx(values.reshape(10, 80).mean(1).std())


def test_the_interval_agrees_with_the_theory_of_the_mean():
    values = numpy.random.default_rng(0).normal(3, 2, size=2000)
    low, high = report.mean_interval(values)
    half = 1.96 * values.std() / 2000**0.5
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)
    assert report.mean_interval([5.0] * 9) == (5, 5)


def test_fid_of_known_gaussians():
    """Diagonal covariances: |difference of means|^2 + sum of (sqrt(a) - sqrt(b))^2."""
    generator = torch.Generator().manual_seed(0)
    deviations = torch.tensor([[1.0, 2.0, 0.5], [2.0, 1.0, 0.5]], dtype=torch.float64)
    means = torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 0.5]], dtype=torch.float64)
    stated = [{"mu": mu.numpy(), "sigma": torch.diag(sd**2).numpy()} for mu, sd in zip(means, deviations)]
    expected = 1 + 4 + 0.25 + 1 + 1
    assert fid.frechet_distance(*stated) == pytest.approx(expected, rel=1e-9)
    samples = [mu + sd * torch.randn(200_000, 3, generator=generator, dtype=torch.float64)
               for mu, sd in zip(means, deviations)]
    assert fid.frechet_distance(*map(fid.statistics, samples)) == pytest.approx(expected, rel=0.02)
    assert fid.frechet_distance(stated[0], stated[0]) == pytest.approx(0, abs=1e-9)


def test_images_are_prepared_as_clean_fid_does(tmp_path):
    """A square of the size already: what is left is clean-fid's own resizing."""
    from cleanfid.resize import make_resizer

    values = numpy.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=numpy.uint8)
    expected = make_resizer("PIL", False, "bicubic", (299, 299))(values)
    assert torch.equal(fid.prepare(Image.fromarray(values), 64), torch.from_numpy(expected).permute(2, 0, 1))
    wide = Image.new("RGB", (40, 20), "red")
    wide.paste("blue", (10, 0, 30, 20))
    assert numpy.array(fid.square(wide, 20)).reshape(-1, 3).tolist() == [[0, 0, 255]] * 400


# ---------------------------------------------------------------------------------------------- whole runs


def test_the_image_of_a_prompt_does_not_depend_on_batch_limit_or_company(run, tmp_path):
    whole = run(tmp_path / "whole", save_images=True)
    others = {"batch": {"batch_size": 3}, "part": {"limit": 3}}
    for name, more in others.items():
        folder = run(tmp_path / name, save_images=True, **more)
        paths = sorted((folder / "tiny" / "images").glob("*.png"))
        assert len(paths) == more.get("limit", 7)
        for path in paths:
            pair = [numpy.array(Image.open(one)).astype(int)
                    for one in (path, whole / "tiny" / "images" / path.name)]
            assert abs(pair[0] - pair[1]).max() <= 1  # of 255: batches add in another order
    text = (tmp_path / "part" / "results.md").read_text()
    assert "quick look: 3 of 7" in text and "| tiny | 3 of 7 |" in text
    distinct = {path.read_bytes() for path in (whole / "tiny" / "images").glob("*.png")}
    assert len(distinct) == 7


@pytest.mark.slow
@pytest.mark.parametrize("name, count, more, size", [
    ("coco30k", 30_000, {}, 256), ("coco10k", 10_000, {}, 512), ("prompts", 7, {}, 512),
    ("coco30k", 30_000, {"fid_size": 64}, 64)])
def test_fid_of_coco_is_at_the_size_of_dmd2(run, tmp_path, extractor, images, name, count, more, size):
    (tmp_path / "captions.txt").write_text("".join(f"caption {index}\n" for index in range(count)))
    out = run(tmp_path / "out", benchmark=name, prompts_file=tmp_path / "captions.txt", limit=4,
              fid_real=images, inception=extractor, save_images=True, **more)
    network = torch.jit.load(str(extractor))
    features = [network(torch.stack([fid.prepare(Image.open(path), size) for path in folder.iterdir()]))
                for folder in (images, out / "tiny" / "images")]
    found = json.loads((out / "results.json").read_text())
    assert found["flags"]["fid_size"] == size
    assert found["models"]["tiny"]["real_images"] == 7 and found["models"]["tiny"]["fid_images"] == 4
    expected = fid.frechet_distance(*map(fid.statistics, features))
    assert found["models"]["tiny"]["fid"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_two_processes_are_one(run, evaluation, flags, tmp_path, run_warm):
    more = {"save_images": True, "images_per_prompt": 2}
    one = run(tmp_path / "one", **more)
    two = run_warm(evaluation.__file__, *flags(tmp_path / "two", **more), processes=2,
                   ACCELERATE_USE_CPU="true")
    assert two.returncode == 0, two.stderr
    assert len(list((tmp_path / "two" / "tiny").glob("scores-*.jsonl"))) == 2
    pandas.testing.assert_frame_equal(scores_of(one), scores_of(tmp_path / "two"), atol=1e-6)  # float32
    tables = [(folder / "results.md").read_text().splitlines()[4] for folder in (one, tmp_path / "two")]
    diversity = [table.split("|")[7] for table in tables]
    assert diversity[0] == diversity[1] and "[" in diversity[0]
    for path in (one / "tiny" / "images").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / "tiny" / "images" / path.name).read_bytes()


def test_a_killed_run_continues_where_it_was(run, tmp_path, extractor, images):
    more = {"fid_real": images, "inception": extractor}
    whole, cut = run(tmp_path / "whole", **more), run(tmp_path / "cut", limit=4, **more)
    path, features = cut / "tiny" / "scores-0.jsonl", cut / "tiny" / "features-0.rows"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    path.write_bytes(b"".join(lines[:3]) + lines[3][:20])  # a line cut in two; the features are a line ahead
    features.write_bytes(features.read_bytes() + b"abc")
    run(cut, **more)
    records = [json.loads(line) for line in lines_of(cut)]
    assert sorted(record["index"] for record in records) == list(range(7))
    assert path.read_bytes().startswith(b"".join(lines[:3])), "what was scored is not scored again"
    pandas.testing.assert_frame_equal(scores_of(whole), scores_of(cut))
    results = [json.loads((folder / "results.json").read_text())["models"]["tiny"] for folder in (whole, cut)]
    assert results[0]["fid"] == pytest.approx(results[1]["fid"]) and results[0]["fid"] > 0


def test_models_of_one_run_and_of_later_ones_are_columns_of_one_comparison(run, tiny, tmp_path, images):
    out = run(tmp_path / "out", name=None, pretrained_model_name_or_path=None, model=[
        f"'two steps' --pretrained_model_name_or_path {tiny['pipeline']}",
        f"other --pretrained_model_name_or_path {tiny['pipeline']} --unet {tiny['unet']}"
        " --scheduler LCMScheduler --timesteps 399 --guidance_scale 0"])
    run(out, name="made elsewhere", images=images)
    results = json.loads((out / "results.json").read_text())["models"]
    assert list(results) == ["two steps", "other", "made elsewhere"]
    assert [entry["facts"].get("steps") for entry in results.values()] == [2, 1, None]
    hashes = [results[name]["facts"]["weights"] for name in ("two steps", "other")]
    assert hashes[0]["unet"] != hashes[1]["unet"] and hashes[0]["vae"] == hashes[1]["vae"]
    assert torch.__version__.startswith(results["made elsewhere"]["facts"]["versions"]["torch"])
    assert len(results["made elsewhere"]["facts"]["scorers"]) == 1
    text = (out / "results.md").read_text()
    assert "| two steps | 7 | 2 | UNet |" in text and "## Differences to two steps" in text
    table = pandas.read_parquet(out / "per_prompt.parquet")
    key = [name for name in table.columns if name.startswith("pickscore")][0]
    values = {name: part[key].to_numpy() for name, part in table.groupby("model")}
    difference = results["other"]["scores"][key]["difference"]
    assert difference["mean"] == pytest.approx((values["other"] - values["two steps"]).mean())
    assert results["other"]["scores"][key]["mean"] == pytest.approx(values["other"].mean())


def test_the_shapes_world_models_generate_what_is_asked_for(evaluation, tmp_path):
    """The teacher and the one-step model, whose images the small preference model gives high scores."""
    import world

    (tmp_path / "captions.txt").write_text("\n".join(world.HELD_OUT_CAPTIONS) + "\n")
    assets = REPOSITORY / "examples" / "shapes" / "assets"
    one_step = f"--unet {assets / 'one_step'} --scheduler LCMScheduler --timesteps 999 --guidance_scale 0"
    evaluation.main(evaluation.parse_args([
        "--benchmark=prompts", f"--prompts_file={tmp_path / 'captions.txt'}", "--limit=8", "--batch_size=8",
        f"--output_dir={tmp_path / 'out'}", "--resolution=40", "--num_inference_steps=10",
        f"--pretrained_model_name_or_path={assets / 'teacher'}", f"--scores=pickscore:{assets / 'reward'}",
        "--model=teacher --guidance_scale 2", f"--model='one step' {one_step}"]))
    results = json.loads((tmp_path / "out" / "results.json").read_text())["models"]
    for entry in results.values():
        assert next(iter(entry["scores"].values()))["mean"] > 0.6
    assert results["one step"]["seconds_per_10"] < results["teacher"]["seconds_per_10"] / 2


def test_images_made_elsewhere_score_as_their_pixels(run, tiny, tmp_path, images):
    from utils.rewards import from_image, load_reward

    out = run(tmp_path / "out", images=images)
    reward = load_reward(f"pickscore:{tiny['clip']}")
    table = pandas.read_parquet(out / "per_prompt.parquet")
    for index, path in enumerate(sorted(images.iterdir())):
        expected = reward(from_image(reward, Image.open(path))[None], [PROMPTS[index]])
        assert table.iloc[index, 4] == pytest.approx(expected.item(), abs=1e-6)


def test_a_score_of_your_own_reads_whole_images(run, tmp_path, images, monkeypatch):
    (tmp_path / "own_score.py").write_text(
        "def height():\n    return lambda images, prompts: images[:, 0, :, 0].numel() / len(images)"
        " + images.sum((1, 2, 3)) * 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    out = run(tmp_path / "out", images=images, batch_size=3,
              scores=["own_score:height"])
    assert scores_of(out).iloc[:, 4].tolist() == [20 + index for index in range(7)]


@pytest.mark.parametrize("returned", [
    "arange(5.0)", "zeros(len(prompts), 1)", "zeros(len(prompts) - 1)", "zeros(len(prompts)).tolist()",
    "absent"])
def test_a_score_is_one_number_an_image(run, tmp_path, images, monkeypatch, capsys, returned):
    score = types.SimpleNamespace(make=lambda: lambda images, prompts: eval(
        returned, vars(torch) | {"prompts": prompts}))
    monkeypatch.setitem(sys.modules, "bad_score", score)
    line = refused(capsys, lambda: run(
        tmp_path / "out", images=images, batch_size=2, scores=["bad_score:make"]))
    assert "--scores bad_score:make" in line


def test_the_page_holds_everything(run, tmp_path):
    (tmp_path / "odd.jsonl").write_text(json.dumps({"text": "</script><b>bold</b> & \"quotes\""}) + "\n")
    out = run(tmp_path / "out", prompts_file=tmp_path / "odd.jsonl")
    page = (out / "report.html").read_text()
    assert page.count("</script>") == 2 and "http://" not in page and "https://" not in page
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["prompts"] == [[0, "</script><b>bold</b> & \"quotes\"", "", 0]] and data["models"] == ["tiny"]
    assert Image.open(out / data["folders"][0] / "thumbnails" / f"{data['names'][0]}.jpg").size == (16, 16)
    assert data["values"][0][0][0] == pytest.approx(scores_of(out).iloc[0, 4], abs=1e-6)


def test_a_clip_score_is_named_after_its_model():
    assert report.title("clip") == "CLIP score (CLIP-ViT-g-14-laion2B-s12B-b42K)"
    assert report.title("clip:openai/clip-vit-base-patch32") == "CLIP score (clip-vit-base-patch32)"
    assert report.title("clip-dmd2") == "CLIP score of DMD2 (CLIP-ViT-g-14-laion2B-s12B-b42K)"
    trained = {"ours": {"scores": {"clip-dmd2": {}, "pickscore": {}}, "facts": {"rewards": ["clip"]}}}
    assert report.columns(trained) == {"pickscore": [], "clip-dmd2": ["ours"]}


def test_the_hpsv2_table_has_the_styles(evaluation):
    groups = {style: {"mean": 30.0, "low": 29.0, "high": 31.0, "chunk_deviation": 0.5}
              for style in benchmarks.HPS_STYLES}
    results = {"ours": {"prompts": 3200, "images": 3200, "facts": {}, "scores": {"hpsv2.1": {
        "mean": 30.0, "low": 29.5, "high": 30.5, "groups": groups}}}}
    header, rows = report.main_table(results, "hpsv2", 3200)
    styles = ["Animation", "Concept-art", "Painting", "Photo", "Average"]
    assert header[2:] == [f"HPSv2.1 {name}" for name in styles]
    assert rows[0] == ["ours", 3200, *["30.00 ± 0.50"] * 4, "30.00 [29.50, 30.50]"]
    assert ["DI*, 1 step (long) (published)", 3200, "33.22", "31.67", "31.25", "28.62", "31.19"] in rows


# ------------------------------------------------------------------------------------------------ bad input


def refused(capsys, function):
    capsys.readouterr()
    with pytest.raises(SystemExit) as status:
        function()
    line = capsys.readouterr().err.splitlines()[-1]
    assert status.value.code == 2 and line.startswith("error: ")
    return line


def test_the_documented_commands_are_understood(evaluation):
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    text = "\n".join(page.read_text() for page in pages).replace("\\\n", " ")
    commands = [line for line in text.splitlines() if line.startswith("accelerate launch eval_benchmarks.py")]
    models = {}
    for command in commands:
        models |= evaluation.parse_args(shlex.split(command)[3:]).models
    assert {"SDXL", "DI*"} < set(models)
    assert models["stable-diffusion-xl-base-1.0, guidance 3, 25 steps"].guidance_scale == 3
    assert models["DI*"].timesteps == [399]


def test_a_corrupt_image_is_named_and_the_scores_before_it_are_kept(run, tmp_path, images, capsys):
    (images / "00005.png").write_bytes((images / "00005.png").read_bytes()[:60])
    more = {"images": images}
    assert "00005.png" in refused(capsys, lambda: run(tmp_path / "out", **more))
    assert len(lines_of(tmp_path / "out")) >= 4
    Image.new("RGB", (20, 20)).save(images / "00005.png")
    before = scores_of(run(tmp_path / "out", **more))
    assert len(before) == 7 and len(lines_of(tmp_path / "out")) == 7
    Image.new("RGB", (20, 20), "red").save(images / "00002.png")  # and only what has changed is scored anew
    after = scores_of(run(tmp_path / "out", **more))
    assert (before.iloc[:, 4] != after.iloc[:, 4]).tolist() == [False, False, True] + [False] * 4


def test_images_that_do_not_match_the_prompts_are_refused(run, tmp_path, images, capsys):
    (images / "00006.png").unlink()
    line = refused(capsys, lambda: run(tmp_path / "out", images=images))
    assert "6 images, but the benchmark needs 7" in line


@pytest.mark.slow
def test_an_image_that_changed_counts_as_it_is_now_whoever_scores_it(
        run, evaluation, flags, tmp_path, images, run_warm):
    more = {"images": images}
    two = run_warm(evaluation.__file__, *flags(tmp_path / "out", **more), processes=2,
                   ACCELERATE_USE_CPU="true")
    assert two.returncode == 0, two.stderr
    for index in (0, 1):
        Image.new("RGB", (20, 20), "red").save(images / f"0000{index}.png")
    run(tmp_path / "out", **more)
    lines = len(lines_of(tmp_path / "out"))
    pandas.testing.assert_frame_equal(scores_of(run(tmp_path / "out", **more)),
                                      scores_of(run(tmp_path / "fresh", **more)))
    assert lines == len(lines_of(tmp_path / "out")) == 9, "and is not scored again"


def test_images_are_in_the_order_of_their_numbers(evaluation, tmp_path, capsys):
    for index in range(12):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{index}.png")
    prompts = [benchmarks.Prompt(index, str(index)) for index in range(12)]
    assert [int(path.stem) for path in evaluation.find_images(tmp_path, prompts).values()] == list(range(12))
    for style in ("photo", "anime"):
        (tmp_path / style).mkdir()
        for index in range(2):
            Image.new("RGB", (4, 4)).save(tmp_path / style / f"{index}.png")
    mixed = [benchmarks.Prompt(index, "", ("photo", "anime")[index % 2]) for index in range(4)]
    found = [f"{path.parent.name}/{path.stem}" for path in evaluation.find_images(tmp_path, mixed).values()]
    assert found == ["photo/0", "anime/0", "photo/1", "anime/1"]
    shutil.rmtree(tmp_path / "anime")
    assert "no folder anime" in refused(capsys, lambda: evaluation.find_images(tmp_path, mixed))


def test_a_second_run_into_the_same_folder_is_refused(run, evaluation, tmp_path, capsys):
    out = run(tmp_path / "out", limit=3)
    held = evaluation.Results(out / "tiny", 0, {})
    assert "another run is writing" in refused(capsys, lambda: run(out))
    held.close()
    assert len(scores_of(run(out))) == 7


def test_a_pipeline_whose_images_are_not_finite_is_refused(run, tiny, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny["pipeline"], tmp_path / "broken")
    file = tmp_path / "broken" / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_out.bias"] = weights["decoder.conv_out.bias"] * float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    line = refused(capsys, lambda: run(tmp_path / "out", pretrained_model_name_or_path=tmp_path / "broken"))
    assert "not finite" in line and "--dtype" in line


def test_a_refusal_by_the_pipeline_is_one_line(run, tmp_path, capsys):
    line = refused(capsys, lambda: run(tmp_path / "out", timesteps=[9999], num_inference_steps=None))
    assert line.startswith("error: tiny: `timesteps` must start before")


def test_a_lora_of_another_family_is_refused(run, tmp_path, capsys):
    from safetensors.torch import save_file

    (tmp_path / "lora").mkdir()
    weights = {"transformer.x.lora_A.weight": torch.zeros(2, 4),
               "transformer.x.lora_B.weight": torch.zeros(4, 2)}
    save_file(weights, tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    line = refused(capsys, lambda: run(
        tmp_path / "out", lora=tmp_path / "lora" / "pytorch_lora_weights.safetensors"))
    assert "--lora" in line


def test_a_run_that_ended_before_its_first_image_blocks_no_later_run(run, tmp_path, capsys):
    assert "--variant" not in refused(capsys, lambda: run(tmp_path / "out", variant="fp16"))
    assert len(scores_of(run(tmp_path / "out"))) == 7
    settings = json.loads((tmp_path / "out" / "tiny" / "settings.json").read_text())
    assert settings["model"]["variant"] is None


def test_one_folder_has_one_fid(run, tmp_path, capsys, extractor, images):
    more = {"fid_real": images, "inception": extractor}
    out = run(tmp_path / "out", name="first", **more)
    for name, other in {"size": more | {"fid_size": 64}, "none": {}}.items():
        assert "FID" in refused(capsys, lambda: run(out, name=name, **other))
    first = json.loads((out / "results.json").read_text())["models"]["first"]["fid"]
    Image.new("RGB", (20, 20), "red").save(images / "00001.png")
    run(out, name="second", **more)  # whatever it was before, all models' FID is to the images of now
    held = json.loads((out / "results.json").read_text())["models"]
    assert held["first"]["fid"] == held["second"]["fid"] != first


def test_results_of_another_model_are_left_alone(run, tiny, tmp_path, capsys):
    out = run(tmp_path / "out")
    before = lines_of(out)
    for more in ({"unet": tiny["unet"]}, {"seed": 1}, {"num_inference_steps": 3},
                 {"scores": [f"clip:{tiny['clip']}"]}):
        assert "other results" in refused(capsys, lambda: run(out, **more))
    (tmp_path / "prompts.txt").write_text("others\n")
    assert "other results" in refused(capsys, lambda: run(out))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    shutil.copytree(tiny["pipeline"], tmp_path / "copy")
    changing = {"pretrained_model_name_or_path": tmp_path / "copy", "name": "changing"}
    run(out, **changing)
    shutil.copy(tiny["unet"] / "diffusion_pytorch_model.safetensors", tmp_path / "copy" / "unet")
    assert "files have changed" in refused(capsys, lambda: run(out, **changing))
    (tmp_path / "mine" / "tiny").mkdir(parents=True)
    (tmp_path / "mine" / "tiny" / "thesis.txt").write_text("do not touch")
    assert "no results" in refused(capsys, lambda: run(tmp_path / "mine"))
    assert lines_of(out) == before


def test_weights_of_another_model_are_refused_by_name(run, tiny, tiny_families, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny["unet"] / "diffusion_pytorch_model.safetensors")
    weights["other"] = weights.pop("conv_in.weight")
    save_file(weights, tmp_path / "unet.safetensors")
    unet = tmp_path / "unet.safetensors"
    assert "conv_in.weight" in refused(capsys, lambda: run(tmp_path / "one", unet=unet))
    for other in (tiny_families["sdxl"]["unet"], tiny["clip"]):
        line = refused(capsys, lambda: run(tmp_path / "two", unet=other))
        assert "another model" in line and not (tmp_path / "two").exists(), "before any model loads"
    (tmp_path / "lora").mkdir()
    assert "--lora" in refused(capsys, lambda: run(tmp_path / "three", lora=tmp_path / "lora"))


def test_broken_fid_files_are_refused(run, tmp_path, capsys, extractor, images):
    (tmp_path / "broken.pt").write_text("no module")
    numpy.savez(tmp_path / "other.npz", mean=numpy.zeros(3))
    (tmp_path / "empty").mkdir()
    for real, inception, words in [(images, tmp_path / "broken.pt", "broken.pt"),
                                   (tmp_path / "other.npz", extractor, "other.npz"),
                                   (tmp_path / "empty", extractor, "empty")]:
        line = refused(capsys, lambda: run(tmp_path / "out", fid_real=real, inception=inception))
        assert words in line
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
