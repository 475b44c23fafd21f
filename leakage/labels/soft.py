"""The soft label of a single image, read off the last layer's gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.labels.from_gradients import logits_of_one
from leakage.labels.last_layer import last_layer
from leakage.labels.rules import INSTEAD
from leakage.precision import full_precision


def check_soft_labels(victim: Victim) -> None:
    """Raise a ``ValueError`` unless :func:`infer_soft_labels` can read the labels of such victims.

    Raises:
        ValueError: labels are not probabilities, the loss is not cross-entropy, there are several images or steps, or a
            defense, or the last layer is not a linear layer that shares the gradients of its weights and its bias.
    """
    protocol, layer = victim.protocol, victim.classifier
    needs = {
        "labels that are probabilities": protocol.label_kind == "probabilities" or f"{protocol.label_kind!r}",
        "loss 'cross_entropy'": protocol.loss == "cross_entropy" or f"{protocol.loss!r}",
        "one image per gradient": protocol.num_images == 1 or f"{protocol.num_images}",
        "no defense": not protocol.defenses or f"{protocol.defenses[0]['name']!r}",
        "one local step": protocol.learning_rate is None or "several, or a secret learning rate",
        "logits that are the output of an nn.Linear layer": bool(layer) or f"logits from {victim.logits_from}",
        "a last layer whose weights and bias both share their gradient": (
            {f"{layer}.weight", f"{layer}.bias"} <= {*victim.trainable} or "another one"
        ),
    }
    for need, met in needs.items():
        if met is not True:
            raise ValueError(f"Expected {need} to infer a soft label, but got {met}. {INSTEAD}")


@torch.no_grad()
@full_precision()
def infer_soft_labels(shared: SharedGradient, victim: Victim) -> Tensor:
    r"""Read the soft label of each victim's single image off the last layer's gradient; exact up to rounding.

    With cross-entropy and class probabilities y, the bias shares :math:`g_b = p - y`, and every row of the weights
    shares :math:`g_{W,k} = g_{b,k} h`. So a ratio of both gives the feature h, the feature gives the prediction p, and

    .. math:: y = \mathrm{softmax}(W h + b) - g_b, \qquad h = g_{W,k} / g_{b,k} .

    Where the prediction equals the label, the gradient is zero and reveals nothing: all classes are then equally
    probable.

    Args:
        shared: gradients of V victims.
        victim: the victims' model and protocol.

    Returns:
        ``(V, 1, K)``, at least 0, with sums of 1.

    Raises:
        ValueError: the gradients do not fit the victim, or :func:`check_soft_labels` refuses it.

    References:
        Wang, Liang and He, *Towards Eliminating Hard Label Constraints in Gradient Inversion Attacks*, ICLR 2024,
        https://arxiv.org/abs/2402.03124, who search for the scale of the feature where there is no bias.

    Example:
        >>> from leakage.models import LeNet
        >>> victim = Victim(LeNet(num_classes=3), image_shape=(1, 28, 28), label_kind="probabilities")
        >>> shared = victim.share(torch.rand(1, 1, 1, 28, 28), torch.tensor([[[0.7, 0.1, 0.2]]]))
        >>> infer_soft_labels(shared, victim)
        tensor([[[0.7000, 0.1000, 0.2000]]])
    """
    check_soft_labels(victim)
    victim.check(shared)
    layer = last_layer(shared, victim, non_negative=False)
    found = logits_of_one(layer).softmax(1) - layer.push.double()
    found = torch.where(found.isfinite(), found, 1.0).clamp(min=0)
    found = found / found.sum(1, keepdim=True)
    return found[:, None].to(layer.push)
