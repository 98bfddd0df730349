from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import picture
from test_shards import parquet, webdataset

from personvit_hf.person_images import BrokenImage, PersonImages, load_person_images
from personvit_hf.shards import Piece, load_person_stream
from personvit_hf.streaming import EpochOrder, PersonStream, skip_batches, stream_loader

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("own_cache")


class NumberedImages:
    """Stands for ShardedImages: rows are their numbers."""

    name = "numbers"

    def __init__(self, sizes):
        starts = np.cumsum([0, *sizes])
        self.pieces = [
            Piece(0, i, int(start), int(start), size)
            for i, (start, size) in enumerate(zip(starts, sizes, strict=False))
        ]
        self.files = ["numbers"]

    def __len__(self):
        return sum(piece.num_rows for piece in self.pieces)

    def read(self, piece, start, stop):
        yield from range(piece.first_row + start, piece.first_row + stop)


class Numbers(PersonStream):
    """The order alone: lanes are asked in turn, as a DataLoader does."""

    def batches(self, epoch=0, first_batch=0):
        num_lanes = max(self.num_workers, 1)
        lanes = [
            iter([number for number, _ in self._rows(epoch, *self._part(worker, first_batch))])
            for worker in range(num_lanes)
        ]
        found = []
        for batch in range(self.num_batches - first_batch):
            found.append([next(lanes[batch % num_lanes]) for _ in range(self.batch_size)])
        assert all(next(lane, None) is None for lane in lanes)
        return found


streams = st.fixed_dictionaries(
    {
        "sizes": st.lists(st.integers(1, 30), min_size=1, max_size=12),
        "batch_size": st.integers(1, 5),
        "num_processes": st.integers(1, 4),
        "num_workers": st.integers(0, 4),
        "window_rows": st.integers(1, 20),
        "epoch": st.integers(0, 3),
    }
)


def numbers(case, process_index=0):
    return Numbers(
        NumberedImages(case["sizes"]),
        None,
        case["batch_size"],
        seed=3,
        process_index=process_index,
        **{name: case[name] for name in ("num_processes", "num_workers", "window_rows")},
    )


@settings(max_examples=150)
@given(streams, st.data())
def test_no_row_twice_and_none_lost_and_every_place_is_found_again(case, data):
    total, processes = sum(case["sizes"]), case["num_processes"]
    if total < case["batch_size"] * processes:
        with pytest.raises(ValueError, match="fewer than one batch"):
            numbers(case)
        return
    epochs = [numbers(case, process).batches(case["epoch"]) for process in range(processes)]
    assert len({len(batches) for batches in epochs}) == 1  # or one process would wait for ever
    seen = Counter(row for batches in epochs for batch in batches for row in batch)
    assert set(seen.values()) == {1} and set(seen) <= set(range(total))
    assert total - len(seen) < case["batch_size"] * processes
    first = data.draw(st.integers(0, len(epochs[0])))
    process = data.draw(st.integers(0, processes - 1))
    assert numbers(case, process).batches(case["epoch"], first) == epochs[process][first:]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(0, 5))
def test_an_epochs_order_is_a_permutation_of_its_own(sizes, epoch):
    pieces = NumberedImages(sizes).pieces
    total = sum(sizes)

    def order(epoch, start=0, stop=total):
        spans = EpochOrder(pieces, 0, epoch).between(start, stop)
        return [span.piece.first_row + row for span in spans for row in range(span.start, span.stop)]

    assert sorted(order(epoch)) == list(range(total))
    assert order(epoch) == order(epoch, 0, total // 3) + order(epoch, total // 3, total)
    if total > 100:
        assert order(epoch) != order(epoch + 1)


def test_neighbours_are_parted():
    """Rows of a batch come from all over the data, though pieces are read one after the other."""
    batches = Numbers(NumberedImages([50] * 40), None, 32, window_rows=500).batches()
    assert np.mean([len({row // 50 for row in batch}) for batch in batches]) > 8


def test_rows_left_over_are_others_in_each_epoch():
    stream = Numbers(NumberedImages([101]), None, 10)
    left = [set(range(101)) - {row for batch in stream.batches(epoch) for row in batch} for epoch in range(8)]
    assert all(len(rows) == 1 for rows in left) and len(set.union(*left)) > 4


def augment(image, rng):
    """Tells which picture and which random numbers it got."""
    return int(image.astype(np.int64).sum()), int(rng.integers(2**40))


@pytest.mark.parametrize("make", [webdataset, parquet])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_resumes_exactly(tmp_path, make, num_workers):
    images = load_person_stream(make(tmp_path / "in"))
    options = {"batch_size": 3, "num_workers": num_workers, "window_rows": 5}
    loader = stream_loader(PersonStream(images, augment, **options), list)
    assert len(loader) == 7
    epochs = []
    for epoch in range(2):  # the same workers
        loader.dataset.set_epoch(epoch)
        epochs.append(list(loader))
    assert [len(batches) for batches in epochs] == [7, 7] and epochs[0] != epochs[1]
    resumed = stream_loader(PersonStream(images, augment, **options), list)
    for batch in (2, 5, 7):
        resumed.dataset.set_position(1, batch)
        assert list(resumed) == epochs[1][batch:]
    resumed.dataset.set_epoch(0)
    assert list(resumed) == epochs[0]


def test_rows_and_randomness_are_those_of_the_table(tmp_path):
    folder = parquet(tmp_path / "in")
    stream = PersonStream(load_person_stream(folder), augment, 1, seed=5, window_rows=7)
    stream.set_epoch(2)
    table = PersonImages(load_person_images(folder))
    expected = [augment(table[row], np.random.default_rng([5, 2, row])) for row in range(len(table))]
    assert sorted(stream) == sorted(expected)


def test_broken_images_are_named_and_no_file_of_this_machine_is_read(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "here.jpg").write_bytes(picture())
    images = [{"bytes": b"", "path": "a.jpg"}, {"bytes": b"no image", "path": None}, None]
    images.append({"bytes": None, "path": str(tmp_path / "here.jpg")})
    schema = datasets.Features({"image": datasets.Image()}).arrow_schema
    pq.write_table(pa.Table.from_pydict({"image": images}, schema), tmp_path / "in" / "a.parquet")
    found = list(PersonStream(load_person_stream(tmp_path / "in"), augment, 1))
    assert all(isinstance(image, BrokenImage) for image in found)
    assert {image.name for image in found} == {"row 0 (a.jpg)", "row 1", "row 2", f"row 3 ({tmp_path}/here.jpg)"}


def test_state_of_another_order_is_refused(tmp_path):
    images = load_person_stream(parquet(tmp_path / "in"))
    state = PersonStream(images, augment, 3).state_dict()
    PersonStream(images, augment, 3).load_state_dict(state)
    for change in ({"batch_size": 4}, {"seed": 1}, {"num_workers": 2}, {"window_rows": 9}, {"num_processes": 2}):
        with pytest.raises(ValueError, match=next(iter(change))):
            PersonStream(images, augment, **{"batch_size": 3, **change}).load_state_dict(state)


def test_bad_numbers(tmp_path):
    images = load_person_stream(parquet(tmp_path / "in"))
    for name in ("batch_size", "window_rows"):
        with pytest.raises(ValueError, match=f"`{name}` must be 1 or more"):
            PersonStream(images, augment, **{"batch_size": 2, name: 0})
    with pytest.raises(ValueError, match="has 23 images, fewer than one batch of 12 for each of the 2 processes"):
        PersonStream(images, augment, 12, num_processes=2)
    stream = PersonStream(images, augment, 4)
    with pytest.raises(ValueError, match="between 0 and 5"):
        stream.set_position(0, 6)
    stream.num_workers = 3
    with pytest.raises(ValueError, match="of the stream is 3, of its DataLoader 1"):
        next(iter(stream))


def test_a_prepared_loader_passes_through_accelerate(tmp_path):
    images = load_person_stream(parquet(tmp_path / "in"))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        accelerator = Accelerator(cpu=True)
        loader = stream_loader(PersonStream(images, augment, 3), list, accelerator)
        assert accelerator.prepare(loader) is loader
        loader.set_epoch(1)
        whole = list(loader)
        assert len(whole) == len(loader) == 7
        loader.set_epoch(1)
        assert list(skip_batches(accelerator, loader, 1, 4)) == whole[4:]
        loader.set_epoch(2)
        assert len(list(skip_batches(accelerator, loader, 2, 0))) == 7
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
