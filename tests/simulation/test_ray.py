"""Flower's Ray engine gives the same numbers as hospitals taking turns in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.checkpoint import RunFolder
from server.history import History
from simulation.ray_engine import RayMissing, require_ray
from simulation.run import Engine, simulate


def test_a_missing_ray_is_said_before_any_work(cohort_data, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RayMissing, match=r"\.\[ray\]"):
        require_ray()
    with pytest.raises(RayMissing):
        simulate(cohort_data, tmp_path / "run", tiny_config(), cache=None, engine=Engine("ray"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ray_gives_the_same_federation(
    finished_run, cohort_data, cohort_cache, tiny_config, tmp_path
):
    pytest.importorskip("ray")
    out = tmp_path / "run"
    result = simulate(
        cohort_data, out, tiny_config(), cache=cohort_cache, engine=Engine("ray", cpus_per_site=1)
    )
    assert result.verdict.complete
    expected = RunFolder(Path(finished_run.folder))
    with History(expected.history) as one, History(result.folder.history) as other:
        for a, b in zip(one.rounds(), other.rounds(), strict=True):
            assert a.sha256 == b.sha256, f"round {a.round}"
            assert repr(a.metrics) == repr(b.metrics)  # as text: NaN is not equal to NaN
        assert repr(one.final()) == repr(other.final())
    assert result.folder.model.read_bytes() == expected.model.read_bytes()
