"""The streamed mean is the weighted mean, in every type, and costs one model whatever the number of sites."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from common.weights import Weights
from server.average import WeightedMean, add, mean, moving

SUBJECTS = [129, 35, 34, 34, 22, 15, 14, 13, 12, 11, 9, 9, 8, 8, 6, 6, 4, 3, 2, 1, 47, 382, 511]


def random_weights(seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    shape = (8, 4, 3, 3, 3)
    return {
        "conv.weight": torch.randn(shape, generator=generator),
        # larger than a block of the implementation, and no multiple of it
        "long": torch.randn(40_007, generator=generator) * 1e3,
        "channels_last": torch.randn((2, 4, 3, 3, 3), generator=generator).to(
            memory_format=torch.channels_last_3d
        ),
        "transposed": torch.randn((5, 7), generator=generator).T,
        "half": torch.randn(11, generator=generator).half(),
        "double": torch.randn(11, generator=generator).double(),
        "scalar": torch.randn((), generator=generator),
        "empty": torch.zeros(0, 3),
        "counter": torch.randint(0, 1000, (), generator=generator),
        "counters": torch.randint(-(2**30), 2**30, (5,), generator=generator, dtype=torch.int32),
    }


def averaged(updates: list[Weights], counts: list[int], since: Weights | None = None) -> Weights:
    """By default since a model that the updates are far from."""
    since = since or random_weights(99)
    running: WeightedMean | None = None
    for update, count in zip(updates, counts, strict=True):
        running = add(running, update, count, since)
    assert running is not None
    return mean(running, since)


def after_a_round(since: Weights, seed: int, step: float = 1e-3) -> Weights:
    """An update as sites send them: near the model; counters a little higher."""
    return {
        name: (tensor + step * (1 + abs(tensor.double())) * other.double().sign()).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor + seed
        for (name, tensor), other in zip(since.items(), random_weights(seed).values(), strict=True)
    }


def exact_mean(updates: list[Weights], counts: list[int], name: str) -> np.ndarray:
    """In a type wide enough to judge float64 tensors, too."""
    stacked = np.stack([update[name].numpy().astype(np.longdouble) for update in updates])
    return np.average(stacked, axis=0, weights=counts)


@pytest.mark.parametrize("near", [True, False])
def test_it_is_numpys_weighted_mean(near):
    """To the bound that the module states, and integers exactly."""
    since = random_weights(99)
    sites = range(len(SUBJECTS))
    updates = [after_a_round(since, seed) if near else random_weights(seed) for seed in sites]
    result = averaged(updates, SUBJECTS, since)
    assert list(result) == list(since)
    for name, tensor in result.items():
        assert (tensor.dtype, tensor.shape) == (since[name].dtype, since[name].shape), name
        exact = exact_mean(updates, SUBJECTS, name)
        if not tensor.dtype.is_floating_point:
            np.testing.assert_array_equal(tensor, np.rint(exact))
            continue
        begin = since[name].double().numpy()
        change = np.max([abs(u[name].double().numpy() - begin) for u in updates], axis=0)
        inner = 2.0**-53 if tensor.dtype == torch.float64 else 2.0**-24
        bound = torch.finfo(tensor.dtype).eps / 2 * abs(exact) + (len(updates) + 8) * inner * change
        subnormal = float(torch.finfo(tensor.dtype).tiny)
        assert (abs(tensor.double().numpy() - exact) <= bound * (1 + 1e-6) + subnormal).all(), name


def test_after_small_changes_it_is_nearly_always_the_nearest_fp32_number():
    """What Flower's own FedAvg misses one time in three: a sum of weights rounds with each site."""
    since = random_weights(99)
    updates = [after_a_round(since, seed, step=1e-4) for seed in range(len(SUBJECTS))]
    result = averaged(updates, SUBJECTS, since)["long"].numpy()
    nearest = exact_mean(updates, SUBJECTS, "long").astype(np.float32)
    assert np.mean(result != nearest) < 0.01
    np.testing.assert_allclose(result, nearest, rtol=2.0**-22)


def test_it_agrees_with_flowers_own_fedavg():
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    names = ("conv.weight", "long", "transposed", "scalar")
    updates = [{n: random_weights(seed)[n] for n in names} for seed in range(len(SUBJECTS))]
    replies = []
    for node, (update, count) in enumerate(zip(updates, SUBJECTS, strict=True), start=2):
        content = RecordDict(
            {
                "arrays": ArrayRecord(torch_state_dict=update),
                "metrics": MetricRecord({"num-examples": count}),
            }
        )
        replies.append(Message(content, reply_to=Message(RecordDict(), node, MessageType.TRAIN)))
    theirs, _ = FedAvg(weighted_by_key="num-examples").aggregate_train(1, replies)
    assert theirs is not None
    ours = averaged(updates, SUBJECTS)
    for name, tensor in theirs.to_torch_state_dict().items():
        rounding = 1e-3 if name == "long" else 1e-6  # theirs sums in float32
        np.testing.assert_allclose(ours[name], tensor, rtol=0, atol=rounding)


def test_the_order_of_sites_matters_to_the_last_bits_of_the_change_only():
    since = random_weights(99)
    updates = [after_a_round(since, seed) for seed in range(len(SUBJECTS))]
    forwards = averaged(updates, SUBJECTS, since)
    backwards = averaged(updates[::-1], SUBJECTS[::-1], since)
    for name, tensor in forwards.items():
        torch.testing.assert_close(tensor, backwards[name], rtol=2.5e-7, atol=1e-9)


def test_a_small_site_is_not_lost_beside_a_large_one():
    """In fp32, 2**24 + 1 is 2**24: no sum of weights or of subjects may be kept in it."""
    since = {"w": torch.full((3,), 1.0)}
    large, small = {"w": torch.full((3,), 1.0)}, {"w": torch.full((3,), 1.0 + 2**-20)}
    result = averaged([large] + [small] * 1000, [2**24] + [1] * 1000, since)
    exact = (Fraction(2**24) + 1000 * (1 + Fraction(1, 2**20))) / (2**24 + 1000)
    assert float(result["w"][0]) == np.float32(float(exact))
    far = {"w": torch.full((3,), 2.0)}
    result = averaged([large, far], [10**7, 1], since)
    assert float(result["w"][0]) == np.float32(1 + 1 / (10**7 + 1))


def test_extreme_but_finite_values_stay_finite():
    largest = torch.finfo(torch.float32).max
    update = {"w": torch.tensor([largest, -largest])}
    since = {"w": torch.zeros(2)}
    assert torch.equal(averaged([update] * 23, SUBJECTS, since)["w"], update["w"])


def test_one_site_is_itself_and_equal_sites_are_unchanged():
    since = random_weights(99)
    update = after_a_round(since, 7)
    for result in (averaged([update], [3], since), averaged([update] * 5, [1, 2, 3, 4, 5], since)):
        for name, tensor in update.items():
            torch.testing.assert_close(result[name], tensor, rtol=0, atol=0)


def test_integers_are_exact_also_where_fp32_is_not():
    since = {"counter": torch.tensor(2**40)}
    updates = [{"counter": torch.tensor(2**40 + more)} for more in (1, 2, 4)]
    assert int(averaged(updates, [1, 1, 2], since)["counter"]) == 2**40 + 3  # 2.75
    assert int(averaged(updates[:2], [1, 1], since)["counter"]) == 2**40 + 2  # 1.5: to even


def test_updates_are_not_changed():
    """Also those already in float64, which need no conversion."""
    updates, again = ([random_weights(seed) for seed in range(3)] for _ in range(2))
    averaged(updates, [5, 6, 7])
    for update, before in zip(updates, again, strict=True):
        assert all(torch.equal(update[name], before[name]) for name in before)


@pytest.mark.parametrize("weight", [0, -1, float("nan")])
def test_a_weight_that_is_not_positive_is_refused(weight):
    with pytest.raises(ValueError, match="must be positive"):
        add(None, random_weights(0), weight, random_weights(1))


MEMORY = """
import json, resource, sys
import torch
from server.average import add, mean

PARTS, SIZE = 8, 262_144  # two million values, 8 MiB in float32

def update(seed):
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{i}": torch.randn(SIZE, generator=generator) for i in range(PARTS)}

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def average(sites):
    model, running = update(99), None
    for site in range(sites):
        running = add(running, update(site), 1 + site, model)
    return mean(running, model)

small = {"layer": torch.zeros(10)}
mean(add(None, small, 1, small), small)  # what torch loads on first use is not ours
peaks = [peak()]
for sites in (2, 23):
    average(sites)
    peaks.append(peak())
print(json.dumps(peaks))
"""


def test_memory_is_one_model_and_one_update_whatever_the_number_of_sites():
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}  # as in test_robust.py
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, env=environment
    )
    start, with_2, with_23 = json.loads(done.stdout)
    model = 8  # MiB
    assert with_2 - start < 3.5 * model  # the round's model: 1; mean change: 1; update: 1
    assert with_23 - with_2 < 0.5 * model


def test_the_moving_average_by_hand_and_counters_are_the_newest():
    average = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(5)}
    newest = {"w": torch.tensor([3.0, -2.0]), "n": torch.tensor(8)}
    result = moving(average, newest, 0.75)
    assert result["w"].tolist() == [1.5, 1.0]
    assert (result["w"].dtype, result["n"].dtype) == (torch.float32, torch.int64)
    assert int(result["n"]) == 8
    assert average["w"].tolist() == [1.0, 2.0], "both stay as they are"
    assert newest["w"].tolist() == [3.0, -2.0]
