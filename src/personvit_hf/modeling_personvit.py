"""PersonViT: the backbone, and its head for person re-identification."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.dynamic_module_utils import custom_object_save
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_personvit import PersonViTConfig
from .convolution_stem import PersonViTConvolutionStem
from .linear import PersonViTLinear
from .losses import batch_hard_triplet_loss

logger = logging.get_logger(__name__)
# Patterns of what other models' checkpoints hold beside a backbone.
OF_PRETRAINING = (r"^student\.", r"^(student|teacher)_head\.", r"^(patch_)?center$")
OF_REID = (r"^(bottleneck|classifier)\.",)


def interpolate_position_embeddings(
    position_embeddings: torch.Tensor, native_grid: tuple[int, int], grid: tuple[int, int]
) -> torch.Tensor:
    """Position embeddings for an input of another size than the native one.

    Bicubic, with the scale factors (n + 0.1) / native themselves setting the sampling points, as DINO, iBOT and
    TransReID-SSL (`dino/vision_transformer.py`, `interpolate_pos_encoding`) do; resizing to the exact size would give
    other values. Unlike transformers' ViT, the native grid may be any rectangle.

    Args:
        position_embeddings: float (1, n + native rows * native columns, hidden): n tokens without a place on the
            grid, [CLS] first and then the parts, which are kept; then patches row by row.
        native_grid: (rows, columns) of `position_embeddings`.
        grid: (rows, columns) wanted.

    Returns:
        (1, n + rows * columns, hidden), the input itself when the grids are equal.
    """
    if grid == native_grid:
        return position_embeddings
    num_patches = native_grid[0] * native_grid[1]
    first, patch_positions = position_embeddings[:, :-num_patches], position_embeddings[:, -num_patches:]
    patch_positions = patch_positions.unflatten(1, native_grid).permute(0, 3, 1, 2)
    scale = tuple((new + 0.1) / native for new, native in zip(grid, native_grid, strict=True))
    # in at least float32, since bicubic sampling points are too coarse in half precision
    patch_positions = patch_positions.to(torch.promote_types(patch_positions.dtype, torch.float32))
    resized = nn.functional.interpolate(patch_positions, scale_factor=scale, mode="bicubic")
    resized = resized.flatten(2).transpose(1, 2).to(first.dtype)
    return torch.cat((first, resized), dim=1)


class PersonViTPatchEmbeddings(nn.Module):
    """Pixels (batch, channels, height, width) to patch tokens (batch, patches, hidden), row by row."""

    def __init__(self, config: PersonViTConfig):
        super().__init__()
        stride = config.patch_stride or config.patch_size
        if config.stem == "ics":
            self.stem = PersonViTConvolutionStem(config)
            self.projection = nn.Conv2d(self.stem.width, config.hidden_size, config.patch_size // 2, stride // 2)
        else:
            self.stem = None
            self.projection = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, stride)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if self.stem is not None:
            pixel_values = self.stem(pixel_values)
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


class PersonViTEmbeddings(nn.Module):
    """Pixels to tokens: [CLS], parts, patches (some replaced by the mask token); positions and side information."""

    def __init__(self, config: PersonViTConfig, use_mask_token: bool):
        super().__init__()
        self.config = config
        self.native_grid = config.patch_grid(*config.image_size)
        rows, columns = self.native_grid
        self.patch_embeddings = PersonViTPatchEmbeddings(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if use_mask_token else None
        num_parts = config.num_part_tokens
        self.part_tokens = nn.Parameter(torch.zeros(1, num_parts, config.hidden_size)) if num_parts else None
        num_tokens = 1 + num_parts + rows * columns
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_tokens, config.hidden_size))
        # one row for each camera, view, or pair of them; camera-major
        num_sides = max(config.num_cameras, 1) * max(config.num_views, 1)
        has_sides = config.num_cameras > 0 or config.num_views > 0
        self.side_embeddings = nn.Parameter(torch.zeros(num_sides, 1, config.hidden_size)) if has_sides else None
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        camera_ids: torch.Tensor | None = None,
        view_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"`pixel_values` must be (batch, {self.config.num_channels}, height, width), "
                f"got {tuple(pixel_values.shape)}."
            )
        batch_size = pixel_values.shape[0]  # len() would fix it to one number under torch.export
        grid = self.config.patch_grid(*pixel_values.shape[2:])
        tokens = self.patch_embeddings(pixel_values)
        if bool_masked_pos is not None:
            tokens = self.mask(tokens, bool_masked_pos, grid)
        first = self.cls_token if self.part_tokens is None else torch.cat((self.cls_token, self.part_tokens), dim=1)
        tokens = torch.cat((first.expand(batch_size, -1, -1), tokens), dim=1)
        tokens = tokens + interpolate_position_embeddings(self.position_embeddings, self.native_grid, grid)
        sides = self.side_information(batch_size, camera_ids, view_ids)
        if sides is not None:
            tokens = tokens + self.config.side_information_scale * sides
        return self.dropout(tokens)

    def mask(self, tokens: torch.Tensor, bool_masked_pos: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Replaces masked (True) patch tokens by the mask token, before positions are added, as iBOT does."""
        if self.mask_token is None:
            raise ValueError("`bool_masked_pos` needs a mask token: build the model with `use_mask_token=True`.")
        expected = tuple(tokens.shape[:2]), (tokens.shape[0], *grid)
        if tuple(bool_masked_pos.shape) not in expected:
            raise ValueError(
                f"`bool_masked_pos` must be (batch, patches) = {expected[0]} or (batch, rows, columns) = "
                f"{expected[1]} for these images, got {tuple(bool_masked_pos.shape)}."
            )
        masked = bool_masked_pos.flatten(1).bool().unsqueeze(-1)
        return torch.where(masked, self.mask_token.to(tokens.dtype), tokens)

    def side_information(
        self, batch_size: int, camera_ids: torch.Tensor | None, view_ids: torch.Tensor | None
    ) -> torch.Tensor | None:
        """(batch, 1, hidden) for the given cameras and views; None where the model or the caller has none."""
        if self.side_embeddings is None or (camera_ids is None and view_ids is None):
            return None
        index = 0
        for name, ids, count in (
            ("camera_ids", camera_ids, self.config.num_cameras),
            ("view_ids", view_ids, self.config.num_views),
        ):
            if not count:
                continue
            setting = f"num_{name[:-4]}s"
            if ids is None:
                raise ValueError(f"`{name}` must be given together with the other ids: `{setting}` is {count}.")
            index = index * count + checked_ids(name, ids, batch_size, count, setting)
        return self.side_embeddings[index]


def checked_ids(name: str, ids: torch.Tensor, batch_size: int, count: int, setting: str) -> torch.Tensor:
    """The ids as int64, since uint8 would choose rows as a mask does, and small types overflow in products.

    Raises a ValueError unless there is one id an image in [0, count), naming the argument and its setting.
    """
    if tuple(ids.shape) != (batch_size,) or ids.is_floating_point():
        found = f"{tuple(ids.shape)} of {ids.dtype}"
        raise ValueError(f"`{name}` must be (batch,) = ({batch_size},) of an integer type, got {found}.")
    ids = ids.long()
    # there are no values to look at while compiling or under vmap, nor in meta and fake tensors (a subclass)
    unseen = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or ids.is_meta
    if unseen or type(ids) is not torch.Tensor or ids.numel() == 0:
        return ids
    low, high = torch.stack(torch.aminmax(ids)).tolist()  # a GPU is waited for once
    if low < 0 or high >= count:
        raise ValueError(
            f"`{name}` must lie in [0, {count - 1}] since `{setting}` is {count}, got values from {low} to {high}."
        )
    return ids


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention: (batch, heads, tokens, head size) in, (batch, tokens, heads, head size) and weights out."""
    weights = torch.matmul(query * scaling, key.transpose(2, 3))
    if attention_mask is not None:
        weights = weights + attention_mask
    # softmax computes in float32 inside; asked for as a float32 result, bfloat16 would be copied there and back
    weights = nn.functional.softmax(weights, dim=-1).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class PersonViTAttention(nn.Module):
    """Multi-head self-attention through transformers' attention interface.

    `sizes` are the (images, tokens) of several batches whose tokens come in one sequence, (1, all tokens, hidden).
    """

    def __init__(self, config: PersonViTConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        # query, key and value in one, as all official checkpoints have them: iBOT clips gradients by parameter
        self.qkv_proj = PersonViTLinear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.o_proj = PersonViTLinear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        num_queries: int | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        projected = self.qkv_proj(hidden_states)
        if sizes is None:
            output, weights = self.attend(projected, num_queries, **kwargs)
            return self.o_proj(output), weights
        batches = projected.squeeze(0).split([images * tokens for images, tokens in sizes])
        each = zip(batches, sizes, strict=True)
        outputs = [self.attend(batch.unflatten(0, size), **kwargs)[0].flatten(0, 1) for batch, size in each]
        return self.o_proj(torch.cat(outputs).unsqueeze(0)), None

    def attend(
        self, projected: torch.Tensor, num_queries: int | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention within each image: (batch, tokens, 3 * hidden) to (batch, queries, hidden), and weights."""
        # to three times (batch, heads, tokens, head size); chunks are joined again with one copy in the backward pass
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in projected.chunk(3, dim=-1)
        )
        query = query[:, :, :num_queries]
        kind = self.config._attn_implementation
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager_attention_forward)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        output, weights = attention(self, query, key, value, None, dropout=dropout, scaling=self.scaling, **kwargs)
        return output.flatten(-2), weights


class PersonViTMLP(nn.Module):
    """Two linear layers with the activation between."""

    def __init__(self, config: PersonViTConfig):
        super().__init__()
        self.fc1 = PersonViTLinear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = PersonViTLinear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class PersonViTLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer with stochastic depth."""

    def __init__(self, config: PersonViTConfig):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = PersonViTAttention(config)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = PersonViTMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        num_outputs: int | None = None,
        scales: torch.Tensor | None = None,
        skips: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """(batch, tokens, hidden) to the same, or to its first `num_outputs` tokens.

        `scales`, from `draw_scales`, is what both branches are multiplied by: (2, batch, 1, 1), or (2, 1, tokens, 1).
        With `skips` what would be multiplied by 0 isn't computed.
        """

        def attend(tokens: torch.Tensor) -> torch.Tensor:
            return self.attention(self.layernorm_before(tokens), num_outputs, **kwargs)[0]

        of_attention, of_mlp = (None, None) if scales is None else scales.unbind()
        hidden_states = self.add(hidden_states, attend, of_attention, skips, num_outputs)
        return self.add(hidden_states, lambda tokens: self.mlp(self.layernorm_after(tokens)), of_mlp, skips)

    def add(
        self, tokens: torch.Tensor, branch: Callable, scales: torch.Tensor | None, skips: bool, num: int | None = None
    ) -> torch.Tensor:
        """Adds a branch times `scales`, to the first `num` tokens."""
        residual = tokens[:, :num]
        if scales is None or not skips:
            added = self.dropout(branch(tokens))
            return residual + (added if scales is None else added * scales.to(residual.dtype))
        kept = scales.flatten().nonzero().flatten()
        if not len(kept):  # one image goes in for nothing, since weights without gradients stop data parallel runs
            kept = torch.zeros(1, dtype=torch.long)
        added = self.dropout(branch(tokens[kept])).to(residual.dtype)
        return residual.index_add(0, kept, added, alpha=scales.max().item())


class PersonViTPreTrainedModel(PreTrainedModel):
    """What all PersonViT models share: configuration, initialisation, and what their checkpoints may lack."""

    config_class = PersonViTConfig
    base_model_prefix = "personvit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["PersonViTEmbeddings", "PersonViTLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    accepts_loss_kwargs = False  # losses are means over the batch: Trainer divides them by its accumulated batches
    _can_record_outputs = {"hidden_states": PersonViTLayer, "attentions": PersonViTAttention}
    _input_embed_layer = "patch_embeddings"
    # Every checkpoint's backbone loads into every class: heads and student of a pre-training run, the ReID head, and
    # a mask token that fine-tuned models no longer have are left aside without a warning. Classes with such parts
    # leave their own patterns out.
    _keys_to_ignore_on_load_missing = [r"embeddings\.mask_token$"]
    _keys_to_ignore_on_load_unexpected = [*OF_PRETRAINING, *OF_REID, r"embeddings\.mask_token$"]

    def post_init(self) -> None:
        """transformers' `post_init`, which adds the backbone's patterns: they would hide a model's own weights."""
        super().post_init()
        own = type(self)._keys_to_ignore_on_load_unexpected
        self._keys_to_ignore_on_load_unexpected = type(self._keys_to_ignore_on_load_unexpected)(own)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """transformers' `from_pretrained`; frozen parameters stay frozen, which loading forgets."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze()
        return loaded

    def save_pretrained(self, save_directory, *args, **kwargs):
        """transformers' `save_pretrained`, which puts the code files beside the weights: without this package,
        `AutoModel` finds the backbone in them whichever class was saved."""
        if type(self).__module__.rpartition(".")[0] != __name__.rpartition(".")[0]:
            # of a subclass elsewhere transformers copies that file alone
            os.makedirs(save_directory, exist_ok=True)
            custom_object_save(PersonViTPreTrainedModel, save_directory)
        self.config.auto_map = {
            "AutoConfig": "configuration_personvit.PersonViTConfig",
            "AutoModel": "modeling_personvit.PersonViTModel",
            "AutoModelForImageClassification": "modeling_personvit.PersonViTForReID",
        }
        super().save_pretrained(save_directory, *args, **kwargs)

    def freeze(self) -> None:
        """Freezes what the model never trains: nothing, in the backbone."""

    def _is_asked_for_more(self, kwargs: dict[str, Any]) -> bool:
        """Whether hidden states or attentions are wanted, by arguments of `forward` or by the configuration."""
        names = (f"output_{name}" for name in self._can_record_outputs)
        return any(kwargs.get(name, getattr(self.config, name)) for name in names)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Truncated normal weights and zero biases, as DINO and iBOT; the mask token starts at zero."""
        std = self.config.initializer_range
        if isinstance(module, PersonViTEmbeddings):
            init.trunc_normal_(module.cls_token, std=std)
            init.trunc_normal_(module.position_embeddings, std=std)
            if module.part_tokens is not None:
                init.trunc_normal_(module.part_tokens, std=std)
            if module.mask_token is not None:
                init.zeros_(module.mask_token)
            if module.side_embeddings is not None:
                init.trunc_normal_(module.side_embeddings, std=std)
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            # DINO and iBOT leave the patch projection at PyTorch's default; at 0.02 colours would start out weaker
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.InstanceNorm2d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class PersonViTModel(PersonViTPreTrainedModel):
    r"""
    The PersonViT backbone: a plain pre-norm ViT whose [CLS] token is the person's feature.

    Args:
        config: A [`PersonViTConfig`].
        use_mask_token: Whether patches can be masked (`bool_masked_pos`).
    """

    _auto_class = "AutoModel"

    def __init__(self, config: PersonViTConfig, use_mask_token: bool = True):
        config.validate_sizes()  # again, since `from_pretrained` replaces settings unchecked
        config.validate_choices()
        super().__init__(config)
        self.embeddings = PersonViTEmbeddings(config, use_mask_token)
        depth = config.num_hidden_layers
        self.layers = nn.ModuleList(PersonViTLayer(config) for _ in range(depth))
        self.drop_path_rates = [config.drop_path_rate * index / max(depth - 1, 1) for index in range(depth)]
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        camera_ids: torch.Tensor | None = None,
        view_ids: torch.Tensor | None = None,
        only_cls: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, num_channels, height, width)`):
                Normalised images of any height and width that the patch size divides. At another size than
                `config.image_size`, position embeddings are interpolated.
            bool_masked_pos (`torch.BoolTensor` of shape `(batch, patches)` or `(batch, rows, columns)`, *optional*):
                True where a patch is replaced by the mask token.
            camera_ids (`torch.LongTensor` of shape `(batch,)`, *optional*):
                Cameras from 0, for models with `num_cameras`. None adds no side information.
            view_ids (`torch.LongTensor` of shape `(batch,)`, *optional*):
                Viewpoints from 0, for models with `num_views`.
            only_cls (`bool`, *optional*, defaults to `False`):
                Whether the last layer computes its [CLS] token alone, which is all of it that the pooled output needs
                (6% less work in 12 layers). `last_hidden_state` then holds this one token, as does the last of
                `hidden_states` if they are asked for.

        Returns:
            `last_hidden_state` (batch, 1 + parts + patches, hidden) after the final LayerNorm, [CLS] first, and
            `pooler_output` (batch, hidden), its [CLS] token. `hidden_states`, if asked for, are those before the
            final LayerNorm.

        Raises:
            ValueError: if the image can't be cut into patches, masks or ids don't fit, or there is `attention_mask`.
        """
        if kwargs.pop("attention_mask", None) is not None:
            raise ValueError("PersonViT has no `attention_mask`: leave it out, or hide patches by `bool_masked_pos`.")
        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        hidden_states = self.embeddings(pixel_values, bool_masked_pos, camera_ids, view_ids)
        scales = self.draw_scales(pixel_values.shape[0], hidden_states.device)
        # Numbers of images that change by chance cost a GPU more than they spare it, would be compiled each anew, and
        # leave attentions without the images that were left out.
        on_cpu = hidden_states.device.type == "cpu" and not torch.compiler.is_compiling()
        kwargs["skips"] = on_cpu and not self._is_asked_for_more(kwargs)
        for layer, own in list(zip(self.layers, scales, strict=True))[:-1]:
            hidden_states = layer(hidden_states, num_outputs=None, scales=own, **kwargs)
        return self.finish(hidden_states, only_cls, scales[-1], **kwargs)

    def draw_scales(self, num_images: int, device: torch.device) -> torch.Tensor | list[None]:
        """What stochastic depth multiplies both branches of each layer by, 0 or 1 / (1 - rate); Nones without it.

        (layers, 2, images, 1, 1), drawn at once, as each operation on a GPU takes its time to start.
        """
        each = zip(self.layers, self.drop_path_rates, strict=True)
        rates = [rate if self.training and layer.training else 0.0 for layer, rate in each]
        if not any(rates):
            return [None] * len(rates)
        dropped = torch.tensor(rates).to(device, non_blocking=True).view(-1, 1, 1, 1, 1)
        kept = torch.rand(len(rates), 2, num_images, 1, 1, device=device) >= dropped
        return kept / (1 - dropped).clamp(min=torch.finfo(dropped.dtype).tiny)

    def finish(
        self, hidden_states: torch.Tensor, only_cls: bool, scales: torch.Tensor | None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """The last layer, and what `forward` returns."""
        hidden_states = self.layers[-1](hidden_states, num_outputs=1 if only_cls else None, scales=scales, **kwargs)
        tokens = self.layernorm(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens[:, 0])


@dataclass
class PersonViTForReIDOutput(ModelOutput):
    r"""
    Output of [`PersonViTForReID`].

    Args:
        loss (scalar, when `labels` are given): Weighted sum of ID and triplet loss.
        id_loss (scalar): Cross-entropy of `logits`, in nats.
        triplet_loss (scalar): Batch-hard triplet loss of the features before the BNNeck.
        logits (`torch.FloatTensor` of shape `(batch, num_labels)`): Scores of the training identities.
        embeddings (`torch.FloatTensor` of shape `(batch, hidden)`): The retrieval feature, not normalised.
        hidden_states, attentions: of the backbone, when asked for.
    """

    loss: torch.FloatTensor | None = None
    id_loss: torch.FloatTensor | None = None
    triplet_loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    embeddings: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class PersonViTForReID(PersonViTPreTrainedModel):
    r"""
    Backbone, BNNeck and ID classifier (Luo et al., arXiv 1903.07071): the [CLS] feature feeds the triplet loss, its
    batch-normalised form the classifier. `config.num_labels` is the number of training identities. For attributes of
    people instead of identities, `config.problem_type` may be "multi_label_classification" or "regression", with the
    loss that transformers' image classifiers have then, and no triplets.
    """

    _auto_class = "AutoModelForImageClassification"
    _keys_to_ignore_on_load_unexpected = [*OF_PRETRAINING, r"embeddings\.mask_token$"]

    def __init__(self, config: PersonViTConfig):
        super().__init__(config)
        self.personvit = PersonViTModel(config, use_mask_token=False)
        self.bottleneck = nn.BatchNorm1d(config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.freeze()
        self.post_init()

    def freeze(self) -> None:
        """The BNNeck has no trained bias (arXiv 1903.07071, sec. 3.6)."""
        self.bottleneck.bias.requires_grad_(False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """A classifier that starts near zero, as in the BNNeck paper's code; the rest as everywhere."""
        if module is self.classifier:
            init.normal_(module.weight, std=0.001)
        else:
            super()._init_weights(module)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        camera_ids: torch.Tensor | None = None,
        view_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PersonViTForReIDOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, num_channels, height, width)`): Normalised images.
            labels (`torch.LongTensor` of shape `(batch,)`, *optional*): Identities from 0 to `num_labels` - 1; gives
                the losses. The batch should hold several images of each of several identities. With a
                `problem_type` other than identities, float (batch, num_labels).
            camera_ids, view_ids (`torch.LongTensor` of shape `(batch,)`, *optional*): See [`PersonViTModel`].

        Raises:
            ValueError: if a label is out of range, a training batch has one image, or the backbone refuses its input.
        """
        if self.training:  # not in evaluation, where features equal the backbone's own to the last bit
            kwargs.setdefault("only_cls", not self._is_asked_for_more(kwargs))
        outputs = self.personvit(pixel_values, camera_ids=camera_ids, view_ids=view_ids, **kwargs)
        feature = outputs.pooler_output
        if isinstance(self.bottleneck, nn.BatchNorm1d) and self.bottleneck.training and feature.shape[0] == 1:
            fix = "set `dataloader_drop_last=True` (Trainer) or `drop_last=True` (DataLoader) if it is the last batch"
            raise ValueError(f"The BNNeck needs a batch of at least 2 images in training, got 1: {fix}.")
        if self.training and labels is None and not torch.compiler.is_compiling():
            logger.warning_once(
                "In training without `labels` there is no loss. With `label_smoothing_factor` Trainer keeps them, and "
                "leaves out triplets and weights of losses: set `label_smoothing` of the model's config instead."
            )
        normalized = self.bottleneck(feature)
        logits = self.classifier(normalized)

        loss = id_loss = triplet_loss = None
        if labels is not None and self.config.problem_type in ("multi_label_classification", "regression"):
            loss = ForSequenceClassificationLoss(labels, logits, self.config)
        elif labels is not None:
            labels = checked_ids("labels", labels, len(logits), self.config.num_labels, "num_labels")
            id_loss = nn.functional.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
            triplet_loss = batch_hard_triplet_loss(feature, labels, self.config.triplet_margin)
            loss = self.config.id_loss_weight * id_loss + self.config.triplet_loss_weight * triplet_loss
        return PersonViTForReIDOutput(
            loss=loss,
            id_loss=id_loss,
            triplet_loss=triplet_loss,
            logits=logits,
            embeddings=feature if self.config.neck_feature == "before" else normalized,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["PersonViTForReID", "PersonViTModel", "PersonViTPreTrainedModel"]
