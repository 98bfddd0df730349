"""The auto classes know PersonViT whenever they are imported, and the package imports nothing for it before."""

import json
import statistics
import subprocess
import sys

import pytest
from PIL import Image
from transformers import pipeline

from personvit_hf import PersonViTConfig, PersonViTForReID, PersonViTImageProcessor, PersonViTModel

SETTINGS = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
WITHOUT_THE_PACKAGE = """
import sys
sys.modules["personvit_hf"] = None
from PIL import Image
from transformers import pipeline
extract = pipeline("image-feature-extraction", model=sys.argv[1], trust_remote_code=True)
assert type(extract.model).__module__.startswith("transformers_modules."), type(extract.model)
print(extract(Image.new("RGB", (50, 90), (9, 99, 199)), pool=True)[0][:3])
"""


def run_python(code: str, *arguments) -> str:
    process = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(params=[PersonViTModel, PersonViTForReID], ids=["backbone", "reid"])
def checkpoint(request, tmp_path):
    folder = tmp_path / "checkpoint"
    request.param(PersonViTConfig(**SETTINGS)).save_pretrained(folder)
    PersonViTImageProcessor().save_pretrained(folder)
    return folder


def test_a_module_of_the_package_runs_as_a_program():
    command = [sys.executable, "-m", "personvit_hf.cli", "--help"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "convert" in process.stdout


def test_importing_the_package_imports_no_slow_library():
    heavy = ["torch", "torchvision", "transformers", "accelerate", "datasets", "cv2", "importlib.metadata"]
    assert run_python(f"import sys, personvit_hf; print([x for x in {heavy} if x in sys.modules])").strip() == "[]"


FIRST_IMPORTS = [
    "import personvit_hf; personvit_hf.PersonViTForPreTraining",
    "import personvit_hf, transformers.modeling_layers",
    pytest.param("from transformers import AutoModel, AutoImageProcessor", marks=pytest.mark.slow),
    pytest.param("import personvit_hf; from transformers import pipeline, ViTModel", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("first", FIRST_IMPORTS)
def test_registration_does_not_depend_on_the_order_of_imports(first):
    code = (
        f"{first}\n"
        "import personvit_hf\n"
        "from transformers import AutoConfig, AutoModel, AutoModelForPreTraining\n"
        "from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING\n"
        f"config = AutoConfig.for_model('personvit', **{SETTINGS})\n"
        "assert type(config) is personvit_hf.PersonViTConfig\n"
        "assert AutoModelForPreTraining._model_mapping[type(config)] is personvit_hf.PersonViTForPreTraining\n"
        "assert type(AutoModel.from_config(config)) is personvit_hf.PersonViTModel\n"
        "assert IMAGE_PROCESSOR_MAPPING[type(config)]['torchvision'] is personvit_hf.PersonViTImageProcessor\n"
        "import transformers.models.auto.modeling_auto as module\n"
        "print(type(module.__loader__).__name__, type(module.__spec__.loader).__name__)\n"
    )
    assert run_python(code).split() == ["SourceFileLoader", "SourceFileLoader"]


@pytest.mark.slow
def test_importing_the_package_adds_next_to_nothing_to_transformers():
    code = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
    pairs = [
        [float(run_python(code.format(names))) for names in ("transformers", "transformers, personvit_hf")]
        for _ in range(7)
    ]
    assert statistics.median(both - alone for alone, both in pairs) < 0.3  # measured: 0.002


def test_feature_pipeline_works_without_a_question(checkpoint, monkeypatch):
    def ask(question):
        raise AssertionError(question)

    monkeypatch.setattr("builtins.input", ask)
    extract = pipeline("image-feature-extraction", model=str(checkpoint))
    assert type(extract.model) is PersonViTModel
    crop = Image.new("RGB", (50, 90), (9, 99, 199))
    (tokens,) = extract(crop)
    (feature,) = extract(crop, pool=True)
    assert len(tokens) == 1 + 128 and len(feature) == 32
    assert feature == pytest.approx(tokens[0], abs=1e-6)
    assert len(extract([crop] * 3, batch_size=2, pool=True)) == 3
    if extract.model.config.architectures == ["PersonViTModel"]:
        remote = json.loads(run_python(WITHOUT_THE_PACKAGE, checkpoint))
        assert remote == pytest.approx(feature[:3], abs=1e-5)
