"""Index samplers whose order is a pure function of seed and epoch, whatever the number of processes and workers.

Both yield *keys*: `key = epoch * num_samples + index`. A data set gets both back by `epoch, index = divmod(key,
num_samples)`, so its random draws can depend on the epoch even in persistent workers, which hold an old copy of it.

A loader prepared by Accelerate sets its sampler's epoch whenever it is iterated, so there it is the loader's own
`set_epoch` that counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

# How many epochs on the key of an image is that stands a second time in a batch; more than any run has.
REPEATED = 2**20


class EpochSampler(Sampler[int]):
    """Every sample once an epoch, in an order of that epoch's own.

    Args:
        num_samples: Length of the data set.
        seed: Seed of the order.
        shuffle: False for the order of the data set.

    Raises:
        ValueError: If `num_samples` is below 1.
    """

    def __init__(self, num_samples: int, seed: int = 0, shuffle: bool = True) -> None:
        if num_samples < 1:
            raise ValueError(f"`num_samples` must be at least 1; got {num_samples}: the data set is empty.")
        self.num_samples = num_samples
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0; call it before each pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        order = np.arange(self.num_samples)
        if self.shuffle:
            np.random.default_rng([self.seed, self.epoch]).shuffle(order)
        yield from (self.epoch * self.num_samples + order).tolist()


class PKSampler(Sampler[int]):
    """Runs of P identities with K images each, for losses that compare images within a batch.

    Use it as `DataLoader(sampler=..., batch_size=P * K, drop_last=True)`: each batch is then one run, and Accelerate
    deals whole batches out to its processes. (A custom batch sampler would not be re-seeded by Accelerate.)

    An identity's images are shuffled and cut into groups of K; what is left over waits for another epoch, and one with
    fewer than K images repeats some, after showing each; a repeated one has the key of a far later epoch (`REPEATED`),
    so that its random draws are others. Identities for a batch are drawn at random from those with groups left. The
    epoch ends when these are fewer than P, so its length differs a little from epoch to epoch.

    Args:
        labels: Identity of each sample; any integers.
        num_identities: P.
        images_per_identity: K.
        seed: Seed of all draws.

    Raises:
        ValueError: If P or K is below 1, or `labels` hold fewer than P identities.

    Source: Hermans et al., arXiv 1703.07737, section 2; `RandomIdentitySampler` of PersonViT, `datasets/sampler.py`.
    """

    def __init__(self, labels: Sequence[int], num_identities: int, images_per_identity: int, seed: int = 0) -> None:
        if num_identities < 1 or images_per_identity < 1:
            raise ValueError(
                "`num_identities` and `images_per_identity` must be at least 1; got "
                f"{num_identities} and {images_per_identity}."
            )
        identities, first = np.unique(np.sort(labels), return_index=True)
        if len(identities) < num_identities:
            raise ValueError(
                f"`labels` hold {len(identities)} identities, and a batch needs {num_identities} different ones: "
                "lower `num_identities` or give more data."
            )
        self.num_samples = len(labels)
        self.num_identities = num_identities
        self.images_per_identity = images_per_identity
        self.seed = seed
        self._members = np.split(np.argsort(labels, kind="stable"), first[1:])
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, and draw its batches; call it before each pass."""
        self.epoch = epoch
        self._order = self._draw(np.random.default_rng([self.seed, epoch]))

    def __len__(self) -> int:
        """Number of samples in the chosen epoch, a multiple of P * K."""
        return len(self._order)

    def __iter__(self) -> Iterator[int]:
        yield from (self.epoch * self.num_samples + self._order).tolist()

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        k = self.images_per_identity
        groups = []
        for members in self._members:
            shuffled = rng.permutation(members)
            kept = max(len(shuffled) // k, 1) * k
            repetition = np.arange(kept) // len(shuffled)
            keys = np.resize(shuffled, kept) + REPEATED * self.num_samples * repetition
            groups.append(keys.reshape(-1, k))
        remaining = np.array([len(g) for g in groups])
        order = []
        while len(available := np.flatnonzero(remaining)) >= self.num_identities:
            chosen = rng.choice(available, self.num_identities, replace=False)
            remaining[chosen] -= 1
            order.extend(groups[identity][remaining[identity]] for identity in chosen)
        return np.concatenate(order)
