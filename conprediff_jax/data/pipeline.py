"""The stream of batches: grain over a random-access source.

    source -> shuffle -> repeat -> every process_count-th -> decode, crop, flip -> batch
              (anew each epoch)   (this process's share)     (worker threads)

The shuffle is one global permutation an epoch, the same in every process, of which process p takes
the places p, p + P, p + 2P, ... So the processes read disjoint parts of every epoch, together all
of it, and nothing is left out when P does not divide the number of records. What is drawn for an
example depends on the seed and its place in the global stream, not on P or on the threads.

The iterator's `get_state()` is a small dict of integers that says which records have been consumed.
`set_state` goes on from there with the very batches that would have come, undecodable records or
not: whether a record can be decoded does not change.
"""

import dataclasses
import math
import resource
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from conprediff_jax.common.keys import fixed
from conprediff_jax.data import latents, sources, transforms
from conprediff_jax.data.tokenizers import Tokenizer

_NO_TEXT = "text is None; it names the feature that holds the captions"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Which images, and how they are read. The keys of a configuration's `data` section.

    Attributes:
        name: TFDS name or path, see `sources`.
        split: Split of it.
        data_dir: Where TFDS data sets live; None for TFDS's own default.
        download: Whether a missing TFDS data set may be downloaded.
        image_size: Pixels a side.
        latents: Folder of latents encoded ahead of time by `precompute`, delivered instead of the
            images; empty to read the images.
        encoded_text: Whether captions are encoded ahead of time too, by a frozen text encoder, and
            delivered as `encoded`. Without `latents` they are encoded on the fly.
        crop: Which square of an image that is not square: `center` or `random`.
        flip: Whether images are mirrored left and right half of the time.
        shuffle: Whether the order is drawn anew every epoch.
        label: Feature delivered as `label`; the default where there is one; None for no labels.
        keep: Further features to deliver, such as `caption`.
        class_names: Names of the classes by number, which a run stores when it begins, so that
            they never change their numbers; () for whatever numbers the data have.
        text: Feature that holds the captions, such as `caption`; delivered under its own name, as
            those of `keep` are, and as `text`, see `make_iterator`. None for no texts.
        threads: Threads that read and decode; 0 to do it in the caller's.
        workers: Worker processes, each with its own threads; 0 for none. Pillow decodes without
            the interpreter lock, so threads usually do. A program that asks for workers must be
            an absl program that guards its start with `if __name__ == "__main__"`.
        prefetch: Batches kept ready.
    """

    name: str
    split: str = "train"
    data_dir: str | None = None
    download: bool = False
    image_size: int = fixed(64)
    latents: str = ""
    encoded_text: bool = False
    crop: str = "center"
    flip: bool = False
    shuffle: bool = True
    label: str | None = "label"
    class_names: Sequence[str] = ()
    keep: Sequence[str] = ()
    text: str | None = None
    threads: int = 8
    workers: int = 0
    prefetch: int = 2

    def __post_init__(self):
        if not self.name:
            raise ValueError("name is empty; it is a TFDS name or the path of a folder")
        if self.crop not in transforms.CROPS:
            raise ValueError(f"crop is {self.crop!r}; choose from {list(transforms.CROPS)}")
        if self.latents and self.crop != "center":
            raise ValueError(f"crop is {self.crop!r}; latents were encoded of the 'center' crop")
        for field, least in {"image_size": 1, "threads": 0, "workers": 0, "prefetch": 1}.items():
            if getattr(self, field) < least:
                raise ValueError(f"{field} is {getattr(self, field)}; at least {least}")
        for field, what in {"keep": "feature", "class_names": "class"}.items():
            if isinstance(value := getattr(self, field), str):
                raise ValueError(f"{field} is the text {value!r}; it is a list of {what} names")
        if self.text == "":
            raise ValueError("text is empty; it is the name of a feature, or None for no texts")
        missing = () if self.text is None or self.text in self.keep else (self.text,)
        object.__setattr__(self, "keep", (*self.keep, *missing))

    def of_images(self, **changes: Any) -> "DataSpec":
        """The images themselves, whether or not training reads their latents; other fields too."""
        return dataclasses.replace(self, latents="", **changes)


def open_data(spec: DataSpec) -> sources.Source:
    """The undecoded records or the latents of a spec; `len()`, `class_names` tell what there is.

    Raises:
        DataError: The data are missing, or lack a split or feature; the latents are of other data;
            the classes are others than `class_names`.
    """
    _allow_open_files()
    source = latents.open_latents(spec) if spec.latents else _open_images(spec)
    sources.check_class_names(spec.latents or spec.name, source.class_names, spec.class_names)
    return source


def _open_images(spec: DataSpec) -> sources.Source:
    return sources.open_source(
        spec.name,
        split=spec.split,
        data_dir=spec.data_dir,
        download=spec.download,
        label=spec.label,
        keep=spec.keep,
        class_names=spec.class_names,
    )


def _allow_open_files() -> None:
    """As many as the system lets: every file of a data set stays open once it has been read."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def num_examples(spec: DataSpec) -> int:
    """Number of records, over all processes, bad ones included."""
    return len(open_data(spec))


def captions(spec: DataSpec, *, limit: int | None = None) -> Iterator[str]:
    """All captions, in the order of the data: what to train a tokenizer on.

    Args:
        spec: Its `text` is the feature that holds them.
        limit: If given, at most so many records are read, evenly spaced.

    Raises:
        DataError: The data are missing, or lack that feature.
        ValueError: The spec has no `text`.
    """
    if spec.text is None:
        raise ValueError(_NO_TEXT)
    source = open_data(spec)
    count = len(source) if limit is None else min(limit, len(source))
    for i in range(count):
        caption = source[i * len(source) // count][spec.text]
        yield from caption if isinstance(caption, list) else [caption]


def make_iterator(
    spec: DataSpec,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    repeat: bool = True,
    tokenizer: Tokenizer | None = None,
) -> grain.DatasetIterator:
    """Batches for training.

    Args:
        spec: Which images, and how they are read.
        batch_size: Examples a batch of this process.
        seed: Of order, crops and flips; 0 to 2^32 - 1, the same in every process.
        process_index: This process, `jax.process_index()`.
        process_count: All of them, `jax.process_count()`.
        repeat: False for a single epoch, whose last, short batch is dropped. The number of batches
            may then differ between processes by one.
        tokenizer: Makes token ids of the captions that `spec.text` names.

    Returns:
        An iterator of dicts: `image` uint8 `[batch, size, size, 3]`, or in its place `latent`
        float32 `[batch, rows, columns, channels]` and, if the spec asks for it, `encoded` float16
        `[batch, length, width]`; `label` int32 `[batch]` where there are labels;
        every kept feature, text as an array of str `[batch]`; `text` where the spec has one: int32
        token ids `[batch, length]`, or str `[batch]` without a tokenizer. Of an image's captions
        one is drawn anew every epoch; an image without any has the empty one. Undecodable images
        are left out and the batch filled with the next ones; more than max(10, 1 %) of them raise
        `DataError`. `get_state()` and `set_state()` as in the module docstring.

    Raises:
        DataError: The data are missing, or a single epoch of them does not fill a batch.
    """
    _check_process(batch_size, process_index, process_count)
    if tokenizer is not None and spec.text is None:
        raise ValueError(_NO_TEXT)
    source = open_data(spec)
    if not repeat and len(source) < batch_size * process_count:
        raise sources.DataError(
            f"{spec.name}: {len(source)} records in split {spec.split!r} do not fill a batch of "
            f"{batch_size} in each of {process_count} processes"
        )
    make_example = latents.ToLatentExample if spec.latents else transforms.ToExample
    example = make_example(
        size=spec.image_size,
        crop=spec.crop,
        flip=spec.flip,
        text=spec.text,
        tokenizer=tokenizer,
    )
    stream = grain.MapDataset.source(source).seed(seed)
    if spec.shuffle:
        stream = stream.shuffle()
    if repeat:
        stream = stream.repeat()
    # The draws come before the share is taken: they belong to the place in the global stream.
    stream = stream.random_map(example)[process_index::process_count]
    examples = _examples(stream, spec, batch_size)
    examples = examples.filter(transforms.BadRecords(len(source)).good)
    return iter(examples.batch(batch_size, drop_remainder=True))


def evaluation_iterator(
    spec: DataSpec,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    tokenizer: Tokenizer | None = None,
) -> grain.DatasetIterator:
    """One pass in the order of the source: centre crops, no flips, the first of several captions.

    All processes get the same number of batches of the same size. What is too much, at the end, is
    filled with copies of the last record; an undecodable image is black.

    Args:
        spec: Which images. `latents`, `crop`, `flip` and `shuffle` do not apply.
        batch_size: Examples a batch of this process.
        process_index: This process, `jax.process_index()`.
        process_count: All of them, `jax.process_count()`.
        tokenizer: Makes token ids of the captions that `spec.text` names.

    Returns:
        An iterator of dicts as from `make_iterator`, with `mask` bool `[batch]`: false for what
        fills up, and for undecodable images.

    Raises:
        DataError: The data are missing, or too many images cannot be decoded.
    """
    _check_process(batch_size, process_index, process_count)
    if tokenizer is not None and spec.text is None:
        raise ValueError(_NO_TEXT)
    records = open_data(spec.of_images())
    example = transforms.ToExample(size=spec.image_size, text=spec.text, tokenizer=tokenizer)
    source = _OnePass(records, example, batch_size * process_count)
    stream = grain.MapDataset.source(source)[process_index::process_count]
    examples = _examples(stream, spec, batch_size)
    examples = examples.map(_Blackened(spec.image_size, transforms.BadRecords(len(records))))
    return iter(examples.batch(batch_size))


def check_batch(
    batch: dict[str, Any],
    spec: DataSpec,
    *,
    batch_size: int,
    num_classes: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Checks a batch against what the model was built for; once, before the first step.

    Args:
        batch: From an iterator of this module.
        spec: What was asked for.
        batch_size: Examples a batch.
        num_classes: Classes the model knows; None when it knows no classes.
        tokenizer: What made the token ids of `text`; None when the model reads no texts.

    Raises:
        DataError: Shape, dtype, value, label or text does not fit; the message says which.
    """
    if spec.latents:
        _check_latents(batch["latent"], spec, batch_size)
    else:
        _check_images(batch["image"], spec, batch_size)
    missing = [name for name in spec.keep if name not in batch]
    if missing:
        raise sources.DataError(f"{spec.name}: batches lack {', '.join(missing)}")
    if tokenizer is not None:
        _check_tokens(batch.get("text"), spec, (batch_size, tokenizer.length))
    if num_classes is None:
        return
    if "label" not in batch:
        raise sources.DataError(
            f"{spec.name}: has no labels, and the model expects {num_classes} classes"
        )
    low, high = int(batch["label"].min()), int(batch["label"].max())
    if low < 0 or high >= num_classes:
        raise sources.DataError(
            f"{spec.name}: labels run from {low} to {high}; the model expects 0 to "
            f"{num_classes - 1}"
        )


def _check_images(image: np.ndarray, spec: DataSpec, batch_size: int) -> None:
    size = spec.image_size
    if image.shape != (batch_size, size, size, 3):
        raise sources.DataError(
            f"{spec.name}: images have shape {image.shape}; expected {(batch_size, size, size, 3)}"
        )
    if image.dtype != np.uint8:
        raise sources.DataError(f"{spec.name}: images have dtype {image.dtype}; expected uint8")
    if image.max() <= 1:
        raise sources.DataError(
            f"{spec.name}: no value of a whole batch is above {image.max()}; expected 0 to 255"
        )


def _check_latents(latent: np.ndarray, spec: DataSpec, batch_size: int) -> None:
    if latent.ndim != 4 or len(latent) != batch_size or latent.dtype != np.float32:
        raise sources.DataError(
            f"{spec.latents}: latents have shape {latent.shape} and dtype {latent.dtype}; expected "
            f"({batch_size}, rows, columns, channels) and float32"
        )
    if not np.isfinite(latent).all():
        raise sources.DataError(f"{spec.latents}: a latent of the first batch is not finite")


def _check_tokens(tokens: np.ndarray | None, spec: DataSpec, shape: tuple[int, int]) -> None:
    if tokens is None:
        raise sources.DataError(
            f"{spec.name}: has no texts, and the model reads them; config.data.text names the "
            "feature that holds the captions"
        )
    if tokens.shape != shape or tokens.dtype != np.int32:
        raise sources.DataError(
            f"{spec.name}: texts have shape {tokens.shape} and dtype {tokens.dtype}; expected "
            f"token ids, {shape} and int32"
        )


class _OnePass:
    """The examples of one pass, filled up to a multiple of `multiple`, and whether they count."""

    def __init__(self, source: sources.Source, example: transforms.ToExample, multiple: int):
        self.source = source
        self.example = example
        self.length = math.ceil(len(source) / multiple) * multiple

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[dict[str, Any] | transforms.Undecodable, bool]:
        record = self.source[min(index, len(self.source) - 1)]
        example = self.example.make(record, offset=0.5, mirrored=False, choice=0.0)
        return example, index < len(self.source)


@dataclasses.dataclass(frozen=True)
class _Blackened:
    """Examples with a `mask`, false for those that fill up and for undecodable images, now black.

    Attributes:
        size: Pixels a side.
        bad: Where undecodable records are counted.
    """

    size: int
    bad: transforms.BadRecords

    def __call__(
        self, counted: tuple[dict[str, Any] | transforms.Undecodable, bool]
    ) -> dict[str, Any]:
        example, mask = counted
        if self.bad.good(example):
            return {**example, "mask": np.bool_(mask)}
        black = np.zeros((self.size, self.size, 3), np.uint8)
        return {**example.others, "image": black, "mask": np.bool_(False)}


def _check_process(batch_size: int, process_index: int, process_count: int) -> None:
    """Checks the arguments that both iterators share."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; at least 1")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index is {process_index}; expected 0 to {process_count - 1}")


def _examples(stream: grain.MapDataset, spec: DataSpec, batch_size: int) -> grain.IterDataset:
    """Reads a stream by threads, and worker processes where asked for, in its order.

    Workers take the places in turn and hand on one example each. What makes fewer of them, leaving
    some out and batching, comes later: done by the workers, it would depend on their number.
    """
    ahead = spec.prefetch * batch_size
    options = grain.ReadOptions(num_threads=spec.threads, prefetch_buffer_size=ahead)
    examples = stream.to_iter_dataset(options)
    if not spec.workers:
        return examples
    share = math.ceil(ahead / spec.workers)
    return examples.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=spec.workers, per_worker_buffer_size=share)
    )
