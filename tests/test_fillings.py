"""Tests of the metrics of inpainting against their definitions."""

import json

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch

from conprediff_jax import parallel
from conprediff_jax.common.errors import UserError
from conprediff_jax.data.holes import Hole
from conprediff_jax.data.masks import make_mask
from conprediff_jax.metrics import features, fillings, regions
from conprediff_jax.metrics.bootstrap import Figure
from conprediff_jax.metrics.results import ResultsTable


def pictures(count, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def random_region(height, width):
    return np.random.default_rng(1).random((height, width)) < 0.5


def mean_extractor():
    """A simple feature network: the mean colour."""
    return features.Extractor(
        name="mean colour",
        fingerprint="mean",
        apply=lambda params, x: {"pool": x.mean(axis=(1, 2)) * params},
        params=np.float32(1),
        labels={"frechet": "FD"},
    )


def two_gaussians(first, second):
    """The Frechet distance by SciPy's root of a matrix."""
    a, b = np.cov(first.T), np.cov(second.T)
    root = scipy.linalg.sqrtm(a @ b).real
    return np.square(first.mean(0) - second.mean(0)).sum() + np.trace(a + b - 2 * root)


def test_psnr_and_spread_are_of_the_region():
    first, second = pictures(2, 10, 12)
    region = random_region(10, 12)
    errors = [
        (int(a) - int(b)) ** 2
        for place in zip(*np.nonzero(region), strict=True)
        for a, b in zip(first[place], second[place], strict=True)
    ]
    mean = sum(errors) / len(errors)
    assert regions.psnr(first, second, region) == pytest.approx(10 * np.log10(65025 / mean))
    assert regions.psnr(first, first, region) == pytest.approx(10 * np.log10(65025 * 12))
    distance = np.sqrt(mean) / 255
    three = np.stack([first, second, first])
    assert regions.spread(three, region) == pytest.approx(2 / 3 * distance)
    assert regions.spread(first[None], region) == 0


def test_ssim_equals_its_definition_in_torch():
    first, second = pictures(2, 16, 14)
    second = first // 2 + second // 2
    region = random_region(16, 14)
    taps = torch.exp(-(torch.arange(-5.0, 6, dtype=torch.float64) ** 2) / (2 * 1.5**2))
    window = torch.outer(taps, taps) / taps.sum() ** 2

    def local(x):
        x = np.pad(x, ((5, 5), (5, 5), (0, 0)), mode="symmetric")
        channels = torch.from_numpy(x).permute(2, 0, 1)[:, None]
        means = torch.nn.functional.conv2d(channels, window[None, None])
        return means[:, 0].permute(1, 2, 0).numpy()

    x, y = first.astype(np.float64), second.astype(np.float64)
    m_x, m_y = local(x), local(y)
    s_x, s_y, s_xy = local(x * x) - m_x**2, local(y * y) - m_y**2, local(x * y) - m_x * m_y
    c_1, c_2 = 6.5025, 58.5225
    terms = (2 * m_x * m_y + c_1) * (2 * s_xy + c_2)
    terms /= (m_x**2 + m_y**2 + c_1) * (s_x + s_y + c_2)
    found = regions.ssim(first, second, region)
    assert found == pytest.approx(terms[region].mean(), abs=1e-12)
    assert 0.2 < found < 1 and regions.ssim(first, first, region) == pytest.approx(1)


def test_the_judge_takes_means_over_fillings_and_prefers_the_truth():
    mesh = parallel.make_mesh(parallel.MeshSpec())
    runner = features.Runner(mean_extractor(), mesh, 8)
    distances = {"mean": lambda x, y: np.abs(x.mean((1, 2, 3)) - y.mean((1, 2, 3)))}
    judge = fillings.FillingJudge(runner, distances, replicates=5, seed=0)
    images = scipy.ndimage.gaussian_filter(pictures(6, 16, 16).astype(float), (0, 2, 2, 0))
    half = make_mask("half", 16, 16, np.random.default_rng(0))
    holes = [Hole(str(i), image.astype(np.uint8), half) for i, image in enumerate(images)]
    truth = [np.stack([hole.image] * 2) for hole in holes]
    noise = [np.where(half[..., None], hole.image, pictures(2, 16, 16)) for hole in holes]
    perfect, bad = judge(holes, truth), judge(holes, noise)
    names = ["PSNR", "SSIM", "spread", "mean", "mean spread", "FD"]
    assert list(perfect) == list(bad) == names
    assert perfect["spread"].value == perfect["mean"].value == 0
    originals = images.astype(np.uint8).mean(axis=(1, 2))
    for found, parts in ((perfect, truth), (bad, noise)):
        colours = np.concatenate(parts).mean(axis=(1, 2))
        expected = two_gaussians(colours, originals)
        assert found["FD"].value == pytest.approx(expected, rel=1e-3, abs=1e-3)
    pairs = [(x, hole.image) for hole, two in zip(holes, noise, strict=True) for x in two]
    expected = [regions.psnr(*pair, ~half) for pair in pairs]
    assert bad["PSNR"].value == pytest.approx(np.mean(expected))
    assert bad["PSNR"].low <= bad["PSNR"].value <= bad["PSNR"].high
    between = [abs(two[0].mean() - two[1].mean()) for two in noise]
    assert bad["mean spread"].value == pytest.approx(np.mean(between))

    whole = holes[1]._replace(mask=np.ones((16, 16), bool))
    smaller = Hole("small", pictures(1, 8, 8)[0], np.zeros((8, 8), bool))
    for wrong, message in [
        (holes[:1], "1 images: a Frechet distance needs at least 2"),
        ([holes[0], whole], "the mask of 1 fills nothing"),
        ([holes[0], smaller], "small and 0 differ in size"),
    ]:
        with pytest.raises(UserError, match=message):
            judge(wrong, truth[: len(wrong)])


def test_the_table_has_a_row_a_model_and_a_column_a_mask():
    row = {"thin": Figure(20.123, 19.0, 21.0), "half": Figure(9.5)}
    lines = fillings.table({"PSNR": {"a": row, "b": row}, "spread": {"a": row}}).splitlines()
    assert [line.split() for line in lines[1:3]] == [[m, "20.12", "±", "1", "9.5"] for m in "ab"]
    assert lines[0].split() == ["PSNR", "(dB,", "higher", "is", "better)", "thin", "half"]
    assert len({len(line) for line in lines[:3]}) == 1 and lines[4].startswith("spread (diversity)")


def test_programs_that_write_one_table_of_results_keep_each_others_rows(tmp_path):
    path = tmp_path / "inpainting.json"
    first, second = ResultsTable(path), ResultsTable(path)
    of_first, of_second = ({"step": step, "sampling": {"steps": 7}} for step in (1, 2))
    first.add(of_first, {"PSNR": Figure(20.0, 19.0, 21.0)})
    second.add(of_second, {"PSNR": Figure(9.5)}, more=[1])
    second.add(of_first | {"version": "of no weight"}, {"SSIM": Figure(0.5)})
    new, old = json.loads(path.read_text())
    assert new["metrics"]["PSNR"]["low"] == 19 and new["metrics"]["SSIM"]["value"] == 0.5
    assert old["settings"] == of_second and old["more"] == [1]
    third = ResultsTable(path)
    assert third.find(of_second) == old and third.find({"step": 3}) is None
    cells = {("a", "thin"): new["metrics"], ("a", "half"): old["metrics"]}
    assert fillings.arranged(cells)["PSNR"]["a"]["half"] == Figure(9.5)
    view = (tmp_path / "inpainting.md").read_text().splitlines()
    assert view[0] == "| time | PSNR | SSIM | step | version |" and "* sampling.steps: 7" in view
    assert view[2].endswith("| 20 [19, 21] | 0.5 | 1 | of no weight |")


def test_a_table_of_results_is_no_other_file_and_none_is_lost(tmp_path):
    path = tmp_path / "held_out.json"
    for content in ("", "3", "[3]", '[{"settings": {}, "metrics": {"PSNR": {}}}]'):
        path.write_text(content)
        with pytest.raises(UserError, match=f"^{path}: not a table of results: move it away$"):
            ResultsTable(path)
    path.write_text('{"runs/a": {"losses": [1]}}')  # of an earlier version
    ResultsTable(path).add({"step": 1}, {})
    assert json.loads((tmp_path / "held_out.old.json").read_text()) == {"runs/a": {"losses": [1]}}
    assert len(json.loads(path.read_text())) == 1
