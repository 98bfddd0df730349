import os

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
