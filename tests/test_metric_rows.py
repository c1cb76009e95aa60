"""Tests of the numbers of a run: they can be read while the run writes them."""

from conprediff_jax.common import metric_rows


def test_lines_that_are_not_finished_are_left_out(tmp_path):
    assert metric_rows.read(tmp_path) == []
    whole = '{"step": 2, "time": 1.5, "loss": null}\n'
    for rest in ("", '{"step": 3, "time": 2.5, "lo', "3\n", '{"step": 3}\n'):
        (tmp_path / metric_rows.METRICS).write_text(whole + rest)
        assert metric_rows.read(tmp_path) == [{"step": 2, "time": 1.5, "loss": None}]
