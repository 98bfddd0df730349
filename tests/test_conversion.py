from __future__ import annotations

import re

import pytest
import torch
from golden_fixtures import GOLDEN, assert_same_weights, assert_within, load_golden, load_official, under
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel

from personvit_hf import PersonViTConfig, PersonViTForPreTraining, PersonViTForReID, PersonViTModel
from personvit_hf.checkpoint_names import OFFICIAL_HEAD_NAMES, OFFICIAL_LAYER_NAMES, OFFICIAL_NAMES
from personvit_hf.checkpoint_sizes import resize_position_embeddings
from personvit_hf.conversion import convert_checkpoint, convert_with_report, save_conversion

FEATURES, _ = load_golden("personvit_pretrain_features")
POSITIONS, POSITION_FACTS = load_golden("pos_embed_resize")
TOLERANCE = 1e-5  # what README.md beside the fixtures states

PRETRAINING = "official_personvit_pretrain"
REID, REID_WITH_CAMERAS = "official_personvit_reid", "official_personvit_reid_sie"
HEADS = {PRETRAINING: 3, "official_personvit_pretrain_noargs": 3, REID: 5, REID_WITH_CAMERAS: 5}


def convert_official(name: str, target: str = "auto", **settings):
    return convert_checkpoint(GOLDEN / f"{name}.pth", target, num_attention_heads=HEADS[name], **settings)


@pytest.fixture
def convert(tmp_path):
    """Converts contents that were written to a file of their own."""

    def write_and_convert(contents, target: str = "auto", **settings):
        torch.save(contents, tmp_path / "file.pth")
        return convert_checkpoint(tmp_path / "file.pth", target, **{"num_attention_heads": 3} | settings)[0]

    return write_and_convert


def bare_teacher() -> dict[str, torch.Tensor]:
    """The official teacher's backbone alone, as the official tools extract it."""
    return under(load_official(PRETRAINING)["teacher"], "backbone.")


# What comes out


@pytest.mark.parametrize("name", [PRETRAINING, "official_personvit_pretrain_noargs"])
def test_pretraining_file(name):
    backbone, processor = convert_official(name)
    model, _ = convert_official(name, "pretraining")
    assert type(backbone) is PersonViTModel and type(model) is PersonViTForPreTraining
    assert not backbone.training and not model.training
    assert_same_weights(backbone, model.personvit)
    teacher = bare_teacher()
    assert torch.equal(backbone.layers[2].attention.qkv_proj.weight, teacher["blocks.2.attn.qkv.weight"])
    student = under(load_official(name)["student"], "module.backbone.")
    assert torch.equal(model.student.embeddings.mask_token[0], student["masked_embed"])
    assert torch.equal(backbone.embeddings.mask_token[0], student["masked_embed"])  # the teacher has none
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (48, 3, 192)
    assert (config.image_size, config.patch_size, config.num_attention_heads) == ([64, 32], 16, 3)
    assert (config.projection_hidden_size, config.projection_bottleneck_size) == (64, 16)
    assert (config.num_cls_prototypes, config.num_patch_prototypes) == (96, 64)
    assert not config.share_projection_head and not config.norm_last_layer
    assert [*processor.image_mean, *processor.image_std] == [0.485, 0.456, 0.406, 0.229, 0.224, 0.225]
    assert (processor.size.height, processor.size.width) == (64, 32)
    assert (model.center.abs().max() > 0) == (name == PRETRAINING)


@pytest.mark.parametrize("name", [REID, REID_WITH_CAMERAS])
def test_reid_file(name):
    model, processor = convert_official(name)
    backbone, _ = convert_official(name, "backbone")
    assert type(model) is PersonViTForReID and not model.training
    assert not model.bottleneck.bias.requires_grad
    assert_same_weights(backbone.layers, model.personvit.layers)
    assert (model.config.num_labels, model.config.num_cameras) == (10, 6 * (name == REID_WITH_CAMERAS))
    assert list(processor.image_mean) == list(processor.image_std) == [0.5, 0.5, 0.5]
    assert (processor.size.height, processor.size.width) == (64, 32)


@torch.no_grad()
def test_heads_and_masked_student():
    model, images = convert_official(PRETRAINING, "pretraining")[0], FEATURES["images"]
    assert_within(TOLERANCE, model.student(images).last_hidden_state, FEATURES["student_tokens_unmasked"])
    student = model.student(images, bool_masked_pos=FEATURES["mask"]).last_hidden_state
    assert_within(TOLERANCE, student, FEATURES["student_tokens_masked"])
    teacher = model.personvit(images).last_hidden_state
    for head, tokens, name in (
        (model.student_head, student, "student_head_{}_masked"),
        (model.teacher_head, teacher, "teacher_head_{}"),
    ):
        bottleneck = head.project(tokens)
        assert_within(TOLERANCE, head.cls_logits(bottleneck[:, 0]), FEATURES[name.format("cls")])
        assert_within(TOLERANCE, head.patch_logits(bottleneck[:, 1:]), FEATURES[name.format("patch")])
    centers = load_official(PRETRAINING)["ibot_loss"]
    assert_within(0, model.center, centers["center"].flatten())
    assert_within(0, model.patch_center, centers["center2"].flatten())


@pytest.mark.parametrize(("height", "width"), [(128, 64), (96, 48)])
@torch.no_grad()
def test_image_size_resizes_positions_as_the_official_finetuning_does(height, width):
    model, processor = convert_official(PRETRAINING, image_size=(height, width))
    positions = model.embeddings.position_embeddings
    assert_within(TOLERANCE, positions, FEATURES[f"finetune_pos_embed_{height}x{width}"])
    tokens = model(FEATURES[f"images_{height}x{width}"]).last_hidden_state
    assert_within(TOLERANCE, tokens, FEATURES[f"finetune_tokens_{height}x{width}"])
    assert (processor.size.height, processor.size.width) == (height, width)
    assert model.config.image_size == [height, width]


CASES = [case for case in POSITION_FACTS["cases"] if case["output"].startswith("finetune.")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["output"])
def test_position_embeddings_at_other_sizes(case):
    grid = tuple(int(side) for side in case["input"].removeprefix("pos_").split("x"))
    resized = resize_position_embeddings(POSITIONS[case["input"]], grid, tuple(case["target"]))
    assert_within(TOLERANCE, resized, POSITIONS[case["output"]])


@pytest.mark.parametrize(("name", "target"), [(PRETRAINING, "backbone"), (PRETRAINING, "pretraining"), (REID, "reid")])
def test_converted_models_and_processors_are_saved_and_loaded(tmp_path, name, target):
    model, processor = convert_official(name, target)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert_same_weights(type(model).from_pretrained(tmp_path), model)
    expected = model if target == "backbone" else model.personvit
    loaded = AutoModel.from_pretrained(tmp_path)
    picture = FEATURES["images"]
    with torch.no_grad():
        assert torch.equal(loaded(picture).pooler_output, expected(picture).pooler_output)
    assert AutoImageProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()


def test_a_conversion_has_the_mode_of_any_file(tmp_path):
    save_conversion(convert_with_report(GOLDEN / f"{REID}.pth", num_attention_heads=HEADS[REID]), tmp_path / "out")
    (tmp_path / "any").touch()
    assert {file.stat().st_mode for file in (tmp_path / "out").iterdir()} == {(tmp_path / "any").stat().st_mode}


# Stems, parts and local branches


@torch.no_grad()
def test_convolution_stem():
    tensors, facts = load_golden("transreid_ssl_ics_features")
    model, processor = convert_checkpoint(
        GOLDEN / "official_transreid_ssl_ics.pth", num_attention_heads=facts["config"]["heads"]
    )
    assert (model.config.stem, model.config.patch_size, model.config.image_size) == ("ics", 16, [64, 32])
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    images, embeddings = tensors["images"], model.embeddings.patch_embeddings
    assert_within(TOLERANCE, embeddings.stem(images)[:, ::16, ::4, ::4], tensors["stem"])
    assert_within(TOLERANCE, embeddings(images), tensors["patch_embeddings"])
    output = model(images)
    assert_within(TOLERANCE, output.last_hidden_state, tensors["tokens"])
    assert_within(TOLERANCE, output.pooler_output, tensors["cls"])


PASS, PASS_FACTS = load_golden("pass_features")
PASS_FILE = GOLDEN / "official_pass_pretrain.pth"


def convert_pass(target: str = "auto", **settings):
    return convert_with_report(PASS_FILE, target, num_attention_heads=PASS_FACTS["config"]["heads"], **settings)


@torch.no_grad()
def test_part_tokens_at_native_and_other_sizes():
    conversion = convert_pass()
    model = conversion.model
    assert (model.config.num_part_tokens, model.config.image_size) == (3, [64, 32])
    output = model(PASS["images"])
    assert_within(TOLERANCE, output.last_hidden_state, PASS["finetune_tokens"])
    assert_within(TOLERANCE, output.pooler_output, PASS["finetune_cls"])
    reasons = {key: reason for key, reason in conversion.left_out.items() if "head" in key}
    assert len(reasons) == 32 and set(reasons.values()) == {"the target is the teacher's backbone"}
    resized = convert_pass(image_size=[96, 48]).model
    assert_within(TOLERANCE, resized.embeddings.position_embeddings[:, 4:], PASS["finetune_resized_pos_embed"])
    assert_within(TOLERANCE, resized(PASS["images_small"]).last_hidden_state, PASS["finetune_resized_tokens"])
    with pytest.raises(ValueError, match="`student`"):
        convert_pass("pretraining")


@pytest.mark.parametrize("part", [1, 2, 3])
@torch.no_grad()
def test_part_tokens_of_the_local_crops_of_pass(part):
    """Its pre-training shows a local crop to [CLS] and one part, with positions interpolated as ours are."""
    weights = under(load_official("official_pass_pretrain")["teacher"], "module.backbone.")
    whole = convert_pass().model
    one = PersonViTModel(PersonViTConfig(**whole.config.to_dict() | {"num_part_tokens": 1})).eval()
    state = whole.state_dict()
    state["embeddings.part_tokens"] = weights[f"part_token{part}"]
    state["embeddings.position_embeddings"] = torch.cat(
        [weights["cls_pos"], weights[f"part{part}_pos"], weights["pos_embed"]], dim=1
    )
    one.load_state_dict(state)
    tokens = one(PASS["images_small"]).last_hidden_state
    assert_within(TOLERANCE, tokens, PASS[f"pretrain_local_tokens_part{part}"])


@pytest.mark.parametrize("key", ["part_token2", "part2_pos", "cls_pos", "pos_embed"])
def test_part_tokens_are_there_in_full(convert, key):
    weights = under(load_official("official_pass_pretrain")["teacher"], "module.backbone.")
    for harmed in (
        {name: value for name, value in weights.items() if name != key},
        weights | {key: torch.zeros(1, 2)},
    ):
        with pytest.raises(ValueError, match=rf"{key}|position_embeddings"):
            convert(harmed, num_attention_heads=2)


def test_finetuned_pass_is_a_backbone(convert, tmp_path):
    """Its feature joins [CLS] and parts, so the head has no place in PersonViTForReID."""
    weights = under(load_official("official_pass_pretrain")["teacher"], "module.backbone.")
    contents = {f"base.{name}": value for name, value in weights.items()}
    for width in (32, 64):
        contents |= {f"bottleneck.{name}": torch.zeros(width) for name in ("weight", "bias", "running_mean")}
        contents |= {"classifier.weight": torch.zeros(7, width)}
        torch.save(contents, tmp_path / "pass.pth")
        conversion = convert_with_report(tmp_path / "pass.pth", num_attention_heads=2)
        assert_same_weights(conversion.model, convert_pass().model)
        assert set(conversion.left_out) == {name for name in contents if not name.startswith("base.")}
        assert list(conversion.image_processor.image_mean) == [0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match="joins .CLS. and parts"):
        convert(contents, "reid", num_attention_heads=2)


def transreid_with_local_branches() -> dict[str, torch.Tensor]:
    """TransReID with JPM: its last layer stands in three places, and only that of `b1` makes the global feature."""
    plain = load_official(REID)
    contents = {name: torch.randn_like(value) if ".blocks.1." in name else value for name, value in plain.items()}
    contents |= {name: torch.randn_like(value) for name, value in plain.items() if name.startswith("base.norm.")}
    for branch in ("b1", "b2"):
        layer = {f"0.{name}": value for name, value in under(plain, "base.blocks.1.").items()}
        layer |= {f"1.{name}": value for name, value in under(plain, "base.norm.").items()}
        layer = {name: value if branch == "b1" else torch.randn_like(value) for name, value in layer.items()}
        contents |= {f"{branch}.{name}": value for name, value in layer.items()}
    for index in range(1, 5):
        contents |= {f"bottleneck_{index}.{name}": value for name, value in under(plain, "bottleneck.").items()}
        contents[f"classifier_{index}.weight"] = torch.zeros(10, 40)
    return contents


def test_local_branches_of_transreid_are_left_out(tmp_path):
    contents = transreid_with_local_branches()
    torch.save(contents, tmp_path / "jpm.pth")
    conversion = convert_with_report(tmp_path / "jpm.pth", num_attention_heads=5)
    assert_same_weights(conversion.model, convert_official(REID)[0])
    left_out = {key for key in conversion.left_out if not key.startswith("base.fc.")}
    assert left_out == {
        key for key in contents if re.match(r"b2|bottleneck_|classifier_|base\.(blocks\.1|norm)\.", key)
    }
    assert all("JPM" in conversion.left_out[key] for key in left_out)
    backbone, _ = convert_checkpoint(tmp_path / "jpm.pth", "backbone", num_attention_heads=5)
    assert_same_weights(backbone.layers, conversion.model.personvit.layers)


def test_narrowed_feature_of_transreid_is_refused(convert):
    contents = load_official(REID) | {"fcneck.weight": torch.zeros(20, 40)}
    with pytest.raises(ValueError, match="fcneck.weight.*REDUCE_FEAT_DIM"):
        convert(contents, num_attention_heads=5)
    assert type(convert(contents, "backbone", num_attention_heads=5)) is PersonViTModel


@pytest.mark.parametrize(("views", "cameras"), [({}, 6), ({"num_views": 2}, 3), ({"num_views": 6}, 0)])
def test_side_information_of_cameras_and_views(views, cameras):
    model, _ = convert_official(REID_WITH_CAMERAS, **views)
    assert (model.config.num_cameras, model.config.num_views) == (cameras, views.get("num_views", 0))
    assert convert_official(REID_WITH_CAMERAS, num_cameras=2, num_views=3)[0].config.num_cameras == 2


def test_finetuned_convolution_stem_with_cameras(convert):
    stem = load_official("official_transreid_ssl_ics")
    contents = {f"module.base.{name}": value for name, value in stem.items()}
    contents |= {"module.base.sie_embed": torch.randn(4, 1, 20), "module.classifier.weight": torch.zeros(7, 20)}
    neck = {"weight": 20, "bias": 20, "running_mean": 20, "running_var": 20}
    contents |= {f"module.bottleneck.{name}": torch.rand(size) for name, size in neck.items()}
    contents |= {"module.bottleneck.num_batches_tracked": torch.tensor(3)}
    model = convert(contents, num_attention_heads=2)
    assert (model.config.stem, model.config.num_cameras, model.config.num_labels) == ("ics", 4, 7)
    expected, _ = convert_checkpoint(GOLDEN / "official_transreid_ssl_ics.pth", num_attention_heads=2)
    assert_same_weights(model.personvit.embeddings.patch_embeddings, expected.embeddings.patch_embeddings)


def test_dino_file_has_no_mask_token_and_one_set_of_prototypes(convert):
    contents = load_official(PRETRAINING)
    contents["dino_loss"] = {"center": contents.pop("ibot_loss")["center"]}
    for role in ("student", "teacher"):
        contents[role] = {
            name: value
            for name, value in contents[role].items()
            if "last_layer2" not in name and "masked_embed" not in name
        }
    model = convert(contents, "pretraining")
    expected, _ = convert_official(PRETRAINING, "pretraining")
    assert model.config.share_projection_head and model.config.num_cls_prototypes == 96
    assert (model.student.embeddings.mask_token == 0).all() and (model.patch_center == 0).all()
    assert torch.equal(model.center, expected.center)
    assert_same_weights(model.student.layers, expected.student.layers)
    assert_same_weights(convert(contents).layers, expected.personvit.layers)


@pytest.mark.parametrize(
    ("grid", "size", "stride"),
    [((16, 8), [256, 128], None), ((14, 14), [224, 224], None), ((24, 8), [384, 128], 16), ((21, 10), [256, 128], 12)],
)
def test_grids_of_the_field(convert, grid, size, stride):
    """2:1, square, TransReID's 384x128 and its overlapping patches."""
    positions = torch.randn(1, 1 + grid[0] * grid[1], 48)
    model = convert(bare_teacher() | {"pos_embed": positions})
    assert model.config.image_size == size and model.config.patch_stride == stride
    assert torch.equal(model.embeddings.position_embeddings, positions)
    resized = convert(bare_teacher() | {"pos_embed": positions}, image_size=[256, 128], patch_stride=16)
    expected = resize_position_embeddings(positions, grid, (16, 8))
    assert torch.equal(resized.embeddings.position_embeddings, expected)


def test_what_is_left_out_is_told(caplog):
    caplog.set_level("INFO", logger="personvit_hf")
    conversion = convert_with_report(GOLDEN / f"{REID}.pth", num_attention_heads=5)
    assert conversion.kind == "reid" and not conversion.notes
    assert conversion.left_out == {
        f"base.fc.{name}": "classifier that TransReID never uses" for name in ("weight", "bias")
    }
    convert_checkpoint(GOLDEN / f"{REID}.pth", num_attention_heads=5)
    assert "left out base.fc.weight, base.fc.bias (classifier that TransReID never uses)" in caplog.text
    left_out = convert_with_report(GOLDEN / f"{PRETRAINING}.pth", num_attention_heads=3).left_out
    assert {"student", "optimizer", "epoch", "args", "fp16_scaler", "ibot_loss"} < set(left_out)
    assert len(left_out) == 6 + len([name for name in load_official(PRETRAINING)["teacher"] if "head." in name])
    left_out = convert_with_report(GOLDEN / f"{PRETRAINING}.pth", "pretraining", num_attention_heads=3).left_out
    assert set(left_out) == {"optimizer", "epoch", "args", "fp16_scaler"}


# Containers


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "module"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone.", "_orig_mod.module."])
def test_flat_backbones_in_every_wrapping(convert, wrapper, prefix):
    weights = {prefix + name: value for name, value in bare_teacher().items()}
    model = convert({wrapper: weights, "epoch": 3} if wrapper else weights)
    assert type(model) is PersonViTModel
    expected, _ = convert_official(PRETRAINING)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]) or name == "embeddings.mask_token"


def test_teacher_wrapped_as_its_student(convert):
    """As iBOT and DINO write networks with batch norm."""
    contents = load_official(PRETRAINING)
    contents["teacher"] = {f"module.{name}": value for name, value in contents["teacher"].items()}
    for target in ("backbone", "pretraining"):
        assert_same_weights(convert(contents, target), convert_official(PRETRAINING, target)[0])


def test_safetensors_and_half_precision(tmp_path):
    weights = {name: value.half() for name, value in bare_teacher().items()}
    save_file(weights, tmp_path / "backbone.safetensors")
    model, _ = convert_checkpoint(tmp_path / "backbone.safetensors", num_attention_heads=3)
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert torch.equal(model.layernorm.weight, weights["norm.weight"].float())


def test_number_of_heads_is_told_only_where_the_width_tells_it(convert):
    with pytest.raises(ValueError, match="48.*`num_attention_heads`"):
        convert_checkpoint(GOLDEN / f"{PRETRAINING}.pth")
    wide = {"cls_token": (1, 1, 128), "pos_embed": (1, 9, 128), "patch_embed.proj.weight": (128, 3, 4, 4)}
    wide |= {name: (128,) for name in ("patch_embed.proj.bias", "norm.weight", "norm.bias")}
    wide |= {f"blocks.0.{name}": (128,) for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")}
    for name, width, fan_in in (
        ("attn.qkv", 384, 128),
        ("attn.proj", 128, 128),
        ("mlp.fc1", 96, 128),
        ("mlp.fc2", 128, 96),
    ):
        wide |= {f"blocks.0.{name}.weight": (width, fan_in), f"blocks.0.{name}.bias": (width,)}
    model = convert({name: torch.rand(shape) for name, shape in wide.items()}, num_attention_heads=2)
    assert (model.config.image_size, model.config.patch_size, model.config.intermediate_size) == ([16, 8], 4, 96)


def test_patch_stride_resizes_positions_to_its_own_grid():
    model, _ = convert_official(PRETRAINING, image_size=[64, 32], patch_stride=12)
    expected = resize_position_embeddings(bare_teacher()["pos_embed"], (4, 2), (5, 2))
    assert torch.equal(model.embeddings.position_embeddings, expected)


# What is refused


def names_of(official: str) -> list[str]:
    """How a message may name an official key: as it is, and as we call it."""
    name = re.sub(r"^(backbone|head|base)\.", "", official.removeprefix("module."))
    if layer := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name):
        return [name, f"layers.{layer[1]}.{OFFICIAL_LAYER_NAMES[layer[2]]}.{layer[3]}"]
    stem, _, kind = name.rpartition(".")
    table = OFFICIAL_NAMES | OFFICIAL_HEAD_NAMES
    return [name, table.get(name, name), f"{table.get(stem, stem)}.{kind}"]


FILES = [(PRETRAINING, "teacher", "backbone"), (PRETRAINING, "teacher", "pretraining")]
FILES += [(PRETRAINING, "student", "pretraining"), (REID, None, "reid"), (REID_WITH_CAMERAS, None, "reid")]
every_file = pytest.mark.parametrize(("name", "role", "target"), FILES)
# The file is whole without them: TransReID's unused classifier, cameras; only the student has a mask token.
OPTIONAL = ("base.fc.", "base.sie_embed")


@every_file
@pytest.mark.parametrize("harm", ["missing", "shorter", "NaN", "text", "integers"])
def test_harm_to_any_key_is_an_error_that_names_it(convert, name, role, target, harm):
    contents = load_official(name)
    weights = contents[role] if role else contents
    for key, value in list(weights.items()):
        optional = any(part in key for part in OPTIONAL) or (target == "backbone" and ".head" in f".{key}")
        if (
            re.search(r"blocks\.[12]\.", key)
            or (optional and harm != "NaN")
            or (harm == "NaN" and not value.is_floating_point())
        ):
            continue
        if harm == "missing":
            del weights[key]
        else:
            changes = {
                "NaN": lambda v: v.new_full(v.shape, torch.nan),
                "text": lambda v: "text",
                "integers": lambda v: v.int(),
            }
            weights[key] = changes.get(harm, lambda v: v[..., :-1] if v.ndim else v[None])(value)
        with pytest.raises(ValueError) as error:
            convert(contents, target, num_attention_heads=HEADS[name])
        assert any(called in str(error.value) for called in names_of(key)), (key, str(error.value))
        assert "file.pth" in str(error.value)
        if harm == "shorter":
            for tensor in (weights[key], value):  # a mask token of two axes is told with three
                assert f"{', '.join(map(str, tensor.shape))}" in str(error.value)
        weights[key] = value


UNKNOWN = ["foo", "backbone.foo", "backbone.blocks.0.foo.weight", "backbone.norm.foo", "head.foo"]


@every_file
@pytest.mark.parametrize("key", UNKNOWN)
def test_unknown_key_is_an_error_that_names_it(convert, name, role, target, key):
    if target == "backbone" and key.startswith("head."):
        target = "pretraining"  # the backbone alone leaves out the head as a whole
    contents = load_official(name)
    weights = contents[role] if role else contents
    key = key if role else key.replace("backbone.", "base.").replace("head.", "bottleneck.")
    weights[key] = torch.zeros(3)
    with pytest.raises(ValueError, match=key.rpartition(".")[2] if "blocks" not in key else "foo.weight"):
        convert(contents, target, num_attention_heads=HEADS[name])


def test_key_that_stands_twice_is_refused(convert):
    weights = bare_teacher() | {"module.norm.weight": torch.zeros(48)}
    with pytest.raises(ValueError, match="norm.weight"):
        convert(weights)


@pytest.mark.parametrize("key", ["pos_embed", "patch_embed.proj.weight"])
@pytest.mark.parametrize("shape", [(), (48,), (1, 1, 48), (48, 3, 16)])
def test_tensors_that_tell_the_sizes_are_named_too(convert, key, shape):
    with pytest.raises(ValueError, match="|".join(names_of(key))):
        convert(bare_teacher() | {key: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"surprise": 1}, "surprise"),
        ({"teacher": 3}, "teacher"),
        ({"student": None}, "student"),
        ({"teacher": {1: torch.zeros(3)}}, "`teacher`.*called 1"),
        ({"ibot_loss": {"center": torch.zeros(1, 96)}}, "center2"),
        ({"ibot_loss": {"center": torch.zeros(1, 95), "center2": torch.zeros(1, 1, 64)}}, r"center.*\(95,\).*\(96,\)"),
        ({"ibot_loss": {"center": torch.full((1, 96), torch.nan), "center2": torch.zeros(1, 1, 64)}}, "center.*NaN"),
        ({"ibot_loss": load_official(PRETRAINING)["ibot_loss"] | {"surprise": torch.zeros(1)}}, "surprise"),
        ({"ibot_loss": [1]}, "ibot_loss"),
    ],
)
def test_other_entries_are_accounted_for(convert, entries, message):
    with pytest.raises(ValueError, match=message):
        convert(load_official(PRETRAINING) | entries, "pretraining")


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        (REID, "pretraining", "'pretraining'.*`student` and `teacher`.*reid"),
        (PRETRAINING, "reid", "'reid'.*fine-tuned.*pretraining"),
        (PRETRAINING, "teacher", "`target`.*'teacher'"),
    ],
)
def test_target_that_does_not_fit_the_file(name, target, message):
    with pytest.raises(ValueError, match=message):
        convert_official(name, target)


def test_more_misfits(convert):
    trimmed = load_official(PRETRAINING)
    del trimmed["student"]
    assert type(convert(trimmed)) is PersonViTModel
    with pytest.raises(ValueError, match="'pretraining'.*`student`"):
        convert(trimmed, "pretraining")
    with pytest.raises(ValueError, match="'reid'.*fine-tuned"):
        convert(bare_teacher(), "reid")
    resized, _ = convert_official(PRETRAINING, "pretraining", image_size=[128, 64])
    assert (
        resized.student.embeddings.position_embeddings.shape == resized.personvit.embeddings.position_embeddings.shape
    )
    assert resized.config.image_size == [128, 64]
    positions = torch.zeros(1, 4, 48)
    with pytest.raises(ValueError, match="3 positions.*`image_size="):
        convert(bare_teacher() | {"pos_embed": positions})
    assert convert(bare_teacher() | {"pos_embed": positions}, image_size=[48, 16]).config.image_size == [48, 16]


@pytest.mark.parametrize(
    ("contents", "message"),
    [([1, 2], "dictionary.*list"), ({}, "known kind"), ({1: torch.zeros(2)}, "one is called 1")],
)
def test_other_contents_are_refused(convert, contents, message):
    with pytest.raises(ValueError, match=message):
        convert(contents)


def test_missing_file_is_named(tmp_path):
    for path in (tmp_path / "nowhere.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match=path.name):
            convert_checkpoint(path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"kind": "resnet"}, "`kind`.*timm.*resnet"),
        ({"kind": "reid"}, "`kind` is 'reid'.*'pretraining'"),
        ({"num_atention_heads": 3}, "`num_atention_heads`"),
        ({"image_mean": [0.5, 0.5]}, "`image_mean` should be 3 numbers"),
        ({"image_std": [0.5, 0.0, 0.5]}, "`image_std` should be positive"),
        ({"image_std": "half"}, "`image_std` should be 3 numbers"),
        ({"hidden_size": 96}, "other shapes.*instead of"),
        ({"image_size": [65, 32]}, "official_personvit_pretrain.pth.*65x32"),
        ({"num_attention_heads": 5}, "official_personvit_pretrain.pth.*num_attention_heads"),
    ],
)
def test_overrides_that_do_not_fit(overrides, message):
    path = GOLDEN / f"{PRETRAINING}.pth"
    with pytest.raises(ValueError, match=f"(?s){message}"):
        convert_checkpoint(path, **{"num_attention_heads": 3} | overrides)


def test_sizes_that_contradict_each_other_take_no_memory(convert):
    """Tensors of a few megabytes whose sizes call for matrices of a terabyte."""
    weights = bare_teacher()
    weights["patch_embed.proj.weight"] = torch.zeros(2**19, 1, 1, 1)
    weights["pos_embed"] = torch.zeros(1, 3, 1)
    with pytest.raises(ValueError, match="other shapes.*524288"):
        convert(weights, num_attention_heads=1)
    many = {f"blocks.{index}.norm1.weight": torch.zeros(1) for index in range(9999)}
    with pytest.raises(ValueError, match="9999 layers"):
        convert(bare_teacher() | many)
