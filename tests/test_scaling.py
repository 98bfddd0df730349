"""What benchmarks/scaling.py counts holds for real models and loaders; docs/scaling.md shows what it prints."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from personvit_hf import PersonViTConfig, PersonViTForPreTraining
from personvit_hf.scripting import parse_arguments

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "scaling.py"
PAGE = ROOT / "docs" / "scaling.md"
HIDDEN, MLP, LOCAL = 32, 64, 3


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def settings(scaling):
    return scaling.PretrainArguments(
        data="", output_dir="", image_size=[64, 32], local_size=[32, 16], num_local_crops=LOCAL,
        mask_ratios=[0.3], mask_ratio_spreads=[0.0],
    )  # fmt: skip


def small_config(depth: int = 2, **changes) -> PersonViTConfig:
    return PersonViTConfig(
        hidden_size=HIDDEN, intermediate_size=MLP, num_attention_heads=2, num_hidden_layers=depth, image_size=[64, 32],
        projection_hidden_size=48, projection_bottleneck_size=16, num_cls_prototypes=200, num_patch_prototypes=100,
        **changes,
    )  # fmt: skip


def test_states_of_data_parallel_training_are_those_of_a_real_model_and_optimizer(scaling, settings):
    config = small_config()
    model = PersonViTForPreTraining(config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(**scaling.make_batch(settings, config, 2)).loss.backward()
    optimizer.step()
    averages = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    real = {
        "student": trained,
        "gradients": [parameter.grad for parameter in trained],
        "AdamW": averages,
        "teacher": frozen,
    }
    counted = scaling.state_bytes(scaling.count_parameters(config), "DDP", 8)
    assert {name: counted[name] for name in real} == {
        name: sum(tensor.nbytes for tensor in tensors) for name, tensors in real.items()
    }


def test_what_a_layout_shards_shrinks_with_the_processes(scaling):
    sizes = scaling.Sizes(trained=8000, frozen=8000, outside_layers=3000)
    sharded = {"DDP": [], "ZeRO-1": ["AdamW"], "ZeRO-2": ["AdamW", "gradients"]}
    sharded |= dict.fromkeys(("ZeRO-3", "FSDP2"), ["AdamW", "gradients", "student", "teacher"])
    whole = scaling.state_bytes(sizes, "DDP", 1)
    for layout, names in sharded.items():
        states = scaling.state_bytes(sizes, layout, 8)
        for name in ("student", "gradients", "AdamW", "teacher"):
            assert states[name] == whole[name] / (8 if name in names else 1), (layout, name)
    with pytest.raises(ValueError, match="'ZeRO-4'.*DDP, ZeRO-1"):
        scaling.state_bytes(sizes, "ZeRO-4", 8)


def test_flops_of_a_layer_are_those_of_its_products(scaling, settings):
    """A layer more costs the teacher its forward pass, the student three times as much."""

    def forward(tokens: int) -> int:
        return 2 * tokens * (4 * HIDDEN**2 + 2 * HIDDEN * MLP) + 4 * tokens**2 * HIDDEN

    more = scaling.count_flops(settings, small_config(3), 2) - scaling.count_flops(settings, small_config(2), 2)
    assert more == 2 * (1 + 3) * forward(1 + 4 * 2) + LOCAL * 3 * forward(1 + 2 * 1)


def test_activations_grow_with_images_and_layers_and_hold_no_logits(scaling, settings):
    few, many = (scaling.measure_kept(settings, small_config(), images) for images in (8, 16))
    assert many == pytest.approx(few, rel=0.05)
    # between the tokens that enter the next layer's norms and fc1's output alone, and 100 bytes for each feature
    layer = scaling.measure_kept(settings, small_config(3), 8) - few
    tokens = 2 * (1 + 4 * 2) + LOCAL * (1 + 2 * 1)
    assert tokens * (8 * HIDDEN + 2 * MLP) < layer < tokens * 100 * HIDDEN
    more_prototypes = small_config(), small_config()
    more_prototypes[1].num_cls_prototypes = 5000
    with_few, with_many = (scaling.measure_kept(settings, config, 8) for config in more_prototypes)
    assert with_many == pytest.approx(with_few, rel=0.05)


@pytest.mark.parametrize("images, batch_size, processes", [(1000, 16, 4), (1003, 7, 3), (64, 16, 4)])
def test_steps_are_those_of_the_loader(scaling, images, batch_size, processes):
    loader = DataLoader(range(images), batch_size=batch_size, drop_last=True)
    prepared = prepare_data_loader(loader, num_processes=processes, process_index=0, even_batches=False)
    assert scaling.steps_per_epoch(images, batch_size, processes) == len(prepared)
    assert scaling.steps_per_epoch(images, batch_size, processes, 2) == -(-len(prepared) // 2)


def test_commands_of_the_page_are_understood(scaling, monkeypatch):
    monkeypatch.chdir(ROOT)
    from finetune import FinetuneArguments  # beside pretrain.py, which the script has put on the path

    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"\$\w+", "0", line) for line in lines if line.startswith("accelerate launch")]
    commands = [shlex.split(line, comments=True) for line in lines]
    assert len(commands) == 3
    scripts = {"pretrain": scaling.PretrainArguments, "finetune": FinetuneArguments}
    for command in commands:
        launched = launch_command_parser().parse_args(command[command.index("launch") + 1 :])
        assert Path(launched.config_file).is_file() and Path(launched.training_script).is_file()
        parse_arguments(scripts[Path(launched.training_script).stem], launched.training_script_args)


@pytest.mark.slow
def test_the_page_shows_what_the_script_prints():
    process = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    page = PAGE.read_text()
    tables = [line for line in process.stdout.splitlines() if line.startswith("|") and "---" not in line]
    assert len(tables) > 20
    assert not [line for line in tables if line not in page]
