"""The stream of batches of a random-access source, in an order that grain draws.

    source -> shuffle -> repeat -> every process_count-th -> decode, crop, flip -> batch
              (anew each epoch)   (this process's share)     (worker threads)

Every epoch is shuffled by one global permutation, which is the same in every process. Of P
processes, process p reads the places p, p + P, p + 2P, ... of the stream. So the processes read
disjoint parts of every epoch, and together all of it, even if P does not divide the number of
records. Crops, colours, flips and captions depend on the seed and on the place of the example in
the global stream, but not on P or on the threads.

The iterator's `get_state()` is a small dict of integers that says which records have been read.
After `set_state`, the iterator returns the batches that would have come next, also where records
cannot be decoded, since these are the same on every pass.
"""

import dataclasses
import math
import resource
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from conprediff_jax.common.files import is_address
from conprediff_jax.common.images import height_and_width
from conprediff_jax.common.keys import fixed, guarded
from conprediff_jax.data import aspects, batching, latents, remote, sources, transforms
from conprediff_jax.data.tokenizers import Tokenizer

_NO_TEXT = "text is None; it must name the feature that holds the captions"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Which images are read, and how: the fields are the keys of a config's `data` section.

    Attributes:
        name: TFDS name or path, see `sources`.
        split: Name of the split.
        data_dir: Folder of the TFDS data sets; None for the default of TFDS.
        download: Whether a missing TFDS data set may be downloaded.
        cache_dir: Folder for copies of data in buckets, see `remote`.
        image_size: Pixels of a side, or height and width of images that are not square.
        aspect_step: If positive, batches have several shapes of about the area of `image_size`. The
            sides of all others are multiples of this many pixels, and an image is cropped to the
            nearest shape; see `aspects`. 0 for `image_size` alone.
        max_aspect: How many times the shorter side the longer one of these shapes may be, at most.
        channels: Channels of an image: 3 for RGB, 1 for grey, or 4 for RGB with transparency.
        latents: Folder of latents that `precompute` has encoded ahead of time. They are delivered
            instead of the images; empty to read the images.
        encoded_text: Whether captions are encoded ahead of time too, by a frozen text encoder, and
            delivered as `encoded`. Without `latents`, captions are encoded during training.
        features: The function that encodes images into the features of `latents` too, for terms of
            the loss that read them, as 'module:function' (see docs/terms.md); empty for none. They
            are delivered as `features`.
        crop: Which square is cut out of an image that is not square: `center` or `random`.
        min_crop: Side of the smallest part that is cut out, as a share of the largest part's. With
            crop `random` and a value below 1, size and place of the part are drawn every time.
        jitter: How much brightness, contrast and saturation may differ: each is multiplied by a
            number from 1 - jitter to 1 + jitter, drawn every time. 0 for none.
        flip: Whether every image is mirrored left and right with probability one half.
        shuffle: Whether the order is drawn anew every epoch.
        label: Name of the feature that is delivered as `label`; None for no labels. Data without a
            feature named `label` are read without labels if this field has its default. Of a
            folder of images, `label` stands for its subfolders, `prefix` for what precedes the
            first `_` of a file's name, and any other name for a column of its metadata.
        keep: Names of further features to deliver, such as `caption`.
        class_names: Names of the classes by number; () to number them as the data do. A run stores
            them when it begins, so that classes never change their numbers.
        text: Name of the feature that holds the captions, such as `caption`; None for no texts.
            It is delivered under its own name, as a feature in `keep` is, and also as `text`, see
            `make_iterator`.
        threads: Number of threads that read and decode; 0 to use the caller's thread.
        workers: Number of worker processes, each with its own threads; 0 for none. Threads are
            usually enough, since Pillow decodes without the interpreter lock. A program that uses
            workers must be an absl program that guards its start with
            `if __name__ == "__main__"`.
        prefetch: Number of batches that are kept ready.
    """

    name: str = guarded()
    split: str = guarded("train")
    data_dir: str | None = None
    download: bool = False
    cache_dir: str = remote.CACHE
    image_size: int | tuple[int, int] = fixed(64)
    aspect_step: int = 0
    max_aspect: float = 2.0
    channels: int = fixed(3)
    latents: str = ""
    encoded_text: bool = False
    features: str = ""
    crop: str = "center"
    min_crop: float = 1.0
    jitter: float = 0.0
    flip: bool = False
    shuffle: bool = True
    label: str | None = guarded("label")
    class_names: Sequence[str] = guarded(())
    keep: Sequence[str] = ()
    text: str | None = guarded(None)
    threads: int = 8
    workers: int = 0
    prefetch: int = 2

    def __post_init__(self):
        if not self.name:
            raise ValueError("name is empty; it must be a TFDS name or the path of a folder")
        if self.crop not in transforms.CROPS:
            raise ValueError(f"crop is {self.crop!r}; choose from {list(transforms.CROPS)}")
        if self.latents and self.crop != "center":
            raise ValueError(f"crop is {self.crop!r}; latents were encoded from 'center' crops")
        if is_address(self.latents):
            raise ValueError(
                f"latents is {self.latents!r}; latents are read from this machine: copy the folder"
            )
        if not 0 < self.min_crop <= 1 or (self.min_crop < 1 and self.crop != "random"):
            raise ValueError(
                f"min_crop is {self.min_crop}; it must lie in (0, 1], and be 1 unless crop is "
                "'random'"
            )
        if not 0 <= self.jitter < 1 or (self.latents and self.jitter):
            raise ValueError(
                f"jitter is {self.jitter}; it must lie in [0, 1), and be 0 with latents, which "
                "were encoded without"
            )
        if min(self.image_shape[:2]) < 1:
            raise ValueError(f"image_size is {self.image_size}; it must be at least 1")
        if self.aspect_step < 0:
            raise ValueError(f"aspect_step is {self.aspect_step}; it must not be negative")
        if self.aspect_step and self.features:
            raise ValueError(
                f"aspect_step is {self.aspect_step}; it must be 0 with features, which are of one "
                "shape"
            )
        if self.max_aspect < 1:
            raise ValueError(f"max_aspect is {self.max_aspect}; it must be at least 1")
        if self.channels not in transforms.MODES:
            raise ValueError(f"channels is {self.channels}; choose from {list(transforms.MODES)}")
        for field, least in {"threads": 0, "workers": 0, "prefetch": 1}.items():
            if getattr(self, field) < least:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least {least}")
        for field, what in {"keep": "feature", "class_names": "class"}.items():
            if isinstance(value := getattr(self, field), str):
                raise ValueError(
                    f"{field} is the text {value!r}; it must be a list of {what} names"
                )
        if self.text == "":
            raise ValueError("text is empty; it must name a feature, or be None for no texts")
        missing = () if self.text is None or self.text in self.keep else (self.text,)
        object.__setattr__(self, "keep", (*self.keep, *missing))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return (*height_and_width(self.image_size), self.channels)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Heights and widths of the images of training; see `aspect_step`."""
        size = height_and_width(self.image_size)
        return aspects.shapes_of(size, self.aspect_step, self.max_aspect)

    def of_images(self, **changes: Any) -> "DataSpec":
        """The same spec for images instead of latents, with changes of other fields."""
        return dataclasses.replace(self, latents="", **changes)


def open_data(spec: DataSpec) -> sources.Source:
    """Opens the undecoded records, or the latents, of a spec.

    Raises:
        DataError: The data are missing, or lack a split or a feature; the latents were encoded from
            other data; or the classes are not `class_names`.
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
        cache_dir=spec.cache_dir,
        label=spec.label,
        keep=spec.keep,
        class_names=spec.class_names,
    )


def _allow_open_files() -> None:
    """Raises the limit of open files: every file of a data set stays open once it is read."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def num_examples(spec: DataSpec) -> int:
    """Number of records over all processes, undecodable ones included."""
    return len(open_data(spec))


def captions(spec: DataSpec, *, limit: int | None = None) -> Iterator[str]:
    """All captions in the order of the data, for training a tokenizer.

    Args:
        spec: A spec whose `text` names the feature with the captions.
        limit: If given, the largest number of records to read, evenly spaced.

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
    exchange: aspects.Exchange | None = None,
) -> grain.DatasetIterator:
    """Makes an iterator over batches for training.

    If an image has several captions, one of them is drawn every epoch; an image without a caption
    has the empty one. Undecodable images are skipped, and the batch is filled with the next ones.

    Args:
        spec: Which images are read, and how.
        batch_size: Number of examples in a batch of this process.
        seed: Seed of order, crops, flips and captions, from 0 to 2^32 - 1; the same in every
            process.
        process_index: Index of this process, `jax.process_index()`.
        process_count: Number of processes, `jax.process_count()`.
        repeat: False for a single epoch, whose last, short batch is dropped. The number of batches
            may then differ between processes by one.
        tokenizer: Turns the captions that `spec.text` names into token ids.
        exchange: Of several processes with `spec.aspect_step`, a function that all of them call
            with an array at the same time, and that returns the arrays of all of them, stacked in
            the order of their indices: `parallel.exchange`.

    Returns:
        An iterator over dicts, with `get_state()` and `set_state()` as in the module docstring:

        * `image`: uint8 `[batch, height, width, channels]`, of one of `spec.shapes`; or in its
          place `latent`: float32 `[batch, rows, columns, channels]`, and `encoded`: float16
          `[batch, length, width]`, and `features`: float16 `[batch, rows, columns, channels]`, if
          the spec says so.
        * `label`: int32 `[batch]`, where there are labels.
        * Every kept feature; text as an array of str `[batch]`.
        * `text`: int32 token ids `[batch, length]`, or str `[batch]` without a tokenizer, if the
          spec has a `text`.

    Raises:
        DataError: The data are missing, or a single epoch does not fill a batch. The iterator
            raises it too, when more than max(10, 1 %) of the images cannot be decoded.
        ValueError: `exchange` or `spec.text` is missing, or `repeat` is false where processes have
            to agree on the shape of every batch.
    """
    _check_process(batch_size, process_index, process_count)
    if tokenizer is not None and spec.text is None:
        raise ValueError(_NO_TEXT)
    if spec.aspect_step and process_count > 1 and (exchange is None or not repeat):
        raise ValueError("aspect_step with several processes needs exchange, and repeat")
    source = open_data(spec)
    if not repeat and len(source) < batch_size * process_count:
        raise sources.DataError(
            f"{spec.name}: {len(source)} records in split {spec.split!r} do not fill a batch of "
            f"{batch_size} in each of {process_count} processes"
        )
    make_example = latents.ToLatentExample if spec.latents else transforms.ToExample
    example = make_example(
        size=spec.image_size,
        shapes=spec.shapes,
        channels=spec.channels,
        crop=spec.crop,
        min_crop=spec.min_crop,
        jitter=spec.jitter,
        flip=spec.flip,
        text=spec.text,
        tokenizer=tokenizer,
    )

    def ordered(records: grain.MapDataset) -> grain.MapDataset:
        """The records of all processes in their order."""
        stream = records.seed(seed)
        if spec.shuffle:
            stream = stream.shuffle()
        if repeat:
            stream = stream.repeat()
        return stream

    bad, part = transforms.BadRecords(len(source)), slice(process_index, None, process_count)
    if spec.aspect_step:
        whole = ordered(grain.MapDataset.source(source)).random_map(example)
        examples = _examples(whole[part].map_with_index(aspects.placed), spec, batch_size)
        share = process_index, process_count
        return aspects.ByShape(iter(examples), whole, bad.good, batch_size, share, exchange)
    if not spec.workers:
        places = ordered(grain.MapDataset.range(len(source)))
        draws = example.draws or spec.keep  # of several captions, one is drawn
        places = places.random_map(batching.drawn) if draws else places.map(batching.undrawn)
        return batching.Batched(
            source,
            places[part],
            example,
            bad.good,
            batch_size=batch_size,
            image=None if spec.latents else spec.image_shape,
            threads=spec.threads,
            ahead=spec.prefetch * batch_size,
        )
    whole = ordered(grain.MapDataset.source(source)).random_map(example)
    examples = _examples(whole[part], spec, batch_size)
    examples = examples.filter(bad.good)
    return iter(examples.batch(batch_size, drop_remainder=True))


def evaluation_iterator(
    spec: DataSpec,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    tokenizer: Tokenizer | None = None,
) -> grain.DatasetIterator:
    """Makes an iterator over one pass in the order of the source, for evaluation.

    Images are cropped at the centre and not flipped; of several captions, the first is taken.
    Processes take the batches in turn, and all get the same number of batches of the same size: the
    last batches are padded with copies of the last record. An undecodable image is black.

    Args:
        spec: Which images are read. `latents`, `crop`, `flip` and `shuffle` do not apply.
        batch_size: Number of examples in a batch of this process.
        process_index: Index of this process, `jax.process_index()`.
        process_count: Number of processes, `jax.process_count()`.
        tokenizer: Turns the captions that `spec.text` names into token ids.

    Returns:
        An iterator over dicts as from `make_iterator`, with `mask`, bool `[batch]`, which is false
        for padding and for undecodable images.

    Raises:
        DataError: The data are missing, or too many images cannot be decoded.
    """
    _check_process(batch_size, process_index, process_count)
    if tokenizer is not None and spec.text is None:
        raise ValueError(_NO_TEXT)
    records = open_data(spec.of_images())
    example = transforms.ToExample(
        size=spec.image_size, channels=spec.channels, text=spec.text, tokenizer=tokenizer
    )
    source = _OnePass(records, example, batch_size, process_index, process_count)
    examples = _examples(grain.MapDataset.source(source), spec, batch_size)
    examples = examples.map(_Blackened(spec.image_shape, transforms.BadRecords(len(records))))
    return iter(examples.batch(batch_size))


def check_batch(
    batch: dict[str, Any],
    spec: DataSpec,
    *,
    batch_size: int,
    num_classes: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Checks that a batch fits the model. It is called once, before the first step.

    Args:
        batch: A batch from an iterator of this module.
        spec: The spec of the iterator.
        batch_size: The number of examples that the batch should have.
        num_classes: Number of classes of the model; None if the model has no classes.
        tokenizer: The tokenizer that made the token ids in `text`; None if the model reads no
            texts.

    Raises:
        DataError: A shape, dtype, value, label or text does not fit; the message says which.
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
            f"{spec.name} has no labels; the model expects {num_classes} classes"
        )
    low, high = int(batch["label"].min()), int(batch["label"].max())
    if low < 0 or high >= num_classes:
        raise sources.DataError(
            f"{spec.name}: labels run from {low} to {high}; the model expects 0 to "
            f"{num_classes - 1}"
        )


def _check_images(image: np.ndarray, spec: DataSpec, batch_size: int) -> None:
    expected = [(batch_size, *shape, spec.channels) for shape in spec.shapes]
    if image.shape not in expected:
        raise sources.DataError(
            f"{spec.name}: images have shape {image.shape}; expected "
            f"{' or '.join(map(str, expected))}"
        )
    if image.dtype != np.uint8:
        raise sources.DataError(f"{spec.name}: images have dtype {image.dtype}; expected uint8")
    if image.max() <= 1:
        raise sources.DataError(
            f"{spec.name}: no value in a whole batch is above {image.max()}; expected 0 to 255"
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
            f"{spec.name}: the batch has no texts, which the model reads; config.data.text must "
            "name the feature that holds the captions"
        )
    if tokens.shape != shape or tokens.dtype != np.int32:
        raise sources.DataError(
            f"{spec.name}: texts have shape {tokens.shape} and dtype {tokens.dtype}; expected "
            f"token ids, {shape} and int32"
        )


class _OnePass:
    """The examples of one pass in every count-th batch; each with whether it counts.

    Args:
        source: The records, which are padded to a whole number of batches for all processes.
        example: What makes examples of them.
        size: Examples in a batch.
        index: Number of the first batch.
        count: Distance to the next batch.
    """

    def __init__(
        self,
        source: sources.Source,
        example: transforms.ToExample,
        size: int,
        index: int,
        count: int,
    ):
        self.source, self.example = source, example
        self.size, self.index, self.count = size, index, count
        self.length = math.ceil(len(source) / (size * count)) * size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[dict[str, Any] | transforms.Undecodable, bool]:
        turn, place = divmod(index, self.size)
        index = (turn * self.count + self.index) * self.size + place
        record = self.source[min(index, len(self.source) - 1)]
        example = self.example.make(record, offset=0.5, mirrored=False, choice=0.0)
        return example, index < len(self.source)


@dataclasses.dataclass(frozen=True)
class _Blackened:
    """Adds a `mask` to examples, which is false for padding and for undecodable images.

    An undecodable image becomes black.

    Attributes:
        shape: Height, width and channels of an image.
        bad: The count of undecodable records.
    """

    shape: tuple[int, int, int]
    bad: transforms.BadRecords

    def __call__(
        self, counted: tuple[dict[str, Any] | transforms.Undecodable, bool]
    ) -> dict[str, Any]:
        example, mask = counted
        if self.bad.good(example):
            return {**example, "mask": np.bool_(mask)}
        black = np.zeros(self.shape, np.uint8)
        return {**example.others, "image": black, "mask": np.bool_(False)}


def _check_process(batch_size: int, process_index: int, process_count: int) -> None:
    """Checks the arguments that both iterators share."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index is {process_index}; it must be from 0 to {process_count - 1}"
        )


def _examples(stream: grain.MapDataset, spec: DataSpec, batch_size: int) -> grain.IterDataset:
    """Reads a stream in its order, with threads and, if the spec says so, with worker processes.

    Workers take the places of the stream in turn, and each returns single examples. Undecodable
    examples are left out, and batches made, after the workers; otherwise the batches would depend
    on the number of workers.
    """
    ahead = spec.prefetch * batch_size
    threads = min(spec.threads, ahead)  # grain warns of threads that nothing is read ahead for
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    examples = stream.to_iter_dataset(options)
    if not spec.workers:
        return examples
    share = math.ceil(ahead / spec.workers)
    return examples.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=spec.workers, per_worker_buffer_size=share),
        worker_init_fn=_leave_interrupts,
    )


def _leave_interrupts(worker: int, workers: int) -> None:
    """Lets a worker ignore Ctrl-C, which terminals send to it too: the trainer saves its step."""
    del worker, workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
