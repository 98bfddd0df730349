import multiprocessing
import os
import subprocess
import sys
import tarfile
from collections import Counter

import pytest
from layouts import picture, to_archive

from personvit_hf import file_trees, shared_files
from personvit_hf.file_trees import FileTree, UnreadableFile, open_tree, read_address
from personvit_hf.person_images import image_trees, load_person_images


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


@pytest.fixture
def listed(monkeypatch):
    """How often each path is listed."""
    counts, init = Counter(), FileTree.__init__

    def counted(tree, path):
        counts[path.name] += 1
        init(tree, path)

    monkeypatch.setattr(FileTree, "__init__", counted)
    return counts


def test_many_archives_are_listed_once_and_few_stay_open(tmp_path, listed):
    members = {f"{name}.jpg": picture(seed) for seed, name in enumerate("ab")}
    for index in range(150):
        to_archive(tmp_path / "many" / f"{index:03}.{'tar' if index % 2 else 'zip'}", members)
    rows = load_person_images(tmp_path / "many")
    before = len(os.listdir("/dev/fd"))
    for row in [*range(0, 300, 2), *range(1, 300, 2)]:
        assert read_address(rows[row]["image"]["path"]) == members["ab"[row % 2] + ".jpg"]
    assert len(listed) == 150 and set(listed.values()) == {1}
    assert len(os.listdir("/dev/fd")) <= before + 64


def read_in_turn(addresses, expected, start, connection):
    """What a worker does; the start makes all of them read at once."""
    start.wait()
    connection.send(all(read_address(address) == expected[address] for address in addresses * 20))


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".lmdb"])
def test_forks_inherit_the_list_and_read_at_once(tmp_path, suffix, listed):
    members = {f"{index:03}.jpg": bytes([index]) * (1000 + 997 * index) for index in range(100)}
    path = tmp_path / f"a{suffix}"
    if suffix == ".lmdb":
        lmdb = pytest.importorskip("lmdb")
        with lmdb.open(str(path), map_size=2**26) as database, database.begin(write=True) as transaction:
            for name, content in members.items():
                transaction.put(name.encode(), content)
    else:
        to_archive(path, members)
    (tree,) = image_trees(path)
    expected = {tree.address(name): members[name] for name in tree.names}
    assert all(read_address(address) == content for address, content in expected.items())
    forks, addresses = multiprocessing.get_context("fork"), list(expected)
    file_trees.open_tree = None  # of the workers: they have the list
    start, workers, answers = forks.Barrier(4), [], []
    try:
        for part in range(4):
            answer, connection = forks.Pipe(duplex=False)
            arguments = (addresses[part * 25 :] + addresses[: part * 25], expected, start, connection)
            workers.append(forks.Process(target=read_in_turn, args=arguments))
            workers[-1].start()
            connection.close()
            answers.append(answer)
    finally:
        file_trees.open_tree = open_tree
    assert [answer.recv() for answer in answers] == [True] * 4
    for worker in workers:
        worker.join()
    assert listed == {path.name: 1}


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_a_replaced_archive_is_listed_anew(tmp_path, suffix):
    path = to_archive(tmp_path / f"a{suffix}", {"a.jpg": picture(0), "b.jpg": picture(1)})
    (tree,) = image_trees(path)
    address = tree.address("b.jpg")
    assert read_address(address) == picture(1)
    to_archive(tmp_path / f"new{suffix}", {"0.jpg": picture(5), "b.jpg": picture(2)}).replace(path)
    os.utime(path, ns=(0, tree.state[1] + 1))  # however coarse the clock
    assert read_address(address) == picture(2)
    with pytest.raises(UnreadableFile, match="no such file"):
        read_address(tree.address("a.jpg"))
    assert image_trees(path)[0].names == ["0.jpg", "b.jpg"]
    path.unlink()
    with pytest.raises(UnreadableFile):
        read_address(address)


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_a_list_is_not_used_on_another_archive(tmp_path, suffix):
    """Its places would cut any bytes out of it."""
    path = to_archive(tmp_path / f"a{suffix}", {"a.jpg": picture(0)})
    tree = open_tree(path)
    shared_files._opened.cache_clear()
    to_archive(path, {"0.jpg": picture(5), "a.jpg": picture(2)})
    os.utime(path, ns=(0, tree.state[1] + 1))
    with pytest.raises(UnreadableFile, match="replaced since it was listed"):
        tree.read("a.jpg")
    assert tree.stamp("a.jpg") != open_tree(path).stamp("a.jpg")


def test_the_error_of_a_zip_that_may_not_be_read(tmp_path, monkeypatch):
    path = to_archive(tmp_path / "a.zip", {"a.jpg": picture(0)})

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shared_files, "_opened", refuse)
    with pytest.raises(PermissionError, match="denied"):
        open_tree(path)


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
