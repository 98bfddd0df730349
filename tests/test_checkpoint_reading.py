"""Files of weights, whole, damaged and hostile. All randomness is seeded."""

from __future__ import annotations

import argparse
import io
import os
import random
import subprocess
import sys
import tarfile
import time
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_fixtures import GOLDEN, load_official, under
from hostile_checkpoints import HOSTILE, saved
from hypothesis import given, settings
from hypothesis import strategies as st

from personvit_hf.checkpoint_reading import read_checkpoint
from personvit_hf.conversion import convert_checkpoint, convert_with_report, save_conversion

FORMATS = ["zip", "legacy", "safetensors"]


def backbone() -> dict[str, torch.Tensor]:
    return under(load_official("official_personvit_pretrain")["teacher"], "backbone.")


def assert_equal(actual: Any, expected: Any) -> None:
    """The same values; a set comes as a list, and OrderedDict as dict."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(actual, torch.Tensor) and actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert isinstance(actual, dict) and list(actual) == list(expected)
        for key, value in expected.items():
            assert_equal(actual[key], value)
    elif isinstance(expected, list | tuple | set):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, argparse.Namespace):
        assert type(actual) is argparse.Namespace
        assert_equal(vars(actual), vars(expected))
    else:
        assert type(actual) is type(expected) and actual == expected


# Whole files


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("file_format", ["zip", "legacy"])
@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.pth")))
def test_official_files_are_read_as_torch_reads_them(tmp_path, name, file_format, protocol):
    expected = load_official(name)
    (tmp_path / "file").write_bytes(saved(expected, file_format, protocol))
    assert_equal(read_checkpoint(tmp_path / "file"), expected)
    assert_equal(read_checkpoint(GOLDEN / f"{name}.pth"), expected)


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
DTYPES += [torch.int8, torch.uint8, torch.bool]


def numbered(shape: list[int], dtype: torch.dtype, transposed: bool) -> torch.Tensor:
    tensor = torch.arange(float(torch.Size(shape).numel())).reshape(shape).to(dtype)
    return tensor.permute(list(range(len(shape)))[::-1]) if transposed else tensor


tensors = st.builds(numbered, st.lists(st.integers(0, 4), max_size=4), st.sampled_from(DTYPES), st.booleans())
leaves = st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats(allow_nan=False) | st.text() | tensors
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abc.", max_size=3), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text("abcdef._0", max_size=5), values, max_size=4), st.sampled_from(["zip", "legacy"]))
def test_whatever_torch_saves_is_read_back(tmp_path_factory, contents, file_format):
    path = tmp_path_factory.mktemp("any") / "file.pth"
    path.write_bytes(saved(contents, file_format))
    assert_equal(read_checkpoint(path), contents)


def test_what_training_runs_keep_beside_the_weights(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    shared = torch.rand(6, 2)
    contents = {
        "model": model.state_dict(),
        "parameters": dict(model.named_parameters()),
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=0.1, names=["a"], nested=argparse.Namespace(size=(1, 2)), choices={3}),
        "ordered": OrderedDict(b=1, a=2),
        "tied": [shared, shared, shared.t(), shared[2:, 1]],
    }
    for file_format in ("zip", "legacy"):
        (tmp_path / "file").write_bytes(saved(contents, file_format))
        assert_equal(read_checkpoint(tmp_path / "file"), contents)


def test_contents_tell_the_format_not_the_name(tmp_path):
    for file_format in FORMATS:
        for name in ("file.pth", "file.safetensors", "file"):
            (tmp_path / name).write_bytes(saved(backbone(), file_format))
            assert_equal(dict(sorted(read_checkpoint(tmp_path / name).items())), dict(sorted(backbone().items())))


# Hostile files


class RunsCode:
    """What unpickling would turn into a call that makes a folder."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("file_format", ["zip", "legacy"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, file_format):
    contents = load_official("official_personvit_pretrain") | {"args": RunsCode(str(tmp_path / "ran"))}
    (tmp_path / "file.pth").write_bytes(saved(contents, file_format))
    with pytest.raises(ValueError, match="file.pth.*read safely.*mkdir"):
        convert_checkpoint(tmp_path / "file.pth", num_attention_heads=3)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "file.pth", weights_only=False)  # the trap works
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path, name):
    contents, message = HOSTILE[name]
    path = tmp_path / "file.pth"
    path.write_bytes(contents)
    started = time.monotonic()
    with pytest.raises(ValueError, match=f"file.pth.*{message}") as error:
        convert_checkpoint(path, num_attention_heads=2)
    assert time.monotonic() - started < 10
    assert str(error.value).isprintable()


@pytest.mark.slow
def test_hostile_files_take_no_memory(tmp_path):
    """All of them in a process that may take one gigabyte more than it has after its imports."""
    for index, (contents, _) in enumerate(HOSTILE.values()):
        (tmp_path / f"{index}.pth").write_bytes(contents)
    code = """
import resource, sys
from pathlib import Path
from personvit_hf.checkpoint_reading import read_checkpoint
status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
limit = int(status["VmSize"].split()[0]) * 1024 + 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        read_checkpoint(path)
    except ValueError as error:
        assert "MemoryError" not in str(error) and "allocate" not in str(error), error
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_tensors_that_repeat_each_other_are_refused(tmp_path):
    numbers = torch.zeros(2**16)
    contents = {f"w{index}": numbers[:60000] for index in range(400)}  # 100 MB of a file of 300 KB
    (tmp_path / "file.pth").write_bytes(saved(contents))
    with pytest.raises(ValueError, match="repeat each other"):
        read_checkpoint(tmp_path / "file.pth")


def test_tar_files_are_refused(tmp_path):
    with tarfile.open(tmp_path / "file.pth.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("../../storages"))
    with pytest.raises(ValueError, match="tar format of torch before 0.2"):
        read_checkpoint(tmp_path / "file.pth.tar")


def test_two_records_of_one_name_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "file.pth", "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("file/data.pkl", b"\x80\x02}.")
        archive.writestr("file/data.pkl", b"\x80\x02}.")
    with pytest.raises(ValueError, match="same name"):
        read_checkpoint(tmp_path / "file.pth")


# Damaged files


@pytest.mark.parametrize("file_format", FORMATS)
def test_truncated_files_are_refused(tmp_path, file_format):
    path = tmp_path / "file.pth"
    whole = saved({name: value for name, value in backbone().items() if "blocks" not in name}, file_format)
    for length in (*range(0, 200, 7), *range(200, len(whole), len(whole) // 50)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=path.name):
            convert_checkpoint(path, num_attention_heads=3)


def with_flipped_bits(whole: bytes, rng: random.Random) -> bytes:
    """One to eight bits flipped, half of the time among the first bytes, where the structure is."""
    damaged = bytearray(whole)
    end = rng.choice([len(whole), min(len(whole), 3000)])
    for _ in range(rng.choice([1, 1, 2, 8])):
        damaged[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def with_changed_pickle(whole: bytes, rng: random.Random) -> bytes:
    """Changes in the pickle alone, with checksums that are right again."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as before, zipfile.ZipFile(buffer, "w") as after:
        for record in before.infolist():
            contents = bytearray(before.read(record))
            if record.filename.endswith("data.pkl"):
                for _ in range(rng.choice([1, 1, 3])):
                    place, other = rng.randrange(len(contents)), rng.randrange(len(contents))
                    match rng.randrange(4):
                        case 0:
                            contents[place] = rng.randrange(256)
                        case 1:
                            del contents[place : place + rng.randrange(1, 20)]
                        case 2:
                            contents[place:place] = contents[other : other + rng.randrange(1, 40)]
                        case 3:
                            contents[place : place + 4] = rng.choice([b"\xff\xff\xff\x7f", b"\xff" * 4, b"\0" * 4])
            after.writestr(record.filename, bytes(contents))
    return buffer.getvalue()


def with_other_tensors(weights: dict[str, torch.Tensor], rng: random.Random) -> dict[str, Any]:
    """One weight of another shape, type or name, or two in each other's place."""
    weights = dict(weights)
    name, other = rng.sample(sorted(weights), 2)
    value = weights[name]
    match rng.randrange(8):
        case 0:
            weights[name] = value.reshape(-1)
        case 1:
            weights[name] = value.transpose(0, -1) if value.ndim else value[None]
        case 2:
            weights[name], weights[other] = weights[other], weights[name]
        case 3:
            weights[name] = value.new_zeros([rng.choice([0, 1, 2, 3, 64]) for _ in range(rng.randrange(5))])
        case 4:
            del weights[name]
        case 5:
            weights[other + rng.choice(["x", ".weight", "\x1b[31m"])] = value
        case 6:
            weights[name] = value.to(rng.choice([torch.int32, torch.float64, torch.bool, torch.complex64]))
        case 7:
            weights[name] = rng.choice([None, 3, "text", [value], {"a": value}, float("nan") * value])
    return weights


def mutated_files() -> Iterator[tuple[str, bytes, bytes | None]]:
    """(kind, file, the file it was made of if a checksum guards its contents)."""
    rng = random.Random(20240611)
    small, reid = backbone(), load_official("official_personvit_reid_sie")
    files = {file_format: saved(small, file_format) for file_format in FORMATS}
    files |= {"pretraining": (GOLDEN / "official_personvit_pretrain.pth").read_bytes(), "reid": saved(reid)}
    files |= {"pass": (GOLDEN / "official_pass_pretrain.pth").read_bytes()}
    for name, whole in files.items():
        guarded = None if name in ("legacy", "safetensors") else whole
        for _ in range(12):
            yield f"{name}, bits flipped", with_flipped_bits(whole, rng), guarded
        for _ in range(6):
            yield f"{name}, truncated", whole[: rng.randrange(len(whole))], None
        if guarded:
            for _ in range(20):
                yield f"{name}, pickle changed", with_changed_pickle(whole, rng), None
    for weights in (small, reid, load_official("official_transreid_ssl_ics")):
        for _ in range(20):
            changed = with_other_tensors(weights, rng)
            yield "tensors changed", saved(changed, rng.choice(["zip", "legacy"])), None


def test_hundreds_of_mutated_files_end_in_an_error_or_a_correct_load(tmp_path):
    outcomes = {"refused": 0, "loaded": 0}
    path = tmp_path / "file.pth"
    for index, (kind, contents, guarded) in enumerate(mutated_files()):
        path.write_bytes(contents)
        output, started = tmp_path / "output" / str(index), time.monotonic()
        try:
            conversion = convert_with_report(path, num_attention_heads=(2, 3)[index % 2])
            save_conversion(conversion, output)
        except ValueError as error:
            outcomes["refused"] += 1
            assert str(path) in str(error) and str(error).replace("\n", "").isprintable(), kind
            assert not output.exists() and not list(tmp_path.glob("output/.*")), kind
        else:
            outcomes["loaded"] += 1
            assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= set(os.listdir(output)), kind
            assert all(value.isfinite().all() for value in conversion.model.state_dict().values()), kind
            if guarded:  # what was flipped is not part of the contents
                loaded = read_checkpoint(path)
                path.write_bytes(guarded)
                assert_equal(loaded, read_checkpoint(path))
        assert time.monotonic() - started < 10, kind
    assert sum(outcomes.values()) >= 200 and min(outcomes.values()) > 5


def test_a_folder_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    conversion = convert_with_report(GOLDEN / "official_personvit_reid.pth", num_attention_heads=5)
    output = tmp_path / "output"

    def fails(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(conversion.image_processor), "save_pretrained", fails)
        with pytest.raises(OSError, match="no space"):
            save_conversion(conversion, output)
    assert list(tmp_path.iterdir()) == []
    save_conversion(conversion, output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(type(conversion.model), "save_pretrained", fails)
        with pytest.raises(OSError, match="no space"):
            save_conversion(conversion, output)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        save_conversion(conversion, tmp_path / "file")
    (output / "arguments.yaml").write_text("epochs: 1\n")
    with pytest.raises(FileExistsError, match="output holds a run of training"):
        save_conversion(conversion, output)


def test_safetensors_of_any_names(tmp_path):
    (tmp_path / "file.safetensors").write_bytes(saved({"a\x1bb": torch.zeros(2)}, "safetensors"))
    with pytest.raises(ValueError, match="called 'a.x1bb'"):
        read_checkpoint(tmp_path / "file.safetensors")
