import json
from pathlib import Path

import pytest
import torch
from golden_fixtures import assert_same_weights
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel

from personvit_hf import (
    PersonViTConfig,
    PersonViTForPreTraining,
    PersonViTForReID,
    PersonViTImageProcessor,
    PersonViTModel,
)
from personvit_hf.loading import load_embedder, load_own_model, load_pretrained

SIZES = {
    **{"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64},
    **{"image_size": [32, 16], "patch_size": 8, "num_cls_prototypes": 16, "num_patch_prototypes": 8},
    **{"projection_hidden_size": 16, "projection_bottleneck_size": 8},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    PersonViTModel(PersonViTConfig(**SIZES)).save_pretrained(folder / "backbone")
    PersonViTForPreTraining(PersonViTConfig(**SIZES)).save_pretrained(folder / "pretraining")
    PersonViTForReID(PersonViTConfig(**SIZES, num_labels=4)).save_pretrained(folder / "reid")
    vit = {name: SIZES[name] for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "patch_size")}
    ViTModel(ViTConfig(**vit, intermediate_size=64, image_size=32)).save_pretrained(folder / "vit")
    return folder


@pytest.mark.parametrize("source", ["backbone", "pretraining", "reid"])
@pytest.mark.parametrize("model_class", [PersonViTForPreTraining, PersonViTForReID])
def test_every_kind_of_checkpoint_gives_its_backbone(checkpoints, source, model_class):
    backbone = PersonViTModel.from_pretrained(checkpoints / source).state_dict()
    model = load_pretrained(model_class, str(checkpoints / source), drop_path_rate=0.3, num_labels=4)
    assert model.config.drop_path_rate == 0.3
    loaded = model.personvit.state_dict()
    assert set(backbone) - set(loaded) <= {"embeddings.mask_token"}
    for name in set(backbone) & set(loaded):
        assert torch.equal(backbone[name], loaded[name])


def test_cameras_may_be_new(checkpoints, tmp_path):
    model = load_pretrained(PersonViTForReID, str(checkpoints / "pretraining"), num_cameras=6)
    assert model.personvit.embeddings.side_embeddings.shape == (6, 1, 32)
    model.save_pretrained(tmp_path)
    model = load_pretrained(PersonViTForReID, str(tmp_path), num_cameras=8)
    assert 0.015 < model.personvit.embeddings.side_embeddings.std() < 0.025


def test_checkpoint_of_another_architecture(checkpoints):
    with pytest.raises(ValueError, match="another architecture.*'vit'.*'personvit'") as caught:
        load_pretrained(PersonViTForReID, str(checkpoints / "vit"))
    assert str(checkpoints / "vit") in str(caught.value)


@pytest.mark.parametrize("found", ["nothing", "an empty folder", "an official file"])
def test_no_checkpoint(tmp_path, found):
    path = tmp_path / "model.pth"
    if found == "an empty folder":
        path.mkdir()
    if found == "an official file":
        torch.save({"cls_token": torch.zeros(1)}, path)
    with pytest.raises(FileNotFoundError, match=r"model\.pth: neither .*`convert_checkpoint`"):
        load_pretrained(PersonViTForReID, str(path))


def test_people_may_be_others(checkpoints):
    model = load_pretrained(PersonViTForReID, str(checkpoints / "reid"), num_labels=1000)
    assert model.classifier.weight.shape == (1000, 32)
    assert 0.0009 < model.classifier.weight.std() < 0.0011  # new, as in a new model
    kept = PersonViTForReID.from_pretrained(checkpoints / "reid").bottleneck
    assert torch.equal(model.bottleneck.weight, kept.weight)


@pytest.mark.parametrize(
    "overrides, example",
    [
        ({"num_hidden_layers": 3}, r"12 parameters .* personvit\.layers\.2\."),
        ({"intermediate_size": 48}, r"6 parameters .* personvit\.layers\.0\.mlp\.fc1\.bias"),
        ({"image_size": [64, 16]}, r"1 parameters .* personvit\.embeddings\.position_embeddings"),
    ],
)
def test_settings_that_would_leave_parts_of_the_backbone_random(checkpoints, overrides, example):
    with pytest.raises(ValueError, match=f"{example}.*`config_overrides`"):
        load_pretrained(PersonViTForReID, str(checkpoints / "pretraining"), **overrides)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    PersonViTForReID(PersonViTConfig(**SIZES, num_labels=4)).save_pretrained(tmp_path)
    PersonViTImageProcessor(size={"height": 32, "width": 16}).save_pretrained(tmp_path)
    return tmp_path


def change(file: Path, **settings) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize("model_class", [PersonViTForReID, PersonViTForPreTraining, PersonViTModel])
def test_the_model_that_a_checkpoint_is_for(checkpoint, model_class):
    saved = model_class(PersonViTConfig(**SIZES))
    saved.save_pretrained(checkpoint)
    model, processor = load_embedder(str(checkpoint))
    assert type(model) is (PersonViTForReID if model_class is PersonViTForReID else PersonViTModel)
    assert not model.training and processor.size.height == 32
    backbone = saved if model_class is PersonViTModel else saved.personvit
    loaded = getattr(model, "personvit", model)
    assert torch.equal(loaded.layernorm.weight, backbone.layernorm.weight)


class OwnReID(PersonViTForReID):
    pass


class OwnBackbone(PersonViTModel):
    pass


@pytest.mark.parametrize("neck_feature", ["before", "after"])
def test_the_feature_of_a_subclass_is_its_own(checkpoint, neck_feature):
    torch.manual_seed(0)
    saved = OwnReID(PersonViTConfig(**SIZES, neck_feature=neck_feature)).eval()
    torch.nn.init.uniform_(saved.bottleneck.running_mean)
    saved.save_pretrained(checkpoint)
    pixels = torch.rand(2, 3, 32, 16)
    with torch.no_grad():
        output = load_embedder(str(checkpoint))[0](pixels)
        feature = output.embeddings if "embeddings" in output else output.pooler_output
        assert torch.equal(feature, saved(pixels).embeddings)
    OwnBackbone(PersonViTConfig(**SIZES)).save_pretrained(checkpoint)
    assert type(load_embedder(str(checkpoint))[0]) is PersonViTModel


@pytest.mark.parametrize(
    "settings, found",
    [
        ({"patch_size": "16"}, "patch_size"),
        ({"image_size": 64}, "image_size"),
        ({"hidden_act": "foo"}, "foo"),
        ({"id2label": [1]}, "config.json"),
        ({"dtype": "float99"}, "config.json"),
        ({"dtype": "load"}, "config.json"),
        ({"dtype": "int8"}, "config.json"),
        ({"_attn_implementation": "owner/kernel"}, "names code elsewhere"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_cameras": 2**20, "num_views": 2**20}, "num_cameras"),
        ({"image_size": [2**20, 2**20]}, "image_size"),
        ({"architectures": 3}, "config.json"),
        ({"num_hidden_layers": 3}, r"lacks weights: \['personvit\.layers\.2"),
        ({"intermediate_size": 48}, "its weights can't be read"),
    ],
)
def test_a_config_that_does_not_fit(checkpoint, settings, found):
    change(checkpoint / "config.json", **settings)
    with pytest.raises(ValueError, match=f"(?s)^{checkpoint}: .*{found}"):
        load_embedder(str(checkpoint))


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "nan"])
def test_damaged_weights(checkpoint, damage):
    file = checkpoint / "model.safetensors"
    if damage == "other":
        save_file({"x": torch.zeros(3)}, file, {"format": "pt"})
    elif damage == "nan":
        weights = load_file(file)
        weights["personvit.layernorm.weight"][0] = torch.nan
        save_file(weights, file, {"format": "pt"})
    else:
        file.write_bytes(file.read_bytes()[: 1000 if damage == "cut" else 0])
    found = {"other": "lacks weights", "nan": "1 weights hold NaN"}.get(damage, "its weights can't be read")
    for load in (load_embedder, load_own_model):
        with pytest.raises(ValueError, match=f"^{checkpoint}: .*{found}"):
            load(str(checkpoint))
    if damage in ("cut", "empty"):
        with pytest.raises(ValueError, match=f"^{checkpoint}: .*{found}"):
            load_pretrained(PersonViTForReID, str(checkpoint))


@pytest.mark.parametrize("settings", [{"image_mean": "x"}, {"image_std": [0, 0, 0]}, {"rescale_factor": "a"}])
def test_processors_that_are_none(checkpoint, settings):
    change(checkpoint / "preprocessor_config.json", **settings)
    with pytest.raises(ValueError, match=f"^{checkpoint}: .*{next(iter(settings))}"):
        load_embedder(str(checkpoint))
    (checkpoint / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"^{checkpoint}: no image processor"):
        load_embedder(str(checkpoint))


@pytest.mark.parametrize("model_class", [PersonViTForReID, PersonViTForPreTraining, PersonViTModel])
@pytest.mark.parametrize("settings", [{}, {"share_projection_head": True}, {"share_teacher_projection_head": True}])
def test_own_folders_are_read_by_their_class(tmp_path, model_class, settings):
    model = model_class(PersonViTConfig(**SIZES | {"num_cls_prototypes": 8}, **settings))
    model.save_pretrained(tmp_path)
    loaded = load_own_model(tmp_path)
    assert type(loaded) is model_class
    assert_same_weights(loaded, model)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ('{"model_type": "vit", "architectures": ["ViTModel"]}', "another architecture"),
        ('{"model_type": "personvit", "architectures": ["ViTModel"]}', "a ViTModel, not one of PersonViTModel"),
        ("{", "not a valid JSON file"),
        ('{"architectures": 3}', "neither folder nor Hub name"),
        (None, "no folder with a config.json"),
    ],
)
def test_folders_of_other_models(tmp_path, config, found):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises((FileNotFoundError, ValueError), match=f"(?s)^{tmp_path}: .*{found}"):
        load_own_model(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_settings_that_are_nested_deeply(checkpoint, file):
    (checkpoint / file).write_text("[" * 100_000)
    with pytest.raises((FileNotFoundError, ValueError), match=f"^{checkpoint}: .*{file}"):
        load_embedder(str(checkpoint))


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 10**9, "width": 10**9}},
        {"size": {"height": -5, "width": 10}},
        {"size": {"shortest_edge": 10**6}},
        {"crop_size": {"height": 60000, "width": 60000}, "do_center_crop": True},
        {"pad_size": {"height": 60000, "width": 60000}, "do_pad": True},
    ],
)
def test_sizes_that_no_picture_has(checkpoint, settings):
    change(checkpoint / "preprocessor_config.json", **settings)
    with pytest.raises(ValueError, match=f"^{checkpoint}: `{next(iter(settings))}` in its preprocessor_config.json"):
        load_embedder(str(checkpoint))


def test_pickled_weights_are_not_read(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save(weights, checkpoint / "pytorch_model.bin")
    for load in (load_embedder, load_own_model, lambda name: load_pretrained(PersonViTForReID, name)):
        with pytest.raises(ValueError, match=f"^{checkpoint}: .*pickled.*personvit convert"):
            load(str(checkpoint))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "pytorch_model.bin", 5])
def test_an_index_names_files_beside_it_alone(checkpoint, name):
    (checkpoint / "model.safetensors").rename(checkpoint / "model-1.safetensors")
    names = dict.fromkeys(load_file(checkpoint / "model-1.safetensors"), "model-1.safetensors")
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    load_embedder(str(checkpoint))
    index.write_text(json.dumps({"metadata": {}, "weight_map": {**names, "x": name}}))
    with pytest.raises(ValueError, match=f"^{index}: expected names of .safetensors files"):
        load_embedder(str(checkpoint))
