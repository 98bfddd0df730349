"""The public ReID benchmarks: what they are called, how their files are laid out, and how many there should be."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .file_trees import ARCHIVE_SUFFIXES, FileTree, FolderTree, open_tree
from .person_images import IMAGE_SUFFIXES

MARKET_FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
# The image folders of MSMT17, V1 and V2 (with blurred faces), for train and test.
MSMT17_FOLDERS = {"v1": ("train", "test"), "v2": ("mask_train_v2", "mask_test_v2")}
MSMT17_LISTS = {
    "train": ("list_train.txt", "list_val.txt"),
    "query": ("list_query.txt",),
    "gallery": ("list_gallery.txt",),
}
# Both halves of MSMT17 number their people from 0. Here 0 is a distractor, and no number may mean two people.
MSMT17_FIRST_PERSON = {"train": 1, "query": 1042, "gallery": 1042}

_MARKET_NAME = re.compile(r"(-1|\d{1,9})_c([1-9]\d{0,3})(?!\d)")
_MSMT17_NAME = re.compile(r"\d+_\d+_(\d{1,4})_")
_MAX_DEPTH = 3  # of the tree in an archive, or under a folder of the benchmark's name


@dataclass(frozen=True)
class Counts:
    """Published size of a split; persons without junk (-1) and distractors (0)."""

    images: int
    persons: int
    cameras: int


@dataclass(frozen=True)
class Benchmark:
    """A data set with a published protocol.

    Attributes:
        name: What users type.
        aliases: What else it, its folder or its archive is called, lower case, letters and digits alone.
        counts: Published size of each split.
        version: Of MSMT17, "v1" or "v2"; None: laid out as Market-1501.
        persons: All person ids of train and test together, if they are known.
    """

    name: str
    aliases: tuple[str, ...]
    counts: dict[str, Counts]
    version: str | None = None
    persons: range | None = None


# Counts: Zheng et al. 2015 (its bounding_box_test holds 2,798 distractors and 3,819 junk images, too), Zheng et al.
# 2017, Miao et al. 2019 (Occluded-Duke), Wei et al. 2018 (train = list_train + list_val, 30,248 + 2,373).
_MSMT17_COUNTS = {
    "train": Counts(32621, 1041, 15),
    "query": Counts(11659, 3060, 15),
    "gallery": Counts(82161, 3060, 15),
}
BENCHMARKS = (
    Benchmark(
        "market1501",
        ("market1501", "market", "market1501v150915"),
        {"train": Counts(12936, 751, 6), "query": Counts(3368, 750, 6), "gallery": Counts(19732, 750, 6)},
        persons=range(1, 1502),
    ),
    Benchmark(
        "dukemtmc-reid",
        ("dukemtmcreid", "dukemtmc", "duke", "dukereid"),
        {"train": Counts(16522, 702, 8), "query": Counts(2228, 702, 8), "gallery": Counts(17661, 1110, 8)},
    ),
    Benchmark(
        "occluded-duke",
        ("occludedduke", "occludeddukemtmc", "occludeddukemtmcreid", "occludeddukereid", "occduke"),
        {"train": Counts(15618, 702, 8), "query": Counts(2210, 519, 8), "gallery": Counts(17661, 1110, 8)},
    ),
    Benchmark("msmt17-v1", ("msmt17v1", "msmt17"), _MSMT17_COUNTS, version="v1"),
    Benchmark("msmt17-v2", ("msmt17v2", "msmt17"), _MSMT17_COUNTS, version="v2"),
)


@dataclass
class LabelledFiles:
    """The rows of a data set before anything is decoded.

    Attributes:
        tree: Where the files lie.
        prefix: Folder of the tree in which the data set begins, "" or with a "/" at its end.
        rows: By split, (name in `tree`, person_id, camera_id) in the order of the table. "train" may be missing.
        missing: By split, files that the data set's own lists name and that aren't there.
        benchmark: Which one it is, if it was asked for by name.
    """

    tree: FileTree
    prefix: str
    rows: dict[str, list[tuple[str, int, int]]]
    missing: dict[str, list[str]] = field(default_factory=dict)
    benchmark: Benchmark | None = None


def benchmarks_called(name: object) -> list[Benchmark]:
    """The benchmarks that go by this name, whatever its case and punctuation; both versions for "MSMT17"."""
    plain = _plain(str(name))
    return [benchmark for benchmark in BENCHMARKS if plain in benchmark.aliases]


def find_benchmark(name: str, root: Path) -> LabelledFiles:
    """The files of the benchmark `name`, at `root` or in a folder or archive of its usual name under it.

    Raises:
        FileNotFoundError: There is no `root`, or the benchmark isn't in it.
        ValueError: No benchmark has this name, several copies were found, or a list or file name has no ids.
    """
    wanted = benchmarks_called(name)
    if not wanted:
        known = ", ".join(benchmark.name for benchmark in BENCHMARKS)
        raise ValueError(f"{name}: no benchmark of this name; known are {known}, and msmt17 for either version.")
    root = root.expanduser().absolute()
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such file or folder to look for {name} in.")
    for places in _places(wanted, root):
        found = []
        for place in places:
            tree = open_tree(place)
            found += [
                (tree, prefix, benchmark) for benchmark in wanted for prefix in _prefixes(tree, benchmark.version)
            ]
        if len(found) > 1:
            copies = "; ".join(
                f"{benchmark.name} in {tree.path}, {prefix or '.'}" for tree, prefix, benchmark in found
            )
            raise ValueError(f"{root}: several copies of {name}: {copies}. Give the one you mean as `root`.")
        if found:
            tree, prefix, benchmark = found[0]
            files = _read_layout(tree, prefix, benchmark.version)
            files.benchmark = benchmark
            return files
    names = ", ".join(f"{_described(benchmark.version)} ({benchmark.name})" for benchmark in wanted)
    raise FileNotFoundError(
        f"{root}: {name} isn't there. Looked for {names}, in it, in folders named like {wanted[0].name}, and in "
        f"archives named so ({', '.join(ARCHIVE_SUFFIXES)})."
    )


def find_layout(tree: FileTree) -> LabelledFiles | None:
    """The labelled files of a folder or archive laid out as Market-1501 or MSMT17, or None if it is neither.

    Raises:
        FileNotFoundError, ValueError: As in `find_benchmark`.
    """
    for version in (None, *MSMT17_FOLDERS):
        is_folder = isinstance(tree, FolderTree)
        prefixes = [prefix for prefix in _prefixes(tree, version) if not (is_folder and prefix)]
        if len(prefixes) > 1:
            raise ValueError(f"{tree.path}: several data sets in one archive: {', '.join(prefixes)}.")
        if prefixes:
            return _read_layout(tree, prefixes[0], version)
    return None


def require_no_layout(trees: Sequence[FileTree]) -> None:
    """Raises a ValueError if a Market-1501 or MSMT17 tree lies in one of them, at any depth that archives may have.

    Training pictures alone (bounding_box_train) are no such tree: there are no test pictures to keep apart.
    """
    found = []
    for tree in trees:
        for version in (None, *MSMT17_FOLDERS) if tree.kind != "lmdb" else ():
            for prefix in _prefixes(tree, version):
                tests = tuple(f"{prefix}{MARKET_FOLDERS[split]}/".lower() for split in ("query", "gallery"))
                if version is not None or any(name.lower().startswith(tests) for name in tree.names):
                    place = tree.path / prefix if isinstance(tree, FolderTree) else tree.path
                    found.append(f"{place} is {'a Market-1501' if version is None else 'an MSMT17'} tree")
    if found:
        raise ValueError(
            f"{'; '.join(_some(found))}. Give that path itself, or a folder without it: here its labels would "
            "be lost, and its test pictures become training data."
        )


def warn_of_missing(files: LabelledFiles) -> None:
    """Compares a benchmark with its published counts; one warning says what differs, and which files are missing."""
    told = [f"{name}: listed, but not there" for names in files.missing.values() for name in _some(names)]
    benchmark = files.benchmark
    if benchmark is not None:
        for split, published in benchmark.counts.items():
            rows = files.rows.get(split, [])
            found = Counts(len(rows), len({row[1] for row in rows if row[1] > 0}), len({row[2] for row in rows}))
            if found != published:
                told.append(
                    f"{split}: found {found.images} images of {found.persons} persons by {found.cameras} cameras, "
                    f"published are {published.images} of {published.persons} by {published.cameras}"
                )
        told += _clues(files) if told else []
    if told:
        name = benchmark.name if benchmark else "data set"
        warnings.warn(f"{files.tree.path}: the {name} there is not complete. " + ". ".join(told) + ".", stacklevel=3)


def _clues(files: LabelledFiles) -> list[str]:
    """What the files that are there tell about the ones that aren't."""
    clues = []
    people = {split: {person for _, person, _ in rows if person > 0} for split, rows in files.rows.items()}
    if files.benchmark.persons is not None:
        absent = sorted(set(files.benchmark.persons) - people.get("train", set()) - people["gallery"])
        if absent:
            clues.append(f"no image of persons {_ranges(absent)}")
    alone = sorted(people["query"] - people["gallery"])
    if alone:
        clues.append(f"no gallery image of the query persons {_ranges(alone)}")
    # Market-1501's gt_query has a file for each query, which outlives a half-unpacked query folder.
    ground_truth = re.compile(re.escape(files.prefix) + r"gt_query/(.+)_(?:good|junk)\.mat")
    named = {match[1] for match in map(ground_truth.fullmatch, files.tree.names) if match}
    lost = sorted(named - {Path(name).stem for name, _, _ in files.rows["query"]})
    if lost:
        clues.append("missing queries, by gt_query: " + ", ".join(_some([f"{name}.jpg" for name in lost])))
    return clues


def _places(wanted: Sequence[Benchmark], root: Path) -> list[list[Path]]:
    """Where to look, in this order: `root` itself, folders of the right name in it, archives of the right name."""
    if root.is_file():
        return [[root]]
    aliases = {alias for benchmark in wanted for alias in benchmark.aliases}
    own = [[root]] if any(_is_folder_layout(root, benchmark.version) for benchmark in wanted) else []
    folders, archives = [], []
    for entry in sorted(root.iterdir()):
        suffix = next((suffix for suffix in ARCHIVE_SUFFIXES if entry.name.lower().endswith(suffix)), None)
        if entry.is_dir() and _plain(entry.name) in aliases:
            folders.append(entry)
        elif suffix and _plain(entry.name[: -len(suffix)]) in aliases:
            archives.append(entry)
    if not own and _plain(root.name) in aliases:
        own = [[root]]
    return [places for places in (*own, folders, archives) if places]


def _is_folder_layout(root: Path, version: str | None) -> bool:
    if version is None:
        return any((root / MARKET_FOLDERS[split]).is_dir() for split in ("train", "gallery"))
    folders = {entry.name.lower() for entry in root.iterdir() if entry.is_dir()}
    return (root / "list_query.txt").is_file() and bool(folders & set(MSMT17_FOLDERS[version]))


def _prefixes(tree: FileTree, version: str | None) -> list[str]:
    """Folders of the tree in which a data set of this layout begins."""
    if isinstance(tree, FolderTree) and _is_folder_layout(tree.path, version):
        return [""]  # it may be a folder whose split folders are empty, which is worth an error of its own
    prefixes: set[str] = set()
    marks = {MARKET_FOLDERS["train"], MARKET_FOLDERS["gallery"]} if version is None else set(MSMT17_FOLDERS[version])
    names = set(tree.names)
    for name in names:
        parts = name.split("/")[:-1][: _MAX_DEPTH + 1]
        for depth, part in enumerate(parts):
            prefix = "".join(f"{parent}/" for parent in parts[:depth])
            if part.lower() in marks and (version is None or prefix + "list_query.txt" in names):
                prefixes.add(prefix)
                break
    return sorted(prefixes)


def _read_layout(tree: FileTree, prefix: str, version: str | None) -> LabelledFiles:
    return _read_market(tree, prefix) if version is None else _read_msmt17(tree, prefix, version)


def _read_market(tree: FileTree, prefix: str) -> LabelledFiles:
    rows: dict[str, list[tuple[str, int, int]]] = {split: [] for split in MARKET_FOLDERS}
    folder_of = {f"{prefix}{folder}": split for split, folder in MARKET_FOLDERS.items()}
    for name in tree.names:
        folder, _, file = name.rpartition("/")
        if folder not in folder_of or not file.lower().endswith(IMAGE_SUFFIXES):
            continue
        ids = _MARKET_NAME.match(file)
        if ids is None:
            raise ValueError(
                f"{tree.path / name}: no ids in the file name; expected <person>_c<camera>..., such as "
                "0002_c1s1_000451_03.jpg, with person -1, 0 or above and camera 1 or above."
            )
        rows[folder_of[folder]].append((name, int(ids[1]), int(ids[2]) - 1))
    for folder, split in folder_of.items():
        is_there = (tree.path / folder).is_dir() if isinstance(tree, FolderTree) else bool(rows[split])
        if split == "train" and not is_there:
            del rows[split]
            continue
        if isinstance(tree, FolderTree) and not is_there:
            raise FileNotFoundError(
                f"{tree.path / folder}: no such folder; a Market-1501 tree has {', '.join(MARKET_FOLDERS.values())}."
            )
        if not rows[split]:
            raise ValueError(f"{tree.path / folder}: no image in it.")
    return LabelledFiles(tree, prefix, rows)


def _read_msmt17(tree: FileTree, prefix: str, version: str) -> LabelledFiles:
    files = LabelledFiles(tree, prefix, {split: [] for split in MSMT17_LISTS})
    # V2 comes as mask_train_v2 and as mask_train_V2.
    actual = {name.lower(): name for name in tree.names}
    for split, lists in MSMT17_LISTS.items():
        folder = MSMT17_FOLDERS[version][0 if split == "train" else 1]
        if split == "train" and not any((prefix + list_name).lower() in actual for list_name in lists):
            del files.rows[split]
            continue
        listed: set[str] = set()
        for list_name in lists:
            if (prefix + list_name).lower() not in actual:
                raise FileNotFoundError(
                    f"{tree.path / prefix / list_name}: no such file; MSMT17's lists name its images."
                )
            text = tree.read(actual[(prefix + list_name).lower()]).decode("utf-8", "replace")
            for number, line in enumerate(text.splitlines(), start=1):
                if not line.strip():
                    continue
                path, _, person = line.strip().rpartition(" ")
                ids = _MSMT17_NAME.match(path.rpartition("/")[2])
                if ids is None or not re.fullmatch(r"[0-9]{1,9}", person) or int(ids[1]) < 1:
                    raise ValueError(
                        f"{tree.path / prefix / list_name}, line {number}: expected <path> <person>, such as "
                        f"0000/0000_000_01_0303morning_0008_0.jpg 0; found {line[:100]!r}."
                    )
                name = actual.get(f"{prefix}{folder}/{path}".lower())
                if name is None:
                    files.missing.setdefault(split, []).append(f"{folder}/{path}")
                elif name in listed:
                    raise ValueError(f"{tree.path / prefix / list_name}, line {number}: {path[:100]!r} a second time.")
                else:
                    listed.add(name)
                    files.rows[split].append((name, MSMT17_FIRST_PERSON[split] + int(person), int(ids[1]) - 1))
        if not files.rows[split]:
            raise ValueError(f"{tree.path / prefix / folder}: no image that {', '.join(lists)} name.")
        files.rows[split].sort()
    return files


def _described(version: str | None) -> str:
    if version is None:
        return f"the folders {', '.join(MARKET_FOLDERS.values())}"
    return f"list_query.txt beside the folders {', '.join(MSMT17_FOLDERS[version])}"


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _some(names: Sequence[str], most: int = 10) -> list[str]:
    return list(names) if len(names) <= most else [*names[:most], f"and {len(names) - most} more"]


def _ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 as "1-3, 7"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(_some([str(a) if a == b else f"{a}-{b}" for a, b in spans]))
