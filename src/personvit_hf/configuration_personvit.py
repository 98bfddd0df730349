"""Configuration of the PersonViT models."""

import difflib
import math

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# (hidden size, attention heads, layers) of ViT-Ti/S/B/L
PRESETS = {"tiny": (192, 3, 12), "small": (384, 6, 12), "base": (768, 12, 12), "large": (1024, 16, 24)}

# Settings by what they must be: at least 1, in [0, 1], finite.
COUNTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size", "num_channels")
COUNTS += ("projection_hidden_size", "projection_bottleneck_size", "num_cls_prototypes", "num_patch_prototypes")
# No model has more of them; what claims to would take all memory.
MAX_COUNT, MAX_PIXELS = 2**22, 2**24
MAX_COUNTS = {"hidden_size": 2**16, "num_hidden_layers": 2**10, "patch_size": 2**12, "num_channels": 2**12}
SHARES = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "drop_path_rate",
    "center_momentum",
    "label_smoothing",
)
FINITE = ("initializer_range", "side_information_scale", "triplet_margin", "dino_loss_weight", "mim_loss_weight")
FINITE += ("koleo_loss_weight", "id_loss_weight", "triplet_loss_weight")


@strict
class PersonViTConfig(PreTrainedConfig):
    r"""
    Configuration of [`PersonViTModel`], [`PersonViTForPreTraining`] and [`PersonViTForReID`]. The defaults are those
    of PersonViT's ViT-B/16 at 256x128 pixels (arXiv 2408.05398). Fields that transformers' `ViTConfig` has mean the
    same here; only the others are described.

    Args:
        image_size (`list[int]`, *optional*, defaults to `[256, 128]`):
            Native [height, width] in pixels. Other sizes work too: position embeddings are interpolated.
        patch_stride (`int`, *optional*):
            Distance between patches in pixels; smaller than `patch_size` makes them overlap. `None`: `patch_size`.
        stem (`str`, *optional*, defaults to `"patch"`):
            `"patch"` cuts the image into patches; `"ics"` sees it first through the convolutions of TransReID-SSL
            (arXiv 2111.12084, IBN-based convolution stem), which halve its size.
        num_part_tokens (`int`, *optional*, defaults to 0):
            Learned tokens for parts of the body between [CLS] and the patches (3 in PASS, arXiv 2203.03931).
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Stochastic depth of the last layer; it grows linearly from 0 at the first one. The teacher has none.
        num_cameras (`int`, *optional*, defaults to 0):
            Cameras with a side information embedding (SIE of TransReID); 0 for none.
        num_views (`int`, *optional*, defaults to 0):
            Viewpoints with a side information embedding; with cameras, each pair (camera, view) has its own.
        side_information_scale (`float`, *optional*, defaults to 3.0):
            Factor of the side information embedding (`SIE_COE`).
        projection_hidden_size (`int`, *optional*, defaults to 2048):
            Width of the projection heads' two hidden layers.
        projection_bottleneck_size (`int`, *optional*, defaults to 256):
            Width of the L2-normalised vector that is compared with the prototypes.
        num_cls_prototypes (`int`, *optional*, defaults to 65536):
            Prototypes of the [CLS] token (DINO).
        num_patch_prototypes (`int`, *optional*, defaults to 8192):
            Prototypes of the patch tokens (MIM). Not used by a shared head.
        share_projection_head (`bool`, *optional*, defaults to `False`):
            Whether [CLS] and patches use the same prototypes.
        share_teacher_projection_head (`bool`, *optional*):
            The same for the teacher alone, as iBOT's default has it (student separate, teacher shared; the numbers
            of prototypes must then be equal). `None`: as `share_projection_head`.
        norm_last_layer (`bool`, *optional*, defaults to `True`):
            Whether the prototypes' gains stay fixed (at 1 in new models) instead of being trained.
        student_temperature (`float`, *optional*, defaults to 0.1):
            Temperature of the student's softmax.
        center_momentum (`float`, *optional*, defaults to 0.9):
            Momentum of the teacher's centers.
        dino_loss_weight (`float`, *optional*, defaults to 1.0):
            lambda1, weight of the [CLS] loss.
        mim_loss_weight (`float`, *optional*, defaults to 1.0):
            lambda2, weight of the masked patch loss.
        koleo_loss_weight (`float`, *optional*, defaults to 0.0):
            Weight of a loss that keeps the [CLS] features of a batch apart (DINOv2's KoLeo; not PersonViT's). Where
            steps are few and batches small, features otherwise shrink to a few dimensions.
        student_sees_unmasked_global (`bool`, *optional*, defaults to `False`):
            Whether the student also sees the global views unmasked (the paper's figure). As in iBOT, it sees them
            masked only by default.
        neck_feature (`str`, *optional*, defaults to `"before"`):
            Whether re-identification embeddings are taken `"before"` or `"after"` the BNNeck.
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Label smoothing of the ID loss.
        triplet_margin (`float`, *optional*):
            Margin of the triplet loss. `None`: the soft margin log(1 + exp(positive - negative)).
        id_loss_weight (`float`, *optional*, defaults to 1.0):
            Weight of the ID loss.
        triplet_loss_weight (`float`, *optional*, defaults to 1.0):
            Weight of the triplet loss.

    Example:

    ```python
    >>> from personvit_hf import PersonViTConfig, PersonViTModel

    >>> model = PersonViTModel(PersonViTConfig.from_preset("tiny"))
    >>> model.config.hidden_size
    192
    ```"""

    model_type = "personvit"
    # what Trainer takes for predictions of a ReID model are its logits alone
    keys_to_ignore_at_inference = ["id_loss", "triplet_loss", "embeddings"]
    _auto_class = "AutoConfig"  # `save_pretrained` then copies the code files beside the weights

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: list[int] | tuple[int, int] = (256, 128)
    patch_size: int = 16
    patch_stride: int | None = None
    num_channels: int = 3
    qkv_bias: bool = True
    stem: str = "patch"
    num_part_tokens: int = 0
    drop_path_rate: float | int = 0.0
    num_cameras: int = 0
    num_views: int = 0
    side_information_scale: float | int = 3.0

    projection_hidden_size: int = 2048
    projection_bottleneck_size: int = 256
    num_cls_prototypes: int = 65536
    num_patch_prototypes: int = 8192
    share_projection_head: bool = False
    share_teacher_projection_head: bool | None = None
    norm_last_layer: bool = True
    student_temperature: float = 0.1
    center_momentum: float | int = 0.9
    dino_loss_weight: float | int = 1.0
    mim_loss_weight: float | int = 1.0
    koleo_loss_weight: float | int = 0.0
    student_sees_unmasked_global: bool = False

    neck_feature: str = "before"
    label_smoothing: float | int = 0.0
    triplet_margin: float | int | None = None
    id_loss_weight: float | int = 1.0
    triplet_loss_weight: float | int = 1.0

    def __post_init__(self, **kwargs):
        # PreTrainedConfig keeps unknown settings as attributes, so a misspelt one would be lost without a word.
        for name in kwargs:
            close = difflib.get_close_matches(name, type(self).__annotations__, n=1, cutoff=0.9)
            if close:
                raise ValueError(f"PersonViTConfig has no setting `{name}`; did you mean `{close[0]}`?")
        self.image_size = list(self.image_size)
        labels = kwargs.get("num_labels")  # of which a dictionary is made
        if isinstance(labels, int) and labels > MAX_COUNT:
            raise ValueError(f"`num_labels` must be at most {MAX_COUNT}, got {labels}.")
        super().__post_init__(**kwargs)

    def validate_sizes(self):
        """Counts are counts, shares are shares, and a grid of whole patches fits in the image."""
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
            if getattr(self, name) > MAX_COUNTS.get(name, MAX_COUNT):
                raise ValueError(
                    f"`{name}` must be at most {MAX_COUNTS.get(name, MAX_COUNT)}, got {getattr(self, name)}."
                )
        for name in ("num_cameras", "num_views", "num_part_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be 0 (none) or more, got {getattr(self, name)}.")
        if self.num_part_tokens > MAX_COUNT or max(self.num_cameras, 1) * max(self.num_views, 1) > MAX_COUNT:
            raise ValueError(
                f"`num_part_tokens`, and `num_cameras` times `num_views`, must be at most {MAX_COUNT}, got "
                f"{self.num_part_tokens}, {self.num_cameras} and {self.num_views}."
            )
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], got {getattr(self, name)}.")
        if self.patch_stride is not None and not 1 <= self.patch_stride <= self.patch_size:
            raise ValueError(
                f"`patch_stride` must lie in [1, patch_size={self.patch_size}] or be None, got {self.patch_stride}."
            )
        if len(self.image_size) != 2:
            raise ValueError(f"`image_size` must be [height, width] in pixels, got {self.image_size}.")
        if math.prod(self.image_size) > MAX_PIXELS:
            raise ValueError(f"`image_size` must have at most {MAX_PIXELS} pixels, got {self.image_size}.")
        self.patch_grid(*self.image_size)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of "
                f"`num_attention_heads` ({self.num_attention_heads})."
            )

    def validate_choices(self):
        """Values that only some choices make sense for."""
        if self.stem not in ("patch", "ics"):
            raise ValueError(f"`stem` must be 'patch' or 'ics', got {self.stem!r}.")
        if self.stem == "ics" and (self.patch_size % 2 or self.patch_stride not in (None, self.patch_size)):
            raise ValueError(
                "`stem='ics'` halves the image and then cuts it: it needs an even `patch_size` and no `patch_stride`, "
                f"got {self.patch_size} and {self.patch_stride}."
            )
        if self.neck_feature not in ("before", "after"):
            raise ValueError(f"`neck_feature` must be 'before' or 'after' the BNNeck, got {self.neck_feature!r}.")
        for name in ("student_temperature", "layer_norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be a positive number, got {getattr(self, name)}.")
        for name in FINITE:
            if not math.isfinite(getattr(self, name) or 0):
                raise ValueError(f"`{name}` must be a finite number, got {getattr(self, name)}.")
        if self.initializer_range < 0:
            raise ValueError(f"`initializer_range` must be 0 or more, got {self.initializer_range}.")
        if self.share_projection_head and self.share_teacher_projection_head is False:
            raise ValueError("`share_projection_head=True` needs `share_teacher_projection_head=True` (or None).")
        only_teacher = self.share_teacher_projection_head and not self.share_projection_head
        if only_teacher and self.num_cls_prototypes != self.num_patch_prototypes:
            raise ValueError(
                "A shared teacher head with separate student heads needs as many patch as [CLS] prototypes, got "
                f"`num_patch_prototypes={self.num_patch_prototypes}`, `num_cls_prototypes={self.num_cls_prototypes}`."
            )

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the patches of a (height, width) image in pixels.

        Raises:
            ValueError: if patches next to each other do not tile the image, or the image is smaller than a patch.
        """
        size, stride = self.patch_size, self.patch_stride or self.patch_size
        not_tiled = stride == size and (height % size or width % size)
        if not_tiled or height < size or width < size:
            raise ValueError(
                f"An image of {height}x{width} pixels (height x width) can't be cut into patches of "
                f"`patch_size={size}` with `patch_stride={stride}`: choose a height and width that are multiples of "
                f"{size} (or at least {size} with a stride from 1 to {size - 1})."
            )
        return (height - size) // stride + 1, (width - size) // stride + 1

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "PersonViTConfig":
        """The configuration of ViT-Ti/S/B/L with patch 16 at 256x128.

        Args:
            name: "tiny", "small", "base" or "large".
            overrides: Any settings of the configuration.

        Raises:
            ValueError: for an unknown name.
        """
        if name not in PRESETS:
            raise ValueError(f"Unknown preset {name!r}: choose one of {', '.join(PRESETS)}.")
        width, heads, depth = PRESETS[name]
        sizes = {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_attention_heads": heads,
            "num_hidden_layers": depth,
        }
        return cls(**(sizes | overrides))


__all__ = ["PersonViTConfig"]
