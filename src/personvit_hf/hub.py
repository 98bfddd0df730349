"""To the Hub: a model with its processor, card and code in one commit, at once or beside a training run."""

from __future__ import annotations

import json
import logging
import platform
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from .cards import CARD_FILE, ENVIRONMENT_FILE, SETTINGS_FILE, published_settings, write_card
from .checkpointing import save_model
from .files import read_json

logger = logging.getLogger(__name__)

T = TypeVar("T")

WAITS = (2.0, 4.0)  # seconds before the second attempt and the third, the last
PACKAGES = ("personvit-hf", "torch", "transformers", "accelerate", "datasets", "numpy")
RUN_FILES = ("results.json", "metrics.jsonl", ENVIRONMENT_FILE)
# what from_pretrained would take for weights: an older one must not stay beside a new one
_WEIGHTS = re.compile(r"(model|pytorch_model)([\w-]*)\.(safetensors|bin)(\.index\.json)?")


def push_to_hub(
    model: PreTrainedModel | str | Path,
    repo_id: str,
    image_processor: BaseImageProcessor | None = None,
    *,
    private: bool | None = None,
    token: str | None = None,
    license: str = "other",
    commit_message: str = "Upload model, image processor, card and code",
) -> CommitInfo:
    """Publishes a model, its image processor, its card and its code in one commit: all of them, or nothing.

    Of a folder only these files go: weights, configurations, code, the card, and what the training scripts write
    (settings without this machine's paths). Checkpoints and anything else stay. The repository is created if there
    is none. A fault of the network or the Hub is tried again twice.

    Args:
        model: A folder that `save_pretrained` of model and image processor wrote, or a model.
        repo_id: "owner/name", or "name" for the token's owner.
        image_processor: The model's own, if `model` is not a folder.
        private: Whether a new repository is private; None for the owner's default.
        token: Token of the Hub; None for HF_TOKEN or the one of `hf auth login`.
        license: As in `write_card`.
        commit_message: First line of the commit.

    Returns:
        The commit; `commit_url` is its address.

    Raises:
        FileNotFoundError: if a file of the model is missing, or the repository can't be seen with this token.
        ValueError: if a file or `repo_id` is broken, or the repository is public and `private` was asked for.
        PermissionError: if there is no token, or it may not write there.
        ConnectionError: if the Hub can't be reached or fails.
    """
    if isinstance(model, (str, Path)):
        folder = Path(model)
        write_card(folder, repo_id, license)
        _files_to_push(folder)  # what can't be published creates no repository
        repo_id = prepare_repo(repo_id, private, token)
        write_card(folder, repo_id, license)  # with its full name
        return _commit_folder(folder, repo_id, token, commit_message)
    if image_processor is None:
        raise ValueError("`image_processor` is missing: a model is published with its own.")
    with tempfile.TemporaryDirectory(prefix="personvit-push-") as folder:
        model.save_pretrained(folder)
        image_processor.save_pretrained(folder)
        return push_to_hub(
            folder, repo_id, private=private, token=token, license=license, commit_message=commit_message
        )


def prepare_repo(repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Creates a repository if there is none, and checks that this token may write to it.

    Returns:
        Its full name, "owner/name".

    Raises:
        PermissionError, FileNotFoundError, ValueError, ConnectionError: As in `push_to_hub`.
    """
    if not (token or get_token()):
        raise PermissionError(
            f"{repo_id}: no token of the Hub. Run `hf auth login`, or set HF_TOKEN to a token with the right to write."
        )
    api = HfApi(token=token)

    def prepare() -> str:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.auth_check(name, write=True)
        if private and not api.model_info(name).private:
            raise ValueError(
                f"{name} exists and is public, and a private repository was asked for. Make it private in its "
                "settings on the Hub, or choose another name."
            )
        return name

    return _with_retries(prepare, repo_id)


def _commit_folder(folder: Path, repo_id: str, token: str | None, commit_message: str) -> CommitInfo:
    files = _files_to_push(folder)
    settings = published_settings(folder)
    api = HfApi(token=token)

    def commit() -> CommitInfo:
        # anew for each attempt: what the one before it brought to the Hub is then found there
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path.name, str(path)) for path in files
        ]
        if settings:
            operations.append(CommitOperationAdd(SETTINGS_FILE, yaml.safe_dump(settings, sort_keys=False).encode()))
        ours = {path.name for path in files}
        stale = [name for name in api.list_repo_files(repo_id) if _WEIGHTS.fullmatch(name) and name not in ours]
        operations += [CommitOperationDelete(name) for name in stale]
        return api.create_commit(repo_id, operations, commit_message=commit_message)

    return _with_retries(commit, repo_id)


def _files_to_push(folder: Path) -> list[Path]:
    """The model's files, once they are sure to be whole.

    Raises:
        FileNotFoundError: if one is missing.
        ValueError: if the weights are cut short, or a file is a link that leaves the folder (but to the Hub's cache).
    """
    config = json.loads((folder / "config.json").read_text())  # write_card has read it, and the processor's
    index = folder / "model.safetensors.index.json"
    weights = [folder / "model.safetensors"]
    if not weights[0].is_file() and index.is_file():
        weights = sorted(
            {folder / Path(str(name)).name for name in json.loads(index.read_text())["weight_map"].values()}
        )
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    references = [config.get("auto_map"), processor.get("auto_map")]
    code = {folder / Path(f"{module}.py").name for module in _modules(references)}
    code |= {Path(path) for entry in code if entry.is_file() for path in get_relative_import_files(entry)}
    code = {path for path in code if path.parent == folder}  # an import can name a module anywhere on this machine
    if not code:
        raise FileNotFoundError(f"{folder}: config.json has no `auto_map`, so no code; save with `save_pretrained`.")
    needed = [folder / name for name in ("config.json", "preprocessor_config.json", CARD_FILE)]
    needed += [*weights, *sorted(code)]
    missing = [path.name for path in needed if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: no {', '.join(missing)}. Save the model and its image processor there.")
    for path in weights:
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file: {error}") from error
    extra = [index] if len(weights) > 1 or weights[0].name != "model.safetensors" else []
    files = needed + [path for path in (*extra, *(folder / name for name in RUN_FILES)) if path.is_file()]
    _require_inside(folder, [*files, folder / SETTINGS_FILE])
    return files


def _require_inside(folder: Path, files: list[Path]) -> None:
    """Raises a ValueError if a file is a link to somewhere else than the folder or the Hub's cache."""
    inside = [folder.resolve(), Path(constants.HF_HUB_CACHE).resolve()]
    if inside[0].parent.name == "snapshots":  # of a cache at another place
        inside.append(inside[0].parents[1] / "blobs")
    for path in files:
        if not any(path.resolve().is_relative_to(place) for place in inside):
            raise ValueError(
                f"{path}: a link to {path.resolve()}, outside the folder: put the file there, or remove it."
            )


def _modules(references: Any) -> set[str]:
    """The modules in `auto_map`s such as {"AutoModel": "modeling_x.Model", "AutoImageProcessor": [None, "y.Z"]}."""
    if isinstance(references, dict):
        references = list(references.values())
    if isinstance(references, list):
        return set().union(*map(_modules, references))
    return {str(references).split("--")[-1].split(".")[0]} if references else set()


def _with_retries(call: Callable[[], T], repo_id: str) -> T:
    """What `call` returns; faults that may pass are tried again, others are told in our words."""
    waits = iter(WAITS)
    while True:
        try:
            return call()
        except Exception as error:  # the client raises its transport's own errors, wrapped for uploads
            cause, wait = _http_cause(error), next(waits, None)
            told = isinstance(error, ValueError) and error is not cause  # such as a card that the Hub refuses
            if cause is None or told:
                raise
            if wait is None or not _may_pass(cause):
                raise _explained(cause, repo_id) from error
            logger.warning("%s: %s; trying again in %.0f s.", repo_id, _first_line(cause), wait)
            time.sleep(wait)


def _http_cause(error: BaseException | None) -> Exception | None:
    while error is not None:
        if isinstance(error, (HTTPError, OfflineModeIsEnabled)):
            return error
        error = error.__cause__
    return None


def _status(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _may_pass(error: Exception) -> bool:
    if isinstance(error, OfflineModeIsEnabled):
        return False
    status = _status(error)
    return status is None or status == 429 or status >= 500


def _explained(error: Exception, repo_id: str) -> OSError:
    status, found = _status(error), _first_line(error)
    if isinstance(error, OfflineModeIsEnabled):
        return ConnectionError(f"{repo_id}: HF_HUB_OFFLINE is set, so nothing can be pushed.")
    if status == 403:
        return PermissionError(
            f"{repo_id}: this token may not write there ({found}). Take one with the right to write, of an account "
            "that owns the repository or belongs to its organisation."
        )
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return PermissionError(f"{repo_id}: the Hub doesn't accept this token ({found}). Run `hf auth login`.")
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(f"{repo_id}: no such repository, or a private one that this token may not see.")
    return ConnectionError(
        f"{repo_id}: the Hub could not be reached or failed ({found}). A commit is there as a whole or not at all; "
        "push again."
    )


def _first_line(error: Exception) -> str:
    server_message = getattr(error, "server_message", None)
    return server_message or (str(error).strip().splitlines() or [type(error).__name__])[0]


class RunPublisher:
    """What a training run leaves for others: its card, and with `push_to_hub` its model on the Hub.

    Pushes run in a thread beside the training. A push that fails is logged and never stops the run; an error that no
    later push could mend (no token, no right to write, a bad name) is raised here, before training starts. Create
    and call it on every process.

    Args:
        accelerator: The run's accelerator.
        arguments: The script's settings: output_dir, data, push_to_hub, hub_model_id, hub_private_repo.

    Raises:
        PermissionError, FileNotFoundError, ValueError: As in `push_to_hub`.
    """

    def __init__(self, accelerator: Accelerator, arguments: Any):
        self.accelerator = accelerator
        self.folder = Path(arguments.output_dir)
        self.repo_id = (arguments.hub_model_id or self.folder.resolve().name) if arguments.push_to_hub else None
        self.private = arguments.hub_private_repo or None
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.url: str | None = None
        if not accelerator.is_main_process:
            return
        if self.repo_id is not None:
            try:
                self.repo_id = prepare_repo(self.repo_id, self.private)
            except ConnectionError as error:
                logger.warning("%s Training starts; each checkpoint tries again.", error)
        device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type
        _record_environment(self.folder, arguments, device, accelerator.num_processes, self.repo_id)

    def checkpoint(self, model: torch.nn.Module, image_processor: BaseImageProcessor, step: int) -> None:
        """Pushes the model as it is now, in the background; not if the last push still runs.

        Args:
            model: The model that the accelerator prepared.
            image_processor: Its image processor.
            step: Optimizer steps done.
        """
        if self.repo_id is None:
            return
        busy = [self.thread is not None and self.thread.is_alive()]
        broadcast_object_list(busy)  # the main process has the thread; saving takes all of them
        if busy[0]:
            logger.info("Step %d: the last push still runs; the next checkpoint is pushed again.", step)
            return
        try:
            save_model(self.accelerator, model, image_processor, self.staging)
            if self.accelerator.is_main_process:
                self._copy_run_files()
        except OSError as error:  # such as a full disk; the run itself may still have what it needs
            logger.warning("Step %d is not pushed: %s", step, error)
            return
        if self.accelerator.is_main_process:
            self.thread = threading.Thread(target=self._push, args=(self.staging, f"Step {step}"), daemon=True)
            self.thread.start()

    def finish(self) -> str | None:
        """Writes the card of the finished run, and pushes the run's folder once the last push has ended.

        Returns:
            The address of the commit, on the main process; None without a push or if it failed, which is logged with
            what to do.
        """
        if not self.accelerator.is_main_process:
            return None
        write_card(self.folder, self.repo_id)
        if self.repo_id is None:
            return None
        if self.thread is not None:
            self.thread.join()
        self._push(self.folder, "End of training")
        shutil.rmtree(self.staging, ignore_errors=True)
        if self.error is not None:
            logger.error(
                "NOT PUSHED: %s\nThe trained model is in %s; push it with `personvit push %s %s`.",
                *(self.error, self.folder, self.folder, self.repo_id),
            )
        return self.url if self.error is None else None

    @property
    def staging(self) -> Path:
        """Where a checkpoint's model waits for the Hub while training goes on."""
        return self.folder / "hub.partial"

    def _copy_run_files(self) -> None:
        """What the card tells of a run under way; an older run's results are not of it."""
        for name in (SETTINGS_FILE, "metrics.jsonl"):
            shutil.copyfile(self.folder / name, self.staging / name)
        record = json.loads((self.folder / ENVIRONMENT_FILE).read_text())
        (self.staging / ENVIRONMENT_FILE).write_text(json.dumps(record | {"unfinished": True}, indent=2) + "\n")

    def _push(self, folder: Path, message: str) -> None:
        try:
            self.url = push_to_hub(folder, self.repo_id, private=self.private, commit_message=message).commit_url
            self.error = None
        except Exception as error:  # whatever it is, training is worth more than a push
            self.error = error
            logger.warning("%s: not pushed: %s", message, error)


def _record_environment(folder: Path, arguments: Any, device: str, num_processes: int, repo_id: str | None) -> None:
    """Writes what a card can't find out later: machine, versions, and which names are those of the Hub.

    Args:
        folder: The run's output folder, in which `environment.json` is written.
        arguments: The script's settings, with `data`, `model_name_or_path` and, in pre-training, `eval_data`.
        device: The accelerator's name, such as that of a GPU.
        num_processes: Processes that train together.
        repo_id: Where the run is pushed to, if it is.
    """
    names = {name: getattr(arguments, name, None) for name in ("data", "eval_data", "model_name_or_path")}
    record = {
        "hardware": {"device": device, "machine": platform.machine(), "processes": num_processes},
        "versions": {"python": platform.python_version(), **_versions()},
        "hub_ids": {name: value for name, value in names.items() if _is_hub_id(value)},
        "repo_id": repo_id,
    }
    base = names["model_name_or_path"]
    pushed_base = read_json(Path(base) / ENVIRONMENT_FILE).get("repo_id") if base and Path(base).is_dir() else None
    if pushed_base and "/" in pushed_base:
        record["hub_ids"]["model_name_or_path"] = pushed_base
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ENVIRONMENT_FILE).write_text(json.dumps(record, indent=2) + "\n")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a checkout on the path, not installed
            continue
    return found


def _is_hub_id(name: Any) -> bool:
    """Whether a data set or model that was found under this name is on the Hub and not on this machine."""
    if not isinstance(name, str) or name.count("/") != 1 or Path(name).expanduser().exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
