"""The streamed mean is the weighted mean, in every type, and costs no more memory for more sites."""

from __future__ import annotations

import json
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
from server.average import WeightedSum, add, mean, moving

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


def averaged(updates: list[Weights], counts: list[int]) -> Weights:
    running: WeightedSum | None = None
    for update, count in zip(updates, counts, strict=True):
        running = add(running, update, count)
    assert running is not None
    return mean(running, like=updates[0])


def test_it_is_the_float64_weighted_mean():
    updates = [random_weights(seed) for seed in range(len(SUBJECTS))]
    result = averaged(updates, SUBJECTS)
    assert list(result) == list(updates[0])
    for name, tensor in result.items():
        assert tensor.dtype == updates[0][name].dtype, name
        assert tensor.shape == updates[0][name].shape, name
        stacked = np.stack([update[name].numpy().astype(np.float64) for update in updates])
        exact = np.average(stacked, axis=0, weights=SUBJECTS)
        if tensor.dtype.is_floating_point:
            rounding = torch.finfo(tensor.dtype).eps
            np.testing.assert_allclose(tensor.double(), exact, rtol=rounding, atol=1e-9)
        else:
            np.testing.assert_array_equal(tensor, np.rint(exact))


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


def test_the_order_of_sites_matters_to_the_last_bit_of_float64_only():
    updates = [random_weights(seed) for seed in range(len(SUBJECTS))]
    forwards, backwards = averaged(updates, SUBJECTS), averaged(updates[::-1], SUBJECTS[::-1])
    for name, tensor in forwards.items():
        torch.testing.assert_close(tensor, backwards[name], rtol=2e-7, atol=1e-9)


def test_a_small_site_is_not_lost_beside_a_large_one():
    """In fp32, 2**24 + 1 is 2**24: the sum must not be kept in it."""
    large, small = {"w": torch.full((3,), 1.0)}, {"w": torch.full((3,), 1.0 + 2**-20)}
    result = averaged([large] + [small] * 1000, [2**24] + [1] * 1000)
    exact = (Fraction(2**24) + 1000 * (1 + Fraction(1, 2**20))) / (2**24 + 1000)
    assert float(result["w"][0]) == np.float32(float(exact))


def test_extreme_but_finite_values_stay_finite():
    largest = torch.finfo(torch.float32).max
    update = {"w": torch.tensor([largest, -largest])}
    assert torch.equal(averaged([update] * 23, SUBJECTS)["w"], update["w"])


def test_one_site_is_itself_and_equal_sites_are_unchanged():
    update = random_weights(7)
    for result in (averaged([update], [3]), averaged([update] * 5, [1, 2, 3, 4, 5])):
        for name, tensor in update.items():
            torch.testing.assert_close(result[name], tensor, rtol=0, atol=0)


def test_updates_are_not_changed():
    """Also those already in float64, which need no conversion."""
    updates, again = ([random_weights(seed) for seed in range(3)] for _ in range(2))
    averaged(updates, [5, 6, 7])
    for update, before in zip(updates, again, strict=True):
        assert all(torch.equal(update[name], before[name]) for name in before)


@pytest.mark.parametrize("weight", [0, -1, float("nan")])
def test_a_weight_that_is_not_positive_is_refused(weight):
    with pytest.raises(ValueError, match="must be positive"):
        add(None, random_weights(0), weight)


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
    running = None
    for site in range(sites):
        running = add(running, update(site), 1 + site)
    return mean(running, update(0))

small = {"layer": torch.zeros(10)}
mean(add(None, small, 1), small)  # what torch loads on first use is not ours
peaks = [peak()]
for sites in (2, 23):
    average(sites)
    peaks.append(peak())
print(json.dumps(peaks))
"""


def test_memory_is_the_running_sum_and_one_update_whatever_the_number_of_sites():
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
    )
    start, with_2, with_23 = json.loads(done.stdout)
    model = 8  # MiB
    assert with_2 - start < 4.5 * model  # sum in float64: 2 models; update: 1; mean: 1
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
