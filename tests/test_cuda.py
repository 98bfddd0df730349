"""What only a GPU can show: the models and the scripts there, under each launcher configuration, and resumed.

One GPU is enough: a single process takes the ways of NCCL, FSDP2 and DeepSpeed, too. `pytest -m gpu tests`.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_distributed import CONFIGURATIONS, SETTINGS, needs_deepspeed
from test_examples import EXAMPLES, FINETUNE, MODEL, as_flags, column, people, weights
from torch.testing import assert_close

from personvit_hf import PersonViTConfig, PersonViTForPreTraining, PersonViTForReID, PersonViTImageProcessor, losses
from personvit_hf.checkpointing import list_checkpoints
from personvit_hf.embedding import read_embeddings

__all__ = ["people"]  # a fixture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LAUNCH = ("accelerate.commands.launch", "--main_process_port", "0", "--num_processes", "1")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "1")  # `launch` wants two GPUs for DDP
WAYS = [pytest.param(TORCHRUN, id="nccl")]
WAYS += [
    pytest.param(
        (*LAUNCH, "--config_file", str(CONFIGURATIONS / f"{name}.yaml"), "--mixed_precision", "no"),
        id=name,
        marks=[needs_deepspeed] if "deepspeed" in name else [],
    )
    for name in ("fsdp2", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3")
]


def launch(way: tuple[str, ...], script: str, **settings) -> None:
    command = [sys.executable, "-m", *way, str(EXAMPLES / script), *as_flags(settings)]
    environment = os.environ | {"DS_ACCELERATOR": "cuda", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, (process.stdout + process.stderr)[-6000:]


def on_one_gpu(precision: str) -> tuple[str, ...]:
    return (*LAUNCH, "--config_file", str(CONFIGURATIONS / "single_gpu.yaml"), "--mixed_precision", precision)


def results(output, loss: torch.Tensor, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Losses, gradients and buffers, on the CPU."""
    loss.backward()
    named = {name: value for name, value in output.items() if name.endswith("loss")}
    named |= {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    named |= dict(model.named_buffers())
    # the keys' bias changes no attention: its gradient is rounding noise
    return {name: value.detach().cpu() for name, value in named.items() if not name.endswith("qkv_proj.bias")}


@pytest.mark.parametrize("max_logits", [2**30, 2**9])
def test_pretraining_gives_the_cpus_losses_gradients_and_centers(monkeypatch, max_logits):
    monkeypatch.setattr(losses, "MAX_LOGITS_ON_GPU", max_logits)
    torch.manual_seed(0)
    model = PersonViTForPreTraining(PersonViTConfig(**MODEL, image_size=[32, 16], koleo_loss_weight=0.1)).train()
    batch = {
        "global_pixel_values": torch.randn(4, 2, 3, 32, 16),
        "local_pixel_values": torch.randn(4, 3, 3, 16, 8),
        "bool_masked_pos": torch.rand(4, 2, 8) < 0.3,
    }
    there = copy.deepcopy(model).cuda()
    output = model(**batch)
    expected = results(output, output.loss, model)
    output = there(**{name: value.cuda() for name, value in batch.items()})
    assert output.loss.is_cuda
    found = results(output, output.loss, there)
    assert set(found) == set(expected)
    assert_close(found, expected, atol=1e-5, rtol=1e-3)


def test_reid_gives_the_cpus_losses_and_gradients():
    torch.manual_seed(0)
    config = PersonViTConfig(**MODEL, image_size=[32, 16], num_labels=4, num_cameras=3)
    model = PersonViTForReID(config).double().train()
    inputs = {"pixel_values": torch.randn(8, 3, 32, 16).double(), "labels": torch.arange(4).repeat_interleave(2)}
    inputs["camera_ids"] = torch.arange(8) % 3
    there = copy.deepcopy(model).cuda()
    output = model(**inputs)
    expected = results(output, output.loss, model)
    output = there(**{name: value.cuda() for name, value in inputs.items()})
    assert_close(results(output, output.loss, there), expected, atol=1e-8, rtol=1e-6)
    with pytest.raises(ValueError, match="`labels` must lie in"):
        there(inputs["pixel_values"].cuda(), labels=torch.full((8,), 4).cuda())


@pytest.mark.parametrize("precision, tolerance", [("no", 1e-5), ("bf16", 1e-3), ("fp16", 1e-3)])
def test_a_run_trains_and_resumes(people, tmp_path, precision, tolerance):
    settings = SETTINGS | {"mixed_precision": precision, "data": people / "unlabelled", "save_epochs": 1}
    settings |= {"keep_checkpoints": 9, "num_workers": 2}
    launch(on_one_gpu(precision), "pretrain.py", output_dir=tmp_path / "whole", **settings)
    expected = column(tmp_path / "whole", "loss")
    assert len(expected) == 20
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for later in list_checkpoints(tmp_path / "resumed" / "checkpoints"):
        if int(later.name.removeprefix("step-")) > 10:
            shutil.rmtree(later)
    again = settings | {"resume_from": "latest", "gradient_checkpointing": True}  # which changes memory and time alone
    launch(on_one_gpu(precision), "pretrain.py", output_dir=tmp_path / "resumed", **again)
    assert column(tmp_path / "resumed", "loss") == pytest.approx(expected, rel=tolerance)


@pytest.fixture(scope="module")
def alone(people, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    launch(on_one_gpu("no"), "pretrain.py", data=people / "unlabelled", output_dir=folder, **SETTINGS)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_every_configuration_gives_the_weights_of_one_gpu(people, alone, tmp_path, way):
    out = tmp_path / "out"
    launch(way, "pretrain.py", data=people / "unlabelled", output_dir=out, **SETTINGS)
    a, b = weights(alone), weights(out)
    for name in a:
        if name.endswith("qkv_proj.bias"):
            a[name][32:64] = b[name][32:64] = 0
    assert_close({k: v.cpu() for k, v in a.items()}, {k: v.cpu() for k, v in b.items()}, atol=1e-4, rtol=0)


def test_finetuning_scores_as_the_saved_model_does_on_the_cpu(people, tmp_path):
    out = tmp_path / "out"
    settings = FINETUNE | {"data": people / "market", "config_overrides": json.dumps(MODEL), "eval_epochs": 1}
    launch(on_one_gpu("bf16"), "finetune.py", output_dir=out, **settings)
    expected = json.loads((out / "results.json").read_text())["mAP"]
    command = [sys.executable, str(EXAMPLES / "evaluate_reid.py"), "--model", str(out), "--data"]
    command += [str(people / "market"), "--output", str(tmp_path / "cpu.json")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    assert json.loads((tmp_path / "cpu.json").read_text())["mAP"] == pytest.approx(expected, abs=2e-3)


def test_embeddings_are_the_cpus(people, tmp_path):
    out = {name: tmp_path / name for name in ("gpu", "cpu")}
    config = PersonViTConfig(**MODEL, image_size=[32, 16])
    PersonViTForReID(config).save_pretrained(tmp_path / "model")
    PersonViTImageProcessor(size={"height": 32, "width": 16}).save_pretrained(tmp_path / "model")
    for name, devices in (("gpu", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": ""})):
        command = [sys.executable, "-c", "from personvit_hf.cli import main; main()", "embed", str(people / "market")]
        command += ["--split", "query", "--model", str(tmp_path / "model"), "--out", str(out[name])]
        process = subprocess.run(command, env=os.environ | devices, capture_output=True, text=True)
        assert process.returncode == 0, process.stdout + process.stderr
    vectors = [read_embeddings(folder).embeddings for folder in out.values()]
    assert len(vectors[0]) > 9
    assert_close(*map(torch.from_numpy, vectors), atol=1e-3, rtol=0)  # PyTorch convolves in TF32 on a GPU
