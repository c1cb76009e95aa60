"""Tests of the 2015 Inception network against torch, and of weight files that users give."""

from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torch.nn import functional as F

from conprediff_jax.common.errors import UserError
from conprediff_jax.metrics import features, frechet
from conprediff_jax.metrics.networks import inception
from conprediff_jax.weights import cached


class TorchInception(nn.Module):
    """The 2015 network with the names of pytorch-fid's file, built from a table of its branches."""

    def __init__(self):
        super().__init__()
        self.inputs = {}
        self.conv("Conv2d_1a_3x3", 3, 32, 3, stride=2, padding=0)
        self.conv("Conv2d_2a_3x3", 32, 32, 3, padding=0)
        self.conv("Conv2d_2b_3x3", 32, 64, 3)
        self.conv("Conv2d_3b_1x1", 64, 80, 1)
        self.conv("Conv2d_4a_3x3", 80, 192, 3, padding=0)
        for name, width, pool in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
            self.branches(
                name, width, {"1x1": [(64, 1)], "5x5": [(48, 1), (64, 5)],
                "3x3dbl": [(64, 1), (96, 3), (96, 3)], "_pool": [(pool, 1)]}
            )  # fmt: skip
        self.branches("6a", 288, {"3x3": [(384, 3, 2)], "3x3dbl": [(64, 1), (96, 3), (96, 3, 2)]})
        row, column = (1, 7), (7, 1)
        for name, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            self.branches(
                name, 768, {"1x1": [(192, 1)], "7x7": [(c, 1), (c, row), (192, column)],
                "7x7dbl": [(c, 1), (c, column), (c, row), (c, column), (192, row)],
                "_pool": [(192, 1)]}
            )  # fmt: skip
        self.branches(
            "7a", 768, {"3x3": [(192, 1), (320, 3, 2)],
            "7x7x3": [(192, 1), (192, row), (192, column), (192, 3, 2)]}
        )  # fmt: skip
        for name, width in (("7b", 1280), ("7c", 2048)):
            self.branches(
                name, width,
                {"1x1": [(320, 1)], "3x3": [(384, 1)], "3x3dbl": [(448, 1), (384, 3)],
                "_pool": [(192, 1)]}, always_number=("3x3",)
            )  # fmt: skip
            for branch in ("3x3_2", "3x3dbl_3"):
                self.conv(f"Mixed_{name}.branch{branch}a", 384, 384, (1, 3))
                self.conv(f"Mixed_{name}.branch{branch}b", 384, 384, (3, 1))
        self.fc = nn.Linear(2048, 1008)

    def conv(self, name, width, out, kernel, stride=1, padding=None):
        *path, last = name.split(".")
        parent = self
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = [k // 2 for k in kernel] if padding is None else padding
        layer = nn.Module()
        layer.conv = nn.Conv2d(width, out, kernel, stride, padding, bias=False)
        layer.bn = nn.BatchNorm2d(out, eps=0.001)
        parent.add_module(last, layer)

    def branches(self, name, width, table, always_number=()):
        for branch, layers in table.items():
            inputs = width
            for number, (out, window, *stride) in enumerate(layers, 1):
                numbered = len(layers) > 1 or branch in always_number
                self.conv(
                    f"Mixed_{name}.branch{branch}" + f"_{number}" * numbered, inputs, out, window,
                    *([stride[0], 0] if stride else []),
                )  # fmt: skip
                inputs = out

    def run(self, x, *names):
        for name in names:
            layer = self.get_submodule(name)
            x = F.relu(layer.bn(layer.conv(x)))
        return x

    def mixed(self, name, x):
        block = getattr(self, f"Mixed_{name}")
        order = ("branch1x1", "branch3x3", "branch5x5", "branch7x7", "branch7x7x3", "branch3x3dbl",
                 "branch7x7dbl")  # fmt: skip
        parts = []
        for branch in order:
            layers = sorted(
                layer for layer, _ in block.named_children() if layer.split("_")[0] == branch
            )
            if not layers:
                continue
            ends = [layer for layer in layers if layer[-1] in "ab"]
            stem = self.run(x, *(f"Mixed_{name}.{layer}" for layer in layers if layer not in ends))
            parts += [self.run(stem, f"Mixed_{name}.{layer}") for layer in ends] or [stem]
        if not hasattr(block, "branch_pool"):
            return torch.cat([*parts, F.max_pool2d(x, 3, 2)], 1)
        pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        if name == "7c":
            pooled = F.max_pool2d(x, 3, 1, 1)
        return torch.cat([*parts, self.run(pooled, f"Mixed_{name}.branch_pool")], 1)

    def forward(self, images):
        x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
        x = 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
        x = self.run(x, "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3")
        taps = [x := F.max_pool2d(x, 3, 2)]
        x = self.run(x, "Conv2d_3b_1x1", "Conv2d_4a_3x3")
        taps.append(x := F.max_pool2d(x, 3, 2))
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e"):
            if name == "6d":
                spatial = self.run(x, "Mixed_6d.branch1x1")[:, :7].permute(0, 2, 3, 1).flatten(1)
            x = self.mixed(name, x)
        taps.append(x)
        for name in ("7a", "7b", "7c"):
            x = self.mixed(name, x)
        pool = x.mean((2, 3))
        return pool, spatial, pool @ self.fc.weight.T, *(tap.mean((2, 3)) for tap in taps)


def gaussian(rows):
    moments = frechet.Moments()
    moments.update(rows)
    return moments.gaussian()


@pytest.fixture(scope="module")
def torch_inception():
    torch.manual_seed(0)
    network = TorchInception()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight, layer.running_var):
                nn.init.uniform_(tensor, 0.8, 1.2)
            for tensor in (layer.bias, layer.running_mean):
                nn.init.uniform_(tensor, -0.1, 0.1)
    return network.eval()


def test_inception_equals_pytorch_fid_from_its_weight_file(torch_inception, tmp_path):
    assert sum(p.numel() for p in torch_inception.parameters()) == 23_850_960
    torch.save(torch_inception.state_dict(), tmp_path / "weights.pth")
    extractor = features.inception_extractor(tmp_path / "weights.pth", tmp_path / "cache")
    shape = (4, 40, 52, 3)
    noise = np.random.default_rng(0).integers(0, 256, shape)
    smooth = np.linspace(0, 255, noise.size).reshape(shape)
    images = np.stack([noise, smooth]).astype(np.uint8)
    apply = jax.jit(inception.Inception().apply)
    ours, theirs = [], []
    for half in images:
        found = apply({"params": extractor.params}, jnp.asarray(half))
        ours.append([np.asarray(a) for a in (*found[:3], *found.taps)])
        with torch.no_grad():
            theirs.append([a.numpy() for a in torch_inception(half)])
    for a, b in zip(chain(*ours), chain(*theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    # The distance of pytorch-fid's 768 features. With fewer images than features, the trace of
    # (C_1 C_2)^(1/2) is a sum of singular values.
    x, y = (part[-1].astype(np.float64) for part in theirs)
    centred = [z - z.mean(0) for z in (x, y)]
    shift = x.mean(0) - y.mean(0)
    spread = sum((z**2).sum() for z in centred)
    spread -= 2 * scipy.linalg.svdvals(centred[0] @ centred[1].T).sum()
    found = frechet.frechet_distance(*(gaussian(part[-1]) for part in ours))
    assert found == pytest.approx(shift @ shift + spread / (shape[0] - 1), rel=1e-3)


def test_weight_files_of_other_networks_or_with_code_are_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save(nn.Conv2d(3, 4, 3).state_dict(), path)
    with pytest.raises(
        UserError, match=r"other\.pth: weights do not fit the 2015 Inception"
    ) as error:
        features.inception_extractor(path, tmp_path)
    assert "\n" not in str(error.value)
    torch.save(nn.Conv2d(3, 4, 3), path)  # a pickled object
    with pytest.raises(UserError, match=r"other\.pth: not a torch file of tensors alone"):
        cached.read(path, tmp_path)
    path.write_bytes(b"no weights at all")
    with pytest.raises(UserError, match=r"other\.pth"):
        cached.read(path, tmp_path)
    with pytest.raises(UserError, match="no such weights file"):
        cached.read(tmp_path / "missing.pth", tmp_path)


def test_weight_files_are_converted_once(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    torch.save({"half": torch.ones(2, 3, dtype=torch.float16)}, path)
    first = cached.read(path, tmp_path / "cache")
    monkeypatch.setattr(torch, "load", None)
    np.testing.assert_array_equal(cached.read(path, tmp_path / "cache")["half"], first["half"])
    assert first["half"].dtype == np.float32
