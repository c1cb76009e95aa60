"""Tests of damaged npz files: what was written is read, or one line names the file."""

import io
import pathlib

import numpy as np
import pytest
from fuzzing import fuzz

from conprediff_jax.common.errors import UserError
from conprediff_jax.metrics import image_sets


def sound(rng):
    """Arrays that a file may hold: images, moments of one or both kinds of features."""
    images = rng.integers(0, 256, (*rng.integers(1, 5, 3), 3), np.uint8)
    moments = {}
    for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s")):
        rows = rng.normal(size=(rng.integers(2, 6), rng.integers(2, 5)))
        dtype = rng.choice([np.float32, np.float64])
        moments |= {mu: rows.mean(0).astype(dtype), sigma: np.cov(rows.T).astype(dtype)}
    moments["count"] = rng.integers(1, 99)
    return [{"arr_0": images}, moments, {"arr_0": images} | moments][rng.integers(3)]


def packed(arrays, rng):
    file = io.BytesIO()
    save = np.savez if rng.random() < 0.5 else np.savez_compressed
    save(file, **arrays)
    return file.getvalue()


def wrong(array, rng):
    """An array that is not what it should be, or, of a single number, may be."""
    not_finite = np.full_like(array, rng.choice([np.nan, np.inf]), np.float64)
    whole = array if array.ndim else array[None]
    candidates = [
        not_finite,
        array.astype(object),
        array.astype(str),
        array.astype(complex),
        array[None],
        whole[..., :0],
        whole[:0],
        np.concatenate([whole, whole]),
        array.ravel(),
        -1 - np.abs(array.astype(np.float64)),
        np.asfortranarray(array),
    ]
    return candidates[rng.integers(len(candidates))]


def damaged(rng):
    """The bytes of a file, and the arrays it holds where they must come back unless refused."""
    arrays = sound(rng)
    data, kind = bytearray(packed(arrays, rng)), rng.integers(7)
    if kind == 0:
        return data, arrays
    if kind == 1:  # flipped bits
        for place in rng.integers(len(data), size=rng.integers(1, 4)):
            data[place] ^= 1 << rng.integers(8)
        return data, arrays
    if kind == 2:  # cut short, or with something behind
        return data[: rng.integers(len(data))] if rng.random() < 0.8 else data + rng.bytes(
            9
        ), arrays
    if kind == 3:
        return rng.bytes(rng.integers(200)), None
    if kind == 4:  # a part overwritten
        start = rng.integers(len(data))
        data[start : start + 30] = rng.bytes(len(data[start : start + 30]))
        return data, arrays
    name = rng.choice(list(arrays))
    if kind == 5:  # an array is missing, or has another name
        del arrays[name]
        return packed(arrays | {"other": np.zeros(2)}, rng), arrays
    arrays[name] = wrong(np.asarray(arrays[name]), rng)
    return packed(arrays, rng), arrays


def test_an_npz_is_what_was_written_or_refused_in_a_line(tmp_path):
    path = pathlib.Path(tmp_path / "file.npz")
    outcomes = {"read": 0, "refused": 0}

    def check(rng):
        data, arrays = damaged(rng)
        path.write_bytes(data)
        try:
            found = image_sets.read_reference(str(path), size=(1, 1))
            images = np.concatenate(list(found.batches(2))) if found.batches else None
        except UserError as error:
            outcomes["refused"] += 1
            assert str(path) in str(error) and "\n" not in str(error)
            return
        outcomes["read"] += 1
        assert (images is None) == ("arr_0" not in arrays)
        if images is not None:
            np.testing.assert_array_equal(images, arrays["arr_0"])
            assert (found.count, found.size) == (len(images), images.shape[1:3])
        kinds = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
        assert set(found.gaussians) == {k for k, pair in kinds.items() if set(pair) <= set(arrays)}
        for kind, gaussian in found.gaussians.items():
            mu, sigma = kinds[kind]
            np.testing.assert_array_equal(gaussian.mean, arrays[mu])
            np.testing.assert_array_equal(gaussian.covariance, arrays[sigma])
            assert gaussian.count == arrays.get("count", 0)

    fuzz(check, 200)
    assert min(outcomes.values()) > 0 or sum(outcomes.values()) < 200


@pytest.mark.parametrize("data", [b"", b"PK\x05\x06" + bytes(18)], ids=["0 bytes", "no arrays"])
def test_an_empty_npz_is_refused(data, tmp_path):
    (tmp_path / "empty.npz").write_bytes(data)
    with pytest.raises(UserError, match=r"empty\.npz: (not a readable file|holds nothing)"):
        image_sets.read_samples(tmp_path / "empty.npz")
