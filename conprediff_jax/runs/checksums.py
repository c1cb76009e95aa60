"""Checksums of a checkpoint's files: written with it, compared before anything is read from it.

    <step>/checksums/crc32.json    {"crc32": {"ema/manifest.ocdbt": 123, ...}, "own": 456}

`own` is of the other entry. Files of the items are listed, wherever orbax puts them.
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
    """Writes the checksums once the other items are complete, of which it has to be the last."""

    def save(self, directory: epath.Path, args: "ChecksumSave") -> None:
        """Writes nothing: the other items are still being written, in the background."""

    def restore(self, directory: epath.Path, args: None = None) -> None:
        """Is not needed: `compare` reads without orbax."""
        raise NotImplementedError

    def finalize(self, directory: epath.Path) -> None:
        """Writes the file; orbax calls this in one process, in the background, at the end."""
        step = directory.parent
        items = sorted(path.name for path in step.iterdir() if path.is_dir())
        found = _checksums(step, [f for i in items if i != directory.name for f in _files(step, i)])
        (directory / _FILE).write_text(json.dumps({"crc32": found, "own": _own(found)}))


@ocp.args.register_with_handler(ChecksumHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class ChecksumSave(ocp.args.CheckpointArgs):
    """Asks orbax for checksums."""


def compare(step: epath.Path, items: Sequence[str]) -> bool:
    """Compares the files of some items with their checksums; of several processes, each takes some.

    Args:
        step: Folder of the checkpoint.
        items: Names of folders in it.

    Returns:
        Whether it has checksums; checkpoints of earlier versions have none.

    Raises:
        ValueError: A file is missing, or is not what was written.
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


def _files(step: epath.Path, item: str) -> list[str]:
    return [
        str((folder / name).relative_to(step))
        for folder, _, names in (step / item).walk()
        for name in names
    ]


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
