import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import yaml

from personvit_hf import (
    PersonViTConfig,
    PersonViTForPreTraining,
    PersonViTForReID,
    PersonViTImageProcessor,
    PersonViTModel,
    evaluate_reid,
    scripting,
)
from personvit_hf.scripting import (
    MetricsLog,
    checkpoint_layers,
    default_attention,
    option,
    parse_arguments,
    parse_overrides,
    read_settings,
    require_finite,
    score,
)

SIZES = {
    **{"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64},
    **{"image_size": [32, 16], "patch_size": 8, "num_cls_prototypes": 16, "num_patch_prototypes": 8},
    **{"projection_hidden_size": 16, "projection_bottleneck_size": 8},
}


@dataclass
class Arguments:
    data: str = field(metadata={"help": "Where the data lie."})
    sizes: list[int] = option([256, 128], "Height and width.", least=1)
    rate: float = option(0.5, "Learning rate.", above=0, most=1)
    epochs: int = option(3, "Epochs.")
    overrides: str = option("{}", "JSON.")
    fast: bool = option(False, "Whether to hurry.")
    name: str | None = option(None, "A name.")


def settings_file(folder: Path, **settings) -> str:
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def test_flags_alone():
    args = parse_arguments(Arguments, ["--data", "x", "--sizes", "32", "16", "--rate", "1e-3", "--fast"])
    assert args == Arguments("x", [32, 16], 0.001, fast=True)


def test_defaults_are_not_shared():
    parse_arguments(Arguments, ["--data", "x"]).sizes.append(1)
    assert parse_arguments(Arguments, ["--data", "x"]).sizes == Arguments("x").sizes == [256, 128]


def test_flags_win_over_the_file(tmp_path):
    path = settings_file(tmp_path, data="from file", epochs=7, rate=0.25, sizes=[64, 32], fast=True, name=None)
    assert parse_arguments(Arguments, ["--config", path]) == Arguments("from file", [64, 32], 0.25, 7, fast=True)
    flags = ["--epochs", "9", f"--config={path}", "--sizes", "8", "4", "--fast", "false", "--name", "n"]
    assert parse_arguments(Arguments, flags) == Arguments("from file", [8, 4], 0.25, 9, name="n")


def test_the_process_own_flags_are_the_default(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", "--data", "mine"])
    assert parse_arguments(Arguments).data == "mine"


def test_settings_that_a_run_wrote_give_the_same_run(tmp_path):
    args = Arguments("x", [32, 16], 1e-6, 2, '{"a": 1}', True, "--odd name: #1")
    assert parse_arguments(Arguments, ["--config", settings_file(tmp_path, **asdict(args))]) == args


def test_numbers_and_mappings_as_yaml_has_them(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("data: 1234\nrate: 4e-4\noverrides:\n  patch_size: 8\n")  # 4e-4 is text to YAML 1.1
    args = parse_arguments(Arguments, ["--config", str(path)])
    assert (args.data, args.rate, json.loads(args.overrides)) == ("1234", 0.0004, {"patch_size": 8})


def test_unknown_settings_in_the_file_are_named(tmp_path):
    path = settings_file(tmp_path, data="x", epoch=7, config="y")
    with pytest.raises(ValueError, match=r"settings\.yaml: unknown settings \['config', 'epoch'\]"):
        parse_arguments(Arguments, ["--config", path])


@pytest.mark.parametrize("flags", [["--epoch", "7"], ["--dat", "x"], ["--conf", "x.yaml"], ["--epochs", "1.5"], []])
def test_wrong_flags_are_named(flags, capsys):
    required = [] if not flags else ["--data", "x"]
    with pytest.raises(SystemExit):
        parse_arguments(Arguments, [*required, *flags])
    assert (flags[0] if flags else "--data") in capsys.readouterr().err


@pytest.mark.parametrize("settings", [{"epochs": 1.5}, {"epochs": "many"}, {"sizes": ["a", "b"]}, {"fast": "perhaps"}])
def test_wrong_values_in_the_file_are_named(tmp_path, settings, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(Arguments, ["--config", settings_file(tmp_path, data="x", **settings)])
    assert f"--{next(iter(settings))}" in capsys.readouterr().err


def test_yaml_takes_no_for_a_word_where_a_word_is_wanted(tmp_path):
    (tmp_path / "settings.yaml").write_text("data: x\nname: no\nfast: yes\n")
    args = parse_arguments(Arguments, ["--config", str(tmp_path / "settings.yaml")])
    assert args.name == "no" and args.fast


@pytest.mark.parametrize("second", [["--config", "b.yaml"], ["--config=b.yaml"]])
def test_a_second_file_is_refused(tmp_path, second):
    first = settings_file(tmp_path, data="x")
    with pytest.raises(ValueError, match=r"`--config` is given 2 times \(.*settings\.yaml, b\.yaml\)"):
        parse_arguments(Arguments, ["--config", first, "--epochs", "2", *second])


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "nan", "inf"])
def test_numbers_outside_their_range_are_named(tmp_path, value):
    with pytest.raises(
        ValueError, match=rf"`rate` must be a finite number, above 0 and at most 1; got {float(value)}"
    ):
        parse_arguments(Arguments, ["--data", "x", "--rate", value])
    with pytest.raises(ValueError, match="`sizes` must be a finite number, at least 1; got 0"):
        parse_arguments(Arguments, ["--config", settings_file(tmp_path, data="x", sizes=[8, 0])])


@pytest.mark.parametrize("text, found", [("- a\n- b\n", "found list"), ("", "found NoneType"), ("a: [", "not a YAML")])
def test_files_that_are_no_settings(tmp_path, text, found):
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"settings\.yaml: .*{found}"):
        read_settings(tmp_path / "settings.yaml")


def test_settings_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml: no such file of settings"):
        parse_arguments(Arguments, ["--data", "x", "--config", str(tmp_path / "none.yaml")])


def test_overrides():
    assert parse_overrides('{"patch_size": 8, "drop_path_rate": 0.2}') == {"patch_size": 8, "drop_path_rate": 0.2}


@pytest.mark.parametrize(
    "text, found",
    [
        ("{patch_size: 8}", "is not JSON"),
        ("[1]", "JSON object"),
        ('{"patchsize": 8, "x": 1}', r"\['patchsize', 'x'\]"),
    ],
)
def test_wrong_overrides_are_named(text, found):
    with pytest.raises(ValueError, match=f"`config_overrides`.*{found}"):
        parse_overrides(text)


class MainProcess:
    """What MetricsLog needs of an accelerator."""

    is_main_process = True

    def __init__(self):
        self.tracked = []

    def log(self, figures, step):
        self.tracked.append((step, figures))


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_log_has_one_line_a_step_and_feeds_the_trackers(tmp_path):
    accelerator = MainProcess()
    log = MetricsLog(tmp_path / "new" / "metrics.jsonl", accelerator)
    log.write(5, loss=0.5, epoch=0)
    log.write(10, loss=0.25, epoch=0)
    lines = log.path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 5, "loss": 0.5, "epoch": 0},
        {"step": 10, "loss": 0.25, "epoch": 0},
    ]
    assert accelerator.tracked == [(5, {"loss": 0.5, "epoch": 0}), (10, {"loss": 0.25, "epoch": 0})]


@pytest.mark.parametrize("step, kept", [(0, []), (4, []), (10, [5, 10]), (12, [5, 10]), (99, [5, 10, 15, 20])])
def test_resumed_log_drops_the_lines_after_its_checkpoint(tmp_path, step, kept):
    log = MetricsLog(tmp_path / "metrics.jsonl", MainProcess())
    for done in (5, 10, 15, 20):
        log.write(done, loss=1.0)
    resumed = MetricsLog(log.path, MainProcess(), step)
    assert steps(log.path) == kept
    resumed.write(25, loss=1.0)
    assert steps(log.path) == [*kept, 25]


@pytest.mark.parametrize("tail", ['{"step": 15, "lo', '{"step": 15, "loss": 1.0}', "\x00\x00\n", '["step"]\n', "\n"])
def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path, tail):
    log = MetricsLog(tmp_path / "metrics.jsonl", MainProcess())
    log.write(5, loss=1.0)
    with log.path.open("a") as file:
        file.write(tail)
    MetricsLog(log.path, MainProcess(), 20).write(25, loss=1.0)
    assert steps(log.path) == [5, 25]


def test_other_processes_leave_the_file_alone(tmp_path):
    accelerator = MainProcess()
    accelerator.is_main_process = False
    MetricsLog(tmp_path / "metrics.jsonl", accelerator).write(1, loss=1.0)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
def test_full_disk_names_the_log(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", MainProcess())
    log.path.unlink()
    log.path.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: .*metrics\.jsonl"):
        log.write(1, loss=1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_stops_the_run(value):
    with pytest.raises(FloatingPointError, match=f"`mim_loss` is {value} after step 7: .* runs/x ") as caught:
        require_finite(7, "runs/x", dino_loss=1.0, mim_loss=value)
    assert "learning rate" in str(caught.value)
    require_finite(7, "runs/x", dino_loss=1.0, mim_loss=0.0)


def test_score_ranks_the_embeddings_of_query_and_gallery():
    rng = np.random.default_rng(0)
    people = rng.integers(0, 256, (5, 40, 20, 3), dtype=np.uint8)

    def split(person_ids: list[int], camera: int) -> datasets.Dataset:
        images = [people[i] // 2 + rng.integers(0, 128, people[i].shape, dtype=np.uint8) for i in person_ids]
        features = datasets.Features(
            {"image": datasets.Image(), "person_id": datasets.Value("int64"), "camera_id": datasets.Value("int64")}
        )
        columns = {"image": images, "person_id": [1 + i for i in person_ids], "camera_id": [camera] * len(person_ids)}
        return datasets.Dataset.from_dict(columns, features)

    dataset = datasets.DatasetDict(query=split([0, 1, 2, 3, 4], 0), gallery=split([4, 3, 2, 1, 0, 0, 1, 2], 1))
    torch.manual_seed(0)
    model = PersonViTModel(PersonViTConfig(**SIZES, num_cameras=2))
    processor = PersonViTImageProcessor(size={"height": 32, "width": 16})
    torch.nn.init.normal_(model.embeddings.side_embeddings)  # large enough to show in the score
    assert score(model, processor, dataset, batch_size=3)["num_valid_queries"] == 5

    def embed(rows: datasets.Dataset, camera: int | None) -> np.ndarray:
        pixel_values = torch.cat(
            [processor(images=image, return_tensors="pt").pixel_values for image in rows["image"]]
        )
        cameras = None if camera is None else torch.full((len(rows),), camera)
        with torch.no_grad():
            return model.eval()(pixel_values, camera_ids=cameras).pooler_output.numpy()

    scores = []
    for use_cameras in (False, True):
        result = score(model, processor, dataset, use_cameras)
        expected = evaluate_reid(
            *(embed(dataset[name], i if use_cameras else None) for i, name in enumerate(("query", "gallery"))),
            query_person_ids=dataset["query"]["person_id"],
            gallery_person_ids=dataset["gallery"]["person_id"],
            query_camera_ids=dataset["query"]["camera_id"],
            gallery_camera_ids=dataset["gallery"]["camera_id"],
        )
        scores.append(result["mAP"])
        assert result["mAP"] == expected["mAP"]
    assert 0 < scores[0] < 1
    assert scores[0] != scores[1]

    # junk images, here copies of the queries, are no neighbours of anything
    junk = dataset["query"].map(lambda row: {"person_id": -1})
    dataset["gallery"] = datasets.concatenate_datasets([dataset["gallery"]] * 3)
    gallery = datasets.concatenate_datasets([dataset["gallery"], junk])
    for way in ({"reranked": True}, {"expand": 2}, {"remove_bias": True}):
        clean = score(model, processor, dataset, **way)
        assert (
            score(model, processor, datasets.DatasetDict(dataset | {"gallery": gallery}), **way)["mAP"] == clean["mAP"]
        )

    # few images have few neighbours, and an odd column is passed over
    few = datasets.DatasetDict({name: dataset[name].select(range(3)) for name in dataset})
    few["query"] = few["query"].add_column("occlusion", [[0.1], None, [0.2]])
    few["gallery"] = dataset["gallery"].select(range(5))
    assert 0 < score(model, processor, few, reranked=True)["mAP"] <= 1


@pytest.mark.parametrize(
    "values, labels",
    [
        ([0.0, 0.1, 0.3, 0.31], ["0", "to 0.1", "to 0.3", "over 0.3"]),
        (np.float32([0.1, 0.3, 0.2]).tolist(), ["to 0.1", "to 0.3", "to 0.3"]),
        ([0.0, None, math.nan, 1], ["0", "unknown", "unknown", "over 0.3"]),
        ([None, None], ["unknown", "unknown"]),
        (["none", None, "heavy"], ["none", "unknown", "heavy"]),
        ([2, 0, 1], [2, 0, 1]),
        ([2, None, 0], ["2", "unknown", "0"]),
        ([True, None], ["True", "unknown"]),
        ([[0.1], None], None),
    ],
)
def test_occlusion_labels(values, labels):
    assert scripting._occlusion_labels(values) == labels


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [("cpu", "bf16", "eager"), ("cpu", "no", "sdpa"), ("cuda", "bf16", "sdpa"), ("cuda", "no", "sdpa")],
)
def test_attention_is_chosen_by_device_and_precision(device, precision, expected):
    accelerator = SimpleNamespace(device=torch.device(device), mixed_precision=precision)
    assert default_attention(accelerator) == expected


def pretraining_inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    masks = torch.rand(4, 2, 8) < 0.3
    local = torch.randn(4, 3, 3, 16, 8)
    return {"global_pixel_values": torch.randn(4, 2, 3, 32, 16), "local_pixel_values": local, "bool_masked_pos": masks}


def finetuning_inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"pixel_values": torch.randn(4, 3, 32, 16), "labels": torch.tensor([0, 0, 1, 1])}


@pytest.mark.parametrize(
    "model_class, inputs", [(PersonViTForPreTraining, pretraining_inputs), (PersonViTForReID, finetuning_inputs)]
)
def test_checkpointed_layers_give_the_same_and_keep_less(model_class, inputs):
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 128}
    heads = {"projection_hidden_size": 16, "projection_bottleneck_size": 8, "num_cls_prototypes": 24}
    config = PersonViTConfig(
        **sizes, **heads, num_patch_prototypes=12, image_size=[32, 16], patch_size=8, drop_path_rate=0.5
    )
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = model_class(config).train()
        if checkpointed:
            checkpoint_layers(model)
        kept = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(2)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(**inputs()).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients, sum(kept.values())))
    torch.testing.assert_close(results[0][:2], results[1][:2], rtol=0, atol=0)
    assert results[1][2] < 0.7 * results[0][2]
