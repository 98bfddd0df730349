"""Pre-training data that are read as a stream: parquet or WebDataset shards, here, on the Hub or behind https.

`datasets` streams the shards. An epoch's order follows from seed and epoch alone: pieces of the data (row groups of
parquet files, whole tar files) are put in a random order, the rows of this order are dealt out in equal runs to
processes and workers, and each worker mixes what it reads in windows. So every position of the order can be found
again by arithmetic. A resumed run reads on from there, without a buffer to save and without decoding what it skips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .person_images import BrokenImage, decode_image
from .shards import Piece, ShardedImages

WINDOW_ROWS = 4096  # some 40 MB of person crops


@dataclass(frozen=True)
class Span:
    """Rows `start` to `stop` of a piece."""

    piece: Piece
    start: int
    stop: int


class EpochOrder:
    """The rows of an epoch, in an order that follows from seed and epoch: pieces at random, from a random row on.

    Args:
        pieces: Of the data set.
        seed: Seed of the order.
        epoch: From 0.
    """

    def __init__(self, pieces: list[Piece], seed: int, epoch: int) -> None:
        rng = np.random.default_rng([seed, epoch])
        order = [pieces[i] for i in rng.permutation(len(pieces))]
        # rows that fill no batch are left out at the end, so it must be another end in each epoch
        cut = int(rng.integers(order[0].num_rows))
        self.spans = [Span(order[0], cut, order[0].num_rows)]
        self.spans += [Span(piece, 0, piece.num_rows) for piece in order[1:]]
        if cut:
            self.spans.append(Span(order[0], 0, cut))
        self._ends = np.cumsum([span.stop - span.start for span in self.spans])

    def between(self, start: int, stop: int) -> list[Span]:
        """The rows at positions `start` to `stop` of the order."""
        found = []
        index = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            span = self.spans[index]
            offset = start - (int(self._ends[index]) - (span.stop - span.start))
            count = min(span.stop - span.start - offset, stop - start)
            found.append(Span(span.piece, span.start + offset, span.start + offset + count))
            start, index = start + count, index + 1
        return found


class PersonStream(IterableDataset):
    """A stream of augmented images; `stream_loader` makes batches of it.

    In an epoch of T rows each of P processes takes T // (P * batch_size) batches, and no row twice; the rows that are
    left over, fewer than P batches, are others in each epoch. What is drawn for a row depends on seed, epoch and the
    row's number alone, as in `examples/pretrain.py` without streaming.

    Args:
        images: The shards.
        augment: Makes an item of a picture, uint8 (height, width, 3) RGB, and a source of randomness.
        batch_size: Images a batch of a process.
        seed: Seed of order and augmentation.
        num_workers: Workers of the DataLoader; the order depends on them.
        window_rows: So many rows, encoded, each worker holds and mixes.
        process_index: Which process this is ...
        num_processes: ... of how many.

    Raises:
        ValueError: A number is below 1, or there are too few rows for one batch a process.
    """

    def __init__(
        self,
        images: ShardedImages,
        augment: Callable[[np.ndarray, np.random.Generator], Any],
        batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
        window_rows: int = WINDOW_ROWS,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("window_rows", window_rows)):
            if value < 1:
                raise ValueError(f"`{name}` must be 1 or more; got {value}.")
        self.images, self.augment = images, augment
        self.batch_size, self.seed, self.window_rows = batch_size, seed, window_rows
        self.num_workers, self.process_index, self.num_processes = num_workers, process_index, num_processes
        self.num_batches = len(images) // (batch_size * num_processes)
        if not self.num_batches:
            raise ValueError(
                f"{images.name} has {len(images)} images, fewer than one batch of {batch_size} for each of the "
                f"{num_processes} processes: lower `batch_size`."
            )
        # epoch and first batch; shared, so that workers that live for several epochs see it change
        self._position = torch.zeros(2, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        """Number of items in an epoch of this process."""
        return self.num_batches * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0; another than before is read from its beginning."""
        if epoch != self._position[0]:
            self.set_position(epoch, 0)

    def set_position(self, epoch: int, batch: int) -> None:
        """Choose the epoch and the number of its batches, of this process, to leave out; before iterating.

        Raises:
            ValueError: The epoch has fewer batches.
        """
        if not 0 <= batch <= self.num_batches:
            raise ValueError(
                f"`batch` must be between 0 and {self.num_batches}, the batches of an epoch; got {batch}."
            )
        self._position[0], self._position[1] = epoch, batch

    def state_dict(self) -> dict[str, Any]:
        """What the order follows from, for a checkpoint; the position in it is epoch and batch, for `set_position`."""
        return {
            "images": len(self.images),
            "shards": len(self.images.files),
            "pieces": len(self.images.pieces),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "num_processes": self.num_processes,
            "window_rows": self.window_rows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Checks that a checkpoint's order is this one's.

        Raises:
            ValueError: It is another, so that going on would show some images twice and others not at all.
        """
        other = [
            f"{name} {state.get(name)} (now {now})"
            for name, now in self.state_dict().items()
            if state.get(name) != now
        ]
        if other:
            raise ValueError(f"{self.images.name}: the checkpoint was made with {', '.join(other)}, in another order.")

    def __iter__(self) -> Iterator[Any]:
        """Items of the batches that this worker makes; a broken image comes as a `BrokenImage`."""
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        if num_workers != max(self.num_workers, 1):
            raise ValueError(f"`num_workers` of the stream is {self.num_workers}, of its DataLoader {num_workers}.")
        epoch, first_batch = self._position.tolist()
        for number, image in self._rows(epoch, *self._part(worker, first_batch)):
            name = f"row {number} ({image['path']})" if image and image["path"] else f"row {number}"
            try:  # never by its path: a stream from elsewhere has no business with files of this machine
                pixels = decode_image({"bytes": image and image["bytes"], "path": None}, name)
            except ValueError as error:
                yield BrokenImage(name, str(error))
                continue
            yield self.augment(pixels, np.random.default_rng([self.seed, epoch, number]))

    def _part(self, worker: int, first_batch: int) -> tuple[int, int, int, int]:
        """A worker's lane, the positions where it starts and stops, and how many of them to leave out."""
        # A loader asks its workers in turn, so batch b is lane b % num_workers's, also after a resume.
        num_lanes = max(self.num_workers, 1)
        lane = (worker + first_batch) % num_lanes
        batches, more = divmod(self.num_batches, num_lanes)
        start = self.process_index * self.num_batches + lane * batches + min(lane, more)
        stop = start + batches + (lane < more)
        skipped = max(0, -(-(first_batch - lane) // num_lanes))
        return lane, start * self.batch_size, stop * self.batch_size, skipped * self.batch_size

    def _rows(self, epoch: int, lane: int, start: int, stop: int, skipped: int) -> Iterator[tuple[int, Any]]:
        """(number of the row, encoded image) at positions `start` to `stop` of the order, mixed window by window."""
        window, within = divmod(skipped, self.window_rows)
        order = EpochOrder(self.images.pieces, self.seed, epoch)
        rows = (
            (span.piece.first_row + row, image)
            for span in order.between(start + window * self.window_rows, stop)
            for row, image in enumerate(self.images.read(span.piece, span.start, span.stop), start=span.start)
        )
        while held := list(islice(rows, self.window_rows)):
            mix = np.random.default_rng([self.seed, epoch, self.process_index, lane, window]).permutation(len(held))
            for index in mix[within:]:
                yield held[index]
                held[index] = None  # let go, before the next window is read
            window, within = window + 1, 0


def stream_loader(
    stream: PersonStream,
    collate_fn: Callable[[list[Any]], Any],
    accelerator: Accelerator | None = None,
    **options: Any,
) -> DataLoader:
    """A DataLoader of a stream, which needs no `accelerator.prepare` (and passes through it unchanged).

    Accelerate would let each process read the whole stream, or one process read for all; this one is parted already.

    Args:
        stream: The stream.
        collate_fn: Makes a batch of items.
        accelerator: Of the run, for the device of the batches; None for an ordinary loader.
        options: Go to DataLoader.
    """
    loader = DataLoader(
        stream,
        batch_size=stream.batch_size,
        collate_fn=collate_fn,
        num_workers=stream.num_workers,
        persistent_workers=stream.num_workers > 0,
        **options,
    )
    if accelerator is None:
        return loader
    prepared = prepare_data_loader(
        loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    )
    prepared._is_accelerate_prepared = True  # what `accelerator.prepare` asks
    return prepared


def skip_batches(accelerator: Accelerator, loader: DataLoader, epoch: int, num_batches: int) -> DataLoader:
    """The rest of an epoch after some batches, as `accelerator.skip_first_batches`; a stream reads none of them."""
    if isinstance(loader.dataset, PersonStream):
        loader.dataset.set_position(epoch, num_batches)
        return loader
    if not num_batches:
        return loader
    rest = accelerator.skip_first_batches(loader, num_batches)
    rest.set_epoch(epoch)  # a new loader, which before accelerate 1.15 would begin with the first epoch's order
    return rest
