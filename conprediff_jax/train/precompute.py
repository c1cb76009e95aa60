"""Encodes a data set's images, and its captions, once ahead of training."""

import dataclasses
import functools
import importlib
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grain
import jax
import numpy as np
from absl import logging
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from conprediff_jax import data, parallel
from conprediff_jax.common import opening
from conprediff_jax.common.errors import ConfigError, FieldError
from conprediff_jax.common.files import check_folder
from conprediff_jax.common.lock import locked
from conprediff_jax.common.progress import ProgressLine
from conprediff_jax.config.experiment import Experiment, make_experiment
from conprediff_jax.config.vocabulary import with_vocabulary
from conprediff_jax.data import DataSpec, encoders, latents, transforms
from conprediff_jax.data.sources import OF_THE_FILE, Source
from conprediff_jax.models.first_stage import Latents, Palette, Pixels
from conprediff_jax.parallel import share
from conprediff_jax.tasks.denoising import Denoising
from conprediff_jax.train import frozen

Encode = Callable[
    [UInt8[np.ndarray, "images height width channels"]],
    Float[np.ndarray, "images rows columns channels"],
]


# The keys of what is encoded of the mirrored image.
_MIRRORED = {"latent": "mirrored", "features": "mirrored_features"}

EncodeTexts = Callable[[list[str]], Float[np.ndarray, "captions length width"]]


def precompute(config: ConfigDict, out: str, shard_size: int | None = None) -> latents.Manifest:
    """Encodes all images of a config's data into a folder; continues if it was interrupted.

    Args:
        config: Config of a denoiser on a trained first stage.
        out: The folder, on a file system that all processes see.
        shard_size: Images per file; None for 1024, or more if there would be over 256 files.

    Returns:
        The manifest of the folder, which says what it holds.

    Raises:
        ConfigError: The config has no first stage to encode with, or crops at random.
        DataError: The data are missing, or the folder holds other latents, which stay unchanged.
        LockedError: Another program writes into the folder.
        FirstStageError: The weights of the first stage are missing, or belong to another model.
    """
    experiment = make_experiment(with_vocabulary(config))
    spec = _image_spec(experiment.data)
    _check_first_stage(experiment)
    if "://" in out:
        raise FieldError("out", f"is {out}: it must be a folder of a mounted file system")
    folder = pathlib.Path(out).expanduser()
    check_folder(folder, "out")
    with locked(folder, hold=jax.process_index() == 0):
        return _precompute(experiment, spec, folder, shard_size)


def _precompute(
    experiment: Experiment, spec: DataSpec, folder: pathlib.Path, shard_size: int | None
) -> latents.Manifest:
    """Encodes into a folder that belongs to this program alone; see `precompute`."""
    first_stage = experiment.task.model.first_stage
    stored = latents.find_manifest(folder)
    source = data.open_data(spec)
    # A scale that was measured before an interruption is not measured again.
    scale = stored.scale if stored and first_stage.scale is None else first_stage.scale
    loaded = frozen.load(
        dataclasses.replace(first_stage, scale=scale), lambda: _first_batches(experiment, spec)
    )
    encode_texts, text_fingerprint = _text_encoder(experiment)
    encode_features, features_shape = _features_encoder(experiment)
    shard_size = shard_size or max(1024, -(-len(source) // 256))
    manifest = dataclasses.replace(
        _manifest(experiment, loaded, source, shard_size),
        text_fingerprint=text_fingerprint,
        features=experiment.data.features,
        features_shape=features_shape,
    )
    if stored:
        _check_same(folder, stored, manifest)
    elif jax.process_index() == 0:
        latents.begin(folder, manifest)
    share.wait_for_all()
    index, count = jax.process_index(), jax.process_count()
    shards = [shard for shard in manifest.missing(folder) if shard % count == index]
    if shards:
        opening.say(
            f"{len(source)} images of {spec.name}, and the weights of {first_stage.weights}",
            experiment.task.model.describe()
            + (", also of mirrored images" if manifest.flip else ""),
            folder,
        )
        encoders = {"latent": _encoder(experiment, loaded["autoencoder"])}
        if encode_features:
            encoders["features"] = encode_features
        _write(experiment, folder, manifest, shards, source, encoders, encode_texts)
    else:
        logging.info("%s: all shards are there already", folder)
    share.wait_for_all()
    if jax.process_index() == 0:
        latents.finish(folder, manifest)
    logging.info(
        "%d images encoded, scale %.5f, written to %s; train with config.data.latents=%s",
        manifest.count, manifest.scale, folder, folder,
    )  # fmt: skip
    return manifest


def _check_first_stage(experiment: Experiment) -> None:
    """Raises ConfigError if there is nothing to encode with."""
    if not isinstance(experiment.task, Denoising):
        raise ConfigError("config.task trains a first stage: give the config of a denoiser on one")
    first_stage = experiment.task.model.first_stage
    if not isinstance(first_stage, Latents):
        kind = {Pixels: "pixels", Palette: "palette"}.get(type(first_stage), "tokens")
        raise ConfigError(
            f"config.first_stage.kind is {kind!r}: there is nothing to encode ahead of time, only "
            "'vq' and 'kl' are encoded"
        )


def _image_spec(spec: DataSpec) -> DataSpec:
    """The spec of the images themselves, even if the config names a folder of latents."""
    if spec.crop != "center":
        raise ConfigError(
            f"config.data.crop is {spec.crop!r}: latents are encoded once, of the 'center' crop"
        )
    return spec.of_images()


def _first_batches(experiment: Experiment, spec: DataSpec) -> grain.DatasetIterator:
    """The batches with which training on images would begin."""
    return data.make_iterator(
        spec,
        batch_size=experiment.train.batch_size // jax.process_count(),
        seed=experiment.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        exchange=parallel.exchange(),
    )


def _check_same(folder: pathlib.Path, stored: latents.Manifest, manifest: latents.Manifest) -> None:
    differences = latents.differences(stored, manifest)
    if differences:
        raise data.DataError(
            f"{folder} holds other latents: {differences}; change the config to match them, or "
            "give another folder"
        )


def _manifest(
    experiment: Experiment,
    loaded: dict[str, Any],
    source: Source,
    shard_size: int,
) -> latents.Manifest:
    """The manifest of the folder to be written."""
    model, scale_source = experiment.task.model.first_stage.model, "given"
    if experiment.task.model.first_stage.scale is None:
        batch_size = experiment.train.batch_size
        scale_source = f"measured with seed {experiment.seed} and batch size {batch_size}"
    return latents.Manifest(
        fingerprint=encoders.fingerprint(model, loaded["autoencoder"]),
        model=encoders.described_model(model),
        data=latents.described_data(experiment.data),
        class_names=source.class_names,
        flip=experiment.data.flip,
        shape=experiment.task.model.point_shape,
        count=len(source),
        shard_size=shard_size,
        scale=float(loaded["scale"]),
        scale_source=scale_source,
    )


def _batch_size(experiment: Experiment) -> int:
    """Images per call: as many as this process trains on, rounded up to a multiple of its devices.

    So the latents are those that training would encode itself, bit for bit unless the compiler
    treats the two programs differently.
    """
    devices = jax.local_device_count()
    share = experiment.train.batch_size // jax.process_count()
    return max(1, math.ceil(share / devices)) * devices


def _encoder(experiment: Experiment, params: Any) -> Encode:
    """A compiled function from images, at most a batch, to their latents."""
    first_stage, batch_size = experiment.task.model.first_stage, _batch_size(experiment)
    mesh = parallel.make_mesh(parallel.MeshSpec(), jax.local_devices())
    sharding = parallel.batch_sharding(mesh)
    params = jax.device_put(params, parallel.replicated(mesh))
    program = jax.jit(first_stage.encode_unscaled, out_shardings=sharding)

    def encode(images: np.ndarray) -> np.ndarray:
        padded = np.zeros((batch_size, *images.shape[1:]), np.uint8)
        padded[: len(images)] = images
        return np.asarray(program(params, jax.device_put(padded, sharding)))[: len(images)]

    for height, width in experiment.data.shapes:
        encode(np.zeros((1, height, width, experiment.data.channels), np.uint8))
    return encode


def _text_encoder(experiment: Experiment) -> tuple[EncodeTexts | None, str]:
    """A function that encodes captions, and the text encoder's fingerprint; None if not wanted."""
    if not experiment.data.encoded_text:
        return None, ""
    text, batch_size = experiment.task.model.text, _batch_size(experiment)
    params = frozen.load_text_encoder(text)
    program = jax.jit(text.encode)

    def encode(captions: list[str]) -> np.ndarray:
        tokens = text.tokenize(captions)
        padding = -len(tokens) % batch_size  # one shape, one compilation
        parts = np.split(
            np.pad(tokens, ((0, padding), (0, 0))), range(batch_size, len(tokens), batch_size)
        )
        encoded = np.concatenate([np.asarray(program(params, part)) for part in parts])
        return encoded[: len(tokens)].astype(np.float16)

    return encode, encoders.text_fingerprint(text.encoder, params, text.vocabulary)


def _features_encoder(experiment: Experiment) -> tuple[Encode | None, tuple[int, ...]]:
    """The function that `config.data.features` names, and the shape of what it returns.

    Raises:
        ConfigError: There is no such function, or it returns no grid of features for an image.
    """
    named, shape = experiment.data.features, (1, *experiment.data.image_shape)
    if not named:
        return None, ()
    where = f"config.data.features is {named!r}"
    module, _, function = named.partition(":")
    try:
        encode = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{where}: give 'module:function', with the module on PYTHONPATH ({error})"
        ) from error
    found = np.asarray(encode(np.zeros(shape, np.uint8)))
    if found.ndim != 4 or len(found) != 1:
        raise ConfigError(
            f"{where}: for images of shape {shape} it returns {found.shape}; expected (1, rows, "
            "columns, channels)"
        )
    return lambda images: np.asarray(encode(images)).astype(np.float16), found.shape[1:]


def _write(
    experiment: Experiment,
    folder: pathlib.Path,
    manifest: latents.Manifest,
    shards: list[int],
    source: Source,
    encode: dict[str, Encode],
    encode_texts: EncodeTexts | None,
) -> None:
    """Encodes and writes the shards of this process."""
    share = range(jax.process_index(), manifest.num_shards, jax.process_count())
    total, todo = (sum(len(manifest.shard_range(shard)) for shard in s) for s in (share, shards))
    progress = ProgressLine(total, "images")
    progress.skip(total - todo)
    if todo:
        progress.compiling()
    bad = transforms.BadRecords(len(source))
    spec = experiment.data
    example = transforms.ToExample(size=spec.image_size, shapes=spec.shapes, channels=spec.channels)
    decode = _Decode(example)
    threads = grain.ReadOptions(num_threads=experiment.data.threads)
    encode_captions = encode_texts and functools.partial(
        _encoded_captions, encode_texts, experiment.data.text
    )

    def records(shard: int) -> Iterator[dict[str, Any]]:
        places = manifest.shard_range(shard)
        stream = grain.MapDataset.source(source)[places.start : places.stop].map(decode)
        batches = stream.to_iter_dataset(threads).batch(_batch_size(experiment), batch_fn=list)
        for batch in batches:
            images = [image if bad.good(image) else None for image, _ in batch]
            others = [others for _, others in batch]
            yield from _encoded(images, others, encode, manifest.flip, encode_captions)
            progress.add(len(batch))

    for shard in shards:
        latents.write_shard(folder, manifest, shard, records(shard))
    if bad.names:
        logging.warning("%d images cannot be decoded and have no latents", len(bad.names))


@dataclasses.dataclass(frozen=True)
class _Decode:
    """Turns a record into its image, or the reason for having none, and its other keys."""

    example: transforms.ToExample

    def __call__(
        self, record: dict[str, Any]
    ) -> tuple[np.ndarray | transforms.Undecodable, dict[str, Any]]:
        example = self.example.make(record, offset=0.5, mirrored=False, choice=0.0)
        others = {key: value for key, value in record.items() if key not in OF_THE_FILE}
        return (example["image"] if isinstance(example, dict) else example), others


def _encoded(
    images: list[np.ndarray | None],
    records: list[dict[str, Any]],
    encode: dict[str, Encode],
    flip: bool,
    encode_captions: Callable[[list[dict[str, Any]]], list[np.ndarray]] | None,
) -> Iterator[dict[str, Any]]:
    """The records to be written for a batch, in the order of the batch."""
    decoded = [place for place, image in enumerate(images) if image is not None]
    encoded: dict[int, dict[str, Any]] = {place: {} for place in range(len(images))}

    def add(key: str, places: list[int], values: Iterable[np.ndarray]) -> None:
        for place, value in zip(places, values, strict=True):
            encoded[place][key] = value

    for shape in dict.fromkeys(images[place].shape for place in decoded):
        alike = [place for place in decoded if images[place].shape == shape]
        stacked = np.stack([images[place] for place in alike])
        for key, encoder in encode.items():
            add(key, alike, encoder(stacked))
            if flip:
                add(_MIRRORED[key], alike, encoder(stacked[:, :, ::-1]))
    if encode_captions and decoded:
        add("encoded", decoded, encode_captions([records[place] for place in decoded]))
    for place, others in enumerate(records):
        yield encoded[place] | others


def _encoded_captions(
    encode_texts: EncodeTexts, feature: str, records: list[dict[str, Any]]
) -> list[np.ndarray]:
    """The encoded captions of every record; a record without captions has an empty one."""
    captions = [record[feature] for record in records]
    captions = [c if isinstance(c, list) else [c] for c in captions]
    captions = [c or [""] for c in captions]
    encoded = encode_texts([caption for some in captions for caption in some])
    return np.split(encoded, np.cumsum([len(some) for some in captions])[:-1])
