"""The ablation of the shapes world: two tiny runs, and the page of made-up results."""

import json
import math
import sys

import ablation
import pytest


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Two settings, runs of two updates, and results of their own."""
    monkeypatch.setattr(ablation, "RESULTS", tmp_path / "results.jsonl")
    changed = {"--max_train_steps": 2, "--train_batch_size": 2, "--num_validation_images": 2,
               "--validation_steps": 1}
    common = [word.partition("=") for word in ablation.COMMON]
    monkeypatch.setattr(ablation, "COMMON", [
        f"{flag}={changed.get(flag, value)}" if mark else flag for flag, mark, value in common])
    monkeypatch.setattr(ablation, "TEACHER_STEPS", 4)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["ablation.py", f"--work_dir={tmp_path / 'work'}", *flags])
        ablation.main()
        return ablation.read_results(tmp_path / "results.jsonl")
    return run


@pytest.mark.slow
@pytest.mark.once
def test_runs_are_measured_once_and_go_on_where_they_stopped(small, tmp_path, capsys):
    records = small("--only", "sim", "kl_only", "--seeds", "3", "--processes=1")
    assert [(record["setting"], record["seed"]) for record in records] == [
        ("start", None), ("teacher", None), ("start, 4 steps", None), ("sim", 3), ("kl_only", 3)]
    start, teacher, four, sim, _ = records
    assert four["kind_right"] > start["kind_right"] + 0.05
    assert start["alignment"] > 0.9 and abs(sim["alignment"] - start["alignment"]) < 0.1
    assert abs(teacher["frechet_teacher"]) < 1e-3 < start["frechet_teacher"]
    assert start["preference_low"] < start["preference"] < start["preference_high"]
    assert [step for step, *_ in sim["curve"]] == [0, 1, 2] and sim["y_norm"] > 0
    assert str(tmp_path) not in json.dumps(records) and "--recipe=sim" in sim["command"]
    capsys.readouterr()
    assert len(small("--only", "sim", "kl_only", "--seeds", "3")) == 5
    assert "0 runs" in capsys.readouterr().out


def test_the_settings_of_every_claim_have_five_seeds_and_are_in_the_plan():
    wanted = ablation.plan(None, None)
    done = {(record["setting"], record["seed"]) for record in ablation.read_results()}
    for name in ablation.SETTINGS:
        seeds = 5 if name in ablation.TABLE_2 or name in {
            *ablation.FRONTS["score, in"].values(), *ablation.FRONTS["KL, in"].values()} else 3
        assert {seed for setting, seed in {*wanted, *done} if setting == name} >= set(range(seeds))
    assert len(ablation.FRONTS) == 5 and all(len(scales) >= 6 for scales in ablation.FRONTS.values())
    assert len(ablation.SETTINGS) == len({" ".join(flags) for flags in ablation.SETTINGS.values()})


def made_up():
    """Score keeps more diversity than KL, KL collapses at 1600 and score at 400, guidance aligns by 0.1."""
    base = {"updates": 200, "seconds": 1, "torch": "2", "diffusers": "0", "found": 1.0, "kind_right": 0.8,
            "frechet_teacher": 1.0, "frechet_rendered": 1.0, "y_norm": 2.0, "grad_divergence": 1.0,
            "command": "", "reward": 0.2, "diversity": 1.0, "alignment": 0.9, "preference": 0.0,
            "curve": [[0, 0.0, 0.1, 0.2]]}
    records = [base | {"setting": "start", "seed": None}]
    for kind, factor in {"score, in": 0.9, "KL, in": 0.6}.items():
        for step, (scale, name) in enumerate(ablation.FRONTS[kind].items()):
            for seed in range(5):
                collapsed = scale >= (1600 if kind == "KL, in" else 400)
                records.append(base | {
                    "setting": name, "seed": seed, "preference": 0.1 * step,
                    "diversity": factor * (1 + 0.01 * seed), "alignment": 0.6 if collapsed else 0.9,
                    "reward": 0.2 + 0.01 * step + (kind == "score, in") * 0.001, "grad_reward": scale / 60})
    for seed in range(5):
        records.append(base | {"setting": "score_only", "seed": seed, "alignment": 0.8 + 0.001 * seed})
    for seed in range(3):  # where the explicit reward has 0.9 and 0.9 times
        records.append(base | {"setting": "preference model alone, 0.05", "seed": seed, "alignment": 0.85,
                               "preference": 0.15 + 0.001 * seed, "diversity": 1.0 + 0.009 * seed})
    # Somebody's fourth seed, which no claim counts.
    records.append(base | {"setting": "preference model alone, 0.05", "seed": 7, "preference": -9.0})
    records.append(base | {"setting": "preference model alone, 0.2", "seed": 0, "found": 0.0})
    return records


def test_the_claims_follow_from_the_results():
    runs = ablation.by_setting(made_up())
    found = {claim: (what, word) for claim, what, word in ablation.claims(runs)}
    what, word = found["(b) score keeps more than KL: diversity"]
    assert word == ablation.HOLDS and f"(1.50 times): {0.3 * 1.02:+.3f} ± " in what
    assert found["(b) score keeps more than KL: alignment"][1] == ablation.HOLDS, "KL collapses earlier"
    # Between two scales, at the half: alignment falls from 0.9 to 0.6 around 0.75.
    what, word = found["(c) KL collapses at a smaller reward scale than score"]
    assert word == ablation.FAILS and f"{math.log2(400 / 1600):+.2f} ± 0.00" in what
    what, word = found["(d) without guidance alignment falls"]
    assert word == ablation.HOLDS and "+0.098" in what
    assert found["(e) four times the full reward scale costs alignment"][1] == ablation.OPEN, "no difference"
    assert ablation.weakest(runs, runs["start"][None]) == (
        "What gives way first, of 10 fronts that collapse: alignment in 10.")
    assert found["(m) a preference model alone adds: preference"][1] == ablation.HOLDS
    what, word = found["(m) and keeps more than the explicit reward: alignment"]
    assert word == ablation.FAILS and what.startswith("difference at equal true preference: -0.050 ± 0.000")
    what, word = found["(m) and keeps more than the explicit reward: diversity"]
    assert word == ablation.HOLDS and what.startswith("difference at equal true preference: +0.100 ± 0.000")
    assert found["(g) a pre-aligned reference adds: preference"] == (
        "with minus without: not run (0 seeds)", ablation.OPEN)
    highest = "(a) DI\\* in with the full reward scale has the highest reward of Table 2's rows"
    assert found[highest][1] == ablation.OPEN, "rows of Table 2 are missing"


def test_intervals_are_those_of_student():
    mean, half = ablation.interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.303 / math.sqrt(3)))
    assert ablation.interval([1.0]) == (1.0, math.inf) and ablation.verdict([1.0]) == ablation.OPEN
    assert ablation.verdict([-1.0, -1.1, -0.9]) == ablation.FAILS


def test_a_front_is_read_where_it_first_reaches_a_preference():
    front = [{"preference": preference, "diversity": diversity}
             for preference, diversity in [(0.0, 1.0), (0.4, 0.8), (0.2, 0.1)]]
    assert ablation.figure_at(front, 0.2, "diversity") == pytest.approx(0.9)
    assert ablation.figure_at(front, 0.5, "diversity") is None


def test_a_front_collapses_where_one_of_three_figures_is_not_kept():
    base = {"alignment": 0.9, "found": 1.0, "diversity": 1.0}
    front = [base, base | {"diversity": 0.7}, base | {"diversity": 0.3}]
    assert ablation.collapse(front, [1, 2, 8], base) == pytest.approx(2)
    assert ablation.collapse(front[:2], [1, 2], base) is None
    unseen = [base, base | {"found": 0.25}]  # twice of what must be kept, then half of it
    assert ablation.collapse(unseen, [1, 8], base) == pytest.approx(2)


def test_the_page_is_written_of_results_alone(tmp_path):
    page = tmp_path / "ablation.md"
    ablation.write(made_up(), page)
    text = page.read_text()
    assert "verdicts are preliminary" in text and f"| **{ablation.HOLDS}** |" in text
    assert (tmp_path / "ablation" / "fronts.png").exists() and (tmp_path / "ablation" / "curves.png").exists()
    assert str(ablation.REPOSITORY) not in text
    assert "| preference model alone, 0.2 | 1 | no shape |" in text


def test_bad_settings_are_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--only", "simm"])
    with pytest.raises(SystemExit) as ending:
        ablation.main()
    assert ending.value.code == 2 and "--only simm is none of kl_only;" in capsys.readouterr().err
