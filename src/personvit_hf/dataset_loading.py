"""`datasets.load_dataset` of folders, parquet files and the Hub: literal paths, and errors that name what is wrong."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from .file_trees import walk_files
from .files import require_modest_yaml

_RESOLVE = (os.path.abspath, os.path.realpath)
EMBEDDINGS_FILE = "embeddings.json"  # is in each folder that `personvit embed` made


def parquet_files(folder: Path) -> list[str]:
    """Parquet files under a folder, sorted, without those of `personvit embed`, which hold no images."""
    files = [
        file for file in walk_files(folder) if file.endswith(".parquet") or os.path.basename(file) == EMBEDDINGS_FILE
    ]
    embedded = {os.path.dirname(file) for file in files if not file.endswith(".parquet")}
    return sorted(
        file
        for file in files
        if file.endswith(".parquet")
        and not (os.path.basename(file).startswith("shard-") and os.path.dirname(file) in embedded)
    )


def load_rows(source: Path | str, config: str | None = None, **options: Any) -> Any:
    """`datasets.load_dataset` with the wanted config where the data set defines it, and with errors that name it.

    Args:
        source: Folder, as a `Path`; or Hub data set or "parquet".
        config: Config to take if the data set's README defines it; else its default config is taken.
        options: Go to `datasets.load_dataset`; `data_files` of this machine by their `literal` names.

    Raises:
        FileNotFoundError: Neither a folder nor a Hub data set that can be reached.
        ValueError: Its files, splits or README can't be read.
    """
    try:
        name, config, more = load_arguments(source, config)
        return datasets.load_dataset(name, config, **options, **more)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{source}: no such folder, and no such data set reached on the Hub: {error}"
        ) from error
    except OSError:  # such as a full disk
        raise
    except Exception as error:  # READMEs and files of any content raise a dozen types
        raise ValueError(f"{options.get('data_files', source)}: can't be read: {error.__cause__ or error}") from error


def load_arguments(source: Path | str, config: str | None) -> tuple[str, str | None, dict[str, Any]]:
    """What `datasets.load_dataset` takes for a folder (a `Path`) by its literal name, a Hub data set or "parquet".

    Returns:
        Path, the config if the data set defines it, and keywords.
    """
    if isinstance(source, Path):
        source = source.resolve()  # as `datasets` does
        configs = readme_configs(source)
        if literal(source) != str(source):
            return "parquet", None, {"data_files": _literal_files(source, configs, config)}
    else:
        configs = datasets.get_dataset_config_names(source) if config is not None else ()
    return str(source), config if config in configs else None, {}


def readme_configs(folder: Path) -> MetadataConfigs:
    """The configs that the README of a folder defines.

    Raises:
        ValueError: It can't be read.
    """
    readme = folder / "README.md"
    if not readme.is_file():
        return MetadataConfigs()
    try:
        text = readme.read_text(encoding="utf-8-sig")
        if block := REGEX_YAML_BLOCK.search(text):
            require_modest_yaml(block[2])
        configs = MetadataConfigs.from_dataset_card_data(DatasetCard(text).data)
        for config in configs.values():
            _require_inside([config.get("data_files"), config.get("data_dir")])
        return configs
    except Exception as error:  # YAML of any content
        raise ValueError(f"{readme}: what it tells of the data set can't be read: {error}") from error


def _require_inside(paths: Any) -> None:
    """Raises a ValueError if paths of a README, in lists and dictionaries, lead out of its folder on this machine."""
    if isinstance(paths, dict | list):
        for path in paths.values() if isinstance(paths, dict) else paths:
            _require_inside(path)
    elif isinstance(paths, str) and ("::" in paths or not paths.startswith(("https://", "http://", "hf://"))):
        if "://" in paths or "::" in paths or os.path.isabs(paths) or ".." in paths.replace("\\", "/").split("/"):
            raise ValueError(f"{paths} lies outside its folder; name files in it")


def literal(path: str | os.PathLike) -> str:
    """A path of this machine as `datasets` must be given it: [, * and ? are patterns to it, "::" parts file systems.

    Raises:
        ValueError: There is "::" in it, which can't be given.
    """
    if "::" in os.fspath(path):
        raise ValueError(f'{path}: shards at a path with "::" in it can\'t be read; rename the folder or file.')
    return glob.escape(os.fspath(path))


def _literal_files(folder: Path, configs: MetadataConfigs, config: str | None) -> DataFilesDict:
    """The parquet files that `datasets` would find for a config if the folder's own name were no pattern."""
    name = config if config in configs else configs.get_default_config_name()
    if configs and name is None:
        raise ValueError(f"{folder}: none of its configs is the default: {', '.join(configs)}.")
    base, patterns = literal(folder), configs.get(name, {}).get("data_files")
    patterns = get_data_patterns(base) if patterns is None else sanitize_patterns(patterns)
    return DataFilesDict.from_patterns(patterns, base_path=base, allowed_extensions=[".parquet"])


def require_own_files(rows: datasets.Dataset, source: Path | str) -> datasets.Dataset:
    """`rows`, if those that hold a path in place of an image's content name files of the data set alone.

    Args:
        rows: Of parquet files of any origin.
        source: The folder they are in, or the name of the data set on the Hub, whose files are in the cache.

    Raises:
        ValueError: A path leads elsewhere on this machine.
    """
    caches = (datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE)
    folders = [
        resolve(folder) for folder in ([source] if isinstance(source, Path) else caches) for resolve in _RESOLVE
    ]
    for chunk in rows.data.column("image").chunks if "image" in rows.column_names else ():
        paths = chunk if pa.types.is_string(chunk.type) else None
        if pa.types.is_struct(chunk.type):
            fields = dict(zip((field.name for field in chunk.type), chunk.flatten(), strict=True))
            if fields.keys() >= {"bytes", "path"}:
                paths = fields["path"].filter(fields["bytes"].is_null())
        for path in () if paths is None else paths.drop_null().to_pylist():
            file = path.rpartition("::")[2]  # of an address in an archive, the archive
            if not any(Path(resolve(file)).is_relative_to(folder) for resolve in _RESOLVE for folder in folders):
                raise ValueError(
                    f"{source}: a row has no image but the path {path!r}, outside the data set, which is not read. "
                    "Put the images themselves into the column `image`."
                )
    return rows


def with_image_column(rows: datasets.Dataset, source: Any, decode: bool) -> datasets.Dataset:
    """`rows` with the column image as `datasets.Image(decode=decode)`; an error that names `source` if it can't be."""
    if "image" not in rows.column_names:
        raise ValueError(f"{source}: no column `image`; found {', '.join(rows.column_names)}.")
    try:
        return rows.cast_column("image", datasets.Image(decode=decode))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{source}: column `image` holds {rows.features['image']}, not images.") from error
