"""A run, its trace and its images, as an earlier version of the code wrote them: `tests/stored/`.

`python tests/stored_run.py` writes the trace and the images anew, and also the run if you remove
`run.tar.xz` first. Do this only if the numbers are meant to change. The present run was written by
version 0.1.0, before its modules were moved into folders and its blocks were stacked. The trace and
the images are newer, since tokens are drawn with more random bits now.
"""

import os
import pathlib
import platform
import shutil
import sys
import tarfile
import tempfile
import zlib

import conftest  # noqa: F401  (sets XLA's flags, on which the last bits depend)
import jax
import jaxlib
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
import tiny
from ml_collections import ConfigDict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import conprediff_jax
from conprediff_jax import config as config_lib
from conprediff_jax.common import blocks
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.models.autoencoder import VQModel
from conprediff_jax.train.loop import train

STORED = pathlib.Path(__file__).parent / "stored"
CAPTIONS = ("a red square", "a blue square", "a red dot", "a blue dot")
VQ = {
    "channels": 32,
    "channel_mult": (1, 1),
    "blocks_per_level": 1,
    "middle_attention": False,
    "latent_channels": 4,
    "num_codes": 16,
}


def captioned_images(folder: pathlib.Path) -> str:
    """A prepared TFDS data set of random pictures with captions."""
    values = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), np.uint8)
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(shape=(8, 8, 3)), "caption": tfds.features.Text()}
    )
    examples = [(i, {"image": x, "caption": CAPTIONS[i % 4]}) for i, x in enumerate(values)]
    builder = tfds.dataset_builders.store_as_tfds_dataset(
        name="squares",
        version="1.0.0",
        features=features,
        split_datasets={"train": examples},
        data_dir=str(folder),
        file_format="array_record",
    )
    return str(builder.data_path)


def machine() -> str:
    """What the last bits of a result depend on: the features of the processor, and the compiler."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    features = next((line for line in lines if line.startswith("flags")), lines[0])
    return f"{zlib.crc32(features.encode()):08x}, jaxlib {jaxlib.__version__}"


def config(steps: int) -> ConfigDict:
    """A discrete model with captions, its paths relative to the folder that it runs in."""
    small = tiny.get_config()
    config = config_lib.default_discrete(config_lib.tokens("vq", **VQ)).unlock()
    for section in ("context", "optimizer", "train"):
        config[section] = small[section]
    config.data.update(name="./squares/1.0.0", image_size=8, text="caption", threads=2)
    config.text = config_lib.text(
        "bert", vocab_size=32, length=8, width=16, num_layers=1, num_heads=2, hidden=16,
        head_channels=8, prompts=CAPTIONS[:2],
    )  # fmt: skip
    config.condition.dropout = 0.3
    config.process.num_steps = 6
    config.model.update(width=32, num_layers=1, num_heads=2)
    config.train.update(steps=steps, checkpoint_every=3)
    config.sampling.update(num=4, steps=3, guidance=2.0)
    return config.lock()


def losses(workdir: pathlib.Path) -> np.ndarray:
    """The loss of every step, float32, from the run's events."""
    events = EventAccumulator(str(workdir)).Reload()
    return np.asarray(
        [tf.make_ndarray(event.tensor_proto) for event in events.Tensors("loss")], np.float32
    )


def continued(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Images of the stored checkpoint, then the trace and parameters of three more steps."""
    model = conprediff_jax.load(str(workdir), step=3)
    found = {"images": model.sample(4, seed=1)}
    state = train(config(steps=6), str(workdir))
    found["losses"] = losses(workdir)[-3:]
    for path, leaf in jax.tree.leaves_with_path(blocks.separate(state.ema)):  # as they were then
        found[f"ema{jax.tree_util.keystr(path)}"] = np.asarray(leaf)
    return found


def demo_trace() -> np.ndarray:
    """Losses of three steps of the demo's own config, batches of four, float32 [3]."""
    sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "configs"))
    demo = __import__("openmoji").get_config()
    demo.train.batch_size = 4
    images = np.random.default_rng(1).integers(0, 256, (4, 32, 32, 3), np.uint8)
    _, trace = tiny.run_steps(make_experiment(demo), tiny.mesh_of(), {"image": images}, steps=3)
    return np.asarray([metrics["loss"] for metrics in trace])


def unpack(folder: pathlib.Path) -> pathlib.Path:
    """Puts data, first stage and the stored run into a folder; the run's workdir."""
    captioned_images(folder)
    tiny.write_autoencoder(folder / "vq", VQModel(**VQ))
    archive = STORED / "run.tar.xz"
    if archive.exists():
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
    return folder / "run"


def measured(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Computes what is stored beside the run. `folder` must be the current directory."""
    return {"demo": demo_trace(), **continued(unpack(folder))}


def _write(folder: pathlib.Path) -> None:
    workdir = unpack(folder)
    if not workdir.exists():
        _write_run(workdir)
    np.savez(STORED / "expected.npz", machine=machine(), **continued(workdir), demo=demo_trace())


def _write_run(workdir: pathlib.Path) -> None:
    train(config(steps=3), "run")
    shutil.rmtree(workdir / "samples")
    for events in workdir.glob("events*"):
        events.unlink()
    STORED.mkdir(exist_ok=True)
    with tarfile.open(STORED / "run.tar.xz", "w:xz") as file:
        file.add(workdir, "run")


if __name__ == "__main__":
    from conprediff_jax import parallel

    one, make_mesh = jax.devices()[:1], parallel.make_mesh
    jax.device_count = lambda *_: 1
    parallel.make_mesh = lambda spec, devices=one: make_mesh(spec, devices)
    os.chdir(tempfile.mkdtemp())
    _write(pathlib.Path.cwd())
    print(f"written to {STORED}: {sorted(path.name for path in STORED.iterdir())}")
