"""Tests of addresses on the Hugging Face Hub, with its own client and a small server of its API."""

import os
import pathlib

import disk
import hub_server
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save

from conprediff_jax.common import hub

TENSORS = save({"x": np.arange(64, dtype=np.float32)})
REPO = {
    "config.json": b"{}",
    "model_index.json": b"{}",
    "v1-5-pruned.ckpt": b"a pickle of the whole pipeline",
    "v1-5-pruned.safetensors": TENSORS,
    "tokenizer/vocab.json": b"{}",
    "tokenizer/merges.txt": b"",
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.safetensors": TENSORS,
    "unet/diffusion_pytorch_model.fp16.safetensors": TENSORS,
    "unet/diffusion_pytorch_model.bin": b"a pickle",
    "vae/diffusion_pytorch_model.fp16-00001-of-00002.safetensors": TENSORS,
    "vae/diffusion_pytorch_model.fp16-00002-of-00002.safetensors": TENSORS,
    "vae/diffusion_pytorch_model.safetensors.index.fp16.json": b"{}",
    "old/model.bin": b"a pickle",
    "safety_checker/model.safetensors": TENSORS,
}


@pytest.fixture
def server(monkeypatch, tmp_path):
    hub._downloaded.cache_clear()
    with hub_server.serving(monkeypatch, tmp_path / "cache") as server:
        server.add("someone/pipeline", REPO)
        yield server
    hub._downloaded.cache_clear()


def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub._downloaded.cache_clear()


def files_in(folder):
    folder = pathlib.Path(folder)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return found - {".gitattributes"}


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("hf://a/b", ("a/b", "", None, False)),
        ("hf://a/b/vae/deep@v1.0", ("a/b", "vae/deep", "v1.0", False)),
        ("hf://a/b@refs/pr/1?bin", ("a/b", "", "refs/pr/1", True)),
    ],
)
def test_an_address_has_four_parts(address, parts):
    assert hub.parse(address) == parts


@pytest.mark.parametrize(
    "address",
    ["hf://a", "hf:///b", "hf://a/b@", "hf://a/b?pickle", "hf://a/../b", "hf://a b/c", "a/b"],
)
def test_other_addresses_are_refused_in_one_line(address):
    with pytest.raises(hub.HubError, match=r"^[^\n]*an address on the Hub is hf://owner/name"):
        hub.parse(address)


def test_what_is_read_is_downloaded_once_and_found_offline(server, monkeypatch):
    assert hub.local("./weights/mine") == "./weights/mine" and not server.requests
    folder = hub.local("hf://someone/pipeline")
    assert files_in(folder) == {
        "config.json",
        "model_index.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "vae/diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
        "vae/diffusion_pytorch_model.safetensors.index.fp16.json",
    }
    path = "unet/diffusion_pytorch_model.safetensors"
    assert pathlib.Path(folder, path).read_bytes() == TENSORS
    done = len(server.requests)
    assert hub.local("hf://someone/pipeline") == folder and len(server.requests) == done
    offline(monkeypatch)
    assert hub.local("hf://someone/pipeline/unet") == os.path.join(folder, "unet")
    with pytest.raises(hub.HubError, match=r"not in the cache as a whole.*HF_HUB_OFFLINE is set"):
        hub.local("hf://someone/pipeline/old?bin")
    assert len(server.requests) == done


def test_parts_and_torch_files_are_downloaded_when_named(server):
    folder = hub.local("hf://someone/pipeline/tokenizer", only=("vocab.json", "x"))
    assert pathlib.Path(folder).name == "tokenizer" and files_in(folder) == {"vocab.json"}
    file = pathlib.Path(hub.local("hf://someone/pipeline/v1-5-pruned.ckpt"))
    assert file.read_bytes() == REPO["v1-5-pruned.ckpt"]
    with pytest.raises(hub.HubError, match=r"torch files, old/model\.bin; end the address with"):
        hub.local("hf://someone/pipeline/old")
    assert files_in(hub.local("hf://someone/pipeline/old?bin")) == {"model.bin"}
    unet = hub.local("hf://someone/pipeline/unet?bin")  # which has safetensors
    assert files_in(unet) == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_a_revision_is_a_branch_or_a_commit_and_branches_move(server):
    first = server.add("someone/model", {"config.json": b"1"})
    server.add("someone/model", {"config.json": b"2"})
    server.add("someone/model", {"config.json": b"3"}, branch="next")

    def read(address):
        return pathlib.Path(hub.local(address), "config.json").read_bytes()

    assert read("hf://someone/model") == b"2"
    assert read(f"hf://someone/model@{first}") == b"1"
    assert read("hf://someone/model@next") == b"3"


def test_private_repositories_take_the_token_of_the_environment(server, monkeypatch):
    server.private.add("someone/pipeline")
    with pytest.raises(hub.HubError, match="no repository someone/pipeline, or it is private"):
        hub.local("hf://someone/pipeline")
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    assert files_in(hub.local("hf://someone/pipeline/unet"))


def test_what_is_missing_refused_or_damaged_is_one_line(server, monkeypatch):
    server.gated.add("someone/gated")
    server.add("someone/gated", REPO)
    for address, said in {
        "hf://someone/else": "there is no repository someone/else, or it is private",
        "hf://someone/gated": "someone/gated is gated: accept its conditions",
        "hf://someone/pipeline@v9": "someone/pipeline has no revision v9",
        "hf://someone/pipeline/vea": "there is no vea in someone/pipeline",
    }.items():
        with pytest.raises(hub.HubError, match=rf"^{address}: {said}[^\n]*$"):
            hub.local(address)
    path = "unet/diffusion_pytorch_model.safetensors"
    server.spoiled.add(path)
    with pytest.raises(hub.HubError, match=rf"{path} came damaged, with another checksum"):
        hub.local("hf://someone/pipeline/unet")
    server.spoiled.clear()
    folder = hub.local("hf://someone/pipeline/unet")
    assert pathlib.Path(folder, pathlib.Path(path).name).read_bytes() == TENSORS
    server.refuse = "/api/models"
    hub._downloaded.cache_clear()
    with pytest.raises(hub.HubError, match="cannot be reached"):
        hub.local("hf://someone/model")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(hub.HubError, match="cannot be reached"):
        hub.local("hf://someone/model")


def test_a_full_disk_leaves_nothing_half_downloaded(server):
    server.add("someone/large", {"model.safetensors": os.urandom(100_000)})
    with (
        disk.little_room(),
        pytest.raises(hub.HubError, match="hf://someone/large: cannot write"),
    ):
        hub.local("hf://someone/large")
    found = pathlib.Path(hub.local("hf://someone/large"))
    assert files_in(found) == {"model.safetensors"}
    assert (found / "model.safetensors").stat().st_size == 100_000


def test_a_folder_is_uploaded_in_one_commit_and_compared(server, monkeypatch, tmp_path):
    folder = tmp_path / "export"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "model.safetensors").write_bytes(TENSORS)
    (folder / "README.md").write_text("---\nlibrary_name: diffusers\n---\n# A model\n")
    with pytest.raises(hub.HubError, match="uploading needs a token: set HF_TOKEN"):
        hub.check_push("hf://me/new")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(hub.HubError, match=r"hf://me/new: [^\n]+$"):
        hub.check_push("hf://me/new")
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    hub.check_push("hf://me/new")
    assert "me/new" not in server.branches

    url = hub.push(folder, "hf://me/new", message="A model")
    commits = [path for method, path in server.requests if "/commit/" in path]
    assert commits == ["/api/models/me/new/commit/main"]
    assert url.endswith(server.branches["me/new"]["main"])
    assert files_in(hub.local("hf://me/new")) == {"README.md", "unet/model.safetensors"}

    hub.push(folder, "hf://me/new/deep", message="Again")
    assert pathlib.Path(hub.local("hf://me/new/deep"), "README.md").exists()
    server.spoiled.add("bad/unet/model.safetensors")
    with pytest.raises(hub.HubError, match=r"holds bad/unet/model\.safetensors with other content"):
        hub.push(folder, "hf://me/new/bad", message="Spoiled")
    before = dict(server.branches["me/new"])
    server.refuse = "/lfs/"
    (folder / "unet" / "model.safetensors").write_bytes(TENSORS[:-1] + b"!")
    with pytest.raises(hub.HubError, match=r"hf://me/new: [^\n]+$"):
        hub.push(folder, "hf://me/new", message="Broken")
    assert server.branches["me/new"] == before
