"""Tests that runs of earlier versions open, continue and sample as before; see `stored_run`."""

import numpy as np
import pytest
import stored_run

pytestmark = pytest.mark.usefixtures("one_device")


def test_a_stored_run_goes_on_and_draws_as_the_version_that_wrote_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = np.load(stored_run.STORED / "expected.npz")
    found = stored_run.measured(tmp_path)
    assert set(expected) == {*found, "machine"}
    same = expected["machine"] == stored_run.machine()
    for name, value in found.items():
        if same:  # to the bit
            np.testing.assert_array_equal(value, expected[name], err_msg=name)
        elif name == "images":  # a token that is as likely as another may come out otherwise
            assert (value == expected[name]).mean() > 0.9
        else:
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
