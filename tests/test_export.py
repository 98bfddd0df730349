"""Exported models compute what ours compute, in processes and libraries that don't know the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, ViTImageProcessor, ViTModel

from personvit_hf import PersonViTConfig, PersonViTForReID, PersonViTImageProcessor, PersonViTModel
from personvit_hf.cli import app
from personvit_hf.configuration_personvit import PRESETS
from personvit_hf.export import export_onnx, export_timm, export_torch, export_vit
from personvit_hf.loading import load_embedder

ROOT = Path(__file__).resolve().parents[1]
PERSONVIT = Path(sys.executable).with_name("personvit")
STATISTICS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}

NOT_PLAIN = [({"patch_stride": 12}, "patch_stride=12"), ({"stem": "ics"}, "stem"), ({"num_part_tokens": 3}, "part")]

every_neck = pytest.mark.parametrize("neck", [None, "before", "after"])


def make_model(neck=None, **settings) -> PersonViTModel | PersonViTForReID:
    """A model whose weights are spread out, so that no part of it is lost in rounding."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96}
    config = PersonViTConfig(**(sizes | {"num_labels": 3, "neck_feature": neck or "before"} | settings))
    torch.manual_seed(0)
    model = PersonViTModel(config) if neck is None else PersonViTForReID(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        if neck is not None:
            model.bottleneck.running_mean.normal_()
            model.bottleneck.running_var.uniform_(0.2, 3)
    return model.eval()


def make_processor(height=256, width=128) -> PersonViTImageProcessor:
    return PersonViTImageProcessor(size={"height": height, "width": width}, **STATISTICS)


@torch.no_grad()
def features(model, pixel_values) -> torch.Tensor:
    outputs = model(pixel_values)
    return outputs["embeddings"] if "embeddings" in outputs else outputs["pooler_output"]


def normalized_features(model, pixel_values) -> np.ndarray:
    return torch.nn.functional.normalize(features(model, pixel_values), dim=-1).numpy()


def run_onnx(file, pixel_values) -> np.ndarray:
    (embeddings,) = onnxruntime.InferenceSession(file).run(["embeddings"], {"pixel_values": pixel_values.numpy()})
    return embeddings


def run_without_the_package(code, *arguments, also_without=()) -> None:
    """Runs Python code where nobody can import personvit_hf (nor `also_without`)."""
    absent = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in ("personvit_hf", *also_without))
    process = subprocess.run(
        [sys.executable, "-c", absent + code, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr


@pytest.fixture(scope="module")
def crops() -> list[Image.Image]:
    """Person crops of different shapes: real photographs where the checkout has them, else the demo's."""
    folders = (ROOT.parent / "shared" / "data" / "mot15-reid-dev", ROOT / "examples" / "data")
    folder = next(folder for folder in folders if folder.is_dir())
    rows = datasets.load_dataset("parquet", data_files=str(folder / "gallery*.parquet"), split="train")
    return [rows[index]["image"].convert("RGB") for index in range(0, len(rows), len(rows) // 7)]


@pytest.fixture(scope="module")
def pixel_values(crops) -> torch.Tensor:
    return make_processor()(images=crops, return_tensors="pt").pixel_values


@every_neck
def test_stock_vit_gives_the_same_features(tmp_path, pixel_values, neck):
    model = make_model(neck)
    export_vit(model, make_processor(), tmp_path / "vit")
    vit, loading = AutoModel.from_pretrained(tmp_path / "vit", output_loading_info=True)
    assert type(vit) is ViTModel
    assert not any(loading.values()), loading
    with torch.no_grad():
        outputs = vit(pixel_values)
    expected = features(model, pixel_values)
    assert expected.std() > 0.1
    torch.testing.assert_close(outputs.last_hidden_state[:, 0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs.pooler_output, expected, atol=1e-5, rtol=0)
    if neck is None:
        with torch.no_grad():
            tokens = model(pixel_values).last_hidden_state
        torch.testing.assert_close(outputs.last_hidden_state, tokens, atol=1e-5, rtol=0)


def test_stock_vit_needs_neither_package_nor_remote_code(tmp_path, crops, pixel_values):
    model = make_model()
    export_vit(model, make_processor(), tmp_path / "vit")
    assert not list(tmp_path.glob("vit/*.py"))
    assert "auto_map" not in (tmp_path / "vit" / "config.json").read_text()
    crops[0].save(tmp_path / "crop.png")
    run_without_the_package(
        "import torch\n"
        "from PIL import Image\n"
        "from transformers import AutoImageProcessor, AutoModel\n"
        "folder, crop, output = sys.argv[1:]\n"
        "processor = AutoImageProcessor.from_pretrained(folder)\n"
        "pixel_values = processor(images=Image.open(crop), return_tensors='pt').pixel_values\n"
        "with torch.no_grad():\n"
        "    tokens = AutoModel.from_pretrained(folder)(pixel_values).last_hidden_state\n"
        "torch.save((type(processor).__name__, pixel_values, tokens), output)\n",
        *(tmp_path / "vit", tmp_path / "crop.png", tmp_path / "output.pt"),
    )
    processor_name, stock_pixel_values, tokens = torch.load(tmp_path / "output.pt")
    assert processor_name in ("ViTImageProcessor", "ViTImageProcessorPil")
    # torchvision's resize differs from PIL's by one grey level of 255 here and there, over the smallest deviation
    torch.testing.assert_close(stock_pixel_values, pixel_values[:1], atol=1.01 / 255 / 0.2, rtol=0)
    torch.testing.assert_close(tokens[:, 0], features(model, stock_pixel_values), atol=1e-5, rtol=0)


def test_stock_vit_carries_the_statistics(tmp_path):
    export_vit(make_model(), make_processor(), tmp_path / "vit")
    processor = ViTImageProcessor.from_pretrained(tmp_path / "vit")
    assert (processor.size["height"], processor.size["width"]) == (256, 128)
    assert [list(processor.image_mean), list(processor.image_std)] == list(STATISTICS.values())
    assert processor.resample == make_processor().resample


def test_the_exported_size_is_the_processors(tmp_path, crops):
    model, processor = make_model(), make_processor(320, 96)  # position embeddings of another grid
    export_vit(model, processor, tmp_path / "vit")
    export_timm(model, processor, tmp_path / "timm")
    pixel_values = processor(images=crops[:2], return_tensors="pt").pixel_values
    expected = features(model, pixel_values)
    with torch.no_grad():
        vit = AutoModel.from_pretrained(tmp_path / "vit")(pixel_values).pooler_output
        in_timm = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()(pixel_values)
    torch.testing.assert_close(vit, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(in_timm, expected, atol=1e-5, rtol=0)


@every_neck
def test_timm_gives_the_same_features(tmp_path, crops, pixel_values, neck):
    model = make_model(neck)
    export_timm(model, make_processor(), tmp_path / "timm")
    expected = features(model, pixel_values)
    from_folder = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    description = json.loads((tmp_path / "timm" / "config.json").read_text())
    by_name = timm.create_model(description["architecture"], **description["model_args"]).eval()
    by_name.load_state_dict(load_file(tmp_path / "timm" / "model.safetensors"))
    for created in (from_folder, by_name):
        with torch.no_grad():
            torch.testing.assert_close(created(pixel_values), expected, atol=1e-5, rtol=0)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(from_folder))
    # PIL's resize in both, so not a grey level apart
    torch.testing.assert_close(torch.stack([transform(crop) for crop in crops]), pixel_values, atol=1e-6, rtol=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_timm_names_are_those_of_the_presets(tmp_path, preset):
    config = PersonViTConfig.from_preset(preset, num_hidden_layers=1)
    export_timm(PersonViTModel(config), make_processor(), tmp_path / "timm")
    description = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert description["architecture"] == f"vit_{preset}_patch16_224"
    with torch.device("meta"):
        stock = timm.create_model(description["architecture"])
    width, heads, depth = PRESETS[preset]
    assert (stock.embed_dim, stock.blocks[0].attn.num_heads, len(stock.blocks)) == (width, heads, depth)


def test_half_precision_halves_the_weights(tmp_path):
    model = make_model()
    for half in (False, True):
        export_vit(model, make_processor(), tmp_path / f"vit{half}", half=half)
        export_timm(model, make_processor(), tmp_path / f"timm{half}", half=half)
    for kind in ("vit", "timm"):
        sizes = [(tmp_path / f"{kind}{half}" / "model.safetensors").stat().st_size for half in (True, False)]
        assert sizes[0] < 0.55 * sizes[1]
    assert AutoModel.from_pretrained(tmp_path / "vitTrue").dtype == torch.float16


@pytest.mark.parametrize("half", [False, True])
def test_onnx_gives_the_same_embeddings_at_any_batch_size(tmp_path, pixel_values, half):
    model, file = make_model("after"), tmp_path / "model.onnx"
    export_onnx(model, make_processor(), file, half=half)
    assert os.listdir(tmp_path) == ["model.onnx"]
    onnx.checker.check_model(file)
    expected = normalized_features(model, pixel_values)
    for batch_size in (1, 2, len(pixel_values)):
        embeddings = run_onnx(file, pixel_values[:batch_size])
        assert embeddings.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(embeddings, expected[:batch_size], atol=1e-4, rtol=0)
    # PyTorch's exporter multiplies out what has less than 8192 entries
    matrices = [tensor for tensor in onnx.load(file).graph.initializer if np.prod(tensor.dims) > 8192]
    assert len(matrices) == 4
    stored = {tensor.data_type for tensor in matrices if "position" not in tensor.name}
    assert stored == {onnx.TensorProto.INT16 if half else onnx.TensorProto.FLOAT}


def test_onnx_tells_how_to_use_it(tmp_path):
    model, folder = make_model(), tmp_path / "my-model"
    model.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    export_onnx(*load_embedder(str(folder)), tmp_path / "model.onnx", normalize=False)
    contents = onnx.load(tmp_path / "model.onnx")
    metadata = {entry.key: entry.value for entry in contents.metadata_props}
    assert metadata["model"] == "my-model"
    assert {name: json.loads(metadata[name]) for name in STATISTICS} == STATISTICS
    assert json.loads(metadata["image_size"]) == [256, 128]
    assert json.loads(metadata["feature_size"]) == 64
    assert json.loads(metadata["normalized"]) is False
    assert len(metadata["weights_sha256"]) == 64
    assert metadata["precision"] == "float32"
    (operators,) = contents.opset_import
    assert operators.version == int(metadata["opset"]) == 18
    # and nothing about the machine that made it
    assert str(ROOT).encode() not in (tmp_path / "model.onnx").read_bytes()
    assert b".py" not in (tmp_path / "model.onnx").read_bytes()


def test_onnx_of_a_fixed_batch_size_newer_opset_and_raw_features(tmp_path, pixel_values):
    model, file = make_model(patch_stride=12), tmp_path / "model.onnx"  # overlapping patches are traced like any other
    export_onnx(model, make_processor(), file, normalize=False, batch_size=3, opset=20)
    (pixels,) = onnxruntime.InferenceSession(file).get_inputs()
    assert (pixels.name, pixels.type, pixels.shape) == ("pixel_values", "tensor(float)", [3, 3, 256, 128])
    np.testing.assert_allclose(run_onnx(file, pixel_values[:3]), features(model, pixel_values[:3]), atol=1e-4, rtol=0)
    assert onnx.load(file).opset_import[0].version == 20


def test_torch_program_runs_without_the_package(tmp_path, pixel_values):
    model, file = make_model("after"), tmp_path / "model.pt2"
    export_torch(model, make_processor(), file)
    torch.save(pixel_values, tmp_path / "pixel_values.pt")
    run_without_the_package(
        "import torch\n"
        "file, pixel_values, output = sys.argv[1:]\n"
        "extra = {'metadata.json': ''}\n"
        "model = torch.export.load(file, extra_files=extra).module()\n"
        "pixel_values = torch.load(pixel_values)\n"
        "batches = [model(pixel_values[:size]) for size in (1, 2, len(pixel_values))]\n"
        "torch.save((extra['metadata.json'], batches), output)\n",
        *(file, tmp_path / "pixel_values.pt", tmp_path / "output.pt"),
        also_without=["transformers"],
    )
    metadata, batches = torch.load(tmp_path / "output.pt")
    expected = normalized_features(model, pixel_values)
    for embeddings in batches:
        np.testing.assert_allclose(embeddings.numpy(), expected[: len(embeddings)], atol=1e-5, rtol=0)
    metadata = json.loads(metadata)
    assert metadata["image_mean"] == STATISTICS["image_mean"]
    assert metadata["normalized"] is True
    assert metadata["precision"] == "float32"


@pytest.mark.slow
def test_half_precision_of_a_whole_vit(tmp_path, crops):
    """ViT-S/16 of 12 layers, and what float16 does to it: the reason why weights are integers with scales."""
    torch.manual_seed(0)
    model = PersonViTModel(PersonViTConfig.from_preset("small")).eval()
    pixel_values = make_processor()(images=crops[:4], return_tensors="pt").pixel_values
    sizes = []
    for half in (False, True):
        file = tmp_path / f"{half}.onnx"
        export_onnx(model, make_processor(), file, half=half)
        difference = np.abs(run_onnx(file, pixel_values) - normalized_features(model, pixel_values)).max()
        assert difference < (5e-5 if half else 1e-6)
        sizes.append(file.stat().st_size)
    assert sizes[1] < 0.52 * sizes[0]


def test_torch_program_in_half_precision(tmp_path, pixel_values):
    model, file = make_model("before"), tmp_path / "model.pt2"
    export_torch(model, make_processor(), file, half=True, normalize=False, batch_size=len(pixel_values))
    program = torch.export.load(file)
    matrices = {weight.dtype for weight in program.state_dict.values() if weight.numel() > 192 and weight.ndim != 3}
    assert matrices == {torch.int16}
    embeddings = program.module()(pixel_values)
    assert embeddings.dtype == torch.float32
    expected = features(model, pixel_values)
    tolerance = 1e-4 * expected.norm(dim=1).max().item()
    torch.testing.assert_close(embeddings, expected, atol=tolerance, rtol=0)


def test_cameras_are_left_out_and_said_to_be(tmp_path, pixel_values, caplog):
    model = make_model(num_cameras=4)
    export_vit(model, make_processor(), tmp_path / "vit")
    assert "4 cameras" in caplog.text
    with torch.no_grad():
        exported = AutoModel.from_pretrained(tmp_path / "vit")(pixel_values).pooler_output
        assert not torch.allclose(exported[:1], model(pixel_values[:1], camera_ids=torch.tensor([1])).pooler_output)
    torch.testing.assert_close(exported, features(model, pixel_values), atol=1e-5, rtol=0)
    caplog.clear()
    export_torch(model, make_processor(), tmp_path / "model.pt2")
    assert "4 cameras" in caplog.text


@pytest.mark.parametrize(("settings", "reason"), NOT_PLAIN)
@pytest.mark.parametrize("export", [export_vit, export_timm])
def test_what_a_plain_vit_cannot_compute_is_refused(tmp_path, export, settings, reason):
    with pytest.raises(ValueError, match=f"{reason}.*use onnx or torch"):
        export(make_model(**settings), make_processor(), tmp_path / "out")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(("settings", "reason"), NOT_PLAIN[1:])
def test_what_is_no_plain_vit_can_be_traced(tmp_path, pixel_values, settings, reason):
    model = make_model(num_hidden_layers=1, **settings)
    export_onnx(model, make_processor(), tmp_path / "model.onnx")
    export_torch(model, make_processor(), tmp_path / "model.pt2")
    expected = normalized_features(model, pixel_values[:3])
    np.testing.assert_allclose(run_onnx(tmp_path / "model.onnx", pixel_values[:3]), expected, atol=1e-4, rtol=0)
    program = torch.export.load(tmp_path / "model.pt2").module()
    np.testing.assert_allclose(program(pixel_values[:3]).detach(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{"hidden_act": "relu"}, {"layer_norm_eps": 1e-12}])
def test_what_timm_cannot_compute_is_refused(tmp_path, settings):
    with pytest.raises(ValueError, match="timm.*" + next(iter(settings))):
        export_timm(make_model(**settings), make_processor(), tmp_path / "out")
    export_vit(make_model(**settings), make_processor(), tmp_path / "vit")


@pytest.mark.parametrize(("export", "suffix"), [(export_onnx, ".onnx"), (export_torch, ".pt2")])
def test_wrong_settings_of_traced_exports(tmp_path, export, suffix):
    with pytest.raises(ValueError, match=f"must end in \\{suffix}"):
        export(make_model(), make_processor(), tmp_path / "model.bin")
    with pytest.raises(ValueError, match="batch_size"):
        export(make_model(), make_processor(), tmp_path / f"model{suffix}", batch_size=0)
    with pytest.raises(ValueError, match="250x128"):
        export(make_model(), make_processor(250, 128), tmp_path / f"model{suffix}")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("opset", [17, 1000])
def test_an_opset_that_cannot_be_written_is_refused(tmp_path, opset):
    with pytest.raises(ValueError, match=f"opset.*{opset}"):
        export_onnx(make_model(num_hidden_layers=1), make_processor(), tmp_path / "model.onnx", opset=opset)
    assert not os.listdir(tmp_path)


def test_weights_beyond_one_onnx_file_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("personvit_hf.export.ONNX_MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="GiB"):
        export_onnx(make_model(), make_processor(), tmp_path / "model.onnx")


def test_a_failed_export_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "model.onnx"
    file.write_text("old")
    with pytest.raises(FileExistsError):
        export_onnx(make_model(), make_processor(), file)

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("torch.onnx.export", full_disk)
    with pytest.raises(OSError, match="No space"):
        export_onnx(make_model(), make_processor(), file, overwrite=True)
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"onnxscript is not installed.*personvit-hf\[export\]"):
        export_onnx(make_model(), make_processor(), tmp_path / "model.onnx")


def test_the_model_itself_stays_as_it_was(tmp_path):
    model = make_model("after").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_timm(model, make_processor(), tmp_path / "timm", half=True)
    export_torch(model, make_processor(), tmp_path / "model.pt2", half=True)
    assert model.training and all(parameter.dtype == torch.float32 for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_command_exports_the_reid_feature(tmp_path, pixel_values):
    model = make_model("after")
    model.save_pretrained(tmp_path / "reid")
    make_processor().save_pretrained(tmp_path / "reid")

    command = ["export", str(tmp_path / "reid"), str(tmp_path / "vit"), "--to", "vit"]
    done = subprocess.run([PERSONVIT, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "vit") in done.stdout
    with torch.no_grad():
        exported = AutoModel.from_pretrained(tmp_path / "vit")(pixel_values).last_hidden_state[:, 0]
    torch.testing.assert_close(exported, features(model, pixel_values), atol=1e-5, rtol=0)

    for refused, reason in (
        (command, "--overwrite"),
        ([*command, "--normalize", "--batch", "2"], "takes no --batch or --normalize"),
    ):
        with pytest.raises((ValueError, OSError), match=reason):
            app(refused, standalone_mode=False)


@pytest.mark.slow
def test_command_exports_to_every_runtime(tmp_path, pixel_values):
    model = make_model("before")
    model.save_pretrained(tmp_path / "reid")
    make_processor().save_pretrained(tmp_path / "reid")
    outputs = {"timm": "timm", "onnx": "model.onnx", "torch": "model.pt2"}
    for runtime, name in outputs.items():
        options = [] if runtime == "timm" else ["--no-normalize", "--batch", "2"]
        command = [PERSONVIT, "export", tmp_path / "reid", tmp_path / name, "--to", runtime, *options]
        subprocess.run(command, check=True)
    expected = features(model, pixel_values[:2]).numpy()
    created = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    np.testing.assert_allclose(created(pixel_values[:2]).detach(), expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(run_onnx(tmp_path / "model.onnx", pixel_values[:2]), expected, atol=1e-4, rtol=0)
    program = torch.export.load(tmp_path / "model.pt2").module()
    np.testing.assert_allclose(program(pixel_values[:2]).detach(), expected, atol=1e-5, rtol=0)
