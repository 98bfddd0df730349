"""The usual way of doing a training step, written plainly: what benchmarks/train_step.py compares ours with.

It follows how public code of the family (DINO, iBOT, TransReID-SSL, TransReID) goes about it: attention by plain
products, stochastic depth that multiplies dropped branches by zero, every token of every crop through the head and
all prototypes, a softmax over every patch of the teacher, one pair of views after the other in the loss; then
clipping, AdamW and the teacher's moving average one parameter at a time. Weights have the names of the official files,
so that ours load (`official_checkpoint`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F

from personvit_hf import PersonViTConfig
from personvit_hf.modeling_personvit import interpolate_position_embeddings

TEACHER_TEMPERATURE = 0.04  # of both softmaxes, as ours by default


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, length, width = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv
        weights = (query @ key.transpose(-2, -1)) * (width // self.heads) ** -0.5
        attended = weights.softmax(-1) @ value
        return self.proj(attended.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, config: PersonViTConfig, drop_path_rate: float):
        super().__init__()
        width = config.hidden_size
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attn = Attention(width, config.num_attention_heads)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(width, config.intermediate_size)
        self.mlp.fc2 = nn.Linear(config.intermediate_size, width)
        self.drop_path_rate = drop_path_rate

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens)))
        return tokens + self.drop_path(self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(tokens)))))

    def drop_path(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.drop_path_rate:
            return branch
        kept = 1 - self.drop_path_rate
        return branch.div(kept) * torch.rand(len(branch), 1, 1, device=branch.device).add_(kept).floor_()


class PlainViT(nn.Module):
    """Pixels (batch, 3, height, width) to all tokens (batch, 1 + patches, hidden)."""

    def __init__(self, config: PersonViTConfig):
        super().__init__()
        width, depth = config.hidden_size, config.num_hidden_layers
        self.patch_size = config.patch_size
        self.native_grid = config.patch_grid(*config.image_size)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.masked_embed = nn.Parameter(torch.zeros(1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.native_grid[0] * self.native_grid[1], width))
        self.blocks = nn.ModuleList(
            Block(config, rate) for rate in torch.linspace(0, config.drop_path_rate, depth).tolist()
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, pixels: torch.Tensor, masks: torch.Tensor | None = None) -> torch.Tensor:
        patches = self.patch_embed.proj(pixels)
        grid = tuple(patches.shape[2:])
        tokens = patches.flatten(2).transpose(1, 2)
        if masks is not None:
            tokens = torch.where(masks[..., None], self.masked_embed.to(tokens.dtype), tokens)
        tokens = torch.cat((self.cls_token.expand(len(tokens), -1, -1), tokens), dim=1)
        tokens = tokens + interpolate_position_embeddings(self.pos_embed, self.native_grid, grid)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


class WeightNormLinear(nn.Module):
    def __init__(self, width: int, prototypes: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1), requires_grad=False)
        self.weight_v = nn.Parameter(torch.empty(prototypes, width))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.linear(inputs, torch._weight_norm(self.weight_v, self.weight_g, 0))


class PlainHead(nn.Module):
    """Tokens (batch, 1 + patches, hidden) to logits of [CLS] and of every patch."""

    def __init__(self, config: PersonViTConfig):
        super().__init__()
        width, hidden, bottleneck = (
            config.hidden_size,
            config.projection_hidden_size,
            config.projection_bottleneck_size,
        )
        self.mlp = nn.Sequential(
            *(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU()),
            nn.Linear(hidden, bottleneck),
        )
        self.last_layer = WeightNormLinear(bottleneck, config.num_cls_prototypes)
        self.last_layer2 = WeightNormLinear(bottleneck, config.num_patch_prototypes)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        bottleneck = F.normalize(self.mlp(tokens), dim=-1)
        return self.last_layer(bottleneck[:, 0]), self.last_layer2(bottleneck[:, 1:])


class PlainPreTraining(nn.Module):
    """Student, teacher and centers; crops come as lists of (batch, 3, height, width), as their loaders give them."""

    def __init__(self, config: PersonViTConfig):
        super().__init__()
        self.config = config
        self.student = nn.ModuleDict({"backbone": PlainViT(config), "head": PlainHead(config)})
        self.teacher = nn.ModuleDict({"backbone": PlainViT(config), "head": PlainHead(config)})
        self.teacher.requires_grad_(False).eval()
        self.register_buffer("center", torch.zeros(1, config.num_cls_prototypes))
        self.register_buffer("patch_center", torch.zeros(1, 1, config.num_patch_prototypes))

    def load_official(self, checkpoint: dict[str, dict[str, torch.Tensor]]) -> None:
        """Weights of `official_checkpoint`."""
        student = {name.removeprefix("module."): value for name, value in checkpoint["student"].items()}
        self.student.load_state_dict(student)
        teacher = {"backbone.masked_embed": student["backbone.masked_embed"]} | checkpoint["teacher"]
        self.teacher.load_state_dict(teacher)
        self.center.copy_(checkpoint["ibot_loss"]["center"])
        self.patch_center.copy_(checkpoint["ibot_loss"]["center2"])

    def forward(
        self,
        global_crops: list[torch.Tensor],
        local_crops: list[torch.Tensor],
        masks: list[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(DINO loss, MIM loss); moves the centers."""
        with torch.no_grad():
            teacher_cls, teacher_patch = self.teacher["head"](self.teacher["backbone"](torch.cat(global_crops)))
        student_cls, student_patch = self.student["head"](
            self.student["backbone"](torch.cat(global_crops), torch.cat(masks))
        )
        local_cls, _ = self.student["head"](self.student["backbone"](torch.cat(local_crops)))
        num_crops = len(global_crops) + len(local_crops)
        temperature = self.config.student_temperature
        student_cls = (torch.cat((student_cls, local_cls)).float() / temperature).chunk(num_crops)
        student_patch = (student_patch.float() / temperature).chunk(2)
        target_cls = F.softmax((teacher_cls.float() - self.center) / TEACHER_TEMPERATURE, dim=-1).chunk(2)
        target_patch = F.softmax((teacher_patch.float() - self.patch_center) / TEACHER_TEMPERATURE, dim=-1).chunk(2)

        dino, mim, pairs = 0.0, 0.0, 0
        for teacher_view in range(2):
            for view in range(num_crops):
                if view == teacher_view:
                    each = torch.sum(-target_patch[view] * F.log_softmax(student_patch[view], dim=-1), dim=-1)
                    mask = masks[view].float()
                    mim = mim + ((each * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean() / 2
                else:
                    each = torch.sum(-target_cls[teacher_view] * F.log_softmax(student_cls[view], dim=-1), dim=-1)
                    dino, pairs = dino + each.mean(), pairs + 1
        with torch.no_grad():
            self.center.lerp_(teacher_cls.float().mean(0, keepdim=True), 1 - self.config.center_momentum)
            patch_mean = teacher_patch.float().mean(1).mean(0).view_as(self.patch_center)
            self.patch_center.lerp_(patch_mean, 1 - self.config.center_momentum)
        return dino / pairs, mim

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        for teacher, student in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            teacher.data.mul_(momentum).add_((1 - momentum) * student.detach().data)


@torch.no_grad()
def clip_one_by_one(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Each gradient to an L2 norm of at most `max_norm`."""
    for parameter in parameters:
        if parameter.grad is not None:
            coefficient = max_norm / (parameter.grad.norm(2) + 1e-6)
            if coefficient < 1:
                parameter.grad.mul_(coefficient)


class PlainReID(nn.Module):
    """Backbone, BNNeck and classifier with cross-entropy and batch-hard triplet loss, as in TransReID."""

    def __init__(self, config: PersonViTConfig):
        super().__init__()
        self.base = PlainViT(config)
        del self.base.masked_embed
        self.bottleneck = nn.BatchNorm1d(config.hidden_size)
        self.bottleneck.bias.requires_grad_(False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels, bias=False)

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        feature = self.base(pixels)[:, 0]
        id_loss = F.cross_entropy(self.classifier(self.bottleneck(feature)), labels)
        return id_loss + self.triplet_loss(feature, labels)

    @staticmethod
    def triplet_loss(feature: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        feature = feature.to(torch.promote_types(feature.dtype, torch.float32))
        squares = feature.pow(2).sum(1, keepdim=True)
        distances = (squares + squares.t() - 2 * feature @ feature.t()).clamp(min=1e-12).sqrt()
        same = labels[:, None] == labels[None, :]
        positive = torch.where(same, distances, -torch.inf).max(1).values
        negative = torch.where(same, torch.inf, distances).min(1).values
        return F.soft_margin_loss(negative - positive, torch.ones_like(positive))
