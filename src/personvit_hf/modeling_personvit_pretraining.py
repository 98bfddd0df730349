"""PersonViT's pre-training: student, teacher, projection heads, and the DINO and MIM losses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_personvit import PersonViTConfig
from .linear import PersonViTLinear
from .losses import (
    at_least_float32,
    dino_loss,
    koleo_loss,
    masked_patch_weights,
    mim_loss,
    student_log_probabilities,
    sum_of_chunks,
    teacher_probabilities,
)
from .modeling_personvit import OF_REID, PersonViTModel, PersonViTPreTrainedModel


class PersonViTPrototypes(nn.Module):
    """Weight-normalised linear layer without bias: row k of the weight is gain[k] * direction[k] / |direction[k]|.

    The gains of new models are 1; `norm_last_layer` keeps them fixed (iBOT `models/head.py`, `last_layer`).
    """

    def __init__(self, config: PersonViTConfig, num_prototypes: int):
        super().__init__()
        self.direction = nn.Parameter(torch.empty(num_prototypes, config.projection_bottleneck_size))
        self.gain = nn.Parameter(torch.ones(num_prototypes, 1))

    def forward(self, bottleneck: torch.Tensor) -> torch.Tensor:
        """(..., bottleneck) to logits (..., prototypes)."""
        return nn.functional.linear(bottleneck, self.weight())

    def weight(self) -> torch.Tensor:
        """(prototypes, bottleneck), by the kernel of PyTorch's own `weight_norm`: plain operations take far longer."""
        return torch._weight_norm(self.direction, self.gain, 0)


class PersonViTProjectionHead(nn.Module):
    """MLP of three layers, L2 normalisation, then the prototypes of the [CLS] token and of the patch tokens."""

    def __init__(self, config: PersonViTConfig, shared: bool):
        super().__init__()
        hidden = config.projection_hidden_size
        self.mlp = nn.Sequential(
            PersonViTLinear(config.hidden_size, hidden),
            ACT2FN["gelu"],
            PersonViTLinear(hidden, hidden),
            ACT2FN["gelu"],
            PersonViTLinear(hidden, config.projection_bottleneck_size),
        )
        self.cls_prototypes = PersonViTPrototypes(config, config.num_cls_prototypes)
        self.patch_prototypes = None if shared else PersonViTPrototypes(config, config.num_patch_prototypes)

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (..., hidden) to unit vectors (..., bottleneck)."""
        return nn.functional.normalize(self.mlp(tokens), dim=-1)

    def cls_logits(self, bottleneck: torch.Tensor) -> torch.Tensor:
        """Unit vectors of [CLS] tokens to (..., num_cls_prototypes)."""
        return self.cls_prototypes(bottleneck)

    def patch_logits(self, bottleneck: torch.Tensor) -> torch.Tensor:
        """Unit vectors of patch tokens to (..., patch prototypes)."""
        return (self.patch_prototypes or self.cls_prototypes)(bottleneck)

    def prototype_parameters(self) -> list[nn.Parameter]:
        """What stays as it is while the last layer is frozen (DINO, first epoch)."""
        modules = [module for module in (self.cls_prototypes, self.patch_prototypes) if module is not None]
        return [parameter for module in modules for parameter in module.parameters()]


def _own_parts(parameter: nn.Parameter) -> list[torch.Tensor]:
    """What this process holds of a parameter: all of it, or its shard under FSDP2 (a DTensor) or DeepSpeed's ZeRO-3.

    Parameters of one shape are cut alike. ZeRO-3 keeps small ones whole beside their shard.
    """
    if hasattr(parameter, "ds_tensor"):
        return [parameter.ds_tensor] + [parameter.data] * (parameter.numel() == parameter.ds_numel)
    return [parameter.to_local() if hasattr(parameter, "to_local") else parameter]


def packed_passes(backbone: PersonViTModel, passes: Sequence[dict[str, Any]]) -> list[BaseModelOutputWithPooling]:
    """Several forward passes in one, of images that may differ in size: fewer and larger operations for a GPU.

    All layers but the last, of which a pass may need little, see the tokens of all images in one sequence; attention
    stays within an image.

    Args:
        backbone: What they all go through.
        passes: For each its `pixel_values` and, where wanted, `bool_masked_pos` and `only_cls`.

    Returns:
        What `backbone(**arguments)` gives for each, without hidden states and attentions.
    """
    dtype = backbone.embeddings.patch_embeddings.projection.weight.dtype
    embedded = [backbone.embeddings(one["pixel_values"].to(dtype), one.get("bool_masked_pos")) for one in passes]
    sizes = [(tokens.shape[0], tokens.shape[1]) for tokens in embedded]
    scales = [backbone.draw_scales(len(tokens), tokens.device) for tokens in embedded]
    of_tokens = scales[0]
    if isinstance(of_tokens, torch.Tensor):  # (layers, 2, images, 1, 1) each, to (layers, 2, 1, all tokens, 1)
        expanded = [own.expand(-1, -1, -1, size[1], -1).flatten(2, 3) for own, size in zip(scales, sizes, strict=True)]
        of_tokens = torch.cat(expanded, dim=2).unsqueeze(2)
    packed = torch.cat([tokens.flatten(0, 1) for tokens in embedded]).unsqueeze(0)
    for layer, own in list(zip(backbone.layers, of_tokens, strict=True))[:-1]:
        packed = layer(packed, num_outputs=None, scales=own, sizes=sizes)
    parts = packed.squeeze(0).split([images * tokens for images, tokens in sizes])
    return [
        backbone.finish(part.unflatten(0, size), one.get("only_cls", False), own[-1])
        for part, size, one, own in zip(parts, sizes, passes, scales, strict=True)
    ]


@dataclass
class PersonViTForPreTrainingOutput(ModelOutput):
    r"""
    Output of [`PersonViTForPreTraining`]; B images, L local crops.

    Args:
        loss (scalar): Sum of the losses below, each times its weight in the configuration.
        dino_loss (scalar): [CLS] loss, in nats, unweighted.
        mim_loss (scalar): Masked patch loss, in nats, unweighted.
        koleo_loss (scalar, with a `koleo_loss_weight`): See `koleo_loss`; of the student's global views, unweighted.
        student_cls_logits (`torch.FloatTensor` of shape `(B, 2 + L, num_cls_prototypes)`, with `output_logits`):
            Before the temperature; global views first.
        student_patch_logits (`torch.FloatTensor` of shape `(masked, patch prototypes)`, with `output_logits`):
            Of the masked patches, in the order of `bool_masked_pos`.
        teacher_cls_logits (`torch.FloatTensor` of shape `(B, 2, num_cls_prototypes)`, with `output_logits`):
            Before centering.
        teacher_patch_logits (`torch.FloatTensor` of shape `(masked, patch prototypes)`, with `output_logits`):
            Before centering.
        hidden_states, attentions: of the student's (masked) global views, (2 * B, ...), when asked for.
    """

    loss: torch.FloatTensor | None = None
    dino_loss: torch.FloatTensor | None = None
    mim_loss: torch.FloatTensor | None = None
    koleo_loss: torch.FloatTensor | None = None
    student_cls_logits: torch.FloatTensor | None = None
    student_patch_logits: torch.FloatTensor | None = None
    teacher_cls_logits: torch.FloatTensor | None = None
    teacher_patch_logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class PersonViTForPreTraining(PersonViTPreTrainedModel):
    r"""
    Student and teacher with their projection heads; the forward pass computes the DINO and MIM losses.

    The teacher's backbone is `personvit`, so that `AutoModel.from_pretrained` on a pre-training checkpoint gives it;
    the student's is `student`. The teacher takes no gradient: after each optimizer step call
    [`~PersonViTForPreTraining.update_teacher`]. In training mode each forward pass moves the centers; where several
    make up one optimizer step, only the last one should (`move_centers`).
    """

    main_input_name = "global_pixel_values"

    _auto_class = "AutoModelForPreTraining"
    _keys_to_ignore_on_load_unexpected = [*OF_REID]

    def __init__(self, config: PersonViTConfig):
        super().__init__(config)
        shared = config.share_projection_head
        teacher_shared = config.share_teacher_projection_head
        teacher_shared = shared if teacher_shared is None else teacher_shared
        self.student = PersonViTModel(config)
        self.student_head = PersonViTProjectionHead(config, shared)
        self.personvit = PersonViTModel(config)
        self.teacher_head = PersonViTProjectionHead(config, teacher_shared)
        num_patch_prototypes = config.num_cls_prototypes if teacher_shared else config.num_patch_prototypes
        self.register_buffer("center", torch.zeros(config.num_cls_prototypes))
        self.register_buffer("patch_center", torch.zeros(num_patch_prototypes))
        self._pending_means: list[list[torch.Tensor]] = []
        self.freeze()
        self.post_init()
        self.train(self.training)  # the teacher in evaluation mode

    def freeze(self) -> None:
        """The teacher takes no gradient, nor do the student's gains with `norm_last_layer`."""
        self.personvit.requires_grad_(False)
        self.teacher_head.requires_grad_(False)
        for prototypes in (self.student_head.cls_prototypes, self.student_head.patch_prototypes):
            if prototypes is not None:
                prototypes.gain.requires_grad_(not self.config.norm_last_layer)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Prototypes as PyTorch's linear layer; teacher and student start equal, whichever of them was loaded."""
        if isinstance(module, PersonViTPrototypes):
            bound = module.direction.shape[1] ** -0.5
            init.uniform_(module.direction, -bound, bound)
            init.ones_(module.gain)
        elif module is self:
            buffers = zip(self.personvit.buffers(), self.student.buffers(), strict=True)
            for teacher, student in (*self.teacher_student_pairs(), *buffers):
                if getattr(teacher, "_is_hf_initialized", False):
                    init.copy_(student, teacher)
                else:
                    init.copy_(teacher, student)
            init.zeros_(self.center)
            init.zeros_(self.patch_center)
        else:
            super()._init_weights(module)

    def train(self, mode: bool = True) -> "PersonViTForPreTraining":
        """Sets the student's mode; the teacher always predicts without dropout and stochastic depth.

        The batch norms of a convolution stem train in the teacher too, as in DINO: the running statistics that it is
        used with later are its own.
        """
        super().train(mode)
        self.personvit.eval()
        self.teacher_head.eval()
        for module in self.personvit.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                module.train(mode)
        return self

    def teacher_student_pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Each teacher parameter with the student's of the same name."""
        pairs = []
        for teacher, student in ((self.personvit, self.student), (self.teacher_head, self.student_head)):
            by_name = dict(student.named_parameters())
            pairs += [(parameter, by_name[name]) for name, parameter in teacher.named_parameters()]
        return pairs

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Moves the teacher towards the student: teacher = momentum * teacher + (1 - momentum) * student.

        Args:
            momentum: In [0, 1]; 0.996 rising to 1 in the usual recipe. Call it once after each optimizer step.

        Raises:
            ValueError: if the momentum lies outside [0, 1].
        """
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"`momentum` must lie in [0, 1], got {momentum}.")
        teacher, student = zip(*self.teacher_student_pairs(), strict=True)
        teacher, student = ([part for p in side for part in _own_parts(p)] for side in (teacher, student))
        torch._foreach_lerp_(teacher, student, 1.0 - momentum)

    @torch.no_grad()
    def _update_centers(self, bottleneck: torch.Tensor, first_patch: int, move: bool) -> None:
        """Moves both centers towards the mean of the raw teacher logits over the batch of all processes.

        The patch center averages all patches, masked or not (iBOT), or stays if there are none. Logits are linear in
        the bottleneck (images, tokens, bottleneck), so the prototypes are applied once, to its mean. Without `move`
        the means wait for the pass that moves.
        """
        with torch.autocast(bottleneck.device.type, enabled=False):
            means = at_least_float32(bottleneck).mean(0).to(self.teacher_head.cls_prototypes.direction.dtype)
            logits = [self.teacher_head.cls_logits(means[0])]
            if len(means) > first_patch:
                logits.append(self.teacher_head.patch_logits(means[first_patch:].mean(0)))
        self._pending_means.append(logits)
        if not move:
            return
        pending, self._pending_means = self._pending_means, []
        for center, *parts in zip((self.center, self.patch_center), *pending, strict=False):
            mean = torch.stack(parts).mean(0).to(center.dtype)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(mean)
                mean = mean / torch.distributed.get_world_size()
            center.lerp_(mean, 1.0 - self.config.center_momentum)

    @can_return_tuple
    def forward(
        self,
        global_pixel_values: torch.Tensor,
        local_pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        teacher_temperature: float = 0.04,
        teacher_patch_temperature: float = 0.04,
        output_logits: bool = False,
        move_centers: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PersonViTForPreTrainingOutput:
        r"""
        Args:
            global_pixel_values (`torch.FloatTensor` of shape `(batch, 2, num_channels, height, width)`):
                The two global crops of each image, normalised.
            local_pixel_values (`torch.FloatTensor` of shape `(batch, L, num_channels, h, w)`, *optional*):
                The local crops of each image.
            bool_masked_pos (`torch.BoolTensor` of shape `(batch, 2, patches)` or `(batch, 2, rows, columns)`,
                *optional*): True where the student's global crop is masked. None masks nothing, and `mim_loss` is 0.
            teacher_temperature (`float`): Temperature of the teacher's [CLS] softmax.
            teacher_patch_temperature (`float`): Temperature of the teacher's patch softmax.
            output_logits (`bool`): Whether to return the logits, which are large.
            move_centers (`bool`): In training mode, whether this pass ends an optimizer step. The centers then move
                once, towards the mean over all passes since the last step; until then all see the same centers.

        Raises:
            ValueError: if an input has another shape, or a temperature is not above 0.
        """
        if not (teacher_temperature > 0 and teacher_patch_temperature > 0):
            found = f"{teacher_temperature} and {teacher_patch_temperature}"
            raise ValueError(f"The teacher's temperatures must be above 0, got {found}.")
        self._check_views(global_pixel_values, local_pixel_values, bool_masked_pos)
        views = global_pixel_values.flatten(0, 1)
        masks = self._masks(views, bool_masked_pos)
        masked_patches = masks.flatten().nonzero().flatten()  # now, as a GPU must be waited for
        first_patch = 1 + self.config.num_part_tokens
        # with neither masks nor a weight for them nobody asks what patches are like
        only_cls = bool_masked_pos is None and not self.config.mim_loss_weight
        with torch.no_grad():
            teacher = self.teacher_head.project(self.personvit(views, only_cls=only_cls).last_hidden_state)
        only_cls = only_cls and not self._is_asked_for_more(kwargs)
        masked, cls_tokens, num_student_global = self._student(views, masks, local_pixel_values, only_cls, **kwargs)
        # what the losses compare: [CLS] (batch, views, bottleneck), patches (masked, bottleneck)
        student_cls, teacher_cls = self.student_head.project(cls_tokens), teacher[:, 0].unflatten(0, (-1, 2))
        patches = masked.last_hidden_state[:, first_patch:].flatten(0, 1)
        student_patches = self.student_head.project(patches.index_select(0, masked_patches))
        teacher_patches = teacher[:, first_patch:].flatten(0, 1).index_select(0, masked_patches)

        cls_loss = self._dino_loss(student_cls, teacher_cls, num_student_global, teacher_temperature)
        patch_loss = self._mim_loss(student_patches, teacher_patches, masks, teacher_patch_temperature)
        loss = self.config.dino_loss_weight * cls_loss + self.config.mim_loss_weight * patch_loss
        spread_loss = None
        if self.config.koleo_loss_weight and len(cls_tokens) > 1:
            spread_loss = koleo_loss(cls_tokens[:, :2])
            loss = loss + self.config.koleo_loss_weight * spread_loss
        if self.training:
            self._update_centers(teacher, first_patch, move_centers)
        logits = {}
        if output_logits:
            logits = {
                "student_cls_logits": self.student_head.cls_logits(student_cls),
                "student_patch_logits": self.student_head.patch_logits(student_patches),
                "teacher_cls_logits": self.teacher_head.cls_logits(teacher_cls),
                "teacher_patch_logits": self.teacher_head.patch_logits(teacher_patches),
            }
        return PersonViTForPreTrainingOutput(
            loss=loss,
            dino_loss=cls_loss,
            mim_loss=patch_loss,
            koleo_loss=spread_loss,
            hidden_states=masked.hidden_states,
            attentions=masked.attentions,
            **logits,
        )

    def _dino_loss(
        self, student: torch.Tensor, teacher: torch.Tensor, num_student_global: int, teacher_temperature: float
    ) -> torch.Tensor:
        """`dino_loss` of [CLS] bottlenecks: student (batch, S, bottleneck), teacher (batch, 2, bottleneck)."""
        center = self.center.clone()  # as it is now: by the backward pass, which may need it again, it has moved

        def of_images(student_part: torch.Tensor, teacher_part: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                logits = self.teacher_head.cls_logits(teacher_part)
                targets = teacher_probabilities(logits, center, teacher_temperature)
            logits = self.student_head.cls_logits(student_part)
            predictions = student_log_probabilities(logits, self.config.student_temperature)
            return dino_loss(predictions, targets, num_student_global) * (len(student_part) / len(student))

        num_logits = student.shape[0] * student.shape[1] * len(self.center)
        return sum_of_chunks(of_images, (student, teacher), num_logits)

    def _mim_loss(
        self, student: torch.Tensor, teacher: torch.Tensor, masks: torch.Tensor, teacher_patch_temperature: float
    ) -> torch.Tensor:
        """`mim_loss` of the masked patches' bottlenecks, (masked, bottleneck) both."""
        center = self.patch_center.clone()  # as for [CLS]

        def of_patches(student_part: torch.Tensor, teacher_part: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                logits = self.teacher_head.patch_logits(teacher_part)
                targets = teacher_probabilities(logits, center, teacher_patch_temperature)
            logits = self.student_head.patch_logits(student_part)
            return mim_loss(student_log_probabilities(logits, self.config.student_temperature), targets, weights)

        weights = masked_patch_weights(masks, len(student), torch.promote_types(student.dtype, torch.float32))
        return sum_of_chunks(of_patches, (student, teacher, weights), len(student) * len(self.patch_center))

    def _masks(self, views: torch.Tensor, bool_masked_pos: torch.Tensor | None) -> torch.Tensor:
        """bool (views, patches); nothing is masked if nothing is given."""
        if bool_masked_pos is not None:
            return bool_masked_pos.reshape(len(views), -1).bool()
        rows, columns = self.config.patch_grid(*views.shape[-2:])
        return torch.zeros(len(views), rows * columns, dtype=torch.bool, device=views.device)

    def _student(
        self,
        views: torch.Tensor,
        masks: torch.Tensor,
        local_pixel_values: torch.Tensor | None,
        only_cls: bool,
        **kwargs: Any,
    ) -> tuple[BaseModelOutputWithPooling, torch.Tensor, int]:
        """The student's output for the masked views; [CLS] tokens of all views, (batch, S, hidden) with global ones
        first, and the number of these."""
        passes = [{"pixel_values": views, "bool_masked_pos": masks, "only_cls": only_cls}]
        if self.config.student_sees_unmasked_global:
            passes.append({"pixel_values": views, "only_cls": True})
        num_global = 2 * len(passes)
        if local_pixel_values is not None and local_pixel_values.shape[1] > 0:
            passes.append({"pixel_values": local_pixel_values.flatten(0, 1), "only_cls": True})
        # packed passes go by the student's own call, where hooks on it and `compile` would miss them
        student = self.student
        is_plain = not (student._forward_hooks or student._forward_pre_hooks or student._compiled_call_impl)
        if views.is_cuda and is_plain and not kwargs and not self._is_asked_for_more(kwargs):
            outputs = packed_passes(student, passes)
        else:
            first, *others = passes
            outputs = [student(**first, **kwargs), *(student(**other) for other in others)]
        tokens = [output.pooler_output.unflatten(0, (len(views) // 2, -1)) for output in outputs]
        return outputs[0], torch.cat(tokens, dim=1), num_global

    def _check_views(
        self,
        global_pixel_values: torch.Tensor,
        local_pixel_values: torch.Tensor | None,
        bool_masked_pos: torch.Tensor | None,
    ) -> None:
        """Checks that views and masks belong together."""
        shape = tuple(global_pixel_values.shape)
        channels = self.config.num_channels
        if len(shape) != 5 or shape[1:3] != (2, channels):
            raise ValueError(f"`global_pixel_values` must be (batch, 2, {channels}, height, width), got {shape}.")
        if self.config.koleo_loss_weight and self.training and shape[0] < 2:
            raise ValueError("`koleo_loss_weight` needs at least 2 images in a batch: it looks for near ones.")
        if local_pixel_values is not None:
            local = tuple(local_pixel_values.shape)
            if len(local) != 5 or local[0] != shape[0] or local[2] != channels:
                raise ValueError(
                    f"`local_pixel_values` must be (batch, crops, {channels}, height, width) with batch {shape[0]} "
                    f"like `global_pixel_values`, got {local}."
                )
        rows, columns = self.config.patch_grid(*shape[-2:])
        if bool_masked_pos is not None:
            expected = (shape[0], 2, rows * columns), (shape[0], 2, rows, columns)
            if tuple(bool_masked_pos.shape) not in expected:
                raise ValueError(
                    f"`bool_masked_pos` must be (batch, 2, patches) = {expected[0]} or {expected[1]} for these "
                    f"images, got {tuple(bool_masked_pos.shape)}."
                )


__all__ = ["PersonViTForPreTraining"]
