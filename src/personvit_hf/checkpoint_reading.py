"""Checkpoint files of any origin, read without running code from them and without believing what they claim.

`torch.save` writes pickles, and unpickling calls what the file names. `torch.load(weights_only=True)` calls only what
is known to be harmless, but a file of a few hundred bytes can still make it take gigabytes, and nested tuples as a key
end the process. So the few pickle instructions that a file of weights needs are followed here: they build
dictionaries, lists, numbers, text and tensors, nothing in the file is ever called, and a tensor must find its numbers
in the file before memory is taken for it.
"""

from __future__ import annotations

import argparse
import math
import mmap
import pickletools
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file

StorageLoader = Callable[[str, torch.dtype, int], torch.Tensor]

# What `torch.save` writes before anything else in the format it used until version 1.6.
LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
# A tensor may be stored once and named twice, as tied weights are; no more than this many times the file all in all.
MAX_TENSOR_BYTES_PER_FILE_BYTE = 4
MAX_TENSOR_AXES = 8
MAX_INSTRUCTIONS = 2_000_000  # a few seconds; a training run of ViT-L has about 100,000
MAX_DEVICE_NAME = 20
MAX_SHOWN = 300

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
STORAGE_NAME = re.compile(r"torch\.(?:cuda\.)?(\w{1,20}Storage)")
DTYPE_NAME = re.compile(r"torch\.(?:b?float|u?int|complex|bool)\d{0,3}")
CALLABLE_NAMES = {
    "argparse.Namespace",
    "builtins.set",
    "__builtin__.set",
    "collections.OrderedDict",
    "torch.Size",
    "torch.device",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
}
# Pickle instructions that carry their value, and those that mean one.
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
LITERALS |= {"BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"}
NEW_VALUES: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_TUPLE": tuple,
}
MARK = object()


@dataclass(frozen=True)
class Named:
    """A class or function that the file names. It is never looked up."""

    name: str


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a file of weights, on the CPU, without running code from it.

    Args:
        path: What `torch.save` writes, in its present (zip) format or the one before 1.6, or a safetensors file. The
            contents tell the format, not the name.

    Returns:
        The dictionary in the file. Its values are tensors, numbers, text, containers of these (a set comes as a list)
        and `argparse.Namespace`, since official files carry their arguments.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, claims more than it holds, is compressed, or holds anything else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file.")
    with path.open("rb") as file:
        head = file.read(512)
    try:
        contents = _read(path, head)
    except Exception as error:  # bytes of any origin make the readers below raise errors of a dozen types
        reason = excerpt(str(error).strip().split("\n")[0] or type(error).__name__)
        raise ValueError(
            f"{path}: not a checkpoint that can be read safely ({reason}). Only tensors and plain values are accepted."
        ) from error
    return dict(named_entries(path, "the file", contents))


def named_entries(path: str | Path, name: str, value: object) -> Mapping[str, Any]:
    """The value if it is a dictionary whose keys are text; `name` says in the error what it is."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}: {name} should hold a dictionary of named entries, found {type(value).__name__}.")
    for key in value:
        if not isinstance(key, str) or key != excerpt(key):
            raise ValueError(
                f"{path}: {name} should hold a dictionary of named entries, one is called {excerpt(ascii(key))}."
            )
    return value


def excerpt(text: str) -> str:
    """What of a text of any origin can be shown in a terminal: a few hundred characters, none that control it."""
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _read(path: Path, head: bytes) -> object:
    if head.startswith(b"PK\x03\x04"):
        return _read_zip(path)
    if head.startswith(b"\x80"):
        return _read_legacy(path)
    if head[257:262] == b"ustar":
        raise ValueError("it is in the tar format of torch before 0.2: load it there and save it again")
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return load_file(path)  # checks each tensor's size and place against the file's before it takes memory
    raise ValueError("it starts neither as a file of torch.save nor as safetensors")


def _read_zip(path: Path) -> object:
    """The format of torch 1.6 and later: `<name>/data.pkl`, and a stored, uncompressed record for each storage."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        sizes = {record.filename: record.file_size for record in records}
        if len(sizes) != len(records):
            raise ValueError("two of its records have the same name")
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("its records are compressed, which torch.save never does")
        file_size = path.stat().st_size
        if sum(sizes.values()) > file_size:
            raise ValueError(f"its records claim {sum(sizes.values())} bytes, the file has {file_size}")
        pickles = [name for name in sizes if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError(f"it should hold one record data.pkl, found {len(pickles)}")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in sizes and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("its numbers are not little-endian")

        def load_storage(key: str, dtype: torch.dtype, count: int) -> torch.Tensor:
            name = f"{root}data/{key}"
            if sizes.get(name) != count * dtype.itemsize:
                raise ValueError(f"record {name} should have {count * dtype.itemsize} bytes, found {sizes.get(name)}")
            return _numbers(archive.read(name), dtype)  # zipfile compares the checksum

        return PickleReader(load_storage, file_size).read(archive.read(pickles[0]))


def _read_legacy(path: Path) -> object:
    """The format before torch 1.6: five pickles, then for each storage its length and numbers."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        storages: dict[str, torch.Tensor] = {}
        claimed = 0

        def load_storage(key: str, dtype: torch.dtype, count: int) -> torch.Tensor:
            nonlocal claimed
            claimed += count * dtype.itemsize
            if claimed > len(data):
                raise ValueError(f"its tensors claim {claimed} bytes, the file has {len(data)}")
            return storages.setdefault(key, torch.empty(count, dtype=dtype))

        def read_pickle() -> Any:
            return PickleReader(load_storage, len(data)).read(data)

        if read_pickle() != LEGACY_MAGIC or read_pickle() != LEGACY_PROTOCOL:
            raise ValueError("it is a pickle, but not one of torch.save")
        system = read_pickle()
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise ValueError("its numbers are not little-endian")
        contents, keys = read_pickle(), read_pickle()
        # Each is text: nested lists of lists can take forever to compare.
        is_list = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
        if not is_list or sorted(keys) != sorted(storages):
            raise ValueError("its list of storages is not that of its tensors")
        for key in keys:
            count = int.from_bytes(data.read(8), "little")
            if count != storages[key].numel():
                raise ValueError(f"storage {key} should hold {storages[key].numel()} numbers, found {count}")
            numbers = _numbers(data.read(storages[key].nbytes), storages[key].dtype)
            if len(numbers) != count:
                raise ValueError("the file ends within a tensor")
            storages[key].copy_(numbers)
        return contents


def _numbers(record: bytes, dtype: torch.dtype) -> torch.Tensor:
    """Little-endian bytes as a tensor of one axis."""
    return torch.frombuffer(bytearray(record), dtype=dtype) if record else torch.empty(0, dtype=dtype)


class PickleReader:
    """Follows the instructions of one pickle of `torch.save`.

    Args:
        load_storage: (key, dtype, count) to the storage's numbers, a tensor of one axis; raises a ValueError if the
            file doesn't hold so many.
        file_size: Of the whole file, in bytes.
    """

    def __init__(self, load_storage: StorageLoader, file_size: int):
        self.load_storage = load_storage
        self.bytes_left = MAX_TENSOR_BYTES_PER_FILE_BYTE * file_size
        # In a file of torch.save, an instruction for each item stands before a container is made of another.
        self.items_left = 0
        self.storages: dict[str, torch.Tensor] = {}
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def read(self, pickle: bytes | BinaryIO | mmap.mmap) -> Any:
        """The value of the next pickle in `pickle`; a file is left at the pickle's end."""
        for count, (instruction, argument, _) in enumerate(pickletools.genops(pickle)):
            name = instruction.name
            if count > MAX_INSTRUCTIONS:
                raise ValueError(f"it has more than {MAX_INSTRUCTIONS} pickle instructions")
            self.items_left += 1
            if name == "STOP":
                break
            if name in LITERALS:
                self.stack.append(argument)
            elif name in NEW_VALUES:
                self.stack.append(NEW_VALUES[name]())
            elif name not in ("PROTO", "FRAME"):
                self._follow(name, argument)
        return self.stack.pop()

    def _follow(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "MARK":
                stack.append(MARK)
            case "POP":
                stack.pop()
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                value = self.memo[argument]
                if isinstance(value, torch.Tensor):  # whoever reads it under two names may make two of it
                    self._take_bytes(value.nbytes)
                stack.append(value)
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "LIST":
                stack.append(self._since_mark())
            case "DICT":
                stack.append(_with_items({}, self._since_mark()))
            case "APPEND":
                items = [stack.pop()]
                _list(stack[-1]).extend(items)
            case "APPENDS" | "ADDITEMS":
                items = self._since_mark()
                _list(stack[-1]).extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _with_items(stack[-1], [key, value])
            case "SETITEMS":
                items = self._since_mark()
                _with_items(stack[-1], items)
            case "GLOBAL":
                stack.append(_named(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                last, module = stack.pop(), stack.pop()
                if not isinstance(module, str) or not isinstance(last, str):
                    raise ValueError(f"it names a {type(last).__name__} of a {type(module).__name__}")
                stack.append(_named(f"{module}.{last}"))
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self._call(function, arguments))
            case "BUILD":
                self._set_state(stack.pop(), stack[-1])
            case _:
                raise ValueError(f"it holds the pickle instruction {name}, which torch.save does not write")

    def _since_mark(self) -> list[Any]:
        """Takes what stands on the stack above the last mark, and the mark."""
        items = []
        while (item := self.stack.pop()) is not MARK:
            items.append(item)
        return items[::-1]

    def _storage(self, identity: Any) -> torch.Tensor:
        """The numbers of a storage: ("storage", its class, key, device, count), in old files with None behind."""
        if not isinstance(identity, tuple) or len(identity) not in (5, 6):
            raise ValueError("a tensor's storage is not described as torch.save does")
        tag, kind, key, _, count, *view = identity
        if tag != "storage" or not isinstance(kind, Named) or not isinstance(key, str) or not _is_count(count):
            raise ValueError("a tensor's storage is not described as torch.save does")
        if view not in ([], [None]):
            raise ValueError("a tensor is stored as a view, as torch before 0.4 did: load it there and save it again")
        storage_class = STORAGE_NAME.fullmatch(kind.name)
        if storage_class is None or storage_class[1] not in STORAGES:
            raise ValueError(f"it holds numbers of {kind.name}, which weights are not made of")
        dtype = STORAGES[storage_class[1]]
        if key not in self.storages:
            self.storages[key] = self.load_storage(key, dtype, count)
        storage = self.storages[key]
        if (storage.dtype, storage.numel()) != (dtype, count):
            raise ValueError(f"storage {key} is described in two ways")
        return storage

    def _call(self, function: Any, arguments: Any) -> Any:
        """What a call that the file asks for would give, if it is one of a handful."""
        match function, arguments:
            case (
                Named("torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2"),
                (storage, offset, list() | tuple() as size, list() | tuple() as stride, *_),
            ):
                return self._tensor(storage, offset, size, stride)
            case Named("torch._utils._rebuild_parameter"), (torch.Tensor() as tensor, *_):
                return tensor
            case Named("collections.OrderedDict"), ():
                return {}
            case Named("collections.OrderedDict"), (list(pairs),):
                self._take_items(2 * len(pairs))
                return _with_items({}, [item for key, value in pairs for item in (key, value)])
            case Named("argparse.Namespace"), ():
                return argparse.Namespace()
            case Named("torch.Size" | "builtins.set" | "__builtin__.set"), (list(items) | tuple(items),):
                self._take_items(len(items))
                return list(items)
            case Named("torch.device"), (str(kind),) if len(kind) <= MAX_DEVICE_NAME:
                return kind
            case Named("torch.device"), (str(kind), int(index)) if len(kind) <= MAX_DEVICE_NAME and 0 <= index < 2**16:
                return f"{kind}:{index}"
        name = function.name if isinstance(function, Named) else type(function).__name__
        raise ValueError(f"it asks to call {name} with arguments that torch.save does not give")

    def _tensor(self, storage: Any, offset: Any, size: Sequence[Any], stride: Sequence[Any]) -> torch.Tensor:
        """A view of a storage, no larger than it and within it."""
        if len(size) != len(stride) or len(size) > MAX_TENSOR_AXES:
            raise ValueError(f"a tensor has {len(size)} sizes and {len(stride)} strides")
        if not isinstance(storage, torch.Tensor) or not all(_is_count(value) for value in (offset, *size, *stride)):
            raise ValueError("a tensor is not described as torch.save does")
        count = math.prod(size)
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if count > storage.numel() or (count and last >= storage.numel()) or max(size, default=0) > 2**40:
            raise ValueError(f"a tensor claims {count} numbers of size {tuple(size)}, the file has {storage.numel()}")
        self._take_bytes(count * storage.itemsize)
        return storage.as_strided(size, stride, offset) if count else storage.new_empty(size)

    def _set_state(self, state: Any, target: Any) -> None:
        """Sets the attributes of a Namespace; those of an OrderedDict (torch's `_metadata`) have no use here."""
        if isinstance(target, argparse.Namespace) and isinstance(state, dict):
            self._take_items(len(state))
            vars(target).update({str(name): value for name, value in state.items()})
        elif not isinstance(target, dict):
            raise ValueError(f"it sets attributes of a {type(target).__name__}")

    def _take_bytes(self, count: int) -> None:
        self.bytes_left -= count
        if self.bytes_left < 0:
            raise ValueError("its tensors repeat each other's numbers beyond any use")

    def _take_items(self, count: int) -> None:
        self.items_left -= count
        if self.items_left < 0:
            raise ValueError("its containers repeat each other's items beyond any use")


def _named(name: str) -> Named:
    """The name of a class or function, if files of weights have a use for it."""
    if name not in CALLABLE_NAMES and not STORAGE_NAME.fullmatch(name) and not DTYPE_NAME.fullmatch(name):
        raise ValueError(f"it names {name}, which is not among what weights are made of")
    return Named(name)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"it appends to a {type(value).__name__}")
    return value


def _with_items(mapping: Any, items: list[Any]) -> dict[Any, Any]:
    """Adds key, value, key, value, ...; keys are plain, since hashing a deeply nested one would end the process."""
    if not isinstance(mapping, dict) or len(items) % 2:
        raise ValueError(f"it sets items of a {type(mapping).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float | None) or (isinstance(key, int) and key.bit_length() > 64):
            raise ValueError(f"a key is a {type(key).__name__} that torch.save does not write")
        mapping[key] = value
    return mapping


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
