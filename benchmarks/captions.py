"""Does a model draw what captions ask for? OpenMoji's roles, genders and skin tones, by guidance.

    python benchmarks/captions.py --workdir=runs/openmoji_text --guidance=1,2,3,5,8

The model draws one image for each of --num captions that it was trained on, and for each of --num
captions that were held out: combinations of role, gender and skin tone that no training image
shows. For every sample, the benchmark finds the nearest image of the whole data set by the squared
distance of pixels, and compares its caption with the caption that was asked for. (Among training
images alone, the nearest to a perfect drawing of a held-out combination would show another one.)
Chance is the share of agreement with the captions of other samples. The figures of the drawings
themselves, with a little noise, are the best that can be reached (a person and a man are often the
same drawing). The benchmark writes a table, JSON, a plot and pictures to --out.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

import numpy as np
from absl import flags, logging
from study.attributes import ATTRIBUTES, agreement, retrieved

from conprediff_jax import data, parallel
from conprediff_jax.cli import app
from conprediff_jax.common import extras, images
from conprediff_jax.common.errors import UserError
from conprediff_jax.common.files import write_atomically, write_text
from conprediff_jax.common.progress import Progress
from conprediff_jax.metrics.bootstrap import Figure, mean_figure
from conprediff_jax.runs.restore import load, load_experiment
from conprediff_jax.sampling.generate import generate_batches, make_generate
from conprediff_jax.sampling.model import TrainedModel

_WORKDIR = flags.DEFINE_string("workdir", "runs/openmoji_text", "Workdir of a captioned model.")
_GUIDANCE = flags.DEFINE_list("guidance", ["1", "2", "3", "5", "8"], "Scales of guidance.")
_NUM = flags.DEFINE_integer("num", 250, "Captions of each kind.", lower_bound=2)
_STEPS = flags.DEFINE_integer("steps", None, "Sampling steps; by default those of the config.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise, the choice of captions, the intervals.")
_BATCH = flags.DEFINE_integer("batch_size", 64, "Images drawn at a time.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "Folder for the results; by default WORKDIR/captions.")

KINDS = {"seen": "train", "held out": "test"}  # kinds of captions -> splits of the data set
DRAWINGS = "the drawings themselves"
SHOWN = 8  # samples a row of the pictures

Table = dict[str, dict[str, Figure]]  # "seen, guidance 3" -> attribute -> share


@dataclasses.dataclass(frozen=True)
class Gallery:
    """The images of the data set that samples are compared with, and their captions."""

    pixels: dict[str, np.ndarray]  # of each kind, [images, values in [0, 1]]
    captions: dict[str, list[str]]

    def shown(self, drawn: np.ndarray) -> list[str]:
        """The captions of the images nearest to some samples, [samples, values]."""
        every = [caption for captions in self.captions.values() for caption in captions]
        return retrieved(drawn, np.concatenate(list(self.pixels.values())), every)

    def drawings(self, kind: str, asked: list[str], noise: float = 5 / 255) -> np.ndarray:
        """The images with some captions, plus a little noise, so that none is an exact copy."""
        found = self.pixels[kind][[self.captions[kind].index(caption) for caption in asked]]
        return found + noise * np.random.default_rng(_SEED.value).standard_normal(found.shape, "f4")


def main(argv: list[str]) -> None:
    """Draws, compares and reports."""
    del argv
    extras.need("matplotlib", "plan")
    trained = load(_WORKDIR.value, parallel.make_mesh(parallel.MeshSpec()))
    spec = load_experiment(_WORKDIR.value).data
    if spec.name != "openmoji/combinations" or trained.model.text is None:
        raise UserError(
            f"--workdir={_WORKDIR.value}: trained on {spec.name}; give a model that reads the "
            "captions of openmoji/combinations, such as that of configs/openmoji_text.py"
        )
    out = pathlib.Path(_OUT.value or pathlib.Path(_WORKDIR.value) / "captions")
    gallery = _gallery(spec)
    asked = _asked(gallery)
    found: Table = {
        f"{kind}, {DRAWINGS}": _figures(gallery, captions, gallery.drawings(kind, captions))
        for kind, captions in asked.items()
    }
    scales = [float(scale) for scale in _GUIDANCE.value]
    progress, done = Progress(sum(map(len, asked.values())) * len(scales)), 0
    for scale in scales:
        for kind, captions in asked.items():
            drawn = _draw(trained, captions, scale)
            found[f"{kind}, guidance {scale:g}"] = _figures(gallery, captions, _flat(drawn))
            _show(out / f"{kind.replace(' ', '_')}_guidance_{scale:g}.png", captions, drawn)
            done += len(drawn)
            speed = progress.mark(done)
            left = progress.left(speed)
            logging.info("%s, guidance %g  %.1f images/s  %s left", kind, scale, speed, left)
        _write(out, found)
    print(table(found))
    plot(found, scales, out / "captions.png")
    logging.info("%d captions of each kind; written to %s", _NUM.value, out)


def table(found: Table) -> str:
    """All shares with their intervals, as Markdown."""
    lines = [f"| captions | {' | '.join(ATTRIBUTES)} |", "|---" * (1 + len(ATTRIBUTES)) + "|"]
    for name, figures in found.items():
        cells = [f"{f.value:.2f} [{f.low:.2f}, {f.high:.2f}]" for f in map(figures.get, ATTRIBUTES)]
        chance = ", ".join(f"{figures[f'chance {a}'].value:.2f}" for a in ATTRIBUTES)
        lines.append(f"| {name} (chance {chance}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: Table, scales: list[float], path: pathlib.Path) -> None:
    """Plots shares over guidance: a panel for each attribute, a line for each kind of caption."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(ATTRIBUTES), figsize=(13, 3.4), sharey=True, layout="constrained"
    )
    for panel, attribute in zip(panels, ATTRIBUTES, strict=True):
        for kind in KINDS:
            row = [found[f"{kind}, guidance {scale:g}"] for scale in scales]
            values, low, high = np.transpose([r[attribute] for r in row])
            (line,) = panel.plot(scales, values, marker="o", label=kind)
            panel.fill_between(scales, low, high, color=line.get_color(), alpha=0.15)
            chance = [r[f"chance {attribute}"].value for r in row]
            best = found[f"{kind}, {DRAWINGS}"][attribute].value
            panel.plot(scales, chance, color=line.get_color(), linestyle=":", linewidth=1)
            panel.axhline(best, color=line.get_color(), linestyle="--", linewidth=1)
        panel.set(title=attribute.replace("_", " "), xlabel="guidance", ylim=(0, 1.03))
    panels[0].set_ylabel("share of images that show it\n(dotted: chance, dashed: drawings)")
    panels[0].legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
    pyplot.close(figure)


def _gallery(spec: data.DataSpec) -> Gallery:
    """All images of the data set with their captions."""
    pixels, captions = {}, {}
    for kind, split in KINDS.items():
        part = dataclasses.replace(spec, split=split)
        captions[kind] = list(data.captions(part))
        plain = dataclasses.replace(part, text=None)
        batches = data.evaluation_iterator(plain, batch_size=_BATCH.value)
        pixels[kind] = np.concatenate([_flat(batch["image"][batch["mask"]]) for batch in batches])
    return Gallery(pixels, captions)


def _asked(gallery: Gallery) -> dict[str, list[str]]:
    """Draws --num captions with a skin tone from each kind."""
    rng, asked = np.random.default_rng(_SEED.value), {}
    for kind, captions in gallery.captions.items():
        toned = [caption for caption in captions if "skin tone" in caption]
        asked[kind] = [toned[i] for i in rng.permutation(len(toned))[: _NUM.value]]
    return asked


def _draw(trained: TrainedModel, captions: list[str], scale: float) -> np.ndarray:
    """Draws an image for every caption."""
    model = trained.model
    mesh = parallel.make_mesh(parallel.MeshSpec())
    spec = model.sampling_with(guidance=scale, steps=_STEPS.value)
    batches = generate_batches(
        make_generate(model, spec, mesh),
        trained.params,
        trained.frozen,
        seed=_SEED.value,
        num=len(captions),
        batch_size=_BATCH.value,
        texts=model.tokenizer(captions),
    )
    return np.concatenate(list(batches))


def _figures(gallery: Gallery, captions: list[str], drawn: np.ndarray) -> dict[str, Figure]:
    """Shares of samples that show what their own caption asks for, and what other captions ask."""
    shown, rng = gallery.shown(drawn), np.random.default_rng(_SEED.value)
    figures = {
        name: mean_figure(same, replicates=1000, rng=rng)
        for name, same in agreement(captions, shown).items()
    }
    others = [agreement(captions[i:] + captions[:i], shown) for i in range(1, len(captions))]
    chance = {f"chance {a}": Figure(float(np.mean([o[a] for o in others]))) for a in ATTRIBUTES}
    return figures | chance


def _flat(pictures: np.ndarray) -> np.ndarray:
    return pictures.reshape(len(pictures), -1).astype(np.float32) / 255


def _show(path: pathlib.Path, captions: list[str], drawn: np.ndarray) -> None:
    """Writes a picture of some samples with their captions."""
    count = 4 * SHOWN
    pictures = images.captioned(drawn[:count], captions[:count])
    images.write_png(path, images.grid(pictures, columns=SHOWN))


def _write(out: pathlib.Path, found: Mapping[str, Mapping[str, Figure]]) -> None:
    plain = {name: {a: f._asdict() for a, f in row.items()} for name, row in found.items()}
    write_text(out / "captions.json", json.dumps(plain, indent=2) + "\n")
    write_text(out / "captions.md", table(found) + "\n")


if __name__ == "__main__":
    app.run(main)
