"""What is trained on: the DINO, MIM and KoLeo losses of pre-training, and the triplet loss of re-identification."""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

# Logits that are held at a time for each loss: 32 MiB in float32 on a CPU, 512 MiB on a GPU, which many small products
# keep idle. More are made in chunks, and made again in the backward pass.
MAX_LOGITS, MAX_LOGITS_ON_GPU = 2**23, 2**27


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or as it is where it is wider: losses and means are not taken in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def teacher_probabilities(logits: torch.Tensor, center: torch.Tensor, temperature: float) -> torch.Tensor:
    """softmax((logits - center) / temperature) over the last axis, in at least float32 (iBOT, eq. 1; DINO, eq. 1)."""
    return (at_least_float32(logits) - center).div(temperature).softmax(-1)


def student_log_probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax(logits / temperature) over the last axis, in at least float32."""
    return at_least_float32(logits).div(temperature).log_softmax(-1)


def dino_loss(student: torch.Tensor, teacher: torch.Tensor, num_student_global: int = 2) -> torch.Tensor:
    """Cross-entropy of every student view with the teacher's other global views.

    Args:
        student: float (batch, S, prototypes), log probabilities: `num_student_global` global views, the teacher's
            two in turn (0, 1, 0, 1, ...), then the local views.
        teacher: float (batch, 2, prototypes), probabilities of the two global views.
        num_student_global: How many of the S views are global; a multiple of 2.

    Returns:
        Scalar in nats: the mean over the batch and over the pairs (teacher view, student view) of different views.

    Source:
        iBOT `main_ibot.py`, `iBOTLoss`, and DINO (arXiv 2104.14294), eq. 3.
    """
    student_global, student_local = student.split([num_student_global, student.shape[1] - num_student_global], dim=1)
    other_view = teacher.flip(1).repeat(1, num_student_global // 2, 1)
    total = -(other_view * student_global).sum()
    # both teacher views are other views of a local crop, so their sum meets each crop once
    total = total - (teacher.sum(1, keepdim=True) * student_local).sum()
    num_pairs = num_student_global + 2 * student_local.shape[1]
    return total / (num_pairs * student.shape[0])


def mim_loss(student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of masked patches with the teacher's view of them.

    Args:
        student: float (masked, prototypes), log probabilities of the masked patches only.
        teacher: float (masked, prototypes), probabilities of the same patches.
        weights: float (masked,), what each counts: see `masked_patch_weights`.

    Returns:
        Scalar in nats, the weighted sum.

    Source:
        iBOT `main_ibot.py`, `iBOTLoss` (arXiv 2111.07832, eq. 2).
    """
    return ((teacher * student).sum(-1) * -weights).sum()  # of no patches 0.0: the sum's negative would be -0.0


def masked_patch_weights(bool_masked_pos: torch.Tensor, num_masked: int, dtype: torch.dtype) -> torch.Tensor:
    """What each masked patch counts, (masked,): 1 / images together for the patches of an image.

    Args:
        bool_masked_pos: bool (images, patches); its True entries, row by row, are the masked patches.
        num_masked: How many entries are True.
        dtype: Of the weights.
    """
    masked_in_image = bool_masked_pos.sum(1)
    weights = masked_in_image.clamp(min=1).to(dtype).reciprocal() / bool_masked_pos.shape[0]
    return weights.repeat_interleave(masked_in_image, output_size=num_masked)


def sum_of_chunks(
    function: Callable[..., torch.Tensor], tensors: tuple[torch.Tensor, ...], num_logits: int
) -> torch.Tensor:
    """`function(*tensors)`, a sum over rows that holds `num_logits` logits, in parts of at most `MAX_LOGITS` each."""
    num_chunks = -(-num_logits // (MAX_LOGITS_ON_GPU if tensors[0].is_cuda else MAX_LOGITS))
    if num_chunks <= 1:
        return function(*tensors)
    rows = -(-len(tensors[0]) // num_chunks)
    chunks = zip(*(tensor.split(rows) for tensor in tensors), strict=True)
    options = {"use_reentrant": False, "preserve_rng_state": False}  # nothing is drawn
    return torch.stack([checkpoint(function, *chunk, **options) for chunk in chunks]).sum()


def koleo_loss(cls_tokens: torch.Tensor) -> torch.Tensor:
    """Minus the mean log distance of each image's [CLS] feature to its nearest other one: it spreads features out.

    Args:
        cls_tokens: float (batch, views, hidden), of at least 2 images; each view is a set of its own.

    Returns:
        Scalar, the mean over images and views. Distances are Euclidean, between L2-normalised features.

    Source:
        Sablayrolles et al., arXiv 1806.03198, eq. 2 (Kozachenko-Leonenko estimator of entropy); DINOv2 (arXiv
        2304.07193, sec. 4), which adds up the two views: its weight of 0.1 is one of 0.2 here.
    """
    with torch.autocast(cls_tokens.device.type, enabled=False):
        features = nn.functional.normalize(at_least_float32(cls_tokens).transpose(0, 1), dim=-1)
        with torch.no_grad():  # which one is nearest needs no gradient, only how far it is
            similarities = features @ features.mT
            similarities.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
            nearest = similarities.argmax(-1, keepdim=True).expand_as(features)
        distances = nn.functional.pairwise_distance(features, features.gather(1, nearest), eps=1e-8)
    return -(distances + 1e-8).log().mean()


def batch_hard_triplet_loss(
    embeddings: torch.Tensor, labels: torch.Tensor, margin: float | None = None
) -> torch.Tensor:
    """Triplet loss with each anchor's farthest positive and nearest negative in the batch.

    Args:
        embeddings: float (batch, hidden).
        labels: int (batch,), the person of each embedding.
        margin: None for the soft margin log(1 + exp(positive - negative)), else max(0, positive - negative + margin).

    Returns:
        Scalar, the mean over anchors. The anchor counts among its own positives (distance about 0).

    Source:
        Hermans et al., arXiv 1703.07737, batch hard; distances are sqrt(max(squared, 1e-12)) as in PersonViT's
        `transreid_pytorch/loss/triplet_loss.py`, which this equals when every person has equally many images.
    """
    embeddings = at_least_float32(embeddings)
    squared_norms = embeddings.square().sum(1)
    with torch.autocast("cpu" if embeddings.is_meta else embeddings.device.type, enabled=False):
        products = embeddings @ embeddings.T
    squared = squared_norms[:, None] + squared_norms[None, :] - 2 * products
    distances = squared.clamp(min=1e-12).sqrt()
    same = labels[:, None] == labels[None, :]
    hardest_positive = distances.masked_fill(~same, 0.0).amax(1)
    hardest_negative = distances.masked_fill(same, torch.inf).amin(1)
    if margin is None:
        return nn.functional.softplus(hardest_positive - hardest_negative).mean()
    return (hardest_positive - hardest_negative + margin).clamp(min=0).mean()
