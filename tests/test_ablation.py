"""Tests of the ablation study: a grid continues after a stop, and its intervals equal SciPy's."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
from quick import environment
from scipy import stats
from study import compare, figure, grid, report, workers
from study.grid import BASELINE, Setting
from study.paired import FEW

from conprediff_jax.common.errors import ConfigError, UserError
from conprediff_jax.common.metric_rows import METRICS
from conprediff_jax.common.trees import flatten
from conprediff_jax.parallel.processes import RESTART_CODE, Preempted

ROOT = pathlib.Path(__file__).parent.parent


# The grid -----------------------------------------------------------------------------------------


def make_runs(out, seeds=(0, 1), num=8, **settings):
    settings = {BASELINE: Setting(weight=0.0), "default": Setting(), **settings}
    return grid.make_runs(
        out, tiny.get_config(), ROOT / "tests" / "tiny.py", settings, seeds, measured={"num": num}
    )


def test_settings_differ_in_one_term_only():
    config = tiny.get_config()

    def changed(setting):
        varied = config.copy_and_resolve_references()
        setting.apply(varied)
        before, after = flatten(config.to_dict()), flatten(varied.to_dict())
        return {
            key: value for key, value in after.items() if key not in before or before[key] != value
        }

    assert changed(Setting()) == {}
    setting = Setting(values={"strides": (3,)}, weight=0.5) + Setting(weight=0.5, warmup=0.5)
    assert changed(setting) == {
        "context.strides": [3], "context.weight": 0.125, "context.warmup_steps": 3,
    }  # fmt: skip
    rival = Setting("own_point", {"weight": 0.5}, weight=0.5) + Setting(values={"tap": "middle"})
    assert changed(rival).items() >= {
        "context.weight": 0.0, "terms.rival.kind": "own_point", "terms.rival.tap": "middle",
        "terms.rival.weight": 0.25,
    }.items()  # fmt: skip
    with pytest.raises(ValueError, match="own_point and dispersion are two terms"):
        rival + Setting("dispersion")
    with pytest.raises(ValueError, match="tap is middle and output: give one"):
        rival + Setting(values={"tap": "output"})


def test_invalid_settings_are_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match="transport is 'emd'"):
        make_runs(tmp_path / "a", emd=Setting(values={"transport": "emd"}))
    assert not (tmp_path / "a").exists()
    make_runs(tmp_path / "b")
    make_runs(tmp_path / "b", seeds=(0, 1, 2), exact=Setting(values={"transport": "exact"}))
    with pytest.raises(UserError, match=r"was made with measured\.num=8, not 9"):
        make_runs(tmp_path / "b", num=9)


def test_a_config_file_that_was_edited_is_noticed(tmp_path, monkeypatch):
    make_runs(tmp_path)
    config = tiny.get_config()
    config.optimizer.learning_rate = 0.5
    monkeypatch.setattr(tiny, "get_config", lambda: config)
    with pytest.raises(
        UserError, match=r"was made with config\.optimizer\.learning_rate=.*not 0\.5"
    ):
        make_runs(tmp_path)


# A worker without training: it is told what to do by the files of a folder.
WORKER = """
import json, os, pathlib, sys
out = pathlib.Path(sys.argv[1])
for line in sys.stdin:
    setting, seed = line.strip().split(", seed ")
    with (out / "done").open("a") as file:
        print(line.strip(), len(os.sched_getaffinity(0)), file=file)
    if (out / f"exit_{seed}").exists():
        sys.exit(int((out / f"exit_{seed}").read_text()))
    error = "diverged" if (out / f"break_{setting}").exists() and seed == "0" else None
    if not error:
        (out / setting / f"seed_{seed}" / "result.json").write_text("{}")
    print(json.dumps({"error": error}), flush=True)
"""


@pytest.fixture
def run_all(tmp_path, monkeypatch):
    """Does the runs that are not done; returns the failures, and which runs had been begun."""
    monkeypatch.setattr(workers.signal, "signal", lambda *_: None)

    def run_all(count=1):
        (tmp_path / "done").write_text("")
        command = [sys.executable, "-c", WORKER, str(tmp_path)]
        failed = workers.complete(make_runs(tmp_path), command, count)
        return failed, [
            line.rpartition(" ") for line in (tmp_path / "done").read_text().split("\n")[:-1]
        ]

    return run_all


def test_a_grid_continues_after_a_failure(tmp_path, run_all):
    (tmp_path / "break_default").touch()
    failed, done = run_all()
    assert failed == ["default, seed 0: diverged"]
    order = ["baseline, seed 0", "default, seed 0", "baseline, seed 1", "default, seed 1"]
    assert [run for run, _, _ in done] == order
    (tmp_path / "break_default").unlink()
    failed, done = run_all()
    assert not failed and [run for run, _, _ in done] == ["default, seed 0"]
    assert run_all() == ([], [])


def test_workers_have_a_core_each_and_do_every_run_once(tmp_path, run_all):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    (tmp_path / "exit_0").write_text("3")  # a process that dies is replaced
    failed, done = run_all(2)
    assert sorted(failed) == [
        f"{name}, seed 0: exit code 3 (see {tmp_path / name / 'seed_0' / 'train.log'})"
        for name in ("baseline", "default")
    ]
    runs = [f"{name}, seed {seed}" for name in ("baseline", "default") for seed in (0, 1)]
    assert sorted(run for run, _, _ in done) == runs
    assert {cores for _, _, cores in done} == {"1"}
    with pytest.raises(UserError, match="workers is 999"):
        run_all(999)


def test_an_interrupted_run_ends_the_grid(tmp_path, run_all):
    (tmp_path / "exit_0").write_text(str(RESTART_CODE))
    with pytest.raises(Preempted):
        run_all()
    assert (tmp_path / "done").read_text().count("seed") == 1


# Pairs --------------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path):
    """Results of runs: three pairs, and a run without a partner."""
    rng = np.random.default_rng(0)
    for setting, seeds in ((BASELINE, (0, 1, 2)), ("default", (1, 0, 2, 7)), ("exact", (2,))):
        for seed in seeds:
            folder = tmp_path / setting / f"seed_{seed}"
            (folder / grid.MEASURED).mkdir(parents=True)
            losses = rng.random((5, 4))
            np.save(folder / grid.MEASURED / "held_out.npy", losses)
            value = float(rng.normal(10))
            found = {
                "setting": setting, "seed": seed, "step": 6, "parameters": 100,
                "steps_per_second": float(rng.uniform(1, 2)),
                "metrics": {
                    "FD": {"value": value, "low": value - 1, "high": value + 1},
                    "held-out loss": {"value": losses.mean(), "low": 0.0, "high": 1.0},
                },
                "num_steps": 20, "times": [2, 7, 12, 17], "losses": losses.mean(0).tolist(),
            }  # fmt: skip
            (folder / "result.json").write_text(json.dumps(found))
    return tmp_path


def values(study, setting, read):
    files = [study / setting / f"seed_{seed}" / "result.json" for seed in (0, 1, 2)]
    return np.array([read(json.loads(file.read_text())) for file in files])


def test_pairs_share_a_seed_and_their_intervals_are_scipys(study):
    results = compare.load(study)
    assert [(a.seed, b.seed) for a, b in compare.pairs(results, "default")] == [
        (0, 0), (1, 1), (2, 2),
    ]  # fmt: skip
    found = compare.compare(results, "default")
    mine, theirs = (
        values(study, name, lambda r: r["metrics"]["FD"]["value"]) for name in ("default", BASELINE)
    )
    interval = stats.ttest_rel(mine, theirs).confidence_interval(0.95)
    assert found["FD"].difference == pytest.approx((np.mean(mine - theirs), *interval))
    assert found["FD"].differences == pytest.approx(tuple(mine - theirs))
    # Three pairs, each with two intervals of half-width 1.
    assert found["FD"].within == pytest.approx(np.sqrt(2 / 3))
    fast, base = (
        np.log(values(study, name, lambda r: r["steps_per_second"]))
        for name in ("default", BASELINE)
    )
    interval = np.exp(stats.ttest_rel(fast, base).confidence_interval(0.95))
    ratio = found[compare.SPEED].difference
    assert ratio == pytest.approx((np.exp(np.mean(fast - base)), *interval))
    # A single pair has the interval of its samples.
    single = compare.compare(results, "exact")["FD"].difference
    assert single[1:] == pytest.approx((single.value - 2**0.5, single.value + 2**0.5))
    times, _, figures = compare.loss_by_time(results, "exact")
    np.testing.assert_allclose(times, [0.1, 0.35, 0.6, 0.85])
    by_time = [
        json.loads((study / name / "seed_2" / "result.json").read_text())["losses"]
        for name in ("exact", BASELINE)
    ]
    expected = 100 * (np.array(by_time[0]) / by_time[1] - 1)
    np.testing.assert_allclose([figure.value for figure in figures], expected)


def test_a_report_is_rebuilt_from_what_is_there(study):
    text = report.write(study)
    assert text + "\n" == (study / "report.md").read_text()
    assert "| metric" in text
    assert "The intervals of a single seed are over its samples" in text
    found = json.loads((study / "report.json").read_text())
    assert len(found["runs"]) == 8 and len(found["comparisons"]["default"]["FD"]["pairs"]) == 3
    for name in ("report.png", "held_out.png"):
        assert (study / name).stat().st_size > 1000
    with pytest.raises(FileNotFoundError, match="no run has been measured"):
        report.write(study / "nothing")


def test_many_settings_are_in_one_table_in_percent(study):
    for name in ("a", "b", "c"):
        for result in compare.load(study):
            if result.setting == "default":
                folder = study / name / f"seed_{result.seed}"
                folder.mkdir(parents=True)
                found = {**result.found, "setting": name}
                (folder / "result.json").write_text(json.dumps(found))
    (table, *_) = report.write(study).split("Mean over seeds")
    whole = compare.compare(compare.load(study), "a")["held-out loss"]
    percents = [f"{100 * d / whole.baseline:+.1f}" for d in whole.differences]
    (row,) = (line for line in table.splitlines() if line.startswith("| a "))
    assert [cell.strip() for cell in row.split("|")[1:-1]] == ["a", ", ".join(percents)]


def test_settings_are_compared_with_each_other_where_there_are_enough_pairs(study):
    rng = np.random.default_rng(1)
    files = study.glob("*/seed_0/result.json")
    known = {file.parent.parent.name: json.loads(file.read_text()) for file in files}
    losses = {}
    for name, found in (*known.items(), ("other", {**known["default"], "setting": "other"})):
        for seed in range(20, 20 + FEW):
            value = losses[name, seed] = float(rng.normal(10))
            found["metrics"]["held-out loss"]["value"] = value
            folder = study / name / f"seed_{seed}"
            folder.mkdir(parents=True)
            (folder / "result.json").write_text(json.dumps(found | {"seed": seed}))
    for folder in study.glob("*/seed_?"):
        (folder / "result.json").unlink()
    text = report.write(study)
    (row,) = [
        line
        for line in text.split("minus that of the column")[1].splitlines()
        if line.startswith("| other")
    ]
    mine, theirs = (
        np.array([v for (n, _), v in losses.items() if n == name]) for name in ("other", "default")
    )
    low, high = (
        100 * np.array(stats.ttest_rel(mine, theirs).confidence_interval(0.95)) / theirs.mean()
    )
    expected = f"{100 * np.mean(mine - theirs) / theirs.mean():+.1f} [{low:+.1f}, {high:+.1f}]"
    assert expected in row


def test_cosines_are_read_from_the_log_and_averaged_over_seeds(study):
    lines = [
        '{"step": 2, "time": 1.5, "loss": 1}',
        '{"step": 4, "time": 2.5, "cosine/context": 0.5, "loss": 1}',
    ]
    for seed, value in ((0, 0.5), (1, -0.1)):
        folder = study / "default" / f"seed_{seed}"
        (folder / METRICS).write_text("\n".join(lines).replace("0.5", str(value)) + "\n")
        (run,) = make_runs(study / "runs", seeds=(seed,))[1:]
        cosines = dataclasses.replace(run, folder=folder).cosines()
        assert cosines == [(4, value)]
        found = json.loads((folder / "result.json").read_text()) | {"cosines": cosines}
        (folder / "result.json").write_text(json.dumps(found))
    file = study / "exact" / "seed_2" / "result.json"  # measured at another step
    file.write_text(json.dumps(json.loads(file.read_text()) | {"cosines": [(3, 0.7)]}))
    *_, table = report.write(study).split("Cosine between")
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()]
    for row in (["setting", "3", "4"], ["default", "", "+0.20"], ["exact", "+0.70", ""]):
        assert row in cells


def test_curves_say_when_the_baseline_is_reached(study):
    curves = {0: [(2, 10.0), (4, 1.0)], 1: [(2, 100.0), (4, 100.0)], 2: [(2, 0.0), (4, 100.0)]}
    for setting, last in ((BASELINE, 5.5), ("default", 100.0)):
        for seed, curve in curves.items():
            file = study / setting / f"seed_{seed}" / "result.json"
            found = json.loads(file.read_text())
            found["metrics"]["FD"]["value"] = last
            found["curve"] = [
                {"step": step, "metrics": {"FD": value, "held-out loss": value}}
                for step, value in curve
            ]
            file.write_text(json.dumps(found))
    # The first crosses 5.5 halfway between steps 2 and 4 of 6, the second never does.
    results = compare.load(study)
    assert compare.reached(results, "default", "FD") == pytest.approx([3 / 6, np.inf, 2 / 6])
    assert compare.reached(results, "exact", "FD") == []


def test_a_report_needs_no_more_than_the_results(study):
    whole = compare.compare(compare.load(study), "default")["held-out loss"]
    for file in study.glob("*/*/*/held_out.npy"):
        file.unlink()
    report.write(study)
    results = compare.load(study)
    assert compare.compare(results, "default")["held-out loss"].difference == whole.difference
    # A single pair gives no interval.
    assert compare.compare(results, "exact")["held-out loss"].difference.low is None


def test_studies_are_drawn_side_by_side_in_percent(study, monkeypatch):
    panels = []
    draw_row = figure.draw_row

    def seen(panel, *arguments, **options):
        panels.append(panel)
        draw_row(panel, *arguments, **options)

    monkeypatch.setattr(figure, "draw_row", seen)
    both = {"pixels": (study, "default"), "tokens": (study, "default")}
    figure.draw(both, study / "figure.png")
    assert (study / "figure.png").stat().st_size > 1000
    # Two studies that have losses, but no other metrics.
    assert len(panels) == 2 and len(set(panels)) == 2
    losses = compare.compare(compare.load(study), "default")["held-out loss"]
    pairs, mean = (dots.get_offsets()[:, 0].tolist() for dots in panels[0].collections)
    assert pairs == pytest.approx([100 * d / losses.baseline for d in losses.differences])
    assert mean == pytest.approx([100 * losses.difference.value / losses.baseline])
    with pytest.raises(FileNotFoundError, match="no pair of 'direct'"):
        figure.draw({"pixels": (study, "direct")}, study / "figure.png")


def test_only_a_setting_that_asks_for_more_steps_is_compared_at_another_step(tmp_path, study):
    base, longer = make_runs(tmp_path / "runs", seeds=(2,), longer=Setting(longer=1.25))[::2]
    assert longer.config.train.steps == round(1.25 * base.config.train.steps)
    file = study / "exact" / "seed_2" / "result.json"
    found = json.loads(file.read_text()) | {"step": 8}
    file.write_text(json.dumps(found | {"longer": 8 / 6}))
    assert compare.compare(compare.load(study), "exact")
    file.write_text(json.dumps(found))
    with pytest.raises(UserError, match="steps is 8 and 6; it must be the same"):
        compare.compare(compare.load(study), "exact")


def test_pairs_of_different_size_at_inference_are_refused(study):
    file = study / "exact" / "seed_2" / "result.json"
    file.write_text(file.read_text().replace('"parameters": 100', '"parameters": 101'))
    with pytest.raises(UserError, match="parameters is 101 and 100; it must be the same"):
        compare.compare(compare.load(study), "exact")


def test_results_that_cannot_be_right_are_refused_by_name(study):
    file = study / "exact" / "seed_2" / "result.json"
    whole = file.read_text()
    found = json.loads(whole)
    lacking = [
        {"losses": found["losses"][1:]},
        {"curve": [{"step": 3, "metrics": {"FD": 1.0}}]},  # no losses
    ]
    for broken in (whole[:40], "", "{}", *(json.dumps(found | part) for part in lacking)):
        file.write_text(broken)
        with pytest.raises(UserError, match=r"exact/seed_2/result.json: is not complete.*delete"):
            report.write(study)
    file.write_text(whole)
    shutil.copytree(study / "default", study / "copy")  # would count every seed twice
    with pytest.raises(UserError, match=r"copy/seed_0/result.json: is the result of default/"):
        report.write(study)


def test_a_value_that_is_not_a_number_is_no_clear_difference(study):
    file = study / "exact" / "seed_2" / "result.json"
    found = json.loads(file.read_text())
    found["metrics"]["FD"] = dict.fromkeys(("value", "low", "high"), float("nan"))
    file.write_text(json.dumps(found))
    assert not compare.compare(compare.load(study), "exact")["FD"].clear


# The whole ----------------------------------------------------------------------------------------


def ablation(*arguments):
    return subprocess.run(
        [sys.executable, "benchmarks/ablation.py", *map(str, arguments)],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip


def test_a_grid_of_two_settings_runs_once(tmp_path):
    for split, count in (("train", 24), ("test", 6)):
        tiny.write_images(tmp_path / "data" / split, count)
    out = tmp_path / "out"
    arguments = [
        f"--config={ROOT / 'tests' / 'tiny.py'}", f"--data={tmp_path / 'data'}", f"--out={out}",
        "--settings=baseline,default", "--seeds=1", "--steps=2", "--num=12", "--held_out=6",
        "--times=3", "--bootstrap=2", "--batch_size=12", "--config.sampling.num=1", "--curve=1",
        "--config.context.cosine_every=1",
    ]  # fmt: skip
    first = ablation(*arguments)
    assert first.returncode == 0, first.stderr
    for said in ("training baseline, seed 1: run 1 of 2", "2/2 runs"):
        assert said in first.stderr
    assert "measured default, seed 1" in (out / "default" / "seed_1" / "train.log").read_text()
    for metric in ("FD-random-VGG16", "held-out loss", "difference W2, radius 1", "patch W2"):
        assert f"| {metric}" in first.stdout
    runs = {
        file.parent.relative_to(out): json.loads(file.read_text())
        for file in out.glob("*/*/result.json")
    }
    assert sorted(map(str, runs)) == ["baseline/seed_1", "default/seed_1"]
    # Pairs have one size at inference.
    assert len({found["parameters"] for found in runs.values()}) == 1
    assert {found["step"] for found in runs.values()} == {2}
    assert all([point["step"] for point in found["curve"]] == [1] for found in runs.values())
    assert "Percent of the steps after which each run" in first.stdout
    assert "Cosine between the gradients" in first.stdout

    touched = {file: file.stat().st_mtime_ns for file in out.glob("*/*/**/*") if file.is_file()}
    again = ablation(*arguments)
    assert again.returncode == 0, again.stderr
    assert again.stdout == first.stdout
    assert "training" not in again.stderr and "measuring" not in again.stderr
    assert touched == {f: f.stat().st_mtime_ns for f in out.glob("*/*/**/*") if f.is_file()}
