from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from personvit_hf.sampling import REPEATED, EpochSampler, PKSampler

FIXTURE = json.loads((Path(__file__).parent / "golden" / "identity_sampler.json").read_text())
LABELS = FIXTURE["pids"]
K = FIXTURE["config"]["k"]
P = FIXTURE["config"]["batch"] // K


class Keys(Dataset):
    """Gives back the key that it is asked for."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, key):
        return key


def shard(sampler, process, num_processes=2, **kwargs):
    loader = DataLoader(Keys(sampler.num_samples), sampler=sampler, drop_last=True, **kwargs)
    return prepare_data_loader(loader, num_processes=num_processes, process_index=process, put_on_device=False)


def batches(loader):
    return [batch.tolist() for batch in loader]


@given(n=st.integers(1, 200), seed=st.integers(0, 2**32), epoch=st.integers(0, 10**6))
def test_an_epoch_is_a_permutation_of_keys(n, seed, epoch):
    sampler = EpochSampler(n, seed)
    sampler.set_epoch(epoch)
    keys = list(sampler)
    assert sorted(keys) == [epoch * n + index for index in range(n)]
    assert len(sampler) == n and type(keys[0]) is int
    again = EpochSampler(n, seed)
    again.set_epoch(epoch)
    assert list(again) == keys


def test_the_order_depends_on_seed_and_epoch():
    def order(seed, epoch, shuffle=True):
        sampler = EpochSampler(50, seed, shuffle)
        sampler.set_epoch(epoch)
        return [key % 50 for key in sampler]

    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert order(0, 2, shuffle=False) == list(range(50))


def test_epoch_sampler_on_two_processes_with_persistent_workers():
    sampler = EpochSampler(24, seed=1)
    loaders = [shard(sampler, process, batch_size=4, num_workers=1, persistent_workers=True) for process in (0, 1)]
    orders = []
    for epoch in (0, 1):
        for loader in loaders:
            loader.set_epoch(epoch)
        keys = np.concatenate([batches(loader) for loader in loaders]).ravel()
        assert sorted(keys) == list(range(epoch * 24, (epoch + 1) * 24))
        orders.append(tuple(keys % 24))
    assert orders[0] != orders[1]


def check_batches(keys, epoch, labels, p, k):
    """Every run of p * k keys holds p identities with k images; returns the indices."""
    epochs, indices = np.divmod(np.array(keys), len(labels))
    assert np.all(epochs % REPEATED == epoch)
    assert len(keys) % (p * k) == 0
    for run in np.asarray(labels)[indices].reshape(-1, p, k):
        assert (run == run[:, :1]).all()
        assert len(set(run[:, 0])) == p
    return indices


@pytest.mark.parametrize("seed", FIXTURE["config"]["seeds"])
@pytest.mark.parametrize("epoch", [0, 3])
def test_properties_of_the_reference(seed, epoch):
    check_batches(FIXTURE["indices_by_seed"][str(seed)], 0, LABELS, P, K)  # the properties hold for its own list
    sampler = PKSampler(LABELS, P, K, seed)
    sampler.set_epoch(epoch)
    keys = list(sampler)
    assert len(sampler) == len(keys) and type(keys[0]) is int
    indices = check_batches(keys, epoch, LABELS, P, K)
    images = Counter(LABELS)
    drawn = Counter(np.asarray(LABELS)[indices].tolist())
    assert all(count <= max(images[label] // K, 1) * K for label, count in drawn.items())  # remainders are dropped
    unfinished = [label for label in images if drawn[label] < max(images[label] // K, 1) * K]
    assert len(unfinished) < P  # the epoch ends only when fewer than P identities are left


@given(
    labels=st.lists(st.integers(-3, 9), min_size=1, max_size=80),
    p=st.integers(1, 5),
    k=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_images_repeat_only_where_an_identity_has_too_few(labels, p, k, seed):
    if len(set(labels)) < p:
        with pytest.raises(ValueError, match=f"hold {len(set(labels))} identities, and a batch needs {p}"):
            PKSampler(labels, p, k, seed)
        return
    sampler = PKSampler(labels, p, k, seed)
    indices = check_batches(list(sampler), 0, labels, p, k)
    assert len(set(sampler)) == len(sampler)  # a repeated image has another key, so that it is drawn anew
    images = Counter(labels)
    for index, times in Counter(indices.tolist()).items():
        least, rest = divmod(k, images[labels[index]])
        assert times in ({least, least + bool(rest)} if images[labels[index]] < k else {1})


@pytest.mark.parametrize("epoch", [0, 1])
def test_pk_batches_on_two_processes(epoch):
    labels = np.repeat(np.arange(9), 12)  # without repeats, so that disjoint batches share no image
    sampler = PKSampler(labels, P, K, seed=5)
    parts = []
    for process in (0, 1):
        loader = shard(sampler, process, batch_size=P * K)
        loader.set_epoch(epoch)
        parts.append(batches(loader))
        assert len(loader) == len(parts[-1])
    assert len(parts[0]) == len(parts[1]) == len(sampler) // (2 * P * K) > 0
    for part in parts:
        for batch in part:
            check_batches(batch, epoch, labels, P, K)
    everything = np.concatenate(parts).ravel()
    assert len(set(everything)) == len(everything)


def test_set_epoch_of_a_prepared_loader_reshuffles_and_resumes():
    sampler = PKSampler(LABELS, P, K)
    loader = shard(sampler, 1, batch_size=P * K)
    orders = []
    for epoch in (0, 1, 2):
        loader.set_epoch(epoch)
        orders.append(batches(loader))
    assert len({tuple(np.array(order[0]) % len(LABELS)) for order in orders}) == 3
    loader.set_epoch(1)
    assert batches(skip_first_batches(loader, 1)) == orders[1][1:]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EpochSampler(0), "`num_samples` must be at least 1; got 0"),
        (lambda: PKSampler([], 1, 1), "hold 0 identities"),
        (lambda: PKSampler([1, 2, 2], 3, 2), "hold 2 identities, and a batch needs 3"),
        (lambda: PKSampler([1, 2, 2], 2, 0), "`images_per_identity` must be at least 1; got 2 and 0"),
        (lambda: PKSampler([1, 2, 2], 0, 2), "`images_per_identity` must be at least 1; got 0 and 2"),
    ],
)
def test_bad_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
