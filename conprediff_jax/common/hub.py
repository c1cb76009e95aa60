"""Models on the Hugging Face Hub: downloading them by an address, and uploading them.

    hf://owner/name                       a whole repository, its branch main
    hf://owner/name/vae                   a folder or a file in it
    hf://owner/name/vae@fp16              a branch, a tag or a commit
    hf://owner/name?bin                   torch files, too, where there are no safetensors

Torch files are pickles, which can run code when they are opened carelessly. They are downloaded
only if the address ends with `?bin`, or names the file itself.

Files come from the cache of huggingface_hub if they are there, and are downloaded into it if not.
Its variables of the environment hold here, too: HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE=1 for no
network, and HF_TOKEN for private repositories. Downloaded and uploaded files are compared with the
checksums that the Hub lists, which the library does not do for files of the right size.
"""

import contextlib
import fnmatch
import functools
import glob
import hashlib
import os
import pathlib
import re
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from absl import logging

from conprediff_jax.common.errors import UserError, first_line, shortened
from conprediff_jax.common.files import HUB

if TYPE_CHECKING:  # the library takes a second to import, and only addresses need it
    from huggingface_hub.hf_api import RepoFile

_FORM = "an address on the Hub is hf://owner/name[/path][@revision]"
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
# Weights for other libraries, pictures, and the parts of pipelines that nothing here reads.
_UNREAD = (
    *("*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.tflite", "*.mlmodel", "*.ot"),
    *("*.png", "*.jpg", "*.gif", "*.mp4", "*openvino*", "*safety_checker/*"),
)
# The mark of a variant in a file name: model.fp16.safetensors, model.fp16-00001-of-2.safetensors.
_MARK = re.compile(r"\.(fp16|bf16|fp32|non_ema)(?=[.-])")


class HubError(UserError):
    """Something on the Hub is missing, refused, out of reach or damaged."""


class Address(NamedTuple):
    """The parts of an address.

    Attributes:
        repo: Owner and name of the repository.
        path: The folder or file in it; '' for all of it.
        revision: The branch, tag or commit; None for the default branch.
        pickles: Whether torch files are wanted, too.
    """

    repo: str
    path: str
    revision: str | None
    pickles: bool


def is_hub(path: str | os.PathLike) -> bool:
    """Whether a path is an address on the Hub."""
    return os.fspath(path).startswith(HUB)


def parse(address: str) -> Address:
    """Takes an address apart.

    Raises:
        HubError: It is no address of this form.
    """
    body, _, option = address.removeprefix(HUB).partition("?")
    body, at, revision = body.partition("@")
    owner, _, rest = body.partition("/")
    name, _, path = rest.strip("/").partition("/")
    good = all(re.fullmatch(r"[\w.-]+", part) for part in (owner, name)) and ".." not in body
    if not is_hub(address) or not good or option not in ("", "bin") or bool(at) != bool(revision):
        raise HubError(f"{address}: {_FORM}, with ?bin at its end for torch files")
    return Address(f"{owner}/{name}", path.strip("/"), revision or None, option == "bin")


def local(path: str | os.PathLike, only: Collection[str] = ()) -> str:
    """The path on this machine of what a path or an address names. Downloads what is not there.

    Args:
        path: Any path, which is returned as it is, or an address on the Hub.
        only: Names of the files that are needed from a folder, or that belong to a file; by
            default all that something here can read.

    Raises:
        HubError: There is no such repository, revision or path; the Hub cannot be reached; a file
            is damaged; or the cache cannot be written.
    """
    path = os.fspath(path)
    return _downloaded(path, tuple(only)) if is_hub(path) else path


def joined(address: str, name: str) -> str:
    """The address of something in the folder that another address names."""
    place, at, rest = re.fullmatch(r"([^@?]*)([@?]?)(.*)", address).groups()
    return f"{place.rstrip('/')}/{name}{at}{rest}"


def results_folder(workdir: str) -> str:
    """The folder for results of a model: its workdir, or one in `runs` for a model on the Hub."""
    if not is_hub(workdir):
        return workdir
    repo, path, *_ = parse(workdir)
    return os.path.join("runs", "-".join([*repo.split("/"), *filter(None, path.split("/"))]))


@functools.cache
def _downloaded(address: str, only: tuple[str, ...]) -> str:
    import huggingface_hub

    repo, path, revision, _ = parse(address)
    get = functools.partial(huggingface_hub.snapshot_download, repo)
    with _saying(address):
        # A file that hardly any repository lacks brings the list of all files with it.
        commit = pathlib.Path(get(revision=revision, allow_patterns=".gitattributes")).name
        listed = {f.path: f for f in huggingface_hub.get_cached_repo_tree(repo, revision=commit)}
        files = [listed[name] for name in _wanted(list(listed), address, only)]
        new = [file for file in files if not _is_cached(repo, file.path, commit)]
        if new:
            size = sum(file.size for file in new) / 1e6
            logging.info("%s: %d files, %.0f MB, into the cache", address, len(new), size)
        names = [glob.escape(file.path) for file in files]
        folder = pathlib.Path(get(revision=commit, allow_patterns=names))
    for file in new:
        _check(folder / file.path, file, address)
    return str(folder / path)


def _is_cached(repo: str, file: str, commit: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, file, revision=commit), str)


def _wanted(files: list[str], address: str, only: tuple[str, ...]) -> list[str]:
    """The files that are downloaded for an address, of all files in its repository.

    Raises:
        HubError: There are none, or only torch files that were not asked for.
    """
    repo, path, revision, pickles = parse(address)
    if path in files and not only:
        return [path]
    found = [name for name in files if not path or name.startswith(f"{path}/")]
    if path in files:  # what is needed lies beside it
        folder = str(pathlib.PurePosixPath(path).parent)
        return [name for name in files if _is_in(name, folder, only)]
    if not found:
        where = f"{repo} at {revision}" if revision else repo
        raise HubError(f"{address}: there is no {path or 'file'} in {where}")
    if only:
        return [name for name in found if _is_in(name, path or ".", only)]
    found = [name for name in found if not any(fnmatch.fnmatch(name, p) for p in _UNREAD)]
    if "model_index.json" in found:  # the weights of a pipeline are in its folders
        found = [name for name in found if "/" in name or not _holds_weights(name)]
    torch_files = [name for name in found if name.endswith(_PICKLES)]
    safe = {os.path.dirname(name) for name in found if name.endswith(".safetensors")}
    kept = [name for name in torch_files if pickles and os.path.dirname(name) not in safe]
    found = [name for name in found if name not in torch_files or name in kept]
    if torch_files and not any(map(_holds_weights, found)):
        raise HubError(
            f"{address}: holds its weights only as torch files, {shortened(torch_files)}; end the "
            "address with ?bin to download them"
        )
    plain = {_kind(name) for name in found if not _MARK.search(name)}
    return [name for name in found if not _MARK.search(name) or _kind(name) not in plain]


def _is_in(name: str, folder: str, only: tuple[str, ...]) -> bool:
    """Whether a file lies in a folder, not deeper, and its name is one of `only`."""
    path = pathlib.PurePosixPath(name)
    return str(path.parent) == folder and path.name in only


def _holds_weights(name: str) -> bool:
    """Whether a file holds weights, as safetensors, for torch, or in a checkpoint of ours."""
    return name.endswith((".safetensors", *_PICKLES)) or "checkpoints/" in name


def _kind(name: str) -> tuple[str, str, str]:
    """What is equal for the variants of a file of weights, and for their shards."""
    folder, file = os.path.split(name)
    stem = re.sub(r"-\d+-of-\d+", "", _MARK.sub("", file)).partition(".")[0]
    return folder, stem, os.path.splitext(file)[1]


def _check(path: pathlib.Path, file: "RepoFile", address: str) -> None:
    """Compares a file with the checksum that the Hub lists, and removes it if they differ.

    Raises:
        HubError: They differ.
    """
    if _checksum(path, file) != _expected(file):
        path.resolve().unlink()  # the cache holds links to the files
        path.unlink(missing_ok=True)
        raise HubError(
            f"{address}: {file.path} came damaged, with another checksum than the Hub lists; "
            "the same command downloads it again"
        )


def _expected(file: "RepoFile") -> str:
    return file.lfs.sha256 if file.lfs else file.blob_id


def _checksum(path: pathlib.Path, file: "RepoFile") -> str:
    """The checksum of a local file: SHA-256 of large files, and git's of others."""
    digest = hashlib.sha256()
    if not file.lfs:
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as content:
        for part in iter(lambda: content.read(1 << 22), b""):
            digest.update(part)
    return digest.hexdigest()


def check_push(address: str) -> None:
    """Checks, before anything is computed, that something can be uploaded to an address.

    Raises:
        HubError: It is no address of a folder, there is no token, or the Hub refuses it.
    """
    from huggingface_hub import HfApi, get_token

    with _saying(address):
        if parse(address).pickles:
            raise HubError(f"{address}: {_FORM}")
        if not get_token():
            raise HubError(f"{address}: uploading needs a token: set HF_TOKEN, or hf auth login")
        HfApi().whoami()


def push(folder: pathlib.Path, address: str, *, message: str, private: bool = False) -> str:
    """Uploads the files of a folder in one commit: either all of them are there then, or none.

    A repository that does not exist is made. Other files in it stay as they are.

    Args:
        folder: The folder.
        address: The address of the repository, or of a folder in it.
        message: The message of the commit.
        private: Whether a repository that is made is private.

    Returns:
        The URL of the commit.

    Raises:
        HubError: The Hub refuses, cannot be reached, or holds other content afterwards.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    repo, path, revision, _ = parse(address)
    api = HfApi()
    sources = {
        str(pathlib.PurePosixPath(path, file.relative_to(folder).as_posix())): file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    with _saying(address):
        api.create_repo(repo, private=private, exist_ok=True)
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        done = api.create_commit(
            repo,
            [CommitOperationAdd(name, str(file)) for name, file in sources.items()],
            commit_message=message,
            revision=revision,
        )
        there = api.get_paths_info(repo, list(sources), revision=done.oid)
    _compare(there, sources, address)
    return done.commit_url


def _compare(there: Iterable["RepoFile"], sources: dict[str, pathlib.Path], address: str) -> None:
    """Compares the files that the Hub lists with those that were uploaded.

    Raises:
        HubError: They differ.
    """
    good = {f.path for f in there if _checksum(sources[f.path], f) == _expected(f)}
    if bad := sources.keys() - good:
        raise HubError(
            f"{address}: the Hub holds {shortened(sorted(bad))} with other content than was "
            "uploaded; upload again"
        )


@contextlib.contextmanager
def _saying(address: str) -> Iterator[None]:
    """Turns errors of the library into one line that says what to do.

    Raises:
        HubError: The library raised an error.
    """
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    repo = parse(address).repo
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError as error:
        raise HubError(
            f"{address}: {repo} is gated: accept its conditions on its page, and set HF_TOKEN to a "
            "token of your account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{address}: there is no repository {repo}, or it is private and needs a token of "
            "yours in HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"{address}: {repo} has no revision {parse(address).revision or 'main'}"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, httpx.TransportError) as e:
        raise HubError(
            f"{address}: is not in the cache as a whole, and the Hub cannot be reached "
            f"({_cause(e)})"
        ) from e
    except (errors.HfHubHTTPError, httpx.HTTPError, ValueError) as error:
        raise HubError(f"{address}: {first_line(error)}") from error
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise HubError(
            f"{address}: cannot write {error.filename or 'to the cache'}: {reason}"
        ) from error


def _cause(error: BaseException) -> str:
    """Why the Hub was not reached, in a few words."""
    while error.__cause__ is not None:
        error = error.__cause__
    return "HF_HUB_OFFLINE is set" if "ffline" in type(error).__name__ else first_line(error)
