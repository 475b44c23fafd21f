"""Checks of the last layer's gradient: the labels and features that it holds must reproduce it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.linalg import vector_norm

from leakage.clients.protocol import UNKNOWN
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.labels.auxiliary import Auxiliary, KnownFeatures, known_features, natural_noise
from leakage.labels.last_layer import LastLayer, has_non_negative_features, last_layer
from leakage.labels.length import restore_length
from leakage.updates.reading import Update

#: The result of a check: whether it passed, its residual and its finding; a text if the check can't be made, with the
#: reason; None if it does not apply.
Found: TypeAlias = tuple[bool, float | None, str] | str | None


def failed(finding: str, left: float | None = None) -> tuple[bool, float | None, str]:
    """Return the result of a failed check, with its residual."""
    return False, left, finding


SIGN = "The update has the opposite sign: after - before was given for before - after."
# The share of a single image's gradient that may stay unexplained, besides rounding: for one step and for several.
_LEFT, _LEFT_OF_STEPS = 1e-3, 0.1
# The factor by which a gradient of several images may look too long or too short, and how close it has to be to the
# length that a mistake would cause for that mistake to be named.
_LONGER, _NEAR = 3.0, 1.7
# Images of noise to see how predictions vary, the most they may vary, and the most that steps may move the logits.
_IMAGES, _UNDECIDED, _MOVED = 64, 0.07, 2.0
# The relative rounding from which on a gradient says nothing.
_COARSE = 0.1
# The largest sum of the bias' gradient and the most negative features (for one step and for several), relative.
_SUM, _NEGATIVE, _NEGATIVE_OF_STEPS = 1e-3, 0.02, 0.3
# The factor by which a gradient is shortened before its length is restored.
_SHORTENED = 1e-6
# Factors by which the logits may move further than the last layer alone moves them.
_LEARNING = torch.logspace(0, 1.5, 31, dtype=torch.float64)
_TINY = 1e-300


@dataclasses.dataclass
class Fit:
    """How well a label and a feature explain a gradient.

    Attributes:
        left: the relative residual.
        length: the ratio of the gradient's length to the expected one.
        left_at_length: the relative residual if the gradient may have that length.
        tolerance: the largest residual that counts as explained.
    """

    left: float
    length: float
    left_at_length: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the gradient is explained."""
        return self.left <= self.tolerance


class LastLayerTest:
    """Check one update by its last layer.

    Args:
        read: the update.
        victim: its model and protocol.
        exchanged: the update with before and after exchanged, if both are known.
        rate: the learning rate of a single step, if it is known.
    """

    def __init__(self, read: Update, victim: Victim, exchanged: SharedGradient | None, rate: float | None) -> None:
        self.read, self.victim, self.exchanged = read, victim, exchanged
        self.rate = victim.protocol.known_rate or rate
        self.names = [f"{victim.classifier}.{part}" for part in ("weight", "bias")]

    @cached_property
    def why_not(self) -> str | None:
        """The reason why there is nothing to test; None if there is."""
        protocol = self.victim.protocol
        if protocol.loss != "cross_entropy":
            return f"the loss is {protocol.loss!r}, not 'cross_entropy'"
        if not self.victim.classifier:
            return f"the logits are from {self.victim.logits_from}, not from a linear layer"
        if not {*self.names} <= {*self.victim.trainable}:
            return "the last layer does not share both gradients"
        return None

    @property
    def layer(self) -> LastLayer:
        """The last layer's gradients, without momentum and weight decay."""
        return last_layer(self.read.shared, self.victim, non_negative=False)

    @cached_property
    def rounding(self) -> float:
        """The relative rounding of the last layer's gradients."""
        gradients = self.read.shared.gradients
        return max(_size(self.read.rounding[name]) / _size(gradients[name]) for name in self.names)

    def bias_sum(self) -> Found:
        """Check that the gradient of the last bias, softmax minus one-hot, sums to zero."""
        if self.why_not:
            return self.why_not
        bias = self.layer.push.double()
        size = float(bias.abs().sum()) + _TINY
        left = abs(float(bias.sum())) / size
        doubt = 4 * _size(self.read.rounding[self.names[1]]) / size
        decay = 0.1 if self.victim.protocol.weight_decay else 0.0  # its part is known only to first order
        if left > _SUM + doubt + decay:
            return failed(
                f"The gradient of {self.names[1]!r} sums to {left:.1%} of its size instead of zero: the loss is not "
                "the cross-entropy of these logits, or another array has taken its place.",
                left=left,
            )
        return True, left, f"The gradient of {self.names[1]!r} sums to zero."

    def classes(self) -> Found:
        """Check that the gradient of the last bias has at most one negative entry per image."""
        if self.why_not:
            return self.why_not
        count, classes = self.victim.protocol.num_images, self.victim.protocol.num_classes
        if self.victim.protocol.label_smoothing or self.victim.protocol.label_kind != "classes":
            return "soft labels make the gradient negative for further classes"
        if count >= classes:
            return f"{count} images may cover all {classes} classes"
        push = self.layer.push[0].double()
        unsure = 1e-4 * push.abs().amax() + 4 * self.read.rounding[self.names[1]].double().amax()
        below, above = int((push < -unsure).sum()), int((push > unsure).sum())
        found = f"Classes with a negative gradient: {below}; images: {count}."
        if below <= count:
            return True, None, found
        return failed(f"{found} " + (SIGN if above <= count else "More images are behind the update."))

    def last_layer(self) -> Found:
        """Check that labels and features reproduce the gradient; if not, look for what would."""
        if self.why_not:
            return self.why_not
        if self.rounding > _COARSE:
            return f"the weights are rounded to {self.rounding:.0%} of the update"
        protocol = self.victim.protocol
        if protocol.learning_rate == UNKNOWN:
            return "the learning rate is unknown, which leaves the length open"
        if protocol.num_images == protocol.local_steps == 1:
            return self._of_one()
        if protocol.label_kind != "classes":
            return "soft labels do not determine how long the update should be"
        # The length of softmax minus one-hot is at most sqrt(2), whatever the images.
        length = _size(self.layer.push)
        if length > math.sqrt(2) * (1.01 + 4 * self.rounding) and not protocol.weight_decay:
            return failed(self._too_long(length), left=length)
        if not self._undecided:
            return "the network's predictions vary, so labels do not determine how long the update should be"
        if protocol.local_steps > 1 and protocol.num_images > 1:
            return "several steps on several images do not determine a length"
        if protocol.local_steps > 1 and self._moved > _MOVED:
            return f"the steps move the logits too far for this test, by {self._moved:.2g}"
        return self._of_one() if protocol.num_images == 1 else self._of_several()

    @cached_property
    def _noise(self) -> KnownFeatures:
        """Features and predictions of images of noise."""
        layer = self.layer
        return known_features(layer, Auxiliary(natural_noise(_IMAGES, layer.protocol.image_shape, 0)), 0)

    @property
    def _undecided(self) -> bool:
        """Whether the network predicts nearly the same for all images, as an untrained one does."""
        predictions = self._noise.predictions[0].double()
        return float((predictions - predictions.mean(0)).abs().amax(1).mean()) < _UNDECIDED

    @property
    def _moved(self) -> float:
        """How far all steps together move the logits through the last layer."""
        protocol, layer = self.victim.protocol, self.layer
        feature = self._noise.features[0].double().square().sum(1).mean()
        return protocol.known_rate * protocol.local_steps * _size(layer.push) * float(1 + feature)

    def features(self) -> Found:
        """Check that a single image's features are not negative after a ReLU or a sigmoid."""
        if self.why_not:
            return self.why_not
        protocol = self.victim.protocol
        if protocol.num_images > 1 or not has_non_negative_features(self.victim):
            return None
        features = _mean_feature(self.layer)
        left = max(float(-features.min() / (features.abs().max() + _TINY)), 0.0)
        # The features of several steps are weighted, and the weights may have either sign.
        if left > (_NEGATIVE if protocol.local_steps == 1 else _NEGATIVE_OF_STEPS) + 10 * self.rounding:
            return failed(
                "The inputs of the last layer are negative, which is impossible after a ReLU or a sigmoid: another "
                "array has taken the place of its gradient.",
                left=left,
            )
        return True, left, "The features are not negative."

    def _of_one(self) -> Found:
        """Test whether a single image's feature and label, with the declared steps, explain the update."""
        fit = self._fit(self.read.shared)
        if fit.holds:
            return True, fit.left, f"The image's label and feature explain the update up to {fit.left:.1e}."
        candidates = [(self._fit(shared), words) for words, shared in self._mistakes()]
        held = [(other.left, words) for other, words in candidates if other.holds]
        if held:
            return failed(min(held)[1], left=fit.left)
        if fit.left_at_length <= fit.tolerance:
            return failed(self._of_length(fit.length), left=fit.left)
        return failed(
            f"The image's label and feature leave {fit.left:.1%} of the update unexplained: `before` is from another "
            "round or model, the arrays are in another order, or the protocol is another (images, steps, loss).",
            left=fit.left,
        )

    def _fit(self, shared: SharedGradient) -> Fit:
        r"""Measure how well the steps of a single image explain the gradient of the last layer.

        The feature h is the ratio of the rows of the weights' gradient to the entries of the bias' gradient. The
        label y is at the most negative of these entries; a soft label is :math:`p - \delta`. Starting from the logits
        :math:`z_0 = W h + b`, the steps are

        .. math:: \delta_t = \mathrm{softmax}(z_t) - y, \qquad v_t = \mu v_{t-1} + \delta_t, \qquad
            z_{t+1} = z_t - \eta \kappa \, v_t

        The layers before the last one learn too, so :math:`\kappa` is larger than the value
        :math:`\lVert h \rVert^2 + 1` of the last layer alone. The one that fits best is taken. A single step is exact.
        """
        protocol, layer = shared.protocol, last_layer(shared, self.victim, non_negative=False)
        steps = protocol.local_steps
        # Without the weight decay of several steps, but with their momentum.
        push = layer.push[0].double() if protocol.weight_decay else shared.gradients[self.names[1]][0].double()
        feature = _mean_feature(layer)
        start = layer.weight[0].double() @ feature + layer.bias[0].double()
        soft = protocol.label_kind != "classes"
        seen = start.softmax(0) - push if (protocol.label_smoothing or soft) and steps == 1 else -push
        label = _as_probabilities(seen) if soft else protocol.targets(seen.argmax(), push.dtype)
        scales = _LEARNING.to(push)[:, None] * (1 + feature.square().sum()) if steps > 1 else torch.zeros(1, 1).to(push)
        logits, velocity, total = start.expand(len(scales), -1), torch.zeros_like(start), torch.zeros_like(start)
        momentum = 0.0 if protocol.weight_decay else protocol.momentum
        for _ in range(steps):
            velocity = momentum * velocity + logits.softmax(1) - label
            total = total + velocity
            logits = logits - protocol.known_rate * scales * velocity
        expected = total / steps
        size = vector_norm(push) + _TINY
        left = vector_norm(push - expected, dim=1) / size
        lengths = (expected @ push) / (expected.square().sum(1) + _TINY)
        left_at_lengths = vector_norm(push - lengths[:, None] * expected, dim=1) / size
        best = int(left_at_lengths.argmin())
        doubt = (30 * self.rounding + 1e-5) * (1 + float(start.abs().amax())) + 1e-6 / (_size(expected[best]) + 1e-12)
        tolerance = doubt + (_LEFT if steps == 1 else _LEFT_OF_STEPS)
        return Fit(float(left.amin()), float(lengths[best]), float(left_at_lengths[best]), tolerance)

    def _mistakes(self) -> Iterator[tuple[str, SharedGradient]]:
        """Yield common mistakes with a single image: a description, and what was shared without the mistake."""
        shared, protocol, rate = self.read.shared, self.victim.protocol, self.rate
        if self.exchanged is not None:
            yield "The update is explained if `before` and `update` are exchanged.", self.exchanged
        yield SIGN, _times(shared, -1.0)
        for words, length in self._lengths():
            yield words, _times(shared, 1 / length)
        if not rate:
            return
        for power in (-3, -2, -1, 1, 2, 3):
            options: dict[str, Any] = {} if protocol.local_steps == 1 else {"learning_rate": rate * 10.0**power}
            words = f"The update is explained by a learning rate that is {10.0**power:g} times the declared one."
            yield words, _times(shared, 10.0**-power, **options)
        for steps in (1, *range(2, 11), 20, 50, 100):
            options = {"local_steps": steps, "learning_rate": rate} if steps > 1 else _ONE_STEP
            words = f"The update is explained by local steps: {steps}, not {protocol.local_steps}."
            if steps != protocol.local_steps:
                yield words, _times(shared, protocol.local_steps / steps, **options)
        for momentum in {0.0, 0.9} - {protocol.momentum} if protocol.local_steps > 1 else ():
            words = f"The update is explained by momentum: {momentum:g}, not {protocol.momentum:g}."
            yield words, _times(shared, 1.0, momentum=momentum)

    def _of_several(self) -> Found:
        """Test the length of the gradient of several images by the fact that label counts are whole numbers."""
        length = self._length()
        if 1 / _LONGER <= length <= _LONGER:
            return True, None, f"It is {length:.2g} times as long as whole numbers of labels make it; 1 is expected."
        return failed(self._nearest(length), left=length)

    def _length(self) -> float:
        """Return the ratio of the gradient's length to the one that whole numbers of labels give."""
        layer = self.layer
        shortened = dataclasses.replace(
            layer, weight_gradient=layer.rows * _SHORTENED, bias_gradient=layer.push * _SHORTENED
        )
        restored = restore_length(shortened, self._noise, torch.zeros(1))
        return _size(layer.push) / _size(restored.push)

    def _too_long(self, length: float) -> str:
        words = f"The gradient of {self.names[1]!r} has length {length:.3g}, but no images make it longer than sqrt(2)."
        if self.victim.protocol.num_images > 1 and self._undecided:
            return f"{words} {self._nearest(self._length())}"
        if self.victim.protocol.num_images == 1 and self._undecided:
            found = self._of_one()
            assert isinstance(found, tuple)
            return f"{words} {found[2]}"
        return f"{words} The learning rate or the number of steps is larger than declared, or the loss is a sum."

    def _nearest(self, length: float) -> str:
        """Describe the mistake that would cause about this length, if there is one."""
        near = [(abs(math.log(length / abs(other))), words) for words, other in self._lengths()]
        apart, words = min(near, default=(math.inf, ""))
        return words if apart < math.log(_NEAR) else self._of_length(length)

    def _lengths(self) -> Iterator[tuple[str, float]]:
        """Yield mistakes that change the length of an update, whatever its steps, and their factors."""
        protocol, rate = self.victim.protocol, self.rate
        count, steps = protocol.local_batch_size or protocol.num_images, protocol.local_steps
        if count > 1:
            mean = protocol.reduction == "mean"
            declared, found = ("mean", "sum") if mean else ("sum", "mean")
            words = f"The update is explained if the loss is the {found} over the images, not the {declared}."
            yield words, float(count) if mean else 1 / count
        if rate and self.read.holds == "gradient":
            yield "The update is explained if it is a difference of weights, after - before.", -rate * steps
        if rate and self.read.holds == "difference":
            yield "The update is explained if it is a gradient, not a difference of weights.", -1 / (rate * steps)
        if steps > 1 and self.read.holds == "gradient":
            yield f"The update is explained if it is the sum of {steps} steps, not their average.", float(steps)
        for power in (-3, -2, -1, 1, 2, 3) if protocol.num_images > 1 else ():
            words = f"The update is explained by a learning rate that is about {10.0**power:g} times the declared one."
            yield words, 10.0**power

    def _of_length(self, length: float) -> str:
        sign = " and has the opposite sign" if length < 0 else ""
        words = f"The update is {abs(length):.3g} times as long as that of the declared client{sign}"
        if self.rate:
            declared = self.rate * self.victim.protocol.local_steps
            words += (
                f": learning rate times steps is {abs(length) * declared:.3g} by the update, {declared:.3g} as declared"
            )
        return f"{words}."


_ONE_STEP: dict[str, Any] = {"local_steps": 1, "learning_rate": None, "momentum": 0.0, "weight_decay": 0.0}


def _times(shared: SharedGradient, factor: float, **options: Any) -> SharedGradient:
    """Scale a shared gradient and change options of its protocol."""
    gradients = {name: factor * gradient for name, gradient in shared.gradients.items()}
    return dataclasses.replace(shared, gradients=gradients, protocol=dataclasses.replace(shared.protocol, **options))


def _mean_feature(layer: LastLayer) -> Tensor:
    """Return the mean feature ``(D,)`` in double precision; for a single image, its feature."""
    push, rows = layer.push[0].double(), layer.rows[0].double()
    return rows.mT @ push / (push.square().sum() + _TINY)


def _size(tensor: Tensor) -> float:
    return float(vector_norm(tensor.double())) + _TINY


def _as_probabilities(label: Tensor) -> Tensor:
    positive = label.clamp(min=0)
    return positive / (positive.sum() + _TINY)
