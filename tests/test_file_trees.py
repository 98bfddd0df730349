import os
import subprocess
import sys

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
