"""Tests of inpainting from an image with a hole to its filling, by functions and commands."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from einops import rearrange
from PIL import Image
from quick import environment

from conprediff_jax import parallel
from conprediff_jax.common.errors import UserError
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.data.holes import Hole
from conprediff_jax.data.masks import make_mask
from conprediff_jax.diffusion.categorical import CategoricalProcess
from conprediff_jax.diffusion.gaussian import GaussianProcess
from conprediff_jax.diffusion.samplers import RePaint
from conprediff_jax.models.denoiser import Denoised
from conprediff_jax.models.first_stage import FirstStage, Pixels
from conprediff_jax.sampling import inpainting
from conprediff_jax.sampling.inpainting import (
    blend,
    fill_holes,
    known_points,
    make_fill,
    sampling_for,
)
from conprediff_jax.sampling.model import ConditionSpec, DiffusionModel, TrainedModel
from conprediff_jax.sampling.spec import GaussianSampling, TokenSampling
from conprediff_jax.train.loop import train

ROOT = pathlib.Path(__file__).parent.parent


def pictures(count, height=8, width=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def random_masks(count, height=8, width=8, seed=1, share=0.5):
    return np.random.default_rng(seed).random((count, height, width)) < share


def fixed_mask(name, height=8, width=8):
    return make_mask(name, height, width, np.random.default_rng(0))


@dataclasses.dataclass(frozen=True)
class Averages(FirstStage):
    """A first stage that one can follow, lossy as latents are: the mean of every 4 x 4 patch.

    As tokens, the means in steps of 64.
    """

    discrete: bool = False
    downsampling = 4
    channels = 3

    def encode(self, frozen, images):
        patches = rearrange(images, "b (r p) (c q) k -> b r c (p q) k", p=4, q=4)
        if self.discrete:
            return (patches.mean(axis=(3, 4)) // 64).astype(jnp.int32)
        return patches.mean(axis=3) / 127.5 - 1

    def decode(self, frozen, points):
        levels = points[..., None] * 64 + 32 if self.discrete else points * 127.5 + 127.5
        levels = jnp.broadcast_to(levels, (*points.shape[:3], 3)).clip(0, 255)
        return jnp.round(levels).astype(jnp.uint8).repeat(4, axis=1).repeat(4, axis=2)


# Bringing masks down, and seams ------------------------------------------------------------------


def test_the_mask_of_patches_of_pixels_is_exact():
    stage, images, masks = Pixels(patch=4), pictures(3), random_masks(3)
    known = known_points(stage, {}, jnp.asarray(images), jnp.asarray(masks))
    assert known.x_0.shape == known.mask.shape == (3, 2, 2, 48)
    other = stage.encode({}, jnp.asarray(255 - images))  # differs everywhere: 255 is odd
    found = np.asarray(stage.decode({}, known.into(other)))
    np.testing.assert_array_equal((found == images).all(-1), masks)


@pytest.mark.parametrize("discrete", [False, True])
def test_a_latent_is_known_where_its_whole_patch_is(discrete):
    masks = random_masks(6, 8, 12, share=0.9)
    masks[0] = True
    known = known_points(
        Averages(discrete), {}, jnp.asarray(pictures(6, 8, 12)), jnp.asarray(masks)
    )
    assert known.mask.shape == known.x_0.shape == ((6, 2, 3) if discrete else (6, 2, 3, 3))
    for image in range(6):
        for row in range(2):
            for column in range(3):
                whole = masks[image, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].all()
                assert (np.asarray(known.mask)[image, row, column] == whole).all()
    assert 0 < np.asarray(known.mask).mean() < 1


def test_seams_are_blended_and_known_pixels_kept():
    image = np.full((1, 32, 32, 3), 100, np.uint8)
    mask = np.zeros((1, 32, 32), bool)
    mask[:, :, :16] = True
    arguments = jnp.asarray(mask), 2
    # A first stage that makes everything lighter by 20: the hole begins where the image ends.
    found = blend(jnp.asarray(image), jnp.asarray(image + 20), *arguments)
    found = np.asarray(found, int)[0, :, :, 0]
    assert (found[:, :16] == 100).all()
    assert (abs(found[:, 16] - 100) <= 5).all() and (found[:, 26:] == 120).all()
    assert (np.diff(found, axis=1) >= 0).all() and np.diff(found, axis=1).max() <= 8
    # An exact one: nothing is changed.
    decoded = np.where(mask[..., None], image, pictures(1, 32, 32))
    found = blend(jnp.asarray(image), jnp.asarray(decoded), *arguments)
    np.testing.assert_array_equal(found, decoded)


def test_holes_are_painted_over_with_the_nearest_colour():
    image, mask = pictures(1)[0], random_masks(1, share=0.2)[0]
    painted = inpainting.painted_over(Hole("a", image, mask))
    where = np.argwhere(mask)
    for place in np.ndindex(8, 8):
        squares = np.square(where - place).sum(1)
        nearest = where[squares == squares.min()]
        assert (painted[place] == image[tuple(nearest.T)]).all(-1).any()
    assert (inpainting.painted_over(Hole("a", image, np.zeros_like(mask))) == 128).all()


# Filling -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh():
    return parallel.make_mesh(parallel.MeshSpec())


@pytest.fixture(scope="module")
def model():
    """An untrained one."""
    model = make_experiment(tiny.get_config()).task.model
    return untrained(model)._replace(params=jax.jit(model.init)(0)[0])


@pytest.fixture(scope="module")
def fill(model, mesh):
    spec = sampling_for(model.model, steps=6, jump_length=2, resamplings=2)
    return make_fill(model.model, spec, mesh)


def holes_of(images, masks):
    return [Hole(str(i), *pair) for i, pair in enumerate(zip(images, masks, strict=True))]


def test_fillings_keep_what_is_known_and_do_not_see_what_is_not(model, fill):
    images, masks = pictures(4), random_masks(4)
    options = {"seed": 0, "samples": 2, "batch_size": 8}
    found = np.stack(fill_holes(fill, model, holes_of(images, masks), **options))
    assert found.shape == (4, 2, 8, 8, 3)
    for image, mask, (first, second) in zip(images, masks, found, strict=True):
        np.testing.assert_array_equal(first[mask], image[mask])
        np.testing.assert_array_equal(second[mask], image[mask])
        assert (first != second).any(-1)[~mask].mean() > 0.9
    hidden = np.where(masks[..., None], images, pictures(4, seed=5))
    again = fill_holes(fill, model, holes_of(hidden, masks), **options)
    np.testing.assert_array_equal(np.stack(again), found)
    other = np.stack(fill_holes(fill, model, holes_of(images, masks), **options | {"seed": 1}))
    assert (other != found).any(-1)[np.stack([~masks] * 2, 1)].mean() > 0.9
    # Nor do they depend on the batch, here not divided over the devices, or on how many there are.
    fewer = fill_holes(fill, model, holes_of(images, masks)[:2], seed=0, samples=1, batch_size=3)
    assert np.abs(np.stack(fewer).astype(int) - found[:2, :1]).max() <= 1


def test_images_of_every_size_the_model_takes(model, fill):
    holes = [
        Hole(str(size), pictures(1, *size)[0], fixed_mask("box", *size))
        for size in ((8, 8), (12, 6), (8, 8))
    ]
    found = fill_holes(fill, model, holes, seed=0, samples=2, batch_size=3)
    for hole, fillings_ in zip(holes, found, strict=True):
        assert fillings_.shape == (2, *hole.image.shape)
        np.testing.assert_array_equal(fillings_[1][hole.mask], hole.image[hole.mask])
    odd = Hole("odd", pictures(1, 9, 8)[0], np.ones((9, 8), bool))
    with pytest.raises(UserError, match="odd: 8 x 9 pixels; this model takes multiples of 2 a"):
        fill_holes(fill, model, [odd], seed=0, samples=1, batch_size=1)


class Answer(types.SimpleNamespace):
    """A denoiser without parameters: whatever `answer` makes of noisy points and labels."""

    learned_null = False

    def init(self, *_, **__):
        return {"params": {}}

    def apply(self, variables, x, t, *, label, **_):
        return Denoised(self.answer(x, label), x)

    def __call__(self, *_, **__):
        raise AssertionError("a denoiser is applied, not called")


def stub(stage, process, answer=None, num_classes=None):
    size = None if stage.discrete else 1
    shape = {"num_classes": num_classes, "discrete": stage.discrete, "downsampling": size}
    return DiffusionModel(
        first_stage=stage,
        process=process,
        denoiser=Answer(answer=answer, **shape),
        point_shape=(2, 2) if stage.discrete else (2, 2, 3),
        condition=ConditionSpec(),
        text=None,
        sampling=TokenSampling() if stage.discrete else GaussianSampling(),
    )


def untrained(model):
    return TrainedModel(model, params={}, frozen={}, step=0)


def test_tokens_that_are_known_are_kept_and_seams_blended(mesh):
    process = CategoricalProcess(num_codes=4, num_steps=10)

    model = stub(Averages(discrete=True), process, lambda x_t, _: jnp.zeros((*x_t.shape, 4)))
    image = np.full((8, 8, 3), 96, np.uint8)  # its token stands for 96
    mask = np.ones((8, 8), bool)
    mask[:3, :2] = False  # within one token
    for reveal in ("posterior", "random", "purity"):
        run = make_fill(model, TokenSampling(steps=10, reveal=reveal), mesh)
        options = {"seed": 0, "samples": 24, "batch_size": 8}
        (found,) = fill_holes(run, untrained(model), [Hole("a", image, mask)], **options)
        np.testing.assert_array_equal(found[:, mask], np.full((24, mask.sum(), 3), 96))
        assert len(np.unique(found[:, 0, 0, 0])) == 4  # the rest is any of the codes
    with pytest.raises(UserError, match="b: 12 x 8 pixels; this model takes 8 x 8 alone"):
        model.check_image_size(8, 12, "b")


def test_labels_are_given_their_own_or_in_turn(mesh):
    """The stub's classes are brightnesses."""

    def answer(x_t, label):
        return jnp.zeros_like(x_t) + (label.reshape(-1, 1, 1, 1) - 1)

    process = make_experiment(tiny.get_config()).task.model.process
    process = dataclasses.replace(process, prediction="x0")
    model = stub(Averages(), process, answer, num_classes=3)
    run = make_fill(model, GaussianSampling(steps=2), mesh)
    image, mask = pictures(1)[0], np.zeros((8, 8), bool)

    def brightness(label, own):
        holes = [Hole("a", image, mask, own)]
        options = {"seed": 0, "samples": 4, "batch_size": 4, "label": label}
        return fill_holes(run, untrained(model), holes, **options)[0][:, 0, 0, 0].tolist()

    assert brightness(None, None) == [0, 128, 255, 0]
    reports = []  # and the same fillings in parts, which say how far they are
    run = make_fill(model, GaussianSampling(steps=2), mesh, lambda *said: reports.append(said))
    assert brightness(None, None) == [0, 128, 255, 0] and reports == [(1, 2), (2, 2)]
    assert brightness(None, 2) == [255] * 4
    assert brightness(1, 2) == [128] * 4
    assert brightness((2, 0), 1) == [255, 0, 255, 0]
    with pytest.raises(UserError, match="labels up to 7, and the model knows 0 to 2: give a label"):
        brightness(None, 7)


def test_masks_too_fine_for_a_first_stage_are_reported(caplog):
    model = stub(Averages(), GaussianProcess())
    fine = Hole("fine", pictures(1)[0], fixed_mask("super_resolve"))
    inpainting.warn_without_known_points(model, [fine])
    assert "1 of 1 images, fine first, have no patch of 4 x 4 pixels" in caplog.text
    caplog.clear()
    inpainting.warn_without_known_points(model, [Hole("half", fine.image, fixed_mask("half"))])
    assert not caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"steps": 21}, "^steps is 21; it must lie in 1 .. 20"),
        ({"steps": 5}, "^jump_length is 10 with steps 5"),
        ({"resamplings": 0}, "^resamplings is 0"),
        ({"eta": 0.5}, "^eta does not fit .* jump_length, resamplings"),
        ({"sampler": "ddim", "eta": 2.0}, "^eta is 2.0"),
        ({"sampler": "ddim", "jump_length": 2}, "^jump_length does not fit .* eta"),
        ({"guidance": 2.0}, "^guidance is 2.0"),
    ],
)
def test_flags_that_do_not_fit_are_named(model, flags, message):
    with pytest.raises(UserError, match=message):
        sampling_for(model.model, **flags)


def test_the_process_decides_on_the_sampler(model):
    other = dataclasses.replace(model.model, process=GaussianProcess())
    sampler = sampling_for(other, steps=None).make(other.process)
    assert isinstance(sampler, RePaint) and sampler.num_model_calls == 2410 and sampler.clip == 1
    assert sampling_for(model.model).steps == 20  # of 20 there are
    ddim = sampling_for(model.model, sampler="ddim", steps=7)
    assert ddim == dataclasses.replace(model.model.sampling, steps=7)
    discrete = stub(Averages(discrete=True), CategoricalProcess(num_codes=4))
    assert sampling_for(discrete, steps=None) == TokenSampling()
    with pytest.raises(UserError, match=r"^jump_length does not fit this model"):
        sampling_for(discrete, jump_length=3)


# The commands ------------------------------------------------------------------------------------


def command(module, *arguments):
    line = [sys.executable, "-m", f"conprediff_jax.{module}", *map(str, arguments)]
    settings = {"env": environment(XLA_FLAGS=""), "cwd": ROOT}
    return subprocess.run(line, **settings, capture_output=True, text=True)


@pytest.fixture(scope="module")
def workdir(one_device, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    config = tiny.get_config()
    config.data.name = str(tiny.write_images(folder / "data"))
    config.train.update(steps=1, checkpoint_every=1)
    train(config, str(folder / "run"))
    return folder / "run"


def test_known_pixels_pass_through_the_command_untouched(workdir, tmp_path):
    images, masks = pictures(3, 12, 8), random_masks(3, 12, 8)
    for index in range(3):
        for kind, pixels in (("images", images[index]), ("masks", masks[index] * np.uint8(255))):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / kind / f"{index}.png")
    arguments = [f"--workdir={workdir}", f"--images={tmp_path / 'images'}", "--samples=2"]
    arguments += ["--jump_length=2", "--resamplings=2", "--steps=4", f"--out={tmp_path / 'out'}"]
    arguments += ["--full_size"]  # of photos that the model crops
    result = command("inpaint", *arguments, f"--masks={tmp_path / 'masks'}", "--polarity=fill")
    assert result.returncode == 0, result.stderr
    for said in (
        "makes   2 fillings",
        "compiling: ",
        "6/6 fillings in",
        "masks fill",
        str(tmp_path),
    ):
        assert said in result.stderr
    for index in range(3):
        known = ~masks[index]  # white fills
        found = [np.asarray(Image.open(tmp_path / "out" / f"{index}_{j}.png")) for j in range(2)]
        for filled in found:
            np.testing.assert_array_equal(filled[known], images[index][known])
        cropped = (np.arange(12)[:, None] >= 2) & (np.arange(12)[:, None] < 10) & ~known
        assert (found[0] != found[1]).any(-1)[cropped].mean() > 0.9
    assert "0: 8 x 12 pixels, cropped to 8 x 8" in result.stderr
    grid = Image.open(tmp_path / "out" / "grid.png")
    assert grid.width / grid.height == pytest.approx(4 / 3, rel=0.05)
    about = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert about["sampling"]["sampler"] == "repaint" and about["sampling"]["resamplings"] == 2
    assert about["filled share"]["1"] == pytest.approx(masks[1].mean(), abs=1e-4)

    refused = command("inpaint", *arguments, "--masks=wide", f"--out={tmp_path / 'none'}")
    assert refused.returncode == 2 and not (tmp_path / "none").exists()
    assert refused.stderr.splitlines()[-1].startswith("error: --masks is 'wide': no such file")


def test_nothing_is_filled_that_cannot_be_written_or_replaces_a_photo(workdir, tmp_path):
    def photos(*names):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name in names:
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pictures(1)[0]).save(file, format="png")
        return folder

    ours, long = photos("x.png", "x_0.png"), photos(250 * "x" + ".png")
    both, dot = photos("x.png", "x_0.png/y.png"), photos("x.png")
    Image.new("RGB", (1, 1)).save(dot / "dot.png")
    (link := tmp_path / "link").symlink_to(ours)
    before = [(ours / name).read_bytes() for name in ("x.png", "x_0.png")]
    for folder, out, message in (
        (ours, link, f"x_0.png would replace {ours}/x_0.png: choose another folder"),
        (long, tmp_path / "out", "a name of 256 bytes; it can have 255 there"),
        (both, tmp_path / "out", "x_0.png: both a filling and a folder of fillings"),
        (dot, tmp_path / "out", "dot: 1 x 1 pixels; this model takes multiples of 2 a side"),
    ):
        arguments = [f"--workdir={workdir}", f"--images={folder}", "--masks=half", "--samples=1"]
        arguments += ["--fit=keep"]
        result = command("inpaint", *arguments, f"--out={out}")
        assert result.returncode == 2, result.stderr
        assert message in result.stderr.splitlines()[-1]
        assert "fillings" not in result.stderr.replace(message, "")  # none were made
    assert [(ours / name).read_bytes() for name in ("x.png", "x_0.png")] == before
    assert not (tmp_path / "out").exists()


def test_models_are_judged_side_by_side_and_taken_up_again(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "other")
    arguments = [
        f"--workdir={workdir},{tmp_path / 'other'}", f"--images={workdir.parent / 'data'}",
        "--num=3", "--samples=2", "--sampler=ddim", "--steps=2", "--bootstrap=3", "--batch_size=6",
        f"--out={tmp_path / 'out'}",
    ]  # fmt: skip
    result = command("evaluate_inpainting", *arguments, "--masks=half,thin")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out" / "inpainting.json").read_text())
    # The other model has the same parameters, so its figures are those of the first.
    assert [row["settings"]["masks"] for row in found] == ["thin", "half"]
    for mask in ("half", "thin"):
        assert len(list((tmp_path / "out").glob(f"run_step_0000001_ddim_2_*_{mask}_*.png"))) == 1
    assert set(found[0]["metrics"]) == {"PSNR", "SSIM", "spread", "FD-random-VGG16"}
    assert result.stdout.splitlines()[0].split()[-2:] == ["half", "thin"]

    again = command("evaluate_inpainting", *arguments, "--masks=half,thin,box")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("6/6 fillings") == 1  # the boxes alone
    new, *old = json.loads((tmp_path / "out" / "inpainting.json").read_text())
    assert old == found and new["settings"]["masks"] == "box"
    assert again.stdout.splitlines()[1].split()[:-3] == result.stdout.splitlines()[1].split()
