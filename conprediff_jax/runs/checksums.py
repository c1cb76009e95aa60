"""Checksums of a checkpoint's files, which are compared before anything is read.

    <step>/checksums/crc32.json    {"crc32": {"ema/manifest.ocdbt": 123, ...}, "own": 456}

`own` is the checksum of the entry `crc32`. The files are found by listing the folders of the items,
so nothing depends on how orbax names them.
"""

import concurrent.futures
import dataclasses
import json
import zlib
from collections.abc import Sequence

import jax
import orbax.checkpoint as ocp
from etils import epath

ITEM = "checksums"
_FILE = "crc32.json"
_CHUNK = 1 << 22


class ChecksumHandler(ocp.CheckpointHandler):
    """Writes the checksums when all other items are complete; it must be the last item."""

    def save(self, directory: epath.Path, args: "ChecksumSave") -> None:
        """Does nothing, since the other items are still being written in the background."""

    def restore(self, directory: epath.Path, args: None = None) -> None:
        """Is not needed, since `compare` reads the file without orbax."""
        raise NotImplementedError

    def finalize(self, directory: epath.Path) -> None:
        """Writes the file. At the end, orbax calls this in the background, in one process."""
        step = directory.parent
        items = sorted(path.name for path in step.iterdir() if path.is_dir())
        found = _checksums(step, [f for i in items if i != directory.name for f in _files(step, i)])
        (directory / _FILE).write_text(json.dumps({"crc32": found, "own": _own(found)}))


@ocp.args.register_with_handler(ChecksumHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class ChecksumSave(ocp.args.CheckpointArgs):
    """The argument that asks orbax to write checksums."""


def compare(step: epath.Path, items: Sequence[str]) -> bool:
    """Compares the files of some items with their checksums. Processes share the work.

    Args:
        step: Folder of the checkpoint.
        items: Names of the items.

    Returns:
        Whether the checkpoint has checksums; checkpoints of earlier versions have none.

    Raises:
        ValueError: A file is missing, or its checksum differs.
    """
    if not (step / ITEM).exists():
        return False
    stored = json.loads((step / ITEM / _FILE).read_text())
    if stored["own"] != _own(stored["crc32"]):
        raise ValueError("its checksums are damaged")
    names = [name for name in sorted(stored["crc32"]) if name.partition("/")[0] in items]
    mine = names[jax.process_index() :: jax.process_count()]
    for name, found in _checksums(step, mine).items():
        if found != stored["crc32"][name]:
            raise ValueError(f"{name} is not what was written: its checksum differs")
    return True


def _files(step: epath.Path, folder: str) -> list[str]:
    """The files of a folder and its subfolders; `walk` of etils loses the scheme of addresses."""
    found = []
    for path in (step / folder).iterdir():
        name = f"{folder}/{path.name}"
        found += _files(step, name) if path.is_dir() else [name]
    return found


def _checksums(step: epath.Path, names: Sequence[str]) -> dict[str, int]:
    with concurrent.futures.ThreadPoolExecutor() as pool:  # zlib lets other threads run
        return dict(zip(names, pool.map(lambda name: _crc32(step / name), names), strict=True))


def _crc32(path: epath.Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _own(found: dict[str, int]) -> int:
    return zlib.crc32(json.dumps(found, sort_keys=True).encode())
