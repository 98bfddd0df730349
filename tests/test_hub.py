"""Publishing over real HTTP, with huggingface_hub's own client, to a small Hub on this machine (hub_server.py)."""

import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from hub_server import HubServer, running_hub
from huggingface_hub import ModelCard, constants, hf_hub_download
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForPreTraining
from typer.testing import CliRunner

from personvit_hf import (
    PersonViTConfig,
    PersonViTForPreTraining,
    PersonViTForReID,
    PersonViTImageProcessor,
    PersonViTModel,
    hub,
    push_to_hub,
)
from personvit_hf.cli import app
from personvit_hf.loading import load_embedder

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SIZES = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64, "patch_size": 8}
HEADS = {"num_cls_prototypes": 16, "num_patch_prototypes": 8, "projection_hidden_size": 16}
CONFIG = {**SIZES, **HEADS, "projection_bottleneck_size": 8, "image_size": [32, 16], "num_labels": 4}
FILES = {"README.md", "config.json", "preprocessor_config.json", "model.safetensors"}
CODE = {
    "configuration_personvit.py",
    "convolution_stem.py",
    "linear.py",
    "losses.py",
    "modeling_personvit.py",
    "image_processing_personvit.py",
}


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub of our own, to which this process's client talks as alice."""
    with running_hub() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        settings = {"ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
        cache = {"HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(tmp_path / "cache")}
        for name, value in {**settings, **cache}.items():
            monkeypatch.setattr(constants, name, value)
        # transformers' own client, which remembers the Hub it was made for
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        monkeypatch.setenv("HF_TOKEN", "hf_alice")
        monkeypatch.setattr(hub, "WAITS", (0.0, 0.0))
        yield server


@pytest.fixture
def impatient(monkeypatch):
    """The client waits for nothing between its attempts."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


@pytest.fixture
def folder(tmp_path) -> Path:
    return save(PersonViTModel(PersonViTConfig(**CONFIG)), tmp_path / "tiny")


def save(model: torch.nn.Module, folder: Path, **options) -> Path:
    model.save_pretrained(folder, **options)
    PersonViTImageProcessor(size={"height": 32, "width": 16}).save_pretrained(folder)
    return folder


def published(server: HubServer, name: str = "alice/tiny") -> dict[str, bytes]:
    tree = server.repos[f"models/{name}"].commits[-1]
    return {path: server.content(stored) for path, stored in tree.items() if path != ".gitattributes"}


def num_commits(server: HubServer, name: str = "alice/tiny") -> int:
    return len(server.repos[f"models/{name}"].commits) - 1  # the first one is the empty repository's


def test_all_of_a_model_is_published_in_one_commit(server, folder):
    commit = push_to_hub(folder, "tiny", private=True)
    assert commit.commit_url.startswith(server.url) and commit.commit_message.startswith("Upload model")
    assert num_commits(server) == 1 and server.repos["models/alice/tiny"].private
    assert set(published(server)) == FILES | CODE
    for name, content in published(server).items():
        assert content == (folder / name).read_bytes()


def test_large_weights_go_the_lfs_way_and_come_back(server, tmp_path):
    config = PersonViTConfig.from_preset("tiny", num_hidden_layers=6)
    model = PersonViTModel(config)
    push_to_hub(model, "alice/large", PersonViTImageProcessor())
    (oid,) = server.objects
    assert len(server.objects[oid]) > 10_000_000
    assert server.repos["models/alice/large"].commits[-1]["model.safetensors"] == oid
    again = AutoModel.from_pretrained("alice/large")
    assert type(again) is PersonViTModel
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    for revision in (None, "main"):
        again, processor = load_embedder("alice/large", revision)
        assert type(again) is PersonViTModel and type(processor) is PersonViTImageProcessor
    with pytest.raises(FileNotFoundError, match="alice/large: neither .* nope"):
        load_embedder("alice/large", "nope")

    # what is there already is neither sent nor committed again
    server.requests.clear()
    push_to_hub(model, "alice/large", PersonViTImageProcessor())
    assert num_commits(server, "alice/large") == 1
    assert not [request for request in server.requests if request.startswith("PUT") or "/commit/" in request]


def test_a_download_goes_on_where_it_was_cut_off(server, impatient, folder, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # what is kept are whole chunks
    push_to_hub(folder, "alice/tiny")
    (oid,) = server.objects
    server.fail(f"GET /objects/{oid}", "cut")
    path = hf_hub_download("alice/tiny", "model.safetensors")
    assert Path(path).read_bytes() == (folder / "model.safetensors").read_bytes()
    first, second = [request for request in server.requests if request.startswith(f"GET /objects/{oid}")]
    assert second == f"{first} bytes={len(server.objects[oid]) // 2 // 4096 * 4096}-"
    # and is not repeated, as its ETag is that of the file in the cache
    hf_hub_download("alice/tiny", "model.safetensors")
    assert server.requests[-1] == "HEAD /alice/tiny/resolve/main/model.safetensors"


def test_a_private_model_needs_its_owners_token(server, folder, monkeypatch):
    push_to_hub(folder, "alice/tiny", private=True)
    assert PersonViTModel.from_pretrained("alice/tiny", token="hf_alice_reads").config.hidden_size == 32
    for number, token in enumerate([False, "hf_bob"]):
        with pytest.raises(OSError, match="alice/tiny"):
            PersonViTModel.from_pretrained("alice/tiny", token=token, cache_dir=folder / str(number))


@pytest.mark.parametrize("action", [500, "cut", "lost"])
@pytest.mark.parametrize(
    "request_", ["repos/create", "auth-check", "tree", "preupload", "objects/batch", "PUT", "verify", "commit"]
)
def test_one_fault_on_the_way_is_mended(server, impatient, folder, request_, action):
    server.fail(request_, action)
    push_to_hub(folder, "alice/tiny")
    assert server.faults[0].times == 0
    assert set(published(server)) == FILES | CODE
    # one whole commit, also where the first was done but its answer lost
    assert num_commits(server) == 1


@pytest.mark.parametrize("action", [500, "cut"])
@pytest.mark.parametrize("request_", ["preupload", "PUT", "verify", "commit"])
def test_a_hub_that_keeps_failing_has_nothing_then_all(server, impatient, folder, request_, action):
    server.fail(request_, action, times=1000)
    with pytest.raises(ConnectionError, match="alice/tiny: .* push again"):
        push_to_hub(folder, "alice/tiny")
    assert num_commits(server) == 0 and published(server) == {}
    server.faults.clear()
    push_to_hub(folder, "alice/tiny")
    assert num_commits(server) == 1 and set(published(server)) == FILES | CODE


def test_an_older_version_stays_whole_while_the_new_one_fails(server, impatient, folder):
    push_to_hub(folder, "alice/tiny")
    before = published(server)
    save(PersonViTModel(PersonViTConfig(**CONFIG)), folder)
    server.fail("commit", 500, times=1000)
    with pytest.raises(ConnectionError):
        push_to_hub(folder, "alice/tiny")
    assert published(server) == before


def test_weights_of_an_older_version_are_removed(server, tmp_path):
    model = PersonViTModel(PersonViTConfig(**CONFIG))
    push_to_hub(save(model, tmp_path / "sharded", max_shard_size="20KB"), "alice/tiny")
    assert "model.safetensors.index.json" in published(server)
    again = PersonViTModel.from_pretrained("alice/tiny")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    push_to_hub(save(model, tmp_path / "whole"), "alice/tiny")
    assert set(published(server)) == FILES | CODE


def test_only_what_belongs_to_the_model_is_published(server, folder, tmp_path):
    (folder / "checkpoints").mkdir()
    for name in (".env", "person.jpg", "notes.txt", "helper.py", "optimizer.bin", "checkpoints/model.safetensors"):
        (folder / name).write_text("secret")
    settings = {"data": str(tmp_path / "data"), "epochs": 3, "output_dir": str(folder), "other": [f"{tmp_path}/x"]}
    (folder / "arguments.yaml").write_text(yaml.safe_dump(settings))
    push_to_hub(folder, "alice/tiny")
    files = published(server)
    assert set(files) == FILES | CODE | {"arguments.yaml"}
    assert yaml.safe_load(files["arguments.yaml"]) == {"epochs": 3}
    for name in files:
        assert str(tmp_path).encode() not in files[name]


def run_python(server: HubServer, tmp_path: Path, code: str, *arguments: str) -> None:
    """A process of its own, told of the Hub as users tell it: by the environment."""
    environment = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment, "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr


WITHOUT_THE_PACKAGE = r"""
import sys
sys.modules["personvit_hf"] = None  # whoever imports it gets an ImportError
import re, torch, transformers
from huggingface_hub import ModelCard

outputs = {}
for name, auto_class in [pair.split(":") for pair in sys.argv[2:]]:
    processor = transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=True)
    backbone = transformers.AutoModel.from_pretrained(name, trust_remote_code=True)
    model = getattr(transformers, auto_class).from_pretrained(name, trust_remote_code=True)
    assert all(type(x).__module__.startswith("transformers_modules.") for x in (processor, backbone, model))
    pixel_values = processor(images=torch.full((3, 50, 20), 99, dtype=torch.uint8), return_tensors="pt").pixel_values
    outputs[name] = (type(model).__name__, pixel_values, backbone(pixel_values).pooler_output, model.state_dict())
    # the card's own instructions, as they stand there; a repository that transformers filled has no such card
    card = ModelCard.load(name)
    for snippet in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL):
        exec(snippet, {})
        outputs[f"{name} card"] = card.data.library_name
torch.save(outputs, sys.argv[1])
"""


def test_a_process_without_the_package_loads_every_class_from_the_hub(server, tmp_path):
    torch.manual_seed(0)
    processor = PersonViTImageProcessor(size={"height": 32, "width": 16})
    models = {
        "alice/backbone": (PersonViTModel(PersonViTConfig(**CONFIG)), "AutoModel"),
        "alice/pretraining": (PersonViTForPreTraining(PersonViTConfig(**CONFIG)), "AutoModelForPreTraining"),
        "alice/reid": (PersonViTForReID(PersonViTConfig(**CONFIG)), "AutoModelForImageClassification"),
        "alice/after": (PersonViTForReID(PersonViTConfig(**CONFIG, neck_feature="after")), "AutoModel"),
    }
    for name, (model, _) in models.items():
        push_to_hub(model.eval(), name, processor, private=True)
    # what transformers itself pushes, in two commits and with an empty card, is complete too
    models["alice/stock"] = (models["alice/reid"][0], "AutoModelForImageClassification")
    models["alice/stock"][0].push_to_hub("alice/stock", private=True)
    processor.push_to_hub("alice/stock")
    pairs = [f"{name}:{auto_class}" for name, (_, auto_class) in models.items()]
    run_python(server, tmp_path, WITHOUT_THE_PACKAGE, str(tmp_path / "outputs.pt"), *pairs)
    outputs = torch.load(tmp_path / "outputs.pt")
    assert {name for name in outputs if name.endswith(" card")} == {f"{name} card" for name in models} - {
        "alice/stock card"
    }
    picture = torch.full((3, 50, 20), 99, dtype=torch.uint8)
    expected_pixels = processor(images=picture, return_tensors="pt").pixel_values
    for name, (model, auto_class) in models.items():
        class_name, pixel_values, feature, state = outputs[name]
        assert class_name == (type(model).__name__ if auto_class != "AutoModel" else "PersonViTModel")
        assert torch.equal(pixel_values, expected_pixels)
        backbone = getattr(model, "personvit", model)
        torch.testing.assert_close(feature, backbone(pixel_values).pooler_output.detach(), rtol=0, atol=1e-6)
        ours = model.state_dict() if auto_class != "AutoModel" else backbone.state_dict()
        assert all(torch.equal(state[key], ours[key]) for key in ours)


PUSH_A_DATA_SET = """
import sys
from huggingface_hub import DatasetCard
from personvit_hf import load_reid_dataset
from personvit_hf.cards import dataset_card

dataset = load_reid_dataset(sys.argv[1])
dataset.push_to_hub("alice/rendered", private=True)
dataset_card(dataset, "alice/rendered", license="cc0-1.0").push_to_hub("alice/rendered")
again = load_reid_dataset("alice/rendered")
for split, rows in dataset.items():
    assert rows["person_id"][:] == again[split]["person_id"][:]
    assert rows[0]["image"] == again[split][0]["image"]
assert DatasetCard.load("alice/rendered").data.license == "cc0-1.0"
"""


@pytest.mark.slow
def test_a_data_set_comes_back_from_the_hub_under_its_card(server, tmp_path):
    run_python(server, tmp_path, PUSH_A_DATA_SET, str(EXAMPLES / "data"))
    repo = server.repos["datasets/alice/rendered"]
    assert repo.private and len(repo.commits) == 3
    assert b"90 queries have a match" in repo.commits[-1]["README.md"]


# What users see when it can't work


def test_no_token(server, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match="alice/tiny: no token.*hf auth login"):
        push_to_hub(folder, "alice/tiny")
    assert not server.requests


@pytest.mark.parametrize("token", ["hf_alice_reads", "hf_bob"])
@pytest.mark.parametrize("exists", [False, True])
def test_no_right_to_write(server, folder, token, exists):
    if exists:
        push_to_hub(folder, "alice/tiny")
    with pytest.raises(PermissionError, match="alice/tiny: this token may not write there"):
        push_to_hub(folder, "alice/tiny", token=token)
    assert len(server.repos) == exists
    assert not exists or num_commits(server) == 1


def test_a_token_that_the_hub_does_not_know(server, folder):
    with pytest.raises(PermissionError, match="alice/tiny: the Hub doesn't accept this token.*hf auth login"):
        push_to_hub(folder, "alice/tiny", token="hf_wrong")


def test_a_repository_that_vanishes(server, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "prepare_repo", lambda repo_id, *_: repo_id)
        with pytest.raises(FileNotFoundError, match="alice/tiny: no such repository"):
            push_to_hub(folder, "alice/tiny")


def test_a_public_repository_where_a_private_one_was_asked_for(server, folder):
    push_to_hub(folder, "alice/tiny", private=False)
    with pytest.raises(ValueError, match="alice/tiny exists and is public"):
        push_to_hub(folder, "alice/tiny", private=True)


@pytest.mark.parametrize("name", ["alice/tiny/model", "alice/ti ny", "../tiny", "alice/tiny.git", ""])
def test_names_that_no_repository_can_have(server, folder, name):
    with pytest.raises(ValueError):
        push_to_hub(folder, name)
    assert not server.repos


def test_a_hub_that_is_not_there(server, folder, impatient):
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError, match="alice/tiny: the Hub could not be reached"):
        push_to_hub(folder, "alice/tiny")


def test_offline(server, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"):
        push_to_hub(folder, "alice/tiny")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors", *sorted(CODE)])
def test_a_folder_that_lacks_a_file_creates_no_repository(server, folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(name)):
        push_to_hub(folder, "alice/tiny")
    assert not server.repos


def test_weights_that_were_cut_short_are_not_published(server, folder):
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    with pytest.raises(ValueError, match=re.escape(str(weights))):
        push_to_hub(folder, "alice/tiny")
    assert not server.repos


def test_no_file_from_outside_the_folder_is_published(server, folder, tmp_path):
    outside = tmp_path / "private" / "notes.py"
    outside.parent.mkdir()
    outside.write_text("SECRET: 1\n")
    code = folder / "losses.py"
    code.write_text(code.read_text() + f'\n"""\nfrom .{outside.with_suffix("")} import SECRET\n"""\n')
    push_to_hub(folder, "tiny")
    assert set(published(server)) == FILES | CODE
    for name in ("metrics.jsonl", "arguments.yaml", "losses.py"):
        content = (folder / name).read_bytes() if (folder / name).exists() else b""
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(outside)
        with pytest.raises(ValueError, match=f"{name}: a link to {outside}"):
            push_to_hub(folder, "tiny")
        (folder / name).unlink()
        (folder / name).write_bytes(content or b"{}")


def test_a_folder_of_the_hub_s_cache_is_published_again(folder, tmp_path):
    hub.write_card(folder, "a/b")
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "1", tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    folder.rename(blobs)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(blob)
    assert {path.name for path in hub._files_to_push(snapshot)} == FILES | CODE


def test_a_card_that_the_hub_refuses_stops_the_push(server, folder):
    (folder / "README.md").write_text("---\ntags: 3\n---\n\n# My own card\n")
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        push_to_hub(folder, "alice/tiny")
    assert num_commits(server) == 0


def test_a_model_without_its_image_processor(server):
    with pytest.raises(ValueError, match="image_processor"):
        push_to_hub(PersonViTModel(PersonViTConfig(**CONFIG)), "alice/tiny")


def test_push_command(server, folder):
    result = CliRunner().invoke(app, ["push", str(folder), "alice/tiny", "--private", "--license", "cc-by-nc-4.0"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{server.url}/models/alice/tiny/commit/")
    assert server.repos["models/alice/tiny"].private
    assert ModelCard(published(server)["README.md"].decode()).data.license == "cc-by-nc-4.0"


# Beside a training run


@dataclass
class Arguments:
    output_dir: str
    data: str = "people"
    model_name_or_path: str | None = None
    push_to_hub: bool = True
    hub_model_id: str | None = None
    hub_private_repo: bool = False


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def run(tmp_path) -> Path:
    """The output folder of a run, which is called tiny."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "arguments.yaml").write_text("data: /home/somebody/people\nepochs: 2\n")
    (folder / "metrics.jsonl").write_text('{"step": 7, "loss": 1.5}\n')
    (folder / "results.json").write_text('{"mAP": 0.5}')  # of an older run in the same folder
    return folder


def test_training_does_not_wait_for_a_push(server, run, accelerator):
    model, processor = PersonViTForReID(PersonViTConfig(**CONFIG)), PersonViTImageProcessor()
    publisher = hub.RunPublisher(accelerator, Arguments(str(run)))
    upload_goes_on = server.hold("PUT")
    publisher.checkpoint(model, processor, 7)
    saved = contents(publisher.staging)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)  # training goes on
    publisher.checkpoint(model, processor, 8)  # while the first still runs
    assert publisher.thread.is_alive() and not upload_goes_on.is_set()
    assert contents(publisher.staging).items() >= saved.items()
    assert num_commits(server) == 0
    upload_goes_on.set()
    publisher.thread.join()
    assert server.repos["models/alice/tiny"].messages[1:] == ["Step 7"]
    assert published(server)["model.safetensors"] == saved["model.safetensors"]
    card = published(server)["README.md"].decode()
    assert "Not finished: step `7`" in card and "model-index" not in card
    assert "results.json" not in published(server)

    save(model, run)
    assert publisher.finish().startswith(server.url)
    assert server.repos["models/alice/tiny"].messages[2:] == ["End of training"]
    assert "Not finished" not in published(server)["README.md"].decode()
    assert "results.json" in published(server)
    assert not publisher.staging.exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_pushes_that_fail_are_told_and_stop_nothing(server, run, accelerator, impatient, caplog):
    publisher = hub.RunPublisher(accelerator, Arguments(str(run)))
    model, processor = PersonViTForReID(PersonViTConfig(**CONFIG)), PersonViTImageProcessor()
    server.fail("commit", 500, times=1000)
    publisher.checkpoint(model, processor, 7)
    publisher.thread.join()
    assert "Step 7: not pushed: alice/tiny" in caplog.text
    save(model, run)
    assert publisher.finish() is None
    assert "NOT PUSHED: alice/tiny: the Hub could not be reached or failed" in caplog.text
    assert f"personvit push {run} alice/tiny" in caplog.text
    assert AutoModelForImageClassification.from_pretrained(run).config.num_labels == 4
    server.faults.clear()
    assert CliRunner().invoke(app, ["push", str(run), "alice/tiny"]).exit_code == 0
    assert "results.json" in published(server)


def test_a_full_disk_for_the_pushed_copy_stops_nothing(server, run, accelerator, monkeypatch, caplog):
    publisher = hub.RunPublisher(accelerator, Arguments(str(run)))

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "save_model", full_disk)
    publisher.checkpoint(PersonViTModel(PersonViTConfig(**CONFIG)), PersonViTImageProcessor(), 7)
    assert "Step 7 is not pushed: [Errno 28] No space left on device" in caplog.text


def test_what_no_later_push_could_mend_stops_the_run_at_its_start(server, run, accelerator, monkeypatch):
    with pytest.raises(PermissionError, match="bob/tiny"):
        hub.RunPublisher(accelerator, Arguments(str(run), hub_model_id="bob/tiny"))
    with pytest.raises(ValueError):
        hub.RunPublisher(accelerator, Arguments(str(run), hub_model_id="alice/ti ny"))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match="no token"):
        hub.RunPublisher(accelerator, Arguments(str(run)))


def test_a_hub_that_is_down_at_the_start_is_asked_again(server, run, accelerator, impatient, caplog):
    server.fail("create", 503, times=3)
    publisher = hub.RunPublisher(accelerator, Arguments(str(run), hub_private_repo=True))
    assert "each checkpoint tries again" in caplog.text
    publisher.checkpoint(PersonViTModel(PersonViTConfig(**CONFIG)), PersonViTImageProcessor(), 7)
    publisher.thread.join()
    assert num_commits(server) == 1 and server.repos["models/alice/tiny"].private


PRETRAIN = {
    **{"config_overrides": json.dumps(SIZES | HEADS), "image_size": [32, 16], "local_size": [16, 8], "epochs": 1},
    **{"num_local_crops": 1, "batch_size": 128, "num_workers": 0, "save_epochs": 0.4, "keep_checkpoints": 1},
}
FINETUNE = {
    **{"image_size": [32, 16], "padding": 2, "identities_per_batch": 8, "images_per_identity": 4, "epochs": 1},
    **{"num_workers": 0, "save_epochs": 1, "keep_checkpoints": 1, "warmup_epochs": 1},
}


def run_script(script: str, **settings) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    argv, sys.argv = sys.argv, [script]
    for name, value in settings.items():
        sys.argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    try:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    finally:
        sys.argv = argv
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_the_training_scripts_push(server, tmp_path, capsys):
    hub_settings = {"push_to_hub": True, "hub_private_repo": True}
    data, runs = EXAMPLES / "data", {name: tmp_path / name for name in ("pretrained", "finetuned")}
    run_script("pretrain.py", data=data, output_dir=runs["pretrained"], **PRETRAIN, **hub_settings)
    base = {"model_name_or_path": runs["pretrained"], "hub_model_id": "alice/person-finder"}
    run_script("finetune.py", data=data, output_dir=runs["finetuned"], **FINETUNE, **base, **hub_settings)
    assert capsys.readouterr().out.count("On the Hub: ") == 2
    for name, kind in (("alice/pretrained", AutoModelForPreTraining), ("alice/person-finder", PersonViTForReID)):
        repo = server.repos[f"models/{name}"]
        assert repo.private and repo.messages[-1] == "End of training"
        assert re.match(r"Step \d", repo.messages[1])
        assert kind.from_pretrained(name).config.hidden_size == 32
        for content in published(server, name).values():
            assert str(tmp_path).encode() not in content and str(EXAMPLES).encode() not in content
    card = ModelCard(published(server, "alice/person-finder")["README.md"].decode())
    results = json.loads((runs["finetuned"] / "results.json").read_text())
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        name: round(100 * value, 2) for name, value in results.items() if name != "num_valid_queries"
    }
    assert card.data.base_model == "alice/pretrained"
    assert AutoModelForImageClassification.from_pretrained("alice/person-finder").config.num_labels == 40
