"""Preflight of an audit: find everything in a module that hinders attacks, and prepare the rest."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision import transforms
from torchvision.transforms import v2

from leakage.audit.client import Client
from leakage.audit.data import Batch, Data, collect, find_images, most_images, seeded
from leakage.audit.layers import dropout_of, prepare_layers
from leakage.audit.losses import LossError, OwnLoss, declared, known_loss
from leakage.audit.relaxed_labels import Unknown
from leakage.audit.report import Problem
from leakage.audit.subject import (
    LogitsOfTrainingStep,
    Loss,
    Subject,
    copy_of,
    difference,
    direction,
    loss_of,
    observe,
    slope_of,
)
from leakage.clients.losses import OWN
from leakage.clients.protocol import are_probabilities
from leakage.clients.victim import Victim

# Rounding may move images out of [0, 1] by this much.
_OUTSIDE = 1e-3
# The largest relative difference of a gradient that is computed for several clients at once.
_SAME_AT_ONCE = 1e-2
# The number of images for a trial of a loss.
_TRIED = 8
# Labels that are whole numbers below this are classes.
_MOST_CLASSES = 100_000
# What a loss that clients can't declare means for the verdict, by what it uses of labels.
_MEANS = {
    "nothing": "Closed-form attacks do not apply. The loss does not depend on labels, so there are none to find.",
    "classes": "Closed-form attacks do not apply. Labels are searched for instead of read off, and found less often: "
    "audit with reveal_labels as well.",
    "numbers": "Closed-form attacks do not apply, and labels can't be searched for: attackers must know them.",
}
#: What a problem that leaves nothing to attack means for the verdict.
NO_VERDICT = "Nothing was attacked: there is no verdict."


def preflight(
    module: LightningModule, data: Data | None, clients: Sequence[Client], *, victims: int, public: int, seed: int
) -> tuple[Subject | None, list[Problem]]:
    """Prepare a module and data for an audit, and list every problem.

    The module is copied and never changed. Dropout, in-place operations and half precision are replaced in the copy.

    Args:
        module: the user's module.
        data: the user's data; None for the module's own ``train_dataloader``.
        clients: the clients that need images.
        victims: the number of victims of each client.
        public: the number of images that the auditor keeps.
        seed: the seed of the order of the images.

    Returns:
        The prepared subject, or None if a problem leaves nothing to attack; and the problems.

    Raises:
        ValueError: ``module`` is not a LightningModule, the data have no images, or they have fewer images
            than one client holds.
    """
    problems: list[Problem] = []
    try:
        return _prepare(module, data, clients, problems, victims, public, seed), problems
    except _StopError as stop:
        return None, [*problems, stop.problem]


class _StopError(Exception):
    """A problem that leaves nothing to attack."""

    def __init__(self, kind: str, where: str, problem: str, fix: str) -> None:
        super().__init__(problem)
        self.problem = Problem(kind, where, problem, fix, NO_VERDICT)


@contextmanager
def _own_errors() -> Iterator[None]:
    """Report an error of the module's own ``training_step`` as a problem."""
    try:
        yield
    except LossError as error:
        fix = "Audit with a loss that depends on nothing but the batch and the weights."
        raise _StopError("not yet", "training_step", str(error), fix) from error
    except Exception as error:
        said = f"it fails in the audit's copy, outside of `Trainer.fit`: {type(error).__name__}: {error}"
        fix = "Change it so that it needs nothing but the batch and the module, and leave out what is only for logs."
        raise _StopError("not yet", "training_step", said, fix) from error


def _prepare(
    module: LightningModule,
    data: Data | None,
    clients: Sequence[Client],
    problems: list[Problem],
    victims: int,
    public: int,
    seed: int,
) -> Subject:
    if not isinstance(module, LightningModule):
        raise ValueError(f"Expected `model` to be a LightningModule, but got {type(module).__name__}.")
    copied = copy_of(module)
    dropout = dropout_of(copied)
    problems += prepare_layers(copied)
    batches = collect(copied, data, victims * max(client.images for client in clients) + public, seed)
    first = find_images(batches[0])
    if first is None:
        raise ValueError(
            "Expected batches with images (B, C, H, W), as a tensor or a tuple or dict of tensors, but got "
            f"{_shape_of(batches[0])}."
        )
    if not copied.automatic_optimization:
        fix = "Audit the same network in a module whose `training_step` returns one loss."
        raise _StopError("not yet", "training_step", "manual optimization", fix)
    images, normalise = _unit_range(batches, data, problems)
    labels, kind = _labels(batches)
    labels = labels[: len(images)]
    with _own_errors(), seeded(seed):
        # In a copy, whose metrics keep results of this step.
        loss, calls, layers = observe(copy.deepcopy(copied), batches[0])
    if not loss.requires_grad:
        raise _StopError("never", "training_step", "a loss without gradient", "Let the loss depend on weights.")
    with _own_errors():
        further = _further_secrets(copied, first, batches[0], seed)
    if further:
        said = f"batches that hold more of each image than labels: the loss depends on {further}"
        fix = "Audit with batches of one tensor of images and one of labels: attacks search for nothing else."
        raise _StopError("not yet", "data", said, fix)

    def to_batch(new_images: Tensor, new_labels: Tensor, dtype: torch.dtype | None = None) -> Any:
        new_images = new_images if normalise is None else normalise(new_images)
        if uses == "nothing" and first.labels is not None:
            new_labels = first.labels[torch.arange(len(new_images)) % len(first.labels)]
        return first.rebuild(new_images if dtype is None else new_images.round().to(dtype), new_labels)

    network: nn.Module
    uses = "numbers" if kind == "values" else "classes"
    call = known_loss(loss, calls, labels, kind)
    if isinstance(call, Loss):
        options, num_classes = declared(call, kind), call.given.shape[1]
        network = _network(copied, first, call, layers)
        if normalise is not None:
            network = nn.Sequential(normalise, network)
    else:
        options, num_classes = {"loss": OWN, "label_kind": kind}, _number_of_classes(labels, calls)
        network = OwnLoss(copied, to_batch, num_classes, classes=kind == "classes")
        with _own_errors():
            uses = network.use_of_labels(images[:_TRIED], labels[:_TRIED], seed)
        if uses == "nothing":
            options, num_classes, labels = options | {"label_kind": "values"}, 1, torch.zeros(len(images), 1)
            network = OwnLoss(copied, to_batch, 1, classes=False)
        problems.append(Problem("not yet", "training_step", call, "Nothing to do.", _MEANS[uses]))
    own = _own_images(len(images), public, max(client.images for client in clients))
    subject = Subject(
        module=copied,
        network=network,
        loss=options,
        num_classes=num_classes,
        images=images[own:],
        labels=labels[own:],
        own_images=images[:own],
        own_labels=labels[:own],
        to_batch=partial(to_batch, dtype=torch.uint8) if first.images.dtype == torch.uint8 else to_batch,
        dropout=dropout,
        problems=problems,
        uses=uses,
    )
    _check_attackable(subject, problems)
    return subject


def _further_secrets(module: LightningModule, first: Batch, batch: Any, seed: int) -> str:
    """Return which tensors of a batch, besides images and labels, the gradient depends on; empty if there are none."""

    def slope(given: Any) -> Tensor:
        made = copy.deepcopy(module)
        with seeded(seed):
            return slope_of(loss_of(made, given), made)

    plain = slope(batch) if first.others else torch.empty(0)

    def matters(other: Any) -> bool:
        try:
            return not torch.equal(slope(other), plain)
        except Exception:  # other values are not possible there
            return True

    used = [key for key, other in first.others.items() if matters(other)]
    return ", ".join(repr(key) for key in sorted(used, key=str))


def _labels(batches: list[Any]) -> tuple[Tensor, str]:
    """Return the labels of all images, ``(M,)`` classes or ``(M, K)`` floats, and what they are."""
    parts = [part for part in map(find_images, batches) if part is not None]
    found = [part.labels.detach().cpu() for part in parts if part.labels is not None]
    if len(found) < len(parts):
        return torch.zeros(sum(len(part.images) for part in parts), 1), "values"
    labels = torch.cat([labels.reshape(len(labels), -1) for labels in found])
    if labels.shape[1] == 1 and bool(((labels == labels.long()) & (labels >= 0) & (labels < _MOST_CLASSES)).all()):
        return labels[:, 0].long(), "classes"
    labels = labels.float()
    return labels, "probabilities" if are_probabilities(labels) else "values"


def _number_of_classes(labels: Tensor, calls: list[Loss]) -> int:
    if labels.ndim == 2:
        return labels.shape[1]
    logits = [call.given.shape[1] for call in calls if call.given.ndim == 2]
    return max(2, int(labels.max()) + 1, *logits)


def _network(module: LightningModule, batch: Batch, call: Loss, layers: list[tuple[str, Tensor, Any]]) -> nn.Module:
    """Find the innermost module that maps the images to the logits and holds all trained weights."""
    modules = dict(module.named_modules())
    trained = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
    found: nn.Module | None = None
    for name, taken, given in layers:
        takes_images = taken.shape == batch.images.shape and torch.equal(taken, batch.images)
        holds_all = trained <= {id(parameter) for parameter in modules[name].parameters()}
        gives = isinstance(given, Tensor) and given.shape == call.given.shape and torch.equal(given, call.given)
        # Inner layers are recorded before outer ones.
        if gives and takes_images and holds_all and found is None:
            found = modules[name]
        if takes_images and holds_all and found is None and _ends_in_log_softmax(modules[name], given, call.given):
            found = cast(nn.Sequential, modules[name])[:-1]
    if found is not None:
        return found
    return LogitsOfTrainingStep(module, batch.rebuild)


def _ends_in_log_softmax(module: nn.Module, output: Any, logits: Tensor) -> bool:
    ends = isinstance(module, nn.Sequential) and len(module) > 1 and isinstance(module[-1], nn.LogSoftmax)
    return ends and torch.equal(output, logits.log_softmax(1))


def _unit_range(
    batches: list[Any], data: Data | None, problems: list[Problem]
) -> tuple[Tensor, transforms.Normalize | None]:
    """Return all images in [0, 1], and what maps the images back (None if nothing has to)."""
    parts = [part for part in map(find_images, batches) if part is not None]
    shape = parts[0].images.shape[1:]
    other = next((tuple(part.images.shape[1:]) for part in parts if part.images.shape[1:] != shape), None)
    if other is not None:
        raise ValueError(f"Expected images of one size, but got {tuple(shape)} and {other}. Resize them.")
    images = torch.cat([part.images.detach().cpu() for part in parts])
    images = images[: most_images(images)]
    whole = images.dtype == torch.uint8
    images = images.float()
    if not bool(images.isfinite().all()):
        raise ValueError("Expected images of finite numbers, but got NaN or infinity.")
    channels = images.shape[1]
    if whole:
        return images / 255, _normalise(torch.zeros(channels), torch.full((channels,), 1 / 255))
    if bool(((images >= 0) & (images <= 1)).all()):
        return images, None
    for mean, std in _normalisations(data):
        if len(mean) not in (1, channels):
            continue
        mean, std = mean.expand(channels), std.expand(channels)
        plain = images * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
        if bool(((plain >= -_OUTSIDE) & (plain <= 1 + _OUTSIDE)).all()):
            return plain.clamp(0, 1), _normalise(mean, std)
    low, high = images.amin((0, 2, 3)), images.amax((0, 2, 3))
    span = (high - low).clamp(min=1e-6)
    problems.append(
        Problem(
            "replace",
            "data",
            f"images from {low.min():.3g} to {high.max():.3g}, and no Normalize from which to get their scale",
            "Nothing to do, or use a torchvision Normalize in the data set.",
            "Each channel is mapped to [0, 1] by its range. PSNR and the success threshold refer to that range.",
        )
    )
    plain = ((images - low.view(-1, 1, 1)) / span.view(-1, 1, 1)).clamp(0, 1)
    return plain, _normalise(-low / span, 1 / span)


def _normalise(mean: Tensor, std: Tensor) -> transforms.Normalize:
    # Closed-form attacks invert this transform as a layer.
    return transforms.Normalize(mean.tolist(), std.tolist())


def _normalisations(data: Data | None) -> list[tuple[Tensor, Tensor]]:
    """Find the mean and standard deviation of every Normalize anywhere in the user's data."""
    found, left, seen = [], [(data, 0)], set[int]()
    while left:
        one, depth = left.pop()
        if id(one) in seen or depth > 5 or one is None or isinstance(one, str | int | float | Tensor):
            continue
        seen.add(id(one))
        if isinstance(one, transforms.Normalize | v2.Normalize) or type(one).__name__ == "Normalize":
            mean, std = getattr(one, "mean", None), getattr(one, "std", None)
            flags = getattr(one, "flags", {})  # kornia keeps them there
            mean, std = flags.get("mean", mean), flags.get("std", std)
            if mean is not None and std is not None:
                found.append(tuple(torch.as_tensor(value).float().reshape(-1) for value in (mean, std)))
        if isinstance(one, list | tuple):
            left += [(part, depth + 1) for part in one[:20]]
        elif isinstance(one, LightningDataModule | nn.Module) or hasattr(one, "__dict__"):
            left += [(part, depth + 1) for name, part in list(vars(one).items()) if name not in ("trainer", "_trainer")]
    return cast(list[tuple[Tensor, Tensor]], found)


def _own_images(available: int, public: int, images: int) -> int:
    """Return the number of images that the auditor keeps: at most a third of all."""
    own = min(public, available // 3)
    if available - own < images or not own:
        raise ValueError(
            f"Expected at least {max(images + 1, 3 * images // 2 + 1)} images in the data, for one client with "
            f"{images} and for the auditor, but got {available}."
        )
    return own


def _check_attackable(subject: Subject, problems: list[Problem]) -> None:
    """Stop unless a client can be simulated and its update differentiated; with limits, a problem is added."""
    try:
        victim = subject.victim(num_images=2)
        depends = _depends_on_images(subject, victim)
    except Exception as error:  # the module's own
        fix = "Replace the part named in the message by a function of only images and weights."
        where = "training_step" if subject.has_own_loss else type(subject.network).__name__
        raise _StopError("not yet", where, str(error), fix) from error
    if not depends:
        said = "an update without a derivative by the images, for example because of `torch.no_grad`, or a loss of zero"
        fix = "Freeze weights by `requires_grad_(False)` instead: a frozen layer needs no `torch.no_grad`."
        raise _StopError("not yet", "training_step", said, fix)
    layer = victim.classifier
    if not subject.has_own_loss and (layer is None or not any(name.startswith(layer) for name in victim.trainable)):
        hidden = "logits that do not come from a trained linear layer"
        means = "Labels are searched for instead of read off, and found less often. Audit with reveal_labels as well."
        problems.append(Problem("not yet", victim.logits_from, hidden, "Nothing to do.", means))


def _depends_on_images(subject: Subject, victim: Victim) -> bool:
    """Return whether an update of two images has a derivative by them; a few pairs are tried.

    Raises:
        ValueError: the update of several clients at once is another one.
    """
    for rows in torch.split(torch.arange(_TRIED) % len(subject.own_images), 2):
        images = subject.own_images[rows].clone().requires_grad_()
        targets = victim.protocol.targets(subject.own_labels[rows], images.dtype)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # only it can be differentiated twice
            gradients = victim.gradients(victim.state, images, targets)
            total = direction(list(gradients.values()))
            slope = torch.autograd.grad(total, images, allow_unused=True)[0] if total.requires_grad else None
        if subject.has_own_loss:
            with torch.no_grad():
                at_once = vmap(partial(victim.gradients, victim.state))(images[None], targets[None])
            if difference({name: one[0] for name, one in at_once.items()}, gradients) > _SAME_AT_ONCE:
                raise ValueError(Unknown.message)
        if slope is not None and bool((slope != 0).any()):
            return True
    return False


def _shape_of(batch: Any) -> str:
    if isinstance(batch, dict):
        return "{" + ", ".join(f"{key!r}: {_shape_of(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, list | tuple):
        return "(" + ", ".join(map(_shape_of, batch)) + ")"
    return f"{tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
