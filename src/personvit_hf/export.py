"""Models out: to plain transformers ViT, timm, ONNX and torch.export, none of which needs this package to run.

All four compute the person's feature: the [CLS] token after the final LayerNorm and, for a PersonViTForReID with
`neck_feature="after"`, after its BNNeck. Cameras and views (SIE) are exported without side information, as the models
themselves compute it when they aren't told the camera.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from importlib.metadata import version
from pathlib import Path

import torch
from PIL.Image import Resampling
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from transformers import BaseImageProcessor, ViTConfig, ViTImageProcessor

from .checkpoint_names import official_name
from .configuration_personvit import PRESETS, PersonViTConfig
from .extras import require
from .files import written_aside
from .modeling_personvit import PersonViTForReID, PersonViTModel
from .plain_vit import Tensors, backbone_and_neck, check_plain, plain_weights, vit_names

logger = logging.getLogger(__name__)

# The oldest that PyTorch's exporter writes without converting; known to every ONNX Runtime since 1.14.
ONNX_OPSET = 18
ONNX_MAX_BYTES = 2**31 - 2**20  # a protobuf ends at 2 GiB; the graph itself needs a little
TIMM_LAYER_NORM_EPS = 1e-6


def export_vit(
    model: PersonViTModel | PersonViTForReID,
    processor: BaseImageProcessor,
    folder: str | Path,
    *,
    half: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes a plain transformers ViT (`model_type: vit`): `AutoModel` loads it without this package or remote code.

    The feature is `last_hidden_state[:, 0]`. The pooler, which stock ViTs have and would fill with random weights, is
    the identity, so `pooler_output` is the same feature. A BNNeck is folded into the final LayerNorm. Position
    embeddings are those of the processor's size, the only one that the exported model takes. The stock processor
    resizes by torchvision's kernel, which differs from this package's (PIL's) by a grey level here and there.

    Args:
        model: What to export.
        processor: Its image processor: size and statistics.
        folder: Where to write; must not exist, or be empty.
        half: float16 weights (half the size).
        overwrite: Replace an earlier export.

    Raises:
        ValueError: if a plain ViT can't compute this model, naming why.
        FileExistsError: if `folder` is not empty.
    """
    config = model.config
    check_plain(config, "a plain transformers ViT")
    _warn_without_cameras(config)
    height, width = _image_size(processor)
    with written_aside(Path(folder), overwrite) as aside:
        aside.mkdir()
        weights = vit_names(plain_weights(model, (height, width)))
        weights["pooler.dense.weight"] = torch.eye(config.hidden_size)
        weights["pooler.dense.bias"] = torch.zeros(config.hidden_size)
        _save_weights(weights, aside / "model.safetensors", half)
        same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
        same += ("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps")
        same += ("patch_size", "num_channels", "qkv_bias")
        ViTConfig(
            **{name: getattr(config, name) for name in same},
            image_size=[height, width],
            pooler_act="linear",
            architectures=["ViTModel"],
            dtype=torch.float16 if half else torch.float32,
        ).save_pretrained(aside)
        ViTImageProcessor(
            size={"height": height, "width": width},
            resample=processor.resample,
            rescale_factor=processor.rescale_factor,
            image_mean=list(processor.image_mean),
            image_std=list(processor.image_std),
            do_convert_rgb=True,
        ).save_pretrained(aside)


def export_timm(
    model: PersonViTModel | PersonViTForReID,
    processor: BaseImageProcessor,
    folder: str | Path,
    *,
    half: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes a folder that `timm.create_model("local-dir:<folder>", pretrained=True)` loads; it returns the feature.

    `model.safetensors` holds the state dict under timm's names, `config.json` the model's name (`architecture`), the
    arguments for `timm.create_model` (`model_args`) and the preprocessing (`pretrained_cfg`). The same folder works
    from the Hub, as `hf-hub:<repository>`. A BNNeck is folded into the final LayerNorm.

    The arguments are those of `export_vit`. timm computes in float32 also from the float16 weights of `half`.

    Raises:
        ValueError: if timm's ViT can't compute this model, naming why.
        FileExistsError: if `folder` is not empty.
    """
    config = model.config
    check_plain(config, "timm")
    _warn_without_cameras(config)
    if config.hidden_act != "gelu" or config.layer_norm_eps != TIMM_LAYER_NORM_EPS:
        raise ValueError(
            f"timm's ViTs have `hidden_act='gelu'` and `layer_norm_eps={TIMM_LAYER_NORM_EPS}`, this model has "
            f"{config.hidden_act!r} and {config.layer_norm_eps}: export it to vit, onnx or torch."
        )
    height, width = _image_size(processor)
    preset = next((name for name, sizes in PRESETS.items() if sizes[0] == config.hidden_size), "base")
    model_args = {
        "img_size": [height, width],
        "patch_size": config.patch_size,
        "in_chans": config.num_channels,
        "num_classes": 0,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "qkv_bias": config.qkv_bias,
    }
    preprocessing = {
        "input_size": [config.num_channels, height, width],
        "fixed_input_size": True,
        "interpolation": Resampling(processor.resample).name.lower(),
        "crop_pct": 1.0,
        "crop_mode": "squash",  # to the size, whatever the crop's shape was
        "mean": list(processor.image_mean),
        "std": list(processor.image_std),
        "num_classes": 0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    with written_aside(Path(folder), overwrite) as aside:
        aside.mkdir()
        weights = {official_name(name): tensor for name, tensor in plain_weights(model, (height, width)).items()}
        _save_weights(weights, aside / "model.safetensors", half)  # timm has the official names
        description = {
            "architecture": f"vit_{preset}_patch16_224",
            "num_classes": 0,
            "num_features": config.hidden_size,
            "global_pool": "token",
            "model_args": model_args,
            "pretrained_cfg": preprocessing,
        }
        (aside / "config.json").write_text(json.dumps(description, indent=2) + "\n")


def export_onnx(
    model: PersonViTModel | PersonViTForReID,
    processor: BaseImageProcessor,
    file: str | Path,
    *,
    normalize: bool = True,
    half: bool = False,
    batch_size: int | None = None,
    opset: int = ONNX_OPSET,
    overwrite: bool = False,
    prepare: nn.Module | None = None,
) -> None:
    """Writes one ONNX file.

    It maps `pixel_values`, float32 (batch, channels, height, width), to `embeddings`, float32 (batch, hidden). Its
    metadata tell what a tracker must know: `image_size`, `image_mean`, `image_std`, `feature_size`, `normalized`,
    `model`, `revision` and more; what is no text stands as JSON.

    Args:
        model: What to export.
        processor: Its image processor: size and statistics.
        file: Where to write, ending in `.onnx`.
        normalize: Rows of length 1, so that dot products are cosines; otherwise the feature as it is.
        half: Weights of 16 bits (half the size), see `Int16Weight`; arithmetic, input and output stay float32.
        batch_size: The only batch size that the file takes; `None` for any.
        opset: Version of the ONNX operators, 18 or later.
        overwrite: Replace an existing file.
        prepare: Goes into the file before the model, for input of another size or statistics than the model's; those
            are then what `processor` tells.

    Raises:
        ImportError: if `onnx` or `onnxscript` are not installed.
        ValueError: if the weights don't fit in one file (2 GiB), the name ends otherwise or PyTorch can't write the
            opset.
        FileExistsError: if `file` exists.
    """
    for module in ("onnx", "onnxscript"):
        require(module, "export")
    file = _with_suffix(file, ".onnx")
    if opset < ONNX_OPSET:
        raise ValueError(f"`opset` must be {ONNX_OPSET} or later, got {opset}: PyTorch writes no older ones.")
    embedder, example, dynamic_shapes = _traceable(model, processor, normalize, half, batch_size, prepare)
    num_bytes = sum(weight.nbytes for weight in embedder.state_dict().values())
    if num_bytes > ONNX_MAX_BYTES:
        raise ValueError(
            f"{file}: {num_bytes / 2**30:.1f} GiB of weights are more than one ONNX file holds (2 GiB): export in "
            "half precision, or to torch."
        )
    with written_aside(file, overwrite) as aside:
        program = torch.onnx.export(
            embedder,
            (example,),
            input_names=["pixel_values"],
            output_names=["embeddings"],
            dynamic_shapes=dynamic_shapes,
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
        written = program.model.opset_imports[""]
        if written != opset:
            raise ValueError(f"`opset` {opset} is not known to this PyTorch, which wrote {written} instead.")
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # names files of this machine
        metadata = _metadata(model, processor, normalize, half) | {"opset": opset}
        program.model.metadata_props.clear()
        program.model.metadata_props.update(
            {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
        )
        program.save(aside, external_data=False)


def export_torch(
    model: PersonViTModel | PersonViTForReID,
    processor: BaseImageProcessor,
    file: str | Path,
    *,
    normalize: bool = True,
    half: bool = False,
    batch_size: int | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a torch.export program: `torch.export.load(file).module()` maps pixels to embeddings as ONNX files do.

    It holds `metadata.json` with the same entries as an ONNX file's metadata:
    `torch.export.load(file, extra_files=extra)` puts it into `extra = {"metadata.json": ""}`.

    The arguments are those of `export_onnx`; `file` must end in `.pt2`.

    Raises:
        ValueError: if the name ends otherwise.
        FileExistsError: if `file` exists.
    """
    file = _with_suffix(file, ".pt2")
    embedder, example, dynamic_shapes = _traceable(model, processor, normalize, half, batch_size)
    with written_aside(file, overwrite) as aside:
        program = torch.export.export(embedder, (example,), dynamic_shapes=dynamic_shapes)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # names files of this machine
        metadata = json.dumps(_metadata(model, processor, normalize, half), indent=2)
        torch.export.save(program, aside, extra_files={"metadata.json": metadata})


class PersonEmbedder(nn.Module):
    """Pixels float32 (batch, channels, height, width) to embeddings float32 (batch, hidden), of length 1 if wanted."""

    def __init__(
        self, backbone: PersonViTModel, neck: nn.BatchNorm1d | None, normalize: bool, prepare: nn.Module | None = None
    ):
        super().__init__()
        self.prepare = prepare
        self.backbone = backbone
        self.neck = neck
        self.normalize = normalize

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See the class."""
        if self.prepare is not None:
            pixel_values = self.prepare(pixel_values)
        feature = self.backbone(pixel_values).pooler_output
        if self.neck is not None:
            feature = self.neck(feature)
        return nn.functional.normalize(feature, dim=-1) if self.normalize else feature


class Int16Weight(nn.Module):
    """A weight as 16-bit integers, with one float32 scale for each output channel.

    float16 would take the same room, but only 11 of its bits count: rounding the weights alone to it moves the
    components of unit vectors by up to 2e-4 (ViT-Ti to ViT-B), this by 2e-5. Runtimes multiply once, when they load.
    """

    def forward(self, integers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The weight, float32."""
        return integers * scale

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Integers of the weight's shape, and scales that are broadcast to it."""
        largest = weight.abs().amax(tuple(range(1, weight.ndim)), keepdim=True)
        scale = largest.clamp(min=torch.finfo(weight.dtype).tiny) / torch.iinfo(torch.int16).max
        return (weight / scale).round().to(torch.int16), scale


def _traceable(
    model: PersonViTModel | PersonViTForReID,
    processor: BaseImageProcessor,
    normalize: bool,
    half: bool,
    batch_size: int | None,
    prepare: nn.Module | None = None,
) -> tuple[PersonEmbedder, torch.Tensor, dict | None]:
    """A copy to be traced, an input for it and which of its axes are free."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, or None for any, got {batch_size}.")
    _warn_without_cameras(model.config)
    size = _image_size(processor)
    model.config.patch_grid(*size)  # an error that names the size, if it can't be cut into patches
    backbone, neck = copy.deepcopy(backbone_and_neck(model))
    backbone.set_attn_implementation("sdpa")
    embedder = PersonEmbedder(backbone, neck, normalize, prepare).eval().requires_grad_(False).cpu().float()
    if half:
        for module in list(backbone.modules()):
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                register_parametrization(module, "weight", Int16Weight())
    # a batch of 1 would be traced as a constant
    example = torch.zeros(batch_size or 2, backbone.config.num_channels, *size)
    dynamic_shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1)}} if batch_size is None else None
    return embedder, example, dynamic_shapes


def _warn_without_cameras(config: PersonViTConfig) -> None:
    if config.num_cameras or config.num_views:
        logger.warning(
            "The model has side information of %d cameras and %d views: it is exported without (as for an image whose "
            "camera is not known).",
            config.num_cameras,
            config.num_views,
        )


def _image_size(processor: BaseImageProcessor) -> tuple[int, int]:
    """(height, width) in pixels that the processor resizes to."""
    height, width = (processor.size[name] for name in ("height", "width"))
    return height, width


def _save_weights(weights: Tensors, file: Path, half: bool) -> None:
    dtype = torch.float16 if half else torch.float32
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}, file, {"format": "pt"})


def _metadata(
    model: PersonViTModel | PersonViTForReID, processor: BaseImageProcessor, normalize: bool, half: bool
) -> dict[str, object]:
    """What one must know to use an exported file."""
    height, width = _image_size(processor)
    channels, features = model.config.num_channels, model.config.hidden_size
    name = model.config._name_or_path
    digest = hashlib.sha256()
    for weight in model.state_dict().values():
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return {
        "model": Path(name).name if Path(name).exists() else name,
        "revision": getattr(model.config, "_commit_hash", None) or "",
        "weights_sha256": digest.hexdigest(),
        "personvit_hf": version("personvit-hf"),
        "input": f"pixel_values: float32 (batch, {channels}, {height}, {width}), RGB, normalised",
        "output": f"embeddings: float32 (batch, {features})",
        "image_size": [height, width],
        "image_mean": list(processor.image_mean),
        "image_std": list(processor.image_std),
        "rescale_factor": processor.rescale_factor,
        "resample": Resampling(processor.resample).name.lower(),
        "feature_size": features,
        "normalized": normalize,
        "precision": "float32, weights int16" if half else "float32",
    }


def _with_suffix(file: str | Path, suffix: str) -> Path:
    if Path(file).suffix != suffix:
        raise ValueError(f"{file}: the file to write must end in {suffix}, such as {Path(file) / ('model' + suffix)}.")
    return Path(file)
