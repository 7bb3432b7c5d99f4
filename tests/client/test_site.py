"""A site's manifest: what is written is what its client loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from client.site import load_site, write_site
from common.config import FederationConfig
from common.config_file import dump_config
from sites.cache import CachedSubject, CacheError
from sites.finding import Finding


def finding(subject: str, severity: str) -> Finding:
    return Finding("site-01", subject, "x.nii", severity, "code", f"what of {subject}", "remedy")


def write(folder: Path, config: FederationConfig, ready: tuple[CachedSubject, ...], **more) -> None:
    settings = {
        "name": "site-01",
        "trains": True,
        "config_text": dump_config(config),
        "training": ready[:4],
        "held_out": ready[4:6],
        "findings": [finding("BAD", "error"), finding("ODD", "warning")],
    }
    write_site(folder, **(settings | more))


def test_a_site_loads_what_was_written(
    prepared, tiny_config: Callable[..., FederationConfig], tmp_path: Path
):
    config = tiny_config("seed=7")
    write(tmp_path / "site", config, prepared.ready)
    site = load_site(tmp_path / "site")
    assert (site.name, site.trains) == ("site-01", True)
    assert site.training == prepared.ready[:4]
    assert site.held_out == prepared.ready[4:6]
    assert site.left_out == {"BAD": "what of BAD"}, "a warning leaves nobody out"
    assert site.config == config
    assert site.config.fingerprint() == config.fingerprint()


def test_whose_scan_each_subject_is_is_known(prepared, tiny_config, tmp_path: Path):
    ids = [entry.id for entry in prepared.ready]
    write(tmp_path, tiny_config(), prepared.ready)
    assert load_site(tmp_path).patients == {i: i for i in ids[:6]}
    patients = {i: f"P{n // 3}" for n, i in enumerate(ids)}
    write(tmp_path, tiny_config(), prepared.ready, patients=patients)
    assert load_site(tmp_path).patients == {i: patients[i] for i in ids[:6]}
    assert load_site(tmp_path).training[0].fingerprints == prepared.ready[0].fingerprints != ()
    del patients[ids[5]]  # not to be guessed
    with pytest.raises(KeyError, match=ids[5]):
        write(tmp_path, tiny_config(), prepared.ready, patients=patients)


def test_writing_again_replaces_everything(prepared, tiny_config, tmp_path: Path):
    write(tmp_path, tiny_config(), prepared.ready)
    write(tmp_path, tiny_config(), prepared.ready, training=(), trains=False, findings=())
    site = load_site(tmp_path)
    assert (site.trains, site.training, site.left_out) == (False, (), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["federation.yaml", "site.json"]


def test_a_subject_gone_from_the_cache_is_said(prepared, tiny_config, tmp_path: Path, make_subject):
    gone = make_subject("GONE", *[prepared.ready[0].image(), prepared.ready[0].labels()])
    write(tmp_path, tiny_config(), prepared.ready, training=(gone,))
    with pytest.raises(CacheError, match="GONE is missing or damaged"):
        load_site(tmp_path)
