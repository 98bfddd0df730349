"""Cards of models and data sets: what they say, that the Hub's readers take them, and what never gets into them."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard, metadata_eval_result, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from hypothesis import given, settings
from hypothesis import strategies as st

from personvit_hf import (
    PersonViTConfig,
    PersonViTForPreTraining,
    PersonViTForReID,
    PersonViTImageProcessor,
    PersonViTModel,
    load_reid_dataset,
)
from personvit_hf.cards import MARKER, dataset_card, model_card, published_settings, write_card

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {
    **{"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64, "patch_size": 8},
    **{"num_cls_prototypes": 16, "num_patch_prototypes": 8, "projection_hidden_size": 16, "image_size": [32, 16]},
    **{"projection_bottleneck_size": 8, "num_labels": 4},
}
RESULTS = {"mAP": 0.92904, "mINP": 0.7, "rank1": 0.968, "rank5": 0.99, "rank10": 0.995, "num_valid_queries": 3368}
ARGUMENTS = {
    "data": "/home/mallory/reid/Market-1501/",
    "output_dir": "/scratch/mallory/runs/x",
    "model_name_or_path": "/scratch/mallory/runs/pretrained",
    "epochs": 120,
    "learning_rate": 4e-4,
    "resume_from": None,
    "hub_model_id": "mallory/secret-name",
}
RECORD = {
    "hardware": {"device": "NVIDIA H100", "machine": "x86_64", "processes": 2},
    "versions": {"python": "3.11.7", "torch": "2.14.1"},
    "hub_ids": {},
    "repo_id": None,
}


def save(model_class, folder: Path, **config) -> Path:
    model_class(PersonViTConfig(**CONFIG, **config)).save_pretrained(folder)
    PersonViTImageProcessor(size={"height": 32, "width": 16}, image_mean=[0.5] * 3).save_pretrained(folder)
    return folder


def write(folder: Path, **files) -> Path:
    for name, content in files.items():
        suffix = {"arguments": ".yaml", "metrics": ".jsonl", "emissions": ".csv"}.get(name, ".json")
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}{suffix}").write_text(text)
    return folder


@pytest.fixture
def reid(tmp_path) -> Path:
    """A fine-tuned model with all that its run wrote."""
    folder = save(PersonViTForReID, tmp_path / "finetuned")
    metrics = '{"step": 100, "loss": 1.25}\n{"step": 120, "mAP": 0.5}\n{"step": 130, "lo'  # cut short by a crash
    return write(folder, arguments=ARGUMENTS, metrics=metrics, results=RESULTS, environment=RECORD)


@pytest.fixture
def pretrained(tmp_path) -> Path:
    folder = save(PersonViTForPreTraining, tmp_path / "pretrained")
    metrics = "".join(
        json.dumps(line) + "\n"
        for line in ({"step": 5, "mAP": 0.1, "rank1": 0.2}, {"step": 9, "mAP": 0.3, "rank1": 0.4})
    )
    arguments = {"data": "LUPerson", "eval_data": "owner/market", "epochs": 100}
    record = RECORD | {"hub_ids": {"eval_data": "owner/market"}}
    return write(folder, arguments=arguments, metrics=metrics, environment=record)


def test_front_matter_of_a_reid_model(reid):
    path = write_card(reid, "alice/finder", license="cc-by-nc-4.0")
    assert path == reid / "README.md"
    data = ModelCard.load(path).data.to_dict()
    assert data == metadata_load(path)
    figures = {"mAP": 92.9, "mINP": 70.0, "rank1": 96.8, "rank5": 99.0, "rank10": 99.5}
    names = {"mAP": "mAP", "mINP": "mINP", "rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10"}
    index = data.pop("model-index")
    assert data == {
        "library_name": "transformers",
        "license": "cc-by-nc-4.0",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["personvit", "person-re-identification", "image-retrieval", "arxiv:2408.05398"],
        "metrics": ["mAP"],
    }
    assert index == [
        {
            "name": "finder",
            "results": [
                {
                    "task": {"type": "image-feature-extraction", "name": "Person re-identification"},
                    "dataset": {"type": "market-1501", "name": "Market-1501", "split": "gallery"},
                    "metrics": [{"type": key, "value": figures[key], "name": names[key]} for key in figures],
                }
            ],
        }
    ]
    # through huggingface_hub's own reader and writer, and as it writes one itself
    name, results = model_index_to_eval_results(index)
    assert eval_results_to_model_index(name, results) == index
    again = metadata_eval_result(
        model_pretty_name="finder",
        task_pretty_name="Person re-identification",
        task_id="image-feature-extraction",
        metrics_pretty_name="mAP",
        metrics_id="mAP",
        metrics_value=92.9,
        dataset_pretty_name="Market-1501",
        dataset_id="market-1501",
        dataset_split="gallery",
    )["model-index"]
    assert again[0]["results"][0]["metrics"] == [index[0]["results"][0]["metrics"][0] | {"verified": False}]
    assert again[0]["results"][0] | {"metrics": []} == index[0]["results"][0] | {"metrics": []}


def test_what_the_card_of_a_reid_model_says(reid):
    text = model_card(reid, "alice/finder").text
    assert "| mAP | mINP | Rank-1 | Rank-5 | Rank-10 |" in text
    assert "| 92.90 | 70.00 | 96.80 | 99.00 | 99.50 |" in text and "3368 queries have a match" in text
    assert "python examples/evaluate_reid.py --model alice/finder --data Market-1501\n" in text
    assert "on the 4 people of `Market-1501`" in text and "fine-tuned from `pretrained`" in text
    assert "32x16 pixels (height x width)" in text and "mean [0.5, 0.5, 0.5]" in text
    for row in (
        "| optimizer steps | `100` |",
        "| loss at the end | `1.2500` |",
        "| hardware | `NVIDIA H100 (x86_64), processes: 2` |",
        "| versions | `python 3.11.7, torch 2.14.1` |",
    ):
        assert row in text
    assert "\n    epochs: 120\n    learning_rate: 0.0004\n" in text
    for heading in ("Use", "Figures", "Training", "Intended use", "Limits", "Privacy", "Licence", "Citation"):
        assert text.count(f"\n## {heading}\n") == 1
    for word in ("surveillance", "DukeMTMC", "withdrawn", "LUPerson", "research only"):
        assert word in text
    assert "CO2" not in text and "Not finished" not in text


def test_a_step_that_is_text_is_no_markup(reid):
    step = "1` <img src=x>\n\n# Heading"
    write(reid, metrics=json.dumps({"step": step}) + "\n", environment=RECORD | {"unfinished": True})
    assert "**Not finished: step `1' <img src=x> # Heading` of a run" in model_card(reid, "alice/finder").text


def test_what_the_card_of_a_pretrained_model_says(pretrained):
    card = model_card(pretrained)
    assert {result.metric_name: result.metric_value for result in card.data.eval_results} == {"mAP": 30, "Rank-1": 40}
    assert card.data.eval_results[0].dataset_type == "owner/market"
    assert "self-supervised-learning" in card.data.tags and card.data.license == "other"
    assert card.data.license_name == "terms-of-the-training-data"
    assert "on `LUPerson`" in card.text and "**This card names LUPerson, which is for research only.**" in card.text
    assert "`AutoModelForPreTraining` student, teacher and heads" in card.text
    assert "--model pretrained --data owner/market" in card.text


@pytest.mark.parametrize(
    "weights, said",
    [
        ({}, "by\n[PersonViT](https://arxiv.org/abs/2408.05398)'s self-distillation and masked image modelling."),
        ({"mim_loss_weight": 0.0}, "'s self-distillation."),
        ({"dino_loss_weight": 0.0}, "'s masked image modelling."),
        ({"dino_loss_weight": 0.0, "mim_loss_weight": 0.0, "koleo_loss_weight": 1.0}, "'s recipe."),
    ],
)
def test_a_card_names_the_losses_that_counted(tmp_path, weights, said):
    assert said in model_card(save(PersonViTForPreTraining, tmp_path / "model", **weights)).text


def test_a_model_alone_claims_nothing(tmp_path):
    card = model_card(save(PersonViTModel, tmp_path / "tiny"))
    assert "Not evaluated" in card.text and "not recorded" in card.text
    data = card.data.to_dict()
    assert not {"model-index", "metrics", "base_model", "datasets", "co2_eq_emissions"} & set(data)


def test_names_of_the_hub_get_into_the_front_matter(reid):
    ids = {"data": "owner/market", "model_name_or_path": "owner/vit"}
    arguments = ARGUMENTS | ids
    write(reid, arguments=arguments, environment=RECORD | {"hub_ids": ids})
    data = model_card(reid).data
    assert (data.datasets, data.base_model, data.base_model_relation) == (["owner/market"], "owner/vit", "finetune")
    # as they are not the Hub's where nobody found them there
    write(reid, arguments=arguments, environment=RECORD)
    assert (model_card(reid).data.datasets, model_card(reid).data.base_model) == (None, None)


def test_emissions_only_if_they_were_measured(reid):
    assert "co2_eq_emissions" not in model_card(reid).data.to_dict()
    write(reid, emissions="run_id,duration,emissions\na,10,0.0005\na,20,0.001\nb,5,0.25\n")
    card = model_card(reid)
    assert card.data.co2_eq_emissions == {
        "emissions": 251.0,
        "source": "codecarbon",
        "training_type": "fine-tuning",
        "hardware_used": "NVIDIA H100",
    }
    assert "| CO2, measured by codecarbon | `251 g` |" in card.text


def test_duke_is_named_as_withdrawn(reid):
    write(reid, arguments=ARGUMENTS | {"data": "DukeMTMC-reID"})
    assert "**This card names data of DukeMTMC, which its authors withdrew in 2019" in model_card(reid).text
    write(reid, arguments=ARGUMENTS)
    assert "**This card names" not in model_card(reid).text


def test_the_neck_decides_the_feature(tmp_path):
    before = model_card(save(PersonViTForReID, tmp_path / "before", num_cameras=6)).text
    assert (
        "AutoModel.from_pretrained" in before and ").pooler_output" in before and "embeddings of 6 cameras" in before
    )
    after = model_card(save(PersonViTForReID, tmp_path / "after", neck_feature="after")).text
    assert "AutoModelForImageClassification.from_pretrained" in after and ").embeddings" in after
    assert "cameras" not in after.split("## Figures")[0].split("## Use")[1]


def test_an_edited_card_stays(reid):
    path = write_card(reid)
    path.write_text(path.read_text().replace("Finds the same person", "Finds nobody"))
    write_card(reid)
    assert "Finds the same person" in path.read_text()
    path.write_text(path.read_text().replace(f"<!-- {MARKER} -->", "My own card."))
    mine = path.read_bytes()
    write_card(reid, "alice/other")
    assert path.read_bytes() == mine


# Names and files of others

PLACES = ["/home/mallory", "/scratch", "mallory"]


def test_no_place_of_this_machine_gets_into_a_card(reid):
    for extra in ("/data/x", ["a", "/data/x"], '{"path": "/data/x"}', "../../data/x", r"C:\data\x", "~/data/x"):
        write(reid, arguments=ARGUMENTS | {"config_overrides": extra, "note": "fine"})
        text = str(model_card(reid))
        assert not [place for place in (*PLACES, "data/x", r"data\x") if place in text]
        assert published_settings(reid) == {"epochs": 120, "learning_rate": 4e-4, "note": "fine"}


@pytest.mark.parametrize("data", [r"C:\Users\mallory\Market-1501", "/home/mallory/Market-1501/.", "../Market-1501"])
def test_a_data_set_is_named_by_the_last_part_of_its_path(reid, data):
    write(reid, arguments={"data": data})
    card = model_card(reid)
    assert card.data.eval_results[0].dataset_name == "Market-1501"
    assert "mallory" not in str(card)


@pytest.fixture(scope="module")
def any_reid(tmp_path_factory) -> Path:
    return save(PersonViTForReID, tmp_path_factory.mktemp("cards") / "any")


HOSTILE = st.sampled_from(
    [
        "---\nlicense: mit\n---",
        "x\n---\n",
        "a: b",
        "`` ` ```\n# Heading",
        "{{ 7 * 7 }}{% raw %}",
        "$(rm -rf x); 'quoted' \"twice\"",
        "<script>alert(1)</script>",
        "| a | b |",
        "!!python/object:os.system",
        "\u2028line\x85\x00",
    ]
)


@given(name=HOSTILE | st.text(max_size=60), value=HOSTILE | st.text(max_size=60))
@settings(max_examples=30)
def test_no_name_breaks_a_card(any_reid, name, value):
    arguments = yaml.safe_dump({"data": name, "model_name_or_path": name, "note": value, "epochs": 3})
    record = RECORD | {"hardware": RECORD["hardware"] | {"device": value}}
    write(any_reid, arguments=arguments, results=RESULTS, environment=record)
    expected = set(model_card(any_reid).data.to_dict())
    path = write_card(any_reid)
    card = ModelCard.load(path)
    assert set(card.data.to_dict()) == expected == set(metadata_load(path))
    assert card.data.license == "other"
    assert len(card.data.eval_results) == 5
    # the text's skeleton is the template's: no heading, fence or marker more
    prose = re.sub(r"^```.*?^```", "", card.text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ .*", prose, re.MULTILINE)
    assert [line for line in headings if not line.startswith("## ")] == ["# any"] and len(headings) == 9
    assert len(re.findall(r"^```", card.text, re.MULTILINE)) == 6
    assert "<script>" not in re.sub(r"`[^`\n]*`|^    .*$", "", prose, flags=re.MULTILINE)
    (command,) = re.findall(r"^python examples/.*", card.text, re.MULTILINE)
    assert len(shlex.split(command)) == 6


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("results", "{", "not a JSON file"),
        ("results", "[" * 200_000, "not a JSON file"),
        ("results", "[1]", "expected a JSON object"),
        ("results", '{"mAP": "high"}', "`mAP` must be a fraction"),
        ("results", '{"mAP": 92.9}', "`mAP` must be a fraction"),
        ("results", '{"mAP": NaN}', "`mAP` must be a fraction"),
        ("arguments", "a: [", "not a YAML file"),
        ("arguments", "[" * 10_000, "not a YAML file"),
        ("arguments", "- a", "expected lines"),
        ("arguments", "!!python/object/apply:os.system ['true']", "not a YAML file"),
        ("environment", "no", "not a JSON file"),
        ("emissions", "a,b\n1,2\n", "not codecarbon's"),
    ],
)
def test_broken_files_are_named(reid, file, content, message):
    write(reid, **{file: content})
    with pytest.raises(ValueError, match=f"{file}.*{message}"):
        model_card(reid)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        write_card(tmp_path)
    PersonViTConfig(**CONFIG, architectures=["ViTModel"]).save_pretrained(tmp_path)
    PersonViTImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ViTModel"):
        write_card(tmp_path)


# Data sets


def test_card_of_the_demo_data(tmp_path):
    dataset = load_reid_dataset(ROOT / "examples" / "data")
    card = dataset_card(dataset, "alice/rendered", license="cc0-1.0", source="Rendered; nobody real is in it.")
    card.save(tmp_path / "README.md")
    again = DatasetCard.load(tmp_path / "README.md")
    assert again.data.to_dict() == card.data.to_dict()
    assert again.data.license == "cc0-1.0" and again.data.size_categories == "n<1K"
    assert again.data.task_categories == ["image-feature-extraction"]
    splits = [files["split"] for files in again.data.configs[0]["data_files"]]
    assert splits == ["train", "query", "gallery"]
    # as examples/data/README.md counts them
    assert (
        "| train | 240 | 40 | 6 | 0 | 0 |\n| query | 90 | 30 | 6 | 0 | 0 |\n| gallery | 170 | 30 | 6 | 15 | 6 |"
        in card.text
    )
    assert "90 queries have a match in another camera" in card.text and "No person is in both" in card.text
    assert "| `occlusion` | float32 | |" in card.text and "Rendered; nobody real" in card.text
    assert 'load_reid_dataset("alice/rendered")' in card.text


def test_card_of_data_for_evaluation_alone():
    dataset = load_reid_dataset(ROOT / "examples" / "data")
    del dataset["train"]
    card = dataset_card(dataset, "alice/rendered")
    assert [files["split"] for files in card.data.configs[0]["data_files"]] == ["query", "gallery"]
    assert "no split train: the data are for evaluation alone" in card.text and "No person is in both" not in card.text


def test_the_card_of_a_data_set_says_what_is_wrong_with_it():
    # distractors and junk are nobody, though another camera has some
    rows = {"person_id": [1, 2, 0, 0, -1, -1], "camera_id": [0, 0, 0, 1, 0, 1]}
    rows["image"] = [np.zeros((4, 2, 3), np.uint8)] * 6
    dataset = datasets.DatasetDict(
        {split: datasets.Dataset.from_dict(rows) for split in ("train", "query", "gallery")}
    )
    text = dataset_card(dataset, "alice/duke", pretty_name="Duke`s | people").text
    assert "0 queries have a match" in text and "**2 people are in both train and gallery.**" in text
    assert "DukeMTMC, which its authors withdrew" in text and "Not said." in text
    assert "# Duke's / people\n" in text
    with pytest.raises(ValueError, match="alice/a b"):
        dataset_card(dataset, "alice/a b")


@pytest.mark.slow
def test_a_wheel_brings_the_templates(reid, tmp_path):
    """Installed without the checkout beside it, as from an index."""
    source, site = tmp_path / "source", tmp_path / "site"
    for name in ("src", "hub_cards"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--disable-pip-version-check", "-w", str(tmp_path), str(source)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from personvit_hf import cards\n"
        "assert cards.__file__.startswith(sys.argv[1]), cards.__file__\n"
        "print(cards.write_card(sys.argv[2]).read_text())"
    )
    command = [sys.executable, "-c", code, str(site), str(reid)]
    process = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert "92.90" in process.stdout
