"""Labels read off a shared gradient, before any optimisation."""

from __future__ import annotations

import torch
from torch import Tensor

from leakage.shared_gradient import SharedGradient
from leakage.victim import Victim


def check_label_rule(victim: Victim) -> None:
    """Raise a ``ValueError`` unless labels can be read off the last layer's gradient.

    Raises:
        ValueError: the loss is not cross-entropy, the logits are not the output of a linear layer,
            or that layer shares no gradient; the message names what to use instead.
    """
    instead = "Use DLGAttack, which recovers labels by optimisation, or reveal the labels (reveal_labels=True)."
    if victim.protocol.loss != "cross_entropy":
        raise ValueError(
            "Expected a victim with loss 'cross_entropy', whose gradient is negative only for the true class, "
            f"but got loss {victim.protocol.loss!r}. {instead}"
        )
    if victim.classifier is None:
        raise ValueError(
            "Expected logits that are the output of an nn.Linear layer, whose gradient iDLG's rule reads, "
            f"but got logits from {victim.logits_from}. {instead}"
        )
    if not {f"{victim.classifier}.weight", f"{victim.classifier}.bias"} & {*victim.trainable}:
        raise ValueError(
            f"Expected the last layer {victim.classifier!r} to share its gradient, but got frozen weights. {instead}"
        )


def infer_labels(shared: SharedGradient, victim: Victim) -> Tensor:
    r"""Apply iDLG's rule: the labels whose logits the shared gradient pushes up.

    With cross-entropy the gradient of logit k, averaged over the N images, is
    :math:`\bar p_k - n_k / N` with :math:`n_k` the images of class k. It is the gradient of the last
    layer's bias. For one image only the true class is negative: the rule is exact. Without a bias the
    rows of the weight gradient are multiples of one vector, and the true class is the one whose row
    points against all others (of two classes, the one whose row has a negative sum, which is exact
    where the layer's inputs are not negative, as after a sigmoid or a ReLU).

    For several images the most negative class is taken and one image's share added back to it, N
    times, which finds repeated labels as long as predictions are near uniform. Without a bias the sums
    of the rows take its place, and the layer's inputs must not be negative.

    Args:
        shared: gradients of V victims.
        victim: their model and protocol.

    Returns:
        ``(V, N)`` class indices, sorted.

    Raises:
        ValueError: see :func:`check_label_rule`.

    References:
        Zhao et al., *iDLG*, 2020, https://arxiv.org/abs/2001.02610; Wainakh et al., *User-Level
        Label Leakage from Gradients in Federated Learning*, PETS 2022, https://arxiv.org/abs/2105.09369.

    Example:
        >>> from leakage.models import LeNet
        >>> victim = Victim(LeNet(), image_shape=(1, 28, 28))
        >>> shared = victim.share(torch.rand(3, 1, 1, 28, 28), torch.tensor([[7], [0], [3]]))
        >>> infer_labels(shared, victim).squeeze(1)
        tensor([7, 0, 3])
    """
    check_label_rule(victim)
    count = victim.protocol.num_images
    bias = f"{victim.classifier}.bias"
    if bias in shared.gradients:
        push = shared.gradients[bias].clone()
        share = torch.full_like(push[:, 0], 1 / count if victim.protocol.reduction == "mean" else 1.0)
    else:
        rows = shared.gradients[f"{victim.classifier}.weight"]
        push = rows.sum(-1) if count > 1 else _against_the_others(rows)
        # One image's share is not known without a bias; what all negative rows hold comes from N images.
        share = -push.clamp(max=0).sum(1) / count
    labels = []
    for _ in range(count):
        most = push.argmin(dim=1)
        labels.append(most)
        push = push.scatter_add(1, most[:, None], share[:, None])
    return torch.stack(labels, dim=1).sort(dim=1).values


def _against_the_others(rows: Tensor) -> Tensor:
    """Rows ``(V, K, D)`` that are multiples of one vector as multiples ``(V, K)``, signed so that most are positive."""
    longest = rows.square().sum(-1).argmax(dim=1)
    along = torch.einsum("vkd,vd->vk", rows, rows[torch.arange(len(rows), device=rows.device), longest])
    surplus = along.sign().sum(1)
    # As many one way as the other: the signs alone do not tell which is which.
    return torch.where((surplus == 0)[:, None], rows.sum(-1), along * surplus.sign()[:, None])
