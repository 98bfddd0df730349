"""The layouts of the public data sets in miniature, with their real naming rules."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed=0, format="JPEG", size=(8, 16), mode="RGB", **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(content, format, **options)
    return content.getvalue()


MARKET = (
    "bounding_box_train/0002_c1s1_000451_03.jpg",
    "bounding_box_train/0007_c3s2_000451_03.jpg",
    "query/0012_c2s1_000001_00.jpg",
    "bounding_box_test/-1_c1s1_000401_03.jpg",
    "bounding_box_test/0000_c3s1_000001_00.jpg",
    "bounding_box_test/0012_c5s1_000001_01.jpg",
)
DUKE = (
    "bounding_box_train/0001_c2_f0046182.jpg",
    "query/0005_c2_f0046985.jpg",
    "bounding_box_test/0005_c5_f0051781.jpg",
    "bounding_box_test/0003_c8_f0051781.jpg",
)
MSMT17_LISTS = {
    "list_train.txt": (
        "train",
        ["0000/0000_000_01_0303morning_0008_0.jpg 0", "0001/0001_000_05_0303noon_0002_1.jpg 1"],
    ),
    "list_val.txt": ("train", ["0000/0000_001_15_0303morning_0009_0.jpg 0"]),
    "list_query.txt": ("test", ["0000/0000_000_02_0303afternoon_0010_0.jpg 0"]),
    "list_gallery.txt": (
        "test",
        ["0000/0000_001_03_0303morning_0011_0.jpg 0", "0001/0001_000_04_0113noon_0012_0.jpg 1"],
    ),
}


def jpegs(names, prefix=""):
    """{name: content}, with a different picture under each name."""
    return {prefix + name: picture(seed) for seed, name in enumerate(names)}


def msmt17(train="train", test="test"):
    files = {}
    for name, (half, lines) in MSMT17_LISTS.items():
        files[name] = ("\n".join(lines) + "\n").encode()
        folder = train if half == "train" else test
        files |= jpegs(f"{folder}/{line.split()[0]}" for line in lines)
    return files


def to_folder(root: Path, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def to_archive(path: Path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(path, f"w:{'gz' if path.suffix == '.gz' else ''}") as archive:
            for name, content in reversed(files.items()):  # not in the order of their names
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path
