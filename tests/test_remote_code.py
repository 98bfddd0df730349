"""Checkpoints work from the code files beside their weights, in a process that can't import the package."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from personvit_hf import (
    PersonViTConfig,
    PersonViTForPreTraining,
    PersonViTForReID,
    PersonViTImageProcessor,
    PersonViTModel,
)

CONFIG = PersonViTConfig(
    **{"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64},
    **{"image_size": [32, 16], "patch_size": 8, "num_cls_prototypes": 16, "num_patch_prototypes": 8, "num_labels": 4},
    **{"projection_hidden_size": 16, "projection_bottleneck_size": 8},
)
CONFIG_WITH_EXTRAS = PersonViTConfig(**CONFIG.to_dict() | {"stem": "ics", "num_part_tokens": 3})
CHECKPOINTS = {
    "backbone": (PersonViTModel, "AutoModel"),
    "extras": (PersonViTModel, "AutoModel"),
    "pretraining": (PersonViTForPreTraining, "AutoModelForPreTraining"),
    "reid": (PersonViTForReID, "AutoModelForImageClassification"),
}
# a picture of another size and a batch of another grid: resizing and position interpolation are the remote code's too
PICTURE = np.random.default_rng(0).integers(0, 256, (45, 23, 3), dtype=np.uint8)

WITHOUT_THE_PACKAGE = """
import sys
sys.modules["personvit_hf"] = None  # whoever imports it gets an ImportError
from pathlib import Path
import numpy as np, torch, transformers

folder = Path(sys.argv[1])
picture = np.load(folder / "picture.npy")
outputs = {}
for pair in sys.argv[2:]:
    name, auto_class = pair.split(":")
    path = folder / name
    processor = transformers.AutoImageProcessor.from_pretrained(path, trust_remote_code=True)
    pixel_values = processor(images=picture, return_tensors="pt").pixel_values
    outputs[f"{name} pixel_values"] = pixel_values
    pil = transformers.AutoImageProcessor.from_pretrained(path, trust_remote_code=True, backend="pil")
    assert type(pil).__name__ == "PersonViTImageProcessorPil", type(pil)
    model = transformers.AutoModel.from_pretrained(path, trust_remote_code=True)
    assert type(model).__name__ == "PersonViTModel", type(model)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    head = getattr(transformers, auto_class).from_pretrained(path, trust_remote_code=True)
    assert type(head).__module__.startswith("transformers_modules."), type(head)
    with torch.no_grad():
        outputs[name] = model(pixel_values).pooler_output
        outputs[f"{name} larger"] = model(pixel_values.repeat(1, 1, 2, 3)).pooler_output
        if name == "reid":
            outputs["reid embeddings"] = head(pixel_values).embeddings
            outputs["reid logits"] = head(pixel_values).logits
        if name == "pretraining":
            views = pixel_values.repeat(2, 1, 1, 1, 1)
            outputs["pretraining loss"] = head(views.transpose(0, 1), bool_masked_pos=torch.eye(8)[None, :2]).loss
    # any checkpoint's backbone can be fine-tuned
    reid = transformers.AutoModelForImageClassification.from_pretrained(path, trust_remote_code=True)
    assert type(reid).__name__ == "PersonViTForReID", type(reid)
    # and what was loaded so can be saved and loaded again
    model.save_pretrained(folder / "again" / name)
    again = transformers.AutoModel.from_pretrained(folder / "again" / name, trust_remote_code=True)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
torch.save(outputs, folder / "outputs.pt")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Each kind of checkpoint with its processor, and `outputs.pt`: what they give without the package."""
    folder = tmp_path_factory.mktemp("remote_code")
    torch.manual_seed(0)
    for name, (model_class, _) in CHECKPOINTS.items():
        model = model_class(CONFIG_WITH_EXTRAS if name == "extras" else CONFIG)
        if name == "reid":
            torch.nn.init.uniform_(model.bottleneck.running_mean)
        if name == "pretraining":
            for parameter in model.student.parameters():
                torch.nn.init.normal_(parameter, std=0.1)  # no longer the teacher
        model.save_pretrained(folder / name)
        PersonViTImageProcessor(size={"height": 32, "width": 16}).save_pretrained(folder / name)
    np.save(folder / "picture.npy", PICTURE)
    pairs = [f"{name}:{auto_class}" for name, (_, auto_class) in CHECKPOINTS.items()]
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(folder), *pairs],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(folder / "modules")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return folder


@pytest.fixture(scope="module")
def outputs(folder) -> dict[str, torch.Tensor]:
    return torch.load(folder / "outputs.pt")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the other process has, since sums depend on it
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_backbone_and_processor_are_equal(folder, outputs, name):
    processor = PersonViTImageProcessor.from_pretrained(folder / name)
    pixel_values = processor(images=PICTURE, return_tensors="pt").pixel_values
    assert pixel_values.shape == (1, 3, 32, 16)
    assert torch.equal(outputs[f"{name} pixel_values"], pixel_values)
    model = PersonViTModel.from_pretrained(folder / name)
    with torch.no_grad():
        assert torch.equal(outputs[name], model(pixel_values).pooler_output)
        assert torch.equal(outputs[f"{name} larger"], model(pixel_values.repeat(1, 1, 2, 3)).pooler_output)


def test_reid_head_is_equal(folder, outputs):
    model = PersonViTForReID.from_pretrained(folder / "reid")
    with torch.no_grad():
        expected = model(outputs["reid pixel_values"])
    assert torch.equal(outputs["reid embeddings"], expected.embeddings)
    assert torch.equal(outputs["reid logits"], expected.logits)


def test_pretraining_loss_is_equal(folder, outputs):
    model = PersonViTForPreTraining.from_pretrained(folder / "pretraining")
    views = outputs["pretraining pixel_values"].repeat(2, 1, 1, 1, 1).transpose(0, 1)
    with torch.no_grad():
        expected = model(views, bool_masked_pos=torch.eye(8)[None, :2]).loss
    assert torch.equal(outputs["pretraining loss"], expected)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_code_files_lie_beside_the_weights(folder, name):
    files = {path.name for path in (folder / name).iterdir()}
    assert {"configuration_personvit.py", "modeling_personvit.py", "image_processing_personvit.py"} <= files
    auto_map = json.loads((folder / name / "config.json").read_text())["auto_map"]
    assert {"AutoConfig", "AutoModel", "AutoModelForImageClassification", CHECKPOINTS[name][1]} <= set(auto_map)
    for reference in auto_map.values():
        assert f"{reference.split('.')[0]}.py" in files


def test_a_subclass_elsewhere_saves_the_code_that_its_configuration_names(tmp_path, monkeypatch):
    (tmp_path / "own_model.py").write_text(
        "from personvit_hf import PersonViTForReID\n\n\nclass Own(PersonViTForReID):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = importlib.import_module("own_model").Own(CONFIG)
    model.save_pretrained(tmp_path / "own")
    named = {f"{name.split('.')[0]}.py" for name in model.config.auto_map.values()}
    saved = {path.name for path in (tmp_path / "own").glob("*.py")}
    assert named | {"linear.py", "losses.py", "convolution_stem.py", "modeling_personvit.py"} <= saved
