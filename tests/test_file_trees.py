import os
import subprocess
import sys
import tarfile

import pytest
from layouts import picture, to_archive

from personvit_hf.file_trees import UnreadableFile, open_tree, read_address


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_colons_in_the_names_of_archive_and_member(tmp_path, suffix):
    members = {"a.jpg": picture(0), "bb::c.jpg": picture(1), "dd::/e.jpg": picture(2), "ff:/g.jpg": picture(3)}
    for folder in ("plain", "x::y", "x::", ":z"):
        tree = open_tree(to_archive(tmp_path / folder / f"n::{suffix}", members))
        assert {name: read_address(tree.address(name)) for name in tree.names} == members
    with pytest.raises(UnreadableFile, match="no such file"):
        read_address(tree.address("a::b.jpg"))


def test_an_empty_path_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="An empty path.*variable"):
        open_tree("")
    assert open_tree(os.curdir).path == tmp_path


CODE_OPENING = """
import sys
from personvit_hf.file_trees import open_tree
for path in sys.argv[1:]:
    try:
        print(len(open_tree(path).names))
    except ValueError as error:
        print(error)
"""


def test_an_lmdb_that_is_cut_off(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(tmp_path / "whole"), map_size=2**24) as database, database.begin(write=True) as transaction:
        for index in range(50):
            transaction.put(f"{index:07}".encode(), bytes(9000))
    content = (tmp_path / "whole" / "data.mdb").read_bytes()
    (tmp_path / "one.lmdb").write_bytes(content)
    paths, lines = [tmp_path / "whole", tmp_path / "one.lmdb"], ["50", "50"]
    for size in (len(content) // 2, len(content) - 1, 3 * 4096):
        (tmp_path / f"{size}").mkdir()
        for file in (tmp_path / f"{size}.mdb", tmp_path / f"{size}" / "data.mdb"):
            file.write_bytes(content[:size])
            paths.append(file if file.name != "data.mdb" else file.parent)
            lines.append(f"{file}: an LMDB that is cut off ({size} of {len(content)} bytes). Fetch it again.")
    # in a process of its own, since reading behind the end would kill it
    done = subprocess.run([sys.executable, "-c", CODE_OPENING, *paths], capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()) == (0, lines), done.stderr


def header(name, size=0, kind=b"0") -> bytes:
    """A tar header block; a negative size as tar's base-256 has it."""
    member = tarfile.TarInfo(name)
    member.type = kind
    block = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = b"%011o\0" % size if size >= 0 else b"\xff" + (2**88 + size).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


FIRST = header("0.png")
NEGATIVE = b"14 size=-1536\n".ljust(512, b"\0")
TARS = {
    "back to itself": FIRST + header("1.png", -512),
    "back by an extended header": FIRST + header("pax", 14, b"x") + NEGATIVE + header("1.png"),
    "a long name of a negative size": FIRST + header("long", -1024, b"L") + header("1.png"),
    "long names from the start": (header("long", 10, b"L") + b"name".ljust(512, b"\0")) * 3000 + FIRST,
    "long names without end": FIRST + (header("long", 10, b"L") + b"name".ljust(512, b"\0")) * 3000 + header("1.png"),
}


@pytest.mark.parametrize("kind", TARS)
def test_tars_whose_headers_lead_nowhere(kind, tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(TARS[kind] + bytes(1024))
    done = subprocess.run([sys.executable, "-c", CODE_OPENING, path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith(str(path)), (done.stdout, done.stderr)
