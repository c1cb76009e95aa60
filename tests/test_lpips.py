"""Tests of LPIPS against the same distance in torch, on random weights, and of its files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from conprediff_jax.common.errors import UserError
from conprediff_jax.metrics.networks import lpips


def trunk(network):
    """`features` as torchvision numbers them, and the places of the ReLUs that are compared."""
    if network == "alexnet":
        layers = [nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)]
        layers += [nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
        layers += [nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*layers), (1, 4, 7, 9, 11), (64, 192, 384, 256, 256)
    layers, channels = [], 3
    for item in [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512]:
        if item == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(channels, item, 3, padding=1), nn.ReLU()]
            channels = item
    return nn.Sequential(*layers), (3, 8, 15, 22, 29), (64, 128, 256, 512, 512)


def reference(network):
    """A distance in float64, and the state dicts of trunk and heads."""
    torch.manual_seed(0)
    layers, taps, widths = trunk(network)
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.normal_(layer.bias, std=0.1)
    features = {f"features.{name}": t.numpy().copy() for name, t in layers.state_dict().items()}
    weights = [torch.rand(1, width, 1, 1) for width in widths]
    heads = {f"lin{i}.model.1.weight": w.numpy().copy() for i, w in enumerate(weights)}
    layers.double()

    def distance(x, y):
        total = 0
        shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
        scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
        x, y = (x - shift) / scale, (y - shift) / scale
        for index, layer in enumerate(layers):
            x, y = layer(x), layer(y)
            if index in taps:
                difference = nn.functional.normalize(x) - nn.functional.normalize(y)
                weight = weights[taps.index(index)].double()
                total = total + (weight * difference**2).sum(1).mean((1, 2))
        return total

    return distance, features, heads


def images(seed, size):
    return np.random.default_rng(seed).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)


@pytest.mark.parametrize(("network", "size"), [("alexnet", 47), ("vgg16", 32)])
def test_equals_torch_on_random_weights(network, size, tmp_path):
    distance, features, heads = reference(network)
    save_file(features | {"classifier.1.weight": np.zeros((2, 2))}, tmp_path / "trunk.safetensors")
    torch.save({name: torch.from_numpy(t) for name, t in heads.items()}, tmp_path / "heads.pth")
    model = lpips.LPIPS(network)
    files = tmp_path / "trunk.safetensors", tmp_path / "heads.pth"
    params = lpips.load(model, *files, cache=tmp_path)

    x, y = images(0, size), images(1, size)
    x_torch, y_torch = (torch.from_numpy(a).permute(0, 3, 1, 2).double() for a in (x, y))
    x_torch.requires_grad_()
    expected = distance(x_torch, y_torch)
    (gradient,) = torch.autograd.grad(expected.sum(), x_torch)

    @jax.jit
    def found(x, y):
        value, pull = jax.vjp(lambda x: model.apply({"params": params}, x, y), x)
        return value, pull(jnp.ones_like(value))[0]

    value, to_x = found(x, y)
    np.testing.assert_allclose(value, expected.detach().numpy(), rtol=1e-5)
    gradient = gradient.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(to_x, gradient, atol=1e-5 * np.abs(gradient).max())
    np.testing.assert_allclose(found(x, x)[0], 0, atol=1e-12)


def test_gradient_is_finite_where_nothing_is_active():
    model = lpips.LPIPS("alexnet")
    x = jnp.zeros((1, 31, 31, 3))
    params = jax.tree.map(
        lambda leaf: jnp.full(leaf.shape, -1.0),
        jax.eval_shape(model.init, jax.random.key(0), x, x)["params"],
    )
    gradient = jax.jit(jax.grad(lambda x: model.apply({"params": params}, x + 1, x).sum()))(x)
    assert jnp.isfinite(gradient).all()


def test_bad_files_are_reported_in_one_line(tmp_path):
    _, features, heads = reference("alexnet")
    good, other = tmp_path / "trunk.safetensors", tmp_path / "heads.safetensors"
    save_file(features, good)
    save_file(heads, other)
    damaged, saved = tmp_path / "damaged.safetensors", tmp_path / "trunk.pth"
    save_file(features | {"features.0.bias": np.full(64, np.nan, np.float32)}, damaged)
    torch.save({name: torch.from_numpy(tensor) for name, tensor in features.items()}, saved)
    for trunk_file, heads_file, network, message in [
        (tmp_path / "none.pth", other, "alexnet", r"none.pth: there is no such weights file"),
        (good, other, "vgg16", r"weights do not fit the LPIPS of vgg16: features.0.weight is"),
        (damaged, other, "alexnet", r"features.0.bias holds values that are no finite numbers"),
        (good, good, "alexnet", r"lin0.model.1.weight \(1, 64, 1, 1\) is missing"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            lpips.load(lpips.LPIPS(network), trunk_file, heads_file, cache=tmp_path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"cannot write .*trunk\.pth/.*\.safetensors: [^\n]+$"):
        lpips.load(lpips.LPIPS("alexnet"), saved, other, cache=saved)
    with pytest.raises(ValueError, match="network is 'resnet': choose one of"):
        lpips.LPIPS("resnet")
