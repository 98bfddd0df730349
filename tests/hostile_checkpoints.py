"""Files that claim to be weights and would take memory, time or control of whoever believed them."""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import Any

import torch
from safetensors.torch import save as save_safetensors

from personvit_hf.checkpoint_reading import LEGACY_MAGIC, LEGACY_PROTOCOL


def saved(contents: Any, file_format: str = "zip", protocol: int = 2) -> bytes:
    """The file that `torch.save` (or safetensors) writes."""
    if file_format == "safetensors":
        return save_safetensors(contents)
    buffer = io.BytesIO()
    torch.save(contents, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=file_format == "zip")
    return buffer.getvalue()


def zipped(pickled: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> bytes:
    """A file of torch.save's format around a pickle of one's own."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("file/data.pkl", pickled)
        archive.writestr("file/byteorder", "little")
        for name, record in records.items():
            archive.writestr(f"file/data/{name}", record)
    return buffer.getvalue()


def storage(count: int, key: str = "0", kind: str = "FloatStorage") -> bytes:
    """Pickle instructions that put a storage of `count` numbers on the stack."""
    number = b"\x8a\x08" + count.to_bytes(8, "little")
    return (
        b"(X\x07\0\0\0storagectorch\n"
        + kind.encode()
        + b"\nX\x01\0\0\0"
        + key.encode()
        + b"X\x03\0\0\0cpu"
        + number
        + b"tQ"
    )


def tensor(count: int, size: int, stride: int = 1, offset: int = 0) -> bytes:
    """The file of {"a": a tensor of these sizes in a storage of `count` numbers}."""
    numbers = [b"\x8a\x08" + value.to_bytes(8, "little") for value in (offset, size, stride)]
    arguments = storage(count) + numbers[0] + numbers[1] + b"\x85" + numbers[2] + b"\x85\x89}"
    return b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tRs."


def doubled(depth: int, first: int = 0) -> bytes:
    """Twice a list of twice a list ...: a few bytes that tell of 2**depth lists, in the memo from `first` on."""
    lists = [b"]q" + bytes([first]) + b"0"]
    lists += [
        b"(" + 2 * (b"h" + bytes([i - 1])) + b"lq" + bytes([i]) + b"0" for i in range(first + 1, first + depth + 1)
    ]
    return b"".join(lists) + b"h" + bytes([first + depth])


def again_and_again(made: bytes, function: bytes, calls: bytes) -> bytes:
    """A pickle that puts something in place 0, a function in place 1, makes some calls and holds nothing."""
    return b"\x80\x02" + made + b"q\x000c" + function + b"\nq\x010" + calls + b"}."


NULLS = b"](" + b"N" * 100_000 + b"e"
PAIRS = b"](" + b"".join(b"(M" + i.to_bytes(2, "little") + b"Nl" for i in range(10_000)) + b"e"
NUMBERED = b"}(" + b"".join(b"M" + i.to_bytes(2, "little") + b"N" for i in range(10_000)) + b"u"
HALF = zipped(
    b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n("
    + storage(2**15, kind="HalfStorage")
    + b"K\0M\0\x80\x85K\x01\x85\x89}tRq\0s"
    + b"".join(b"X\x04\0\0\0%04dh\0s" % i for i in range(5000))
    + b".",
    **{"0": bytes(2**16)},
)
FOUR = b"\0" * 16
TERA = 2**40
HOSTILE = {
    "a terabyte in a storage": (zipped(tensor(TERA, 4), **{"0": FOUR}), "should have 4398046511104 bytes, found 16"),
    "a terabyte in a tensor": (zipped(tensor(4, TERA), **{"0": FOUR}), "claims 1099511627776 numbers"),
    "one number a terabyte of times": (zipped(tensor(4, TERA, stride=0), **{"0": FOUR}), "claims 1099511627776"),
    "a tensor beyond its storage": (zipped(tensor(4, 4, offset=1), **{"0": FOUR}), "claims 4 numbers"),
    "a storage that is not there": (zipped(tensor(4, 4)), "found None"),
    "a storage outside of its folder": (
        zipped(tensor(4, 4).replace(b"X\x01\0\0\x000", b"X\x04\0\0\0../x")),
        "found None",
    ),
    "a bomb": (zipped(tensor(2**22, 2**22), zipfile.ZIP_DEFLATED, **{"0": bytes(2**24)}), "compressed"),
    "a bytearray of gigabytes": (
        zipped(b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + (2**34).to_bytes(5, "little") + b"\x85R."),
        "builtins.bytearray",
    ),
    "a bytearray instruction": (zipped(b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"."), "bytes"),
    "a key of nested tuples": (zipped(b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s."), "a key is a tuple"),
    "nested lists": (
        zipped(b"\x80\x02}X\x01\0\0\0a" + b"]" * 300_000 + b"a" * 299_999 + b"s."),
        "",
    ),
    "a call of a call": (zipped(b"\x80\x02ccollections\nOrderedDict\n)R)R."), "call dict"),
    "an attribute of a class": (zipped(b"\x80\x02cargparse\nNamespace\n}b."), "sets attributes of a Named"),
    "eval": (zipped(b"\x80\x02cbuiltins\neval\nX\x01\0\0\x001\x85R."), "builtins.eval"),
    "eval by protocol 4": (zipped(b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93X\x01\0\0\x001\x85R."), "builtins.eval"),
    "a class named by nested lists": (zipped(b"\x80\x04" + doubled(30) + b"\x8c\x04eval\x93."), "a str of a list"),
    "a class of an endless name": (zipped(b"\x80\x02ctorch\n" + b"a" * 10**6 + b"Storage\n."), "it names torch.aaa"),
    "a device of nested lists": (zipped(b"\x80\x02ctorch\ndevice\n" + doubled(30) + b"\x85R."), "call torch.device"),
    "sets of one list": (
        zipped(again_and_again(NULLS, b"builtins\nset", b"h\x01h\0\x85R" * 3000)),
        "each other's items",
    ),
    "dictionaries of one list": (
        zipped(again_and_again(PAIRS, b"collections\nOrderedDict", b"h\x01h\0\x85R" * 3000)),
        "each other's items",
    ),
    "namespaces of one dictionary": (
        zipped(again_and_again(NUMBERED, b"argparse\nNamespace", b"h\x01)Rh\0b" * 3000)),
        "each other's items",
    ),
    "one tensor of many names": (HALF, "each other's numbers"),
    "a tensor for a size": (
        zipped(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage(4) + b"q\0K\0h\0h\0tR.", **{"0": FOUR}),
        "call torch._utils._rebuild_tensor_v2 with arguments",
    ),
    "a tensor for a storage": (zipped(b"\x80\x02" + storage(4) + b"Q.", **{"0": FOUR}), "storage is not described"),
    "legacy storages called by nested lists": (
        b"".join(pickle.dumps(value, 2) for value in (LEGACY_MAGIC, LEGACY_PROTOCOL, {"little_endian": True}, {}))
        + b"\x80\x02]("
        + doubled(60)
        + doubled(60, first=100)
        + b"e.",
        "list of storages",
    ),
    "a class by an old instruction": (zipped(b"\x80\x02(ios\nsystem\n."), "INST"),
    "an empty stack": (zipped(b"\x80\x020."), ""),
    "no end": (zipped(b"\x80\x02}"), "STOP"),
    "control characters": (zipped(b"\x80\x02}X\x05\0\0\0\x1b[31mK\x01s."), "called '.x1b"),
    "a huge number as a key": (
        zipped(b"\x80\x02}\x8b" + (5000).to_bytes(4, "little") + b"\x7f" * 5000 + b"K\x01s."),
        "key",
    ),
    "a big-endian file": (zipped(b"\x80\x02}.").replace(b"little", b"bigbig"), ""),
    "legacy terabyte": (
        saved({"a": torch.zeros(10)}, "legacy").replace(b"K\nN", b"\x8a\x06" + TERA.to_bytes(6, "little") + b"N"),
        "claim 4398046511104 bytes",
    ),
    "safetensors terabyte": (
        (lambda header: len(header).to_bytes(8, "little") + header)(
            b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
        ),
        "",
    ),
    "safetensors of a huge header": ((2**62).to_bytes(8, "little") + b"{", ""),
    "an empty file": (b"", "starts neither"),
    "text": (b"not a checkpoint", "starts neither"),
    "a pickle": (pickle.dumps({"a": 1}), "not one of torch.save"),
}
