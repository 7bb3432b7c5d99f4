"""Each aggregation against one written out in loops; what a bad update does to it; its memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity

from common.config import Rounds
from common.weights import Weights, relative_change
from server import robust
from server.average import add, mean
from server.robust import aggregate, fewest_updates, outliers
from server.spool import Kept, write

ROBUST = ("trimmed_mean", "median", "krum")


@pytest.fixture(autouse=True)
def _inside_a_server_app():
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


def random_weights(seed: int, spread: float = 1.0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    ties = torch.randint(0, 3, (6, 5), generator=generator).float()
    return {
        "conv": 1 + spread * torch.randn((4, 3, 2, 2, 2), generator=generator),
        "double": spread * torch.randn(7, generator=generator).double(),
        "empty": torch.zeros(0, 3),
        "half": (spread * torch.randn(11, generator=generator)).half(),
        "scalar": spread * torch.randn((), generator=generator),
        "ties": ties,
        "transposed": spread * torch.randn((5, 7), generator=generator).T,
        "counter": torch.randint(0, 2**40, (), generator=generator),
        "counters": torch.randint(-(2**30), 2**30, (5,), generator=generator, dtype=torch.int32),
    }


MODEL = random_weights(0)


def kept(folder: Path, updates: list[Weights], subjects: list[int] | None = None) -> list[Kept]:
    result = []
    for number, weights in enumerate(updates):
        path = folder / f"{number}.safetensors"
        write(path, weights)
        n = subjects[number] if subjects else 5
        result.append(Kept(f"s{number}", n, relative_change(weights, MODEL), path))
    return result


def changed(seed: int) -> Weights:
    """An honest update: the model, a little further."""
    return {
        name: (t + 0.01 * other).to(t.dtype) if t.is_floating_point() else t + seed
        for (name, t), other in zip(MODEL.items(), random_weights(seed).values(), strict=True)
    }


def in_loops(updates: list[Weights], cut: int | None) -> dict[str, np.ndarray]:
    """Of each value the mean without the `cut` lowest and highest, or the median (None)."""
    result = {}
    for name in MODEL:
        columns = np.stack([u[name].double().numpy().reshape(-1) for u in updates], axis=1)
        values = []
        for column in columns.tolist():
            line = sorted(column)
            c = (len(line) - 1) // 2 if cut is None else cut
            inner = line[c : len(line) - c]
            values.append(sum(inner) / len(inner))
        result[name] = np.array(values).reshape(tuple(MODEL[name].shape))
    return result


@pytest.mark.parametrize("together", [7, 2**21])
@pytest.mark.parametrize("n", [3, 5, 10])
@pytest.mark.parametrize(
    ("rounds", "cut"),
    [
        (Rounds(aggregation="median"), dict.fromkeys((3, 5, 10))),
        (Rounds(aggregation="trimmed_mean"), {3: 0, 5: 1, 10: 2}),
        (Rounds(aggregation="trimmed_mean", trim=0.35), {3: 1, 5: 1, 10: 3}),
    ],
)
def test_values_are_those_of_the_loops_in_every_type(
    tmp_path, monkeypatch, rounds, cut, n, together
):
    """Also of blocks smaller than a tensor, and whatever the numbers of subjects."""
    monkeypatch.setattr(robust, "TOGETHER", together)
    updates = [random_weights(seed) for seed in range(1, n + 1)]
    result, chosen = aggregate(kept(tmp_path, updates, list(range(1, n + 1))), MODEL, rounds)
    assert chosen is None
    assert list(result) == list(MODEL)
    for name, exact in in_loops(updates, cut[n]).items():
        assert result[name].dtype == MODEL[name].dtype, name
        assert result[name].shape == MODEL[name].shape, name
        if MODEL[name].is_floating_point():
            rounding = torch.finfo(MODEL[name].dtype).eps
            np.testing.assert_allclose(result[name].double(), exact, rtol=rounding, atol=1e-12)
        else:
            np.testing.assert_array_equal(result[name], np.rint(exact), err_msg=name)


def krum_in_loops(updates: list[Weights], bad: int) -> int:
    scores = []
    for mine in updates:
        distances = []
        for other in updates:
            if other is not mine:
                distances.append(
                    sum(
                        float((mine[k].double() - other[k].double()).square().sum())
                        for k in MODEL
                        if MODEL[k].is_floating_point()
                    )
                )
        scores.append(sum(sorted(distances)[: len(updates) - bad - 2]))
    return int(np.argmin(scores))


@pytest.mark.parametrize("together", [7, 2**21])
@pytest.mark.parametrize(("n", "bad"), [(3, 0), (5, 1), (10, 1), (10, 3)])
def test_krum_takes_the_update_that_the_loops_take(tmp_path, monkeypatch, n, bad, together):
    monkeypatch.setattr(robust, "TOGETHER", together)
    for repeat in range(3):
        updates = [changed(100 * repeat + seed) for seed in range(1, n + 1)]
        rounds = Rounds(aggregation="krum", bad_sites=bad)
        result, chosen = aggregate(kept(tmp_path, updates), MODEL, rounds)
        number = krum_in_loops(updates, bad)
        assert chosen == f"s{number}"
        for name, tensor in updates[number].items():
            assert torch.equal(result[name], tensor), name
            assert result[name].dtype == tensor.dtype


def test_krum_sees_small_differences_between_large_weights(tmp_path):
    """|x|^2 + |y|^2 - 2 x.y in float32, as in Flower, finds no difference between these."""
    begin = {"w": torch.full((4000,), 8.0)}
    steps = [0, 1, 2, 3, 40]
    updates = [{"w": begin["w"] + 2.0**-18 * step} for step in steps]
    found = []
    for number, weights in enumerate(updates):
        write(tmp_path / str(number), weights)
        found.append(Kept(str(number), 1, 1.0, tmp_path / str(number)))
    # of 5 with one bad, the two nearest count: 1 + 4, 1 + 1, 1 + 1, 1 + 4 and far away
    rounds = Rounds(aggregation="krum", bad_sites=1)
    for order in (found, found[::-1]):
        assert aggregate(order, begin, rounds)[1] in {"1", "2"}


def test_fedavg_from_the_disk_is_fedavg_to_the_last_bit(tmp_path):
    updates = [random_weights(seed) for seed in range(1, 8)]
    subjects = [129, 35, 34, 1, 7, 382, 511]
    running = None
    for update, n in zip(updates, subjects, strict=True):
        running = add(running, update, n, MODEL)
    assert running is not None
    direct = mean(running, MODEL)
    result, chosen = aggregate(kept(tmp_path, updates, subjects), MODEL, Rounds())
    assert chosen is None
    for name, tensor in direct.items():
        assert torch.equal(result[name], tensor), name
        assert (result[name].dtype, result[name].shape) == (tensor.dtype, tensor.shape)


# ------------------------------------------------------------------------------------ a bad site


def floats(weights: Weights, change) -> Weights:
    return {
        n: change(t.double(), MODEL[n].double()).to(t.dtype) if t.is_floating_point() else t
        for n, t in weights.items()
    }


BAD = {
    "scaled": lambda good: floats(good, lambda t, m: m + 1e3 * (t - m)),
    "sign-flipped and scaled": lambda good: floats(good, lambda t, m: m - 1e3 * (t - m)),
    "constant": lambda good: floats(good, lambda t, m: torch.full_like(t, 50.0)),
}


def farthest(result: Weights, honest: list[Weights]) -> float:
    """How far outside the range of the honest updates the worst value is, in widths of that range."""
    worst = 0.0
    for name in ("conv", "double", "scalar", "transposed"):
        values = torch.stack([h[name].double() for h in honest])
        low, high = values.amin(0), values.amax(0)
        beyond = torch.maximum(result[name].double() - high, low - result[name].double())
        worst = max(worst, float((beyond / (high - low)).max()))
    return worst


@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("kind", BAD)
def test_one_bad_update_spoils_the_mean_and_no_other_aggregation(tmp_path, kind, place):
    honest = [changed(seed) for seed in range(1, 5)]
    updates = [*honest[:place], BAD[kind](changed(5)), *honest[place:]]
    of = kept(tmp_path, updates)
    assert farthest(aggregate(of, MODEL, Rounds())[0], honest) > 10
    for aggregation in ROBUST:
        result, chosen = aggregate(of, MODEL, Rounds(aggregation=aggregation))
        assert farthest(result, honest) <= 1e-6, aggregation
        assert chosen != f"s{place}"
    refused = outliers(of, 10.0)
    assert list(refused) == [f"s{place}"]
    ratio = of[place].change / float(np.median([k.change for k in of]))
    assert f"its change is {ratio:.3g} times the median" in refused[f"s{place}"]
    assert "limit for its 5 subjects: 10" in refused[f"s{place}"]
    good = [k for k in of if k.site not in refused]
    assert farthest(aggregate(good, MODEL, Rounds())[0], honest) <= 1e-6


def sized(*changes: float, subjects: tuple[int, ...] = ()) -> list[Kept]:
    numbers = subjects or (4,) * len(changes)
    return [
        Kept(f"s{i}", n, c, Path("none"))
        for i, (c, n) in enumerate(zip(changes, numbers, strict=True))
    ]


def test_fewer_than_three_updates_are_not_judged():
    assert outliers(sized(1, 1e6), 1.5) == {}  # twice their median
    assert list(outliers(sized(1, 1, 1e6), 10)) == ["s2"]


def test_the_limit_is_a_multiple_of_the_median():
    assert outliers(sized(1, 2, 3, 19.9), 8) == {}  # the median is 2.5
    assert list(outliers(sized(1, 2, 3, 20.1), 8)) == ["s3"]
    assert list(outliers(sized(1, 2, 3, 30, 25, 2, 2), 8)) == ["s3", "s4"]


def test_a_site_with_more_subjects_may_move_further_and_one_with_fewer_no_less():
    assert outliers(sized(1, 1, 1, 59, subjects=(10, 10, 10, 60)), 10) == {}
    assert list(outliers(sized(1, 1, 1, 61, subjects=(10, 10, 10, 60)), 10)) == ["s3"]
    assert outliers(sized(1, 1, 1, 9, subjects=(10, 10, 10, 1)), 10) == {}


def test_a_round_in_which_most_sites_change_nothing_has_no_measure():
    assert outliers(sized(0, 0, 5), 10) == {}


def test_how_many_updates_each_aggregation_needs():
    assert fewest_updates(Rounds()) == 1
    assert fewest_updates(Rounds(aggregation="median")) == 3
    for trim in (0.05, 0.1, 0.2, 0.3, 1 / 3, 0.4, 0.49):
        n = fewest_updates(Rounds(aggregation="trimmed_mean", trim=trim))
        assert int(n * trim) == 1
        assert int((n - 1) * trim) == 0
    assert fewest_updates(Rounds(aggregation="trimmed_mean", trim=0)) == 1
    assert [fewest_updates(Rounds(aggregation="krum", bad_sites=bad)) for bad in (0, 1, 2, 3)] == [
        3,
        5,
        7,
        9,
    ]


# ---------------------------------------------------------------------------------------- memory

MEMORY = """
import json, resource, sys
from pathlib import Path
import torch
from flwr.supercore.task_identity import TaskIdentity
from common.config import Rounds
from server.robust import aggregate
from server.spool import Kept, write

TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
aggregation, folder = sys.argv[1], Path(sys.argv[2])
SIZES = 4_000_000, 1_000_000, 1_000_000  # 24 MB in float32

def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{i}": torch.randn(n, generator=generator) for i, n in enumerate(SIZES)}

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

model, rounds = weights(0), Rounds(aggregation=aggregation)
peaks = []
for sites in (5, 15):
    kept = []
    for site in range(sites):
        path = folder / f"{site}.safetensors"
        write(path, weights(1 + site))
        kept.append(Kept(str(site), 1, 1.0, path))
    peaks.append(peak())
    aggregate(kept, model, rounds)
    peaks.append(peak())
print(json.dumps(peaks))
"""


@pytest.mark.parametrize("aggregation", ["fedavg", *ROBUST])
def test_memory_does_not_grow_with_the_number_of_sites(tmp_path, aggregation):
    """15 updates of 23 MiB are 343 MiB on disk; in memory the growth from 5 to 15 is a quarter of one."""
    command = (sys.executable, "-c", MEMORY, aggregation, str(tmp_path))
    # fixed, or glibc keeps freed tensors in a heap: growth was 0 to 46 MiB, of fragments
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    _, with_5, _, with_15 = json.loads(done.stdout)
    assert with_15 - with_5 < 6
