"""The protocol: what the attacker knows about the client's computation."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from leakage.clients.losses import LOSSES, OWN
from leakage.errors import check_choice, check_count, check_flag, check_not_negative, check_positive
from leakage.files.tensors import shorten

# Largest number of values of all images behind one gradient: with more, not even one search would fit into memory.
_MOST_VALUES = 2**30
# Largest number of local steps: an attack differentiates through all of them twice. Federated averaging makes hundreds.
_MOST_STEPS = 10_000
# How near to 1 the sum of probabilities must be, since labels may be rounded to half precision.
_NEAR_ONE = 1e-2
#: The types of whole numbers.
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Largest number of characters of all descriptions of defenses: error messages repeat them.
_LONGEST_DEFENSES = 10_000
#: What the labels of clients are: class indices ``(N,)``, or soft labels or any numbers, both ``(N, K)``.
LABEL_KINDS = ("classes", "probabilities", "values")
#: The ``learning_rate`` of a :class:`Protocol` if the attacker does not know it.
UNKNOWN = "unknown"


@dataclass
class Protocol:
    """What the attacker knows about the client's computation.

    Attributes:
        image_shape: ``(C, H, W)``.
        num_classes: K, the number of logits.
        num_images: N, the number of images behind one gradient.
        loss: the training loss, a key of :data:`leakage.clients.losses.LOSSES`, or ``"own"``: that of the model.
        reduction: reduction over the images of a step, ``"mean"`` or ``"sum"``. A model's own loss is reduced already.
        local_steps: number of SGD steps that the client makes before it shares their average; with one step, it shares
            the gradient at the weights that it received. At most 10,000, since every evaluation of an attack simulates
            all of them.
        learning_rate: learning rate of these steps; None with one step, where it cancels out. ``"unknown"`` if the
            client keeps it secret, with any number of steps: it then shares its update, the weights that it received
            minus those after its steps. See :class:`~leakage.dummies.LearningRate`.
        local_batch_size: number of images in one step; None for all N.
        shuffle: whether the client takes its images in a new, secret order in each pass over them. Needs a
            ``local_batch_size``. See :class:`~leakage.dummies.LocalOrder`.
        momentum: momentum of several steps, from 0 to below 1, as in :class:`torch.optim.SGD` (without dampening and
            Nesterov).
        weight_decay: weight decay of several steps, at least 0, as in :class:`torch.optim.SGD`.
        defenses: descriptions of the client's defenses, in order, as :meth:`leakage.defenses.Defense.describe` returns
            them: each a dict with a ``"name"``, with values that JSON can hold.
        label_smoothing, class_weights: options of cross-entropy, as in :class:`torch.nn.CrossEntropyLoss`. See
            :meth:`targets`.
        label_kind: what labels are: ``"classes"``, indices from 0 to K - 1; ``"probabilities"`` of all classes (soft
            labels, as from MixUp or distillation); or ``"values"``, any K numbers, as for several labels per image or
            regression. Values need the mean squared error or the model's own loss.
    """

    image_shape: tuple[int, ...]
    num_classes: int
    num_images: int = 1
    loss: str = "cross_entropy"
    reduction: str = "mean"
    local_steps: int = 1
    learning_rate: float | str | None = None
    local_batch_size: int | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0
    shuffle: bool = False
    defenses: tuple[dict[str, Any], ...] = ()
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None
    label_kind: str = "classes"

    def __post_init__(self) -> None:
        if not isinstance(self.image_shape, list | tuple) or len(self.image_shape) != 3:
            raise ValueError(f"Expected `image_shape` (C, H, W), but got {self.image_shape!r}.")
        self.image_shape = tuple(self.image_shape)
        check_count(**dict(zip("CHW", self.image_shape, strict=True)))
        check_count(num_classes=self.num_classes, num_images=self.num_images)
        if self.num_images * math.prod(self.image_shape) > _MOST_VALUES:
            raise ValueError(
                f"Expected `num_images` times `image_shape` of at most 2**30 values, but got {self.num_images} times "
                f"{self.image_shape}."
            )
        check_choice("loss", self.loss, (*LOSSES, OWN))
        check_choice("reduction", self.reduction, ("mean", "sum"))
        check_local_steps(
            self.num_images,
            self.local_steps,
            self.learning_rate,
            self.local_batch_size,
            self.momentum,
            self.weight_decay,
            self.shuffle,
        )
        self.momentum, self.weight_decay = float(self.momentum), float(self.weight_decay)
        if self.local_batch_size == self.num_images:
            self.local_batch_size = None  # one representation, so that equal protocols compare equal
        self.defenses = _plain(self.defenses)
        self.label_smoothing, self.class_weights = check_targets(
            self.label_smoothing, self.class_weights, self.loss, self.reduction, self.num_classes, self.shuffle
        )
        self._check_labels()
        if self.loss == OWN and (self.reduction == "sum" or self.shuffle):
            raise ValueError(
                "Expected no reduction 'sum' and no `shuffle` with loss 'own', a single number for all images of a "
                f"step, but got {self.reduction!r} and shuffle={self.shuffle}."
            )

    def _check_labels(self) -> None:
        check_choice("label_kind", self.label_kind, LABEL_KINDS)
        if self.label_kind != "classes" and not self.plain_labels:
            raise ValueError(
                "Expected `label_kind` 'classes' with `label_smoothing` or `class_weights`, but got "
                f"{self.label_kind!r}. Smooth or weight the labels themselves."
            )
        if self.label_kind == "values" and self.loss == "cross_entropy":
            raise ValueError(
                "Expected loss 'mean_squared_error' or 'own' with `label_kind` 'values', but got 'cross_entropy', "
                "whose labels are classes or probabilities."
            )

    @property
    def step_size(self) -> int:
        """The number of images in one step."""
        return self.local_batch_size or self.num_images

    @property
    def known_rate(self) -> float:
        """The learning rate of several steps if the attacker knows it; otherwise 0."""
        return 0.0 if self.learning_rate is None or isinstance(self.learning_rate, str) else self.learning_rate

    @property
    def plain_labels(self) -> bool:
        """Whether the loss compares predictions with one-hot labels."""
        return not self.label_smoothing and self.class_weights is None

    def targets(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        r"""Return ``(..., N, K)``, what the loss compares predictions with, for labels of this protocol.

        Probabilities and values are returned as they are. For class indices ``(..., N)``, these are one-hot labels y.
        Label smoothing :math:`\varepsilon` makes them :math:`(1 - \varepsilon) \, y + \varepsilon / K`. Class weights w
        multiply them by :math:`w_{y_n}` over the mean weight of the images in the same step. Cross-entropy with these
        targets is that of torch with these options.

        Example:
            >>> Protocol((1, 8, 8), 4, label_smoothing=0.2).targets(torch.tensor([1]), torch.float32)
            tensor([[0.0500, 0.8500, 0.0500, 0.0500]])
        """
        if self.label_kind != "classes":
            return labels.to(dtype)
        found = F.one_hot(labels.long(), self.num_classes).to(dtype)
        found = (1 - self.label_smoothing) * found + self.label_smoothing / self.num_classes
        if self.class_weights is None:
            return found
        weights = found.new_tensor(self.class_weights)[labels.long()]
        of_steps = weights.view(*labels.shape[:-1], -1, self.step_size)
        weighted: Tensor = found * (of_steps / of_steps.mean(-1, keepdim=True)).view(*labels.shape, 1)
        return weighted

    def blank_labels(self, victims: int) -> Tensor:
        """Return labels of this kind that say nothing: the first class, or the same number for all."""
        if self.label_kind == "classes":
            return torch.zeros(victims, self.num_images, dtype=torch.long)
        return torch.full((victims, self.num_images, self.num_classes), 1 / self.num_classes)

    def counts(self, targets: Tensor) -> Tensor:
        """Return the numbers of images ``(..., K)`` of each class behind the mean :meth:`targets` ``(..., K)``."""
        if self.label_smoothing:
            targets = (targets - self.label_smoothing / self.num_classes) / (1 - self.label_smoothing)
        if self.class_weights is not None:
            targets = targets / targets.new_tensor(self.class_weights)
            targets = targets / targets.clamp(min=0).sum(-1, keepdim=True).clamp(min=torch.finfo(targets.dtype).tiny)
        return self.num_images * targets


def are_probabilities(labels: Tensor) -> bool:
    """Whether labels ``(..., K)`` are probabilities of at least two classes."""
    sound = labels.is_floating_point() and labels.shape[-1] > 1 and bool((labels >= 0).all())
    return sound and bool(((labels.sum(-1) - 1).abs() <= _NEAR_ONE).all())


def check_labels(labels: Tensor, victims: int, protocol: Protocol) -> None:
    """Raise a ``ValueError`` unless these are labels of so many victims of a protocol."""
    kind = protocol.label_kind
    of_one = () if kind == "classes" else (protocol.num_classes,)
    shape = (victims, protocol.num_images, *of_one)
    if tuple(labels.shape) != shape:
        raise ValueError(f"Expected `labels` of shape {shape}, but got {tuple(labels.shape)}.")
    if kind == "classes":
        if labels.dtype in WHOLE and bool(((labels >= 0) & (labels < protocol.num_classes)).all()):
            return
        expected = f"class indices from 0 to {protocol.num_classes - 1}"
    elif kind == "probabilities":
        if are_probabilities(labels):
            return
        expected = f"probabilities of {protocol.num_classes} classes, which sum to 1"
    else:
        if labels.is_floating_point() and bool(labels.isfinite().all()):
            return
        expected = "finite floating-point numbers"
    got = f"{labels.dtype}"
    if labels.numel() and not labels.is_complex():
        got += f" from {labels.min().item()} to {labels.max().item()}"
    raise ValueError(f"Expected `labels` as {expected}, but got {got}.")


def check_local_steps(
    num_images: int,
    local_steps: int,
    learning_rate: float | str | None,
    local_batch_size: int | None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    shuffle: bool = False,
) -> None:
    """Raise a ``ValueError`` unless a client can make such steps, using every image equally often."""
    check_count(num_images=num_images, local_steps=local_steps)
    if local_steps > _MOST_STEPS:
        raise ValueError(
            f"Expected `local_steps` of at most {_MOST_STEPS}, as every evaluation of an attack simulates all of them, "
            f"but got {local_steps}."
        )
    if local_batch_size is not None:
        check_count(local_batch_size=local_batch_size)
        if num_images % local_batch_size:
            raise ValueError(
                f"Expected `local_batch_size` to divide `num_images` = {num_images}, so that every image is used "
                f"equally often, but got {local_batch_size}. Choose a divisor of {num_images}, or None for all at once."
            )
        steps = num_images // local_batch_size
        if local_steps % steps:
            raise ValueError(
                f"Expected `local_steps` to be a multiple of {steps} = `num_images` / `local_batch_size`, so that "
                f"every image is used equally often, but got {local_steps}."
            )
    check_not_negative(momentum=momentum, weight_decay=weight_decay)
    if momentum >= 1:
        raise ValueError(f"Expected `momentum` below 1, as steps would otherwise diverge, but got {momentum!r}.")
    if local_steps == 1 and (momentum or weight_decay):
        raise ValueError(
            "Expected no `momentum` and no `weight_decay` with one local step, whose gradient is shared directly, but "
            f"got {momentum!r} and {weight_decay!r}. Leave them out, or set `local_steps`."
        )
    check_flag(shuffle=shuffle)
    if shuffle and local_batch_size in (None, num_images):
        raise ValueError(
            "Expected a `local_batch_size` below `num_images` with `shuffle`, as the images of one step have no order, "
            f"but got {local_batch_size} of {num_images}."
        )
    if learning_rate == UNKNOWN:
        return
    if local_steps > 1:
        if learning_rate is None:
            raise ValueError(f"Expected a `learning_rate` for {local_steps} local steps, but got None.")
        check_positive(learning_rate=cast(float, learning_rate))
    elif learning_rate is not None:
        raise ValueError(
            f"Expected no `learning_rate` with one local step, where it cancels out, but got {learning_rate!r}. "
            "Leave it out, or set `local_steps`."
        )


def check_targets(
    label_smoothing: float,
    class_weights: object,
    loss: str,
    reduction: str,
    num_classes: int,
    shuffle: bool,
) -> tuple[float, tuple[float, ...] | None]:
    """Return the options of cross-entropy as plain numbers; raise a ``ValueError`` if they are not possible."""
    check_not_negative(label_smoothing=label_smoothing)
    if label_smoothing >= 1:
        raise ValueError(f"Expected `label_smoothing` below 1, which hides all labels, but got {label_smoothing!r}.")
    if label_smoothing and (loss != "cross_entropy" or class_weights is not None):
        other = f"loss {loss!r}" if loss != "cross_entropy" else "class weights"
        raise ValueError(f"Expected `label_smoothing` with plain 'cross_entropy', but got {other}.")
    if class_weights is None:
        return float(label_smoothing), None
    if not isinstance(class_weights, list | tuple) or len(class_weights) != num_classes:
        raise ValueError(
            f"Expected `class_weights` as {num_classes} numbers, one per class, but got {class_weights!r}."
        )
    for weight in class_weights:
        check_positive(class_weights=weight)
    if (loss, reduction, shuffle) != ("cross_entropy", "mean", False):
        raise ValueError(
            "Expected `class_weights` with loss 'cross_entropy', reduction 'mean' and images that are not shuffled, "
            f"but got {loss!r}, {reduction!r} and shuffle={shuffle}."
        )
    return 0.0, tuple(map(float, class_weights))


def protocol_rate(learning_rate: float | str | None, *, reveal: bool) -> float | str | None:
    """Return the learning rate for a protocol; raise a ``ValueError`` if it is to be secret and there is none."""
    check_flag(reveal_learning_rate=reveal)
    if reveal:
        return learning_rate
    check_positive(learning_rate=cast(float, learning_rate))
    return UNKNOWN


def _plain(defenses: object) -> tuple[dict[str, Any], ...]:
    """Return the descriptions after a round trip through JSON; raise a ``ValueError`` if JSON can't hold them."""
    if isinstance(defenses, list | tuple) and all(
        isinstance(defense, dict) and isinstance(defense.get("name"), str) for defense in defenses
    ):
        try:
            text = json.dumps(defenses, allow_nan=False)
            if len(text) <= _LONGEST_DEFENSES:
                return tuple(json.loads(text))
        except (TypeError, ValueError, RecursionError):
            pass
    raise ValueError(
        "Expected `defenses` as descriptions such as [{'name': 'GaussianNoise', 'std': 0.1}], made of strings, finite "
        f"numbers, lists and dicts, of at most {_LONGEST_DEFENSES} characters, but got {shorten(repr(defenses))}."
    )
