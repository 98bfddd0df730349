import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from personvit_hf.files import (
    MANIFEST,
    check_manifest,
    flush_to_disk,
    read_json,
    read_yaml,
    rename_durably,
    require_writable,
    require_writable_folder,
    write_manifest,
    written_aside,
)


def write_folder(folder, names, overwrite=False):
    with written_aside(folder, overwrite) as aside:
        aside.mkdir()
        for name in names:
            (aside / name).write_text("new")


def test_a_file_appears_when_it_is_complete(tmp_path):
    output = tmp_path / "made" / "model.bin"
    with written_aside(output) as aside:
        aside.write_text("new")
        assert not output.exists()
    assert output.read_text() == "new"
    assert os.listdir(output.parent) == ["model.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_what_failed(tmp_path, error):
    (tmp_path / "model.bin").write_text("old")
    with pytest.raises(error):
        with written_aside(tmp_path / "model.bin", overwrite=True) as aside:
            aside.write_text("half")
            raise error
    assert (tmp_path / "model.bin").read_text() == "old"
    assert os.listdir(tmp_path) == ["model.bin"]


def test_what_exists_is_replaced_only_when_asked(tmp_path):
    write_folder(tmp_path / "out", ["a", "b"])
    (tmp_path / "out" / "a").write_text("old")
    with pytest.raises(FileExistsError, match="overwrite"):
        write_folder(tmp_path / "out", ["a", "b"])
    assert (tmp_path / "out" / "a").read_text() == "old"
    write_folder(tmp_path / "out", ["a", "b"], overwrite=True)
    assert (tmp_path / "out" / "a").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_what_was_written_for_its_owner_alone_has_the_mode_of_any_file(tmp_path):
    (tmp_path / "any").touch()
    with written_aside(tmp_path / "model") as aside:
        aside.mkdir()
        save_file({"a": np.zeros(2)}, aside / "model.safetensors")  # safetensors 0.8 is such a writer
        (aside / "private").touch(0o600)
    with written_aside(tmp_path / "one.safetensors") as aside:
        save_file({"a": np.zeros(2)}, aside)
    modes = {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "any").stat().st_mode}


def test_an_empty_folder_may_be_filled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path.joinpath("."), ["a"])
    assert (tmp_path / "a").read_text() == "new"


def test_other_files_are_never_lost(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "family.jpg").write_text("dear")
    with pytest.raises(FileExistsError, match="family.jpg"):
        write_folder(tmp_path / "photos", ["a"], overwrite=True)
    with pytest.raises(FileExistsError, match="folder"):
        with written_aside(tmp_path / "photos", overwrite=True) as aside:
            aside.write_text("a file")
    assert (tmp_path / "photos" / "family.jpg").read_text() == "dear"
    assert os.listdir(tmp_path) == ["photos"]


def test_an_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    write_folder(tmp_path / "out", ["a"])
    (tmp_path / "out" / "a").write_text("old")
    rename = type(tmp_path).rename
    monkeypatch.setattr(
        type(tmp_path),
        "rename",
        lambda self, to: os.remove("missing") if self.name == "out" and to == tmp_path / "out" else rename(self, to),
    )
    with pytest.raises(OSError):
        write_folder(tmp_path / "out", ["a"], overwrite=True)
    assert (tmp_path / "out" / "a").read_text() == "old"


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 200_000, b"[]", b"", b"\0"], ids=lambda text: text[:20])
def test_a_json_file_of_any_origin(tmp_path, content):
    path = tmp_path / "x.json"
    assert read_json(path) == {}
    path.write_text('{"a": "ä"}', encoding="utf-8")
    assert read_json(path) == {"a": "ä"}
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json: (not a JSON file|expected a JSON object, found list)"):
        read_json(path)


@pytest.mark.parametrize(
    "content",
    [b"a: [", b"\xff", b"[" * 10_000, b"- a", b"", b"a: 2001-99-99", b"a: !!bool x", b"!!python/object/apply:a []"],
    ids=lambda text: text[:20],
)
def test_a_yaml_file_of_any_origin(tmp_path, content):
    path = tmp_path / "x.yaml"
    assert read_yaml(path) == {}
    path.write_text("a: ä", encoding="utf-8")
    assert read_yaml(path) == {"a": "ä"}
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.yaml: (not a YAML file|expected lines `setting: value`, found)"):
        read_yaml(path)


@pytest.fixture
def listed(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"content of {name}")
    write_manifest(tmp_path)
    return tmp_path


def test_a_folder_is_as_its_manifest_says(listed):
    check_manifest(listed)
    (listed / "a").write_text("another text")
    with pytest.raises(ValueError, match="a has changed"):
        check_manifest(listed)
    (listed / "a").write_text("short")
    with pytest.raises(ValueError, match="a has not the size of 12 bytes"):
        check_manifest(listed)
    (listed / "a").unlink()
    (listed / "c").touch()
    with pytest.raises(ValueError, match=r"missing files \['a'\], unexpected files \['c'\]"):
        check_manifest(listed)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"files": 3}', '{"files": {"a": 1}}', '{"files": {}}', "\0"]
    + [200_000 * "[", '{"x": "' + 2**21 * "y" + '"}'],
)
def test_a_manifest_that_is_none(listed, text):
    (listed / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match="manifest.json can't be read|unexpected files"):
        check_manifest(listed)


def test_a_manifest_that_is_a_pipe_is_not_waited_for(listed):
    (listed / MANIFEST).unlink()
    os.mkfifo(listed / MANIFEST)
    with pytest.raises(ValueError, match="manifest.json can't be read"):
        check_manifest(listed)


def test_a_manifest_names_nothing_outside_its_folder(listed):
    (listed / "inner").mkdir()
    (listed / "inner" / MANIFEST).write_text('{"files": {"../a": {"size": 12, "sha256": ""}}}')
    with pytest.raises(ValueError, match="missing files"):
        check_manifest(listed / "inner")


def test_flushed_and_renamed(listed):
    (listed / "folder").mkdir()
    (listed / "folder" / "file").write_text("x")
    flush_to_disk(listed)
    rename_durably(listed / "folder", listed / "other")
    assert (listed / "other" / "file").read_text() == "x"


def test_a_folder_that_can_not_be_written_is_told_before(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "file/inside", "link/inside"):
        with pytest.raises(NotADirectoryError, match=f"can't be a folder, as .*{name[:4]} is none"):
            require_writable_folder(tmp_path / name)
    require_writable_folder(tmp_path)
    require_writable_folder(tmp_path / "a" / "b")
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root, who may write everywhere
    with pytest.raises(PermissionError, match=f"b can't be written, as {tmp_path} may not"):
        require_writable_folder(tmp_path / "a" / "b")


def test_a_file_that_can_not_be_written_is_told_before(tmp_path, monkeypatch):
    require_writable(tmp_path / "a" / "b" / "features.npz")
    assert os.listdir(tmp_path / "a" / "b") == []
    with pytest.raises(IsADirectoryError, match="b is a folder: give the name of a file"):
        require_writable(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("x")
    require_writable(tmp_path / "file")
    for path in (tmp_path / "file" / "features.npz", tmp_path / "file" / "c" / "features.npz"):
        with pytest.raises(OSError, match="features.npz can't be written, as its folder can't be made"):
            require_writable(path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(PermissionError, match="new.npz may not be written"):
        require_writable(tmp_path / "new.npz")


BILLIONS = "a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*{f'b{i - 1}' if i else 'a'}, x]\n" for i in range(3))


def test_yaml_with_aliases_is_refused(tmp_path):
    file = tmp_path / "arguments.yaml"
    file.write_text(BILLIONS)
    with pytest.raises(ValueError, match=f"{file}: .*line 2: the alias .a; write out"):
        read_yaml(file)
    file.write_text("a: &a [x, x]\n")  # a name alone is harmless
    assert read_yaml(file) == {"a": ["x", "x"]}
    file.write_text("a: " + 50_000 * "[")  # its scanner takes hours for it
    with pytest.raises(ValueError, match=f"{file}: .*line 1: nested more than 100 deep"):
        read_yaml(file)
