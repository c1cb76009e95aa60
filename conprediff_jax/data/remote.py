"""Prepared data sets in buckets, which are copied to this machine as far as they are needed.

array_record reads local files only. So the description of a data set and the shards of one split
are copied into a folder of copies before the first batch, several shards at a time, and stay there:

    <cache_dir>/gs/BUCKET/FOLDER/
        dataset_info.json, features.json, ...
        photos-train.array_record-00000-of-00012, ...

A later run copies only what has changed in the bucket. Since every epoch is shuffled as a whole,
every process reads from all shards: each machine has its own copies.
"""

import os
import pathlib
import re
from typing import Any

from conprediff_jax.common import buckets
from conprediff_jax.common.errors import DataError, first_line
from conprediff_jax.common.files import writing
from conprediff_jax.data.tfds import builder_from_directory

CACHE = "~/.cache/conprediff_jax/data"
_INFO = "dataset_info.json"
_SHARD = re.compile(r"\.\w+-\d{5}-of-\d{5}$")


def copied_builder(address: str, title: str, split: str, cache_dir: str) -> Any:
    """The builder of a local copy of a data set in a bucket, which holds one split.

    Args:
        address: Address of the folder with `dataset_info.json`.
        title: Name of the data set in messages.
        split: Name of the split, or a part of one in the notation of TFDS.
        cache_dir: The folder of copies.

    Raises:
        BucketError: The bucket or the folder cannot be read, or there is no room for the copies.
        DataError: The folder holds no prepared data set, or not this split.
        WriteError: The copies cannot be written.
    """
    address = address.rstrip("/")
    entries = buckets.listed(address)
    if _INFO not in entries:
        raise DataError(
            f"{title}: holds no prepared data set ({_INFO}), and nothing else in a bucket is read "
            "at random: copy it to this machine, run python -m conprediff_jax.prepare --from=... "
            "--out=..., and copy OUT to the bucket"
        )
    folder = pathlib.Path(os.path.expanduser(cache_dir), *address.replace("://", "/").split("/"))
    with writing(folder):
        described = {name: entry for name, entry in entries.items() if not _SHARD.search(name)}
        buckets.copy(address, described, folder)
        builder = builder_from_directory(str(folder), title)
        shards = [name for name in _shards(builder, title, split) if ".array_record" in name]
        if missing := [name for name in shards if name not in entries]:
            raise DataError(f"{title}: {len(missing)} shards are missing, such as {missing[0]}")
        buckets.copy(address, {name: entries[name] for name in shards}, folder)
    return builder


def _shards(builder: Any, title: str, split: str) -> list[str]:
    """The names of the files that hold a split."""
    try:
        instructions = builder.info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        raise DataError(f"{title}: {first_line(error)}") from error
    return [os.path.basename(each.filename) for each in instructions]
