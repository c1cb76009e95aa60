"""Recognizes what is imported, and plans the import.

| format       | recognized by                                  | read by    |
|--------------|------------------------------------------------|------------|
| `folder`     | a folder of image files                        | `folders`  |
| `webdataset` | `.tar` files                                   | `archives` |
| `npz`        | `.npz` files                                   | `archives` |
| `parquet`    | `.parquet` files                               | `tables`   |
| `arrow`      | `dataset_dict.json` or `state.json`            | `tables`   |

The last one is what `save_to_disk` of Hugging Face's library `datasets` writes.
Several files are named by their folder or by a pattern such as `shards/*.tar`. Of a folder that
holds archives and tables, as img2dataset writes them, the archives are read. A file whose name
begins with `train`, `test` or `validation` (or `val`, `valid`, `dev`), or whose folder has that
name, belongs to this split; all others belong to `train`.

In a bucket, `.tar` and `.parquet` files are read, from their beginning to their end.
"""

import glob
import os
import pathlib

from conprediff_jax.common import buckets
from conprediff_jax.common.errors import DataError
from conprediff_jax.common.images import holds_images, natural_key, warn_once
from conprediff_jax.data.importing import archives, folders, tables
from conprediff_jax.data.importing.parts import Plan, Wanted

_ENDINGS = {
    "webdataset": (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"),
    "parquet": (".parquet",),
    "npz": (".npz",),
}


def plan_import(source: str, wanted: Wanted) -> Plan:
    """Finds out what is imported. No image is read.

    Args:
        source: A folder, a file, or a pattern of files.
        wanted: The features that are imported.

    Raises:
        DataError: There is nothing that can be imported, or a feature is missing.
    """
    kind, paths = recognize(os.path.expanduser(source))
    if kind == "folder":
        return folders.plan(paths[0], wanted)
    if kind == "webdataset":
        return archives.plan_tars(paths, wanted)
    if kind == "npz":
        return archives.plan_npz(paths, wanted)
    return tables.plan(kind, paths, wanted)


def recognize(path: str) -> tuple[str, list[str]]:
    """The format of what a path or a pattern names, and its files in their natural order.

    Raises:
        DataError: There is nothing there, or nothing that can be imported.
    """
    if buckets.is_bucket(path):
        return _in_bucket(path)
    if not os.path.isdir(path):
        return _files(path)
    for name in ("dataset_dict.json", "state.json"):
        if os.path.isfile(os.path.join(path, name)):
            return "arrow", tables.arrow_files(path)
    if os.path.isfile(os.path.join(path, "dataset_info.json")):
        raise DataError(f"{path} is a prepared data set already: --config.data.name={path}")
    found = [str(file) for file in sorted(pathlib.Path(path).rglob("*")) if file.is_file()]
    for kind in _ENDINGS:
        paths = sorted((file for file in found if _kind(file) == kind), key=natural_key)
        if paths and os.path.basename(paths[0]) != "metadata.parquet":
            if holds_images(path):
                warn_once(f"{path}: its {kind} files are read; images beside them are not")
            return kind, paths
    return "folder", [path]


def _files(path: str) -> tuple[str, list[str]]:
    paths = [path] if os.path.isfile(path) else sorted(glob.glob(path), key=natural_key)
    kinds = {kind for file in paths if (kind := _kind(file))}
    if len(kinds) != 1:
        what = (
            f"names files of several formats, {', '.join(sorted(kinds))}"
            if kinds
            else ("there is nothing there that can be imported")
        )
        raise DataError(f"{path}: {what}; name a folder, or .tar, .parquet or .npz files")
    return kinds.pop(), [file for file in paths if _kind(file)]


def _in_bucket(address: str) -> tuple[str, list[str]]:
    """Archives or tables of a bucket; of a folder that holds both, the archives."""
    found = sorted(buckets.found(address), key=natural_key)
    for kind in ("webdataset", "parquet"):
        if paths := [file for file in found if _kind(file) == kind]:
            return kind, paths
    raise DataError(
        f"{address}: holds no .tar or .parquet files, and nothing else is imported from a bucket: "
        "copy it to this machine"
    )


def _kind(file: str) -> str | None:
    if os.path.basename(file).startswith("."):
        return None
    return next((kind for kind, endings in _ENDINGS.items() if file.endswith(endings)), None)
