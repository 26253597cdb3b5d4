# ruff: noqa: F401, F811  (it shares the fixtures of test_eval.py)
"""What eval_benchmarks.py does with files that were cut, changed, lost or foreign, and with a full disk."""

import errno
import json
import os
import shutil
import weakref
from pathlib import Path

import numpy
import pandas
import pytest
import torch
from PIL import Image
from scipy.stats import t as student
from test_eval import evaluation, extractor, flags, images, lines_of, refused, run, scores_of

from utils import report


def results_of(folder):
    return json.loads((folder / "results.json").read_text())["models"]


def held(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def samples(evaluation, monkeypatch):
    """The batches that pipelines have sampled, as lists of the images' names."""
    made, plain = [], evaluation.Sampler.__call__

    def sample(self, prompts):
        made.append([prompt.name for prompt in prompts])
        return plain(self, prompts)
    monkeypatch.setattr(evaluation.Sampler, "__call__", sample)
    return made


# ------------------------------------------------------------------------------------------------ order


def two_models(tiny):
    place = f"--pretrained_model_name_or_path {tiny['pipeline']}"
    return {"name": None, "pretrained_model_name_or_path": None, "num_inference_steps": None,
            "model": [f"zebra {place} --num_inference_steps 2", f"ape {place} --num_inference_steps 1"]}


@pytest.mark.slow
def test_models_keep_the_order_of_their_flags_after_a_run_that_ended_before_its_first_image(
        run, tiny, tmp_path, evaluation, monkeypatch, images):
    def ends(*given):
        raise KeyboardInterrupt

    more = two_models(tiny)
    plain = run(tmp_path / "plain", **more)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluation, "Sampler", ends)
        run(tmp_path / "out", **more)
    assert len(list((tmp_path / "out").glob("*/settings.json"))) == 2
    out = run(tmp_path / "out", **more)
    table = pandas.read_parquet(out / "per_prompt.parquet")
    key = next(name for name in table.columns if name.startswith("pickscore"))
    means = table.groupby("model")[key].mean()
    for folder in (plain, out):
        found = results_of(folder)
        assert list(found) == ["zebra", "ape"]
        assert found["ape"]["scores"][key]["difference"]["mean"] == pytest.approx(
            means["ape"] - means["zebra"], abs=1e-6)
    assert abs(means["ape"] - means["zebra"]) > 1e-4
    run(out, name="aardvark", images=images)
    assert list(results_of(out)) == ["zebra", "ape", "aardvark"]
    run(out, **more | {"model": more["model"][::-1]})
    assert list(results_of(out)) == ["zebra", "ape", "aardvark"], "the first command with scores decides"


# ---------------------------------------------------------------------------------------------- features


def test_features_are_found_by_their_image_whatever_happened_to_the_file(tmp_path):
    generator, path = numpy.random.default_rng(0), tmp_path / "features-0.rows"
    expected = {(index, image): generator.normal(size=5).astype("<f4") for index in (3, 70_000)
                for image in (0, 1)}
    rows = [report.make_row(key, values) for key, values in expected.items()]

    def found(content):
        path.write_bytes(content)
        return {key: values.tolist() for key, values in report.read_features(path).items()}
    all_of = {key: values.tolist() for key, values in expected.items()}
    assert found(b"".join(rows)) == all_of
    assert found(b"".join(rows[::-1])) == all_of
    assert found(b"".join(rows)[:-1]) == {key: all_of[key] for key in list(all_of)[:3]}
    assert found(b"".join(rows)[:-30] + bytes(90)) == {key: all_of[key] for key in list(all_of)[:3]}
    assert found(rows[0] + bytes(len(rows[0])) + rows[2]) == {
        key: all_of[key] for key in ((3, 0), (70_000, 0))}
    assert found(rows[0] + rows[1][:7] + rows[2]) == {(3, 0): all_of[3, 0]}
    newer = report.make_row((3, 0), numpy.ones(5))
    assert found(rows[0] + rows[1] + newer)[3, 0] == [1] * 5
    assert found(b"") == found(b"ab") == found(b"no features " * 9) == found(bytes(99)) == {}
    path.unlink()
    assert report.read_features(path) == {}


FILES = ("features-0.rows", "embeddings-0.rows", "scores-0.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("name, damage", [
    *((name, damage) for name in FILES[:2] for damage in ("cut", "padded", "removed", "foreign")),
    ("scores-0.jsonl", "line"), ("scores-0.jsonl", "two lines")])
def test_damaged_rows_are_computed_again_and_all_others_kept(
        run, tmp_path, extractor, images, samples, name, damage):
    """The FID and the diversity are those of the undamaged run; only the images concerned are sampled."""
    more = {"fid_real": images, "inception": extractor, "images_per_prompt": 2, "limit": 4}
    out = run(tmp_path / "out", **more)
    before, path = results_of(out)["tiny"], out / "tiny" / name
    content, samples[:] = path.read_bytes(), []
    lines = content.splitlines(keepends=True)
    path.write_bytes({
        "cut": content[:len(content) // 2 + 3], "padded": content[:len(content) // 2] + bytes(
            len(content) - len(content) // 2), "removed": b"", "foreign": b"nothing of ours " * 40,
        "line": b"".join(lines[:1] + lines[2:]), "two lines": b"".join(lines[:2] + lines[4:])}[damage])
    after = results_of(run(out, **more))["tiny"]
    assert len(samples) - 1 == {"line": 1, "two lines": 2, "cut": 4, "padded": 4}.get(damage, 8)  # a warm-up
    assert after["fid"] == pytest.approx(before["fid"], rel=1e-6) and after["fid"] > 0
    for key, score in before["scores"].items():
        assert after["scores"][key]["mean"] == pytest.approx(score["mean"], abs=1e-7), key
    samples[:] = []
    run(out, **more)
    assert not samples, "and not once more"


def test_features_of_a_model_outside_of_the_command_are_missed_before_anything_loads(
        run, tmp_path, extractor, images, evaluation, monkeypatch, capsys):
    more = {"fid_real": images, "inception": extractor}
    out = run(tmp_path / "out", **more)
    path = out / "tiny" / "features-0.rows"
    path.write_bytes(path.read_bytes()[:-40])
    before = held(out)
    monkeypatch.setattr(evaluation, "load_scorers", None)
    line = refused(capsys, lambda: run(out, name="other", **more))
    assert f"{path} lacks the features of image 00006; give the flags of tiny again" in line
    assert held(out) == before and not (out / "other").exists()


def test_a_folder_of_an_earlier_version_is_continued_or_refused(
        run, tiny, tmp_path, extractor, images, capsys):
    """Its records name no files; its features are rows without names; its paths were as they were given."""
    out = run(tmp_path / "out", limit=3)
    path = out / "tiny" / "scores-0.jsonl"
    records = [json.loads(line) for line in lines_of(out)]
    for record in records:
        del record["written"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = json.loads((out / "tiny" / "settings.json").read_text())
    settings["model"]["pretrained_model_name_or_path"] = os.path.relpath(tiny["pipeline"])
    (out / "tiny" / "settings.json").write_text(json.dumps(settings))
    old = path.read_bytes()
    assert len(scores_of(run(out))) == 7 and path.read_bytes().startswith(old)
    more = {"fid_real": images, "inception": extractor}
    measured = run(tmp_path / "measured", **more)
    (measured / "tiny" / "features-0.rows").rename(measured / "tiny" / "features-0.f32")
    line = refused(capsys, lambda: run(measured, **more))
    assert "features-0.f32 is of an earlier version" in line and "give another --output_dir" in line


# ------------------------------------------------------------------------------------------------ images


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["empty", "other", "lost"])
def test_a_saved_image_that_was_changed_is_made_again(run, tmp_path, samples, capsys, damage):
    out = run(tmp_path / "out", save_images=True)
    path = out / "tiny" / "images" / "00002.png"
    before, samples[:] = path.read_bytes(), []
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "empty" else before[:-1] + b"x")
        content = held(out)
        for name in ("tiny", "other"):
            line = refused(capsys, lambda: run(out, name=name))
            assert f"{path} was changed after it was scored" in line and "--save_images" in line
        assert held(out) == content and not samples
    run(out, save_images=True)
    assert path.read_bytes() == before and samples == [["00002"]] * 2  # the first is the warm-up
    samples[:] = []
    os.utime(path, (1, 1))  # a copy of a folder has other times
    run(out, save_images=True)
    run(out)
    assert not samples


@pytest.mark.slow
@pytest.mark.parametrize("saved", [True, False])
def test_a_lost_thumbnail_is_made_again(run, tmp_path, samples, saved):
    out = run(tmp_path / "out", save_images=saved)
    paths = [out / "tiny" / "thumbnails" / f"0000{index}.jpg" for index in (1, 4)]
    before, samples[:] = [path.read_bytes() for path in paths], []
    paths[0].unlink()
    paths[1].write_bytes(before[1][:20])
    run(out, save_images=saved)
    assert [path.read_bytes() for path in paths] == before
    assert samples == ([] if saved else [["00001"], ["00001"], ["00004"]])
    if saved:  # also of a model that the command does not name
        shutil.rmtree(out / "tiny" / "thumbnails")
        run(out, name="other", limit=5)
        assert {path.name for path in (out / "tiny" / "thumbnails").iterdir()} >= {"00001.jpg", "00004.jpg"}


def test_few_images_are_in_memory_at_a_time(run, tmp_path, evaluation, monkeypatch):
    opened, most, plain = [], [], evaluation.open_image
    (tmp_path / "many").mkdir()
    (tmp_path / "many.txt").write_text("".join(f"prompt {index}\n" for index in range(60)))
    for index in range(60):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / "many" / f"{index}.png")

    def open_image(path):
        image = plain(path)
        opened.append(weakref.ref(image))
        most.append(sum(one() is not None for one in opened))
        return image
    monkeypatch.setattr(evaluation, "open_image", open_image)
    run(tmp_path / "out", images=tmp_path / "many", prompts_file=tmp_path / "many.txt", batch_size=2)
    assert len(most) == 60 and max(most) <= 3 * 2


# ------------------------------------------------------------------------------------------ damaged files


DAMAGES = [
    *((name, content) for name in ("settings.json", "facts.json", "rewards.json")
      for content in ("", '{"name": "ti', "7", '"words"', "\x00\xff", "folder")),
    ("settings.json", '{"name": "tiny"}'), ("facts.json", '{"parameters": "many"}'), ("rewards.json", "[3]"),
    *(("scores-0.jsonl", content) for content in (
        "", "folder", "caption\n", "caption", "7\n", "[]\n", "{}\n", '{"index": 1}\n', '{"index": 1, "scor\n',
        '{"index": "a", "scores": {}, "time": 1, "seconds": null, "memory": null}\n',
        '{"index": 1, "scores": {"a": "b"}, "time": 1, "seconds": null, "memory": null}\n',
        '{"index": 1, "scores": {"a": NaN}, "time": 1, "seconds": null, "memory": null}\n',
        '{"index": 1, "scores": [], "time": 1, "seconds": null, "memory": null}\n')),
    ("thumbnails", "file"), ("images", "file"), ("", "file"), ("../results.md", "folder"),
    ("../per_prompt.parquet", "folder")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tmp_path_factory.mktemp("whole") / "out"


@pytest.mark.parametrize("name, content", DAMAGES)
def test_a_damaged_file_is_one_line(run, whole, tmp_path, evaluation, monkeypatch, capfd, name, content):
    """Whether the command names the model or another, before anything loads, and nothing is changed."""
    if not whole.exists():
        run(whole, limit=2, save_images=True)
    out = shutil.copytree(whole, tmp_path / "out")
    path = Path(os.path.normpath(out / "tiny" / name))
    if path.is_dir():
        shutil.rmtree(path)
    elif content == "folder":
        path.unlink()
    path.mkdir() if content == "folder" else path.write_text(content)
    before = held(out)
    monkeypatch.setattr(evaluation, "load_scorers", None)
    for model in ("tiny", "other") if name else ("tiny",):
        capfd.readouterr()
        with pytest.raises(SystemExit) as ending:
            run(out, name=model, limit=2)
        (line,) = capfd.readouterr().err.splitlines()
        assert ending.value.code == 2 and line.startswith(f"error: --output_dir {out}: ")
        assert str(path) in line and held(out) == before


def test_a_foreign_line_among_good_ones_is_named_and_none_is_lost(run, tmp_path, capsys):
    out = run(tmp_path / "out", limit=3)
    path = out / "tiny" / "scores-0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + "text\n" + "".join(lines[1:]))
    assert f"{path} is damaged, line 2 is no record of scores" in refused(capsys, lambda: run(out))
    path.write_text("".join(lines))
    assert len(scores_of(run(out))) == 7


# ------------------------------------------------------------------------------------------- processes


@pytest.mark.slow
def test_processes_that_do_not_see_each_other_are_refused(evaluation, flags, tmp_path, run_warm):
    ended = run_warm(evaluation.__file__, *flags(tmp_path / "out"), processes=2)
    assert ended.statuses == [2, 2] and not (tmp_path / "out").exists(), ended.stderr
    for line in ended.stderr.splitlines():
        assert line.startswith("error: 2 processes were started, but accelerate sees 1")
        assert line.endswith("without a GPU, set ACCELERATE_USE_CPU=true")


# ------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("count", [3, 4, 5, 8, 20, 39])
def test_intervals_of_small_groups_hold_the_mean_as_often_as_they_say(count):
    """Of 10,000 samples from a normal distribution, 95% within four standard errors of that fraction."""
    draws = numpy.random.default_rng(count).normal(2, 3, size=(10_000, count))
    intervals = [report.mean_interval(values) for values in draws]
    coverage = numpy.mean([low <= 2 <= high for low, high in intervals])
    assert coverage == pytest.approx(0.95, abs=4 * (0.95 * 0.05 / 10_000)**0.5)


def test_quantiles_are_those_of_student_and_fewer_than_three_values_have_no_interval():
    assert report.STUDENT == pytest.approx(student.ppf(0.975, numpy.arange(2, 39)), abs=5e-5)
    assert report.mean_interval([1.0]) == report.mean_interval([1.0, 2.0]) == (None, None)
    assert report.mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5))
    values = numpy.random.default_rng(0).normal(size=40)
    draws = numpy.random.default_rng(0)
    means = [values[draws.integers(40, size=40)].mean() for _ in range(1000)]
    assert report.mean_interval(values) == pytest.approx(tuple(numpy.percentile(means, [2.5, 97.5])))
    assert report.shown(report.summary([1.0, 2.0]), "clip") == "1.50"
    assert report.shown(report.summary([1.0, 2.0, 3.0]), "clip") == "2.00 [-0.48, 4.48]"


def test_fid_of_few_images_is_marked(run, tmp_path, extractor, images):
    out = run(tmp_path / "out", fid_real=images, inception=extractor, limit=5)
    found = results_of(out)["tiny"]
    text = (out / "results.md").read_text()
    assert found["fid_images"] == 5 and f"| {found['fid']:.2f} (5 images) |" in text
    assert "FID of fewer than 10,000 images is marked" in text
    assert f"<td>{found['fid']:.2f} (5 images)</td>" in (out / "report.html").read_text()
    assert report.distance({"fid": 3.0, "images": 30_000}, "fid") == "3.00"
    assert report.distance({"fid": 3.0, "images": 10_000, "fid_images": 9_999}, "fid") == "3.00 (9999 images)"


# -------------------------------------------------------------------------------------------- a full disk


@pytest.mark.slow
@pytest.mark.parametrize("place", [
    "tiny/thumbnails/00004.jpg", "tiny/images/00004.png", "results.md", "report.html", "per_prompt.parquet"])
def test_a_full_disk_is_one_line_and_leaves_no_half(run, tmp_path, capsys, place):
    """/dev/full takes no byte; the old file stays, the temporary one does not, and the run continues."""
    out = run(tmp_path / "out", save_images=True, limit=2)
    path = out / place
    before = path.read_bytes() if path.exists() else None
    path.with_name(path.name + ".unfinished").symlink_to("/dev/full")
    line = refused(capsys, lambda: run(out, save_images=True))
    assert line == (f"error: disk full: [Errno 28] No space left on device: '{path}'; make room and give the"
                    " same command again")
    assert (path.read_bytes() if path.exists() else None) == before
    assert not list(out.rglob("*.unfinished"))
    fresh = run(tmp_path / "fresh", save_images=True)
    pandas.testing.assert_frame_equal(scores_of(run(out, save_images=True)), scores_of(fresh))


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("name", ["features", "scores"])
def test_a_record_that_a_full_disk_cut_is_taken_back(
        run, tmp_path, evaluation, monkeypatch, capsys, extractor, images, name, at):
    more = {"fid_real": images, "inception": extractor}
    plain, taken = evaluation.Results.open_files, []

    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, attribute):
            return getattr(self.file, attribute)

        def write(self, content):
            taken.append(content)
            return self.file.write(content if len(taken) <= at else content[:10])

    def opened(self):
        plain(self)
        self.files[name] = Full(self.files[name])
    with monkeypatch.context() as patch:
        patch.setattr(evaluation.Results, "open_files", opened)
        line = refused(capsys, lambda: run(tmp_path / "out", **more))
    assert line.startswith("error: disk full: ") and f"{tmp_path / 'out' / 'tiny' / name}-0." in line
    row = len(report.make_row((0, 0), numpy.zeros(6)))
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out" / "tiny").glob("*-0.*")}
    assert sizes.get("features-0.rows", 0) == at * row and len(lines_of(tmp_path / "out")) == at
    assert ("features-0.rows" in sizes) == ("scores-0.jsonl" in sizes) == bool(at)
    assert len(scores_of(run(tmp_path / "out", **more))) == 7


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Disk quota exceeded"),
    RuntimeError("I/O error: No space left on device (os error 28)")])
def test_each_library_is_understood(run, tmp_path, evaluation, monkeypatch, capsys, error):
    def fails(*given, **more):
        raise error
    for name in ("rewards_of", "load_pipeline", "write_report"):  # also inside of another one-line error
        with monkeypatch.context() as patch:
            patch.setattr(evaluation if name != "load_pipeline" else evaluation.cli, name, fails)
            line = refused(capsys, lambda: run(tmp_path / name))
            assert line.startswith("error: disk full: ") and str(error) in line


# ------------------------------------------------------------------------------------------------ flags


def test_a_name_of_several_words_is_understood(evaluation, flags, tmp_path, capsys, tiny):
    place = f"--pretrained_model_name_or_path {tiny['pipeline']}"

    def models(*texts):
        return evaluation.parse_args(flags(tmp_path, name=None, model=texts)).models
    found = models(f"my model {place} --guidance_scale 0", "'my other' model", "DI* (long) --resolution=32")
    assert list(found) == ["my model", "my other model", "DI* (long)"]
    assert found["my model"].guidance_scale == 0 and found["DI* (long)"].resolution == 32


@pytest.mark.parametrize("flag", ["--seed 1", "--seed=1", "--limit 3", "--save_images", "--scores clip",
                                  "--benchmark parti", "--model x", "--name x"])
def test_a_flag_of_the_whole_run_inside_of_a_model_is_one_line(evaluation, flags, tmp_path, capsys, flag):
    line = refused(capsys, lambda: evaluation.parse_args(flags(
        tmp_path, name=None, model=[f"my model {flag} --guidance_scale 0"])))
    name = flag.replace("=", " ").split()[0]
    assert line == f"error: --model 'my model': {name} is not a flag of one model; give it outside of --model"


def test_one_folder_by_two_paths_is_one_model(run, tiny, tmp_path, monkeypatch, samples, capsys, images):
    out = run(tmp_path / "out", unet=tiny["unet"])
    run(out, name="made", images=images)
    monkeypatch.chdir(tiny["pipeline"].parent)
    (tmp_path / "link").symlink_to(tiny["unet"])
    samples[:] = []
    run(out, pretrained_model_name_or_path=tiny["pipeline"].name, unet=tmp_path / "link")
    run(out, name="made", images=os.path.relpath(images))
    assert not samples and len(lines_of(out)) == 7
    line = refused(capsys, lambda: run(out, unet=tiny["unet"], guidance_scale=[3]))
    assert "other results, of tiny: another --guidance_scale; give another folder or name" in line
