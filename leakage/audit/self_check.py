"""Before any attack: does the simulated client do what the module's own training does, and is the truth a solution?"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.nn import functional as F

from leakage.audit.client import Client
from leakage.audit.report import Check, Problem
from leakage.audit.subject import Subject, loss_of, seeded
from leakage.clients.victim import Victim
from leakage.defenses.base import relative_noise
from leakage.defenses.encoding import Encoding
from leakage.inversion.simulation import Simulation, known_to
from leakage.precision import full_precision

# Relative: what rounding leaves of two ways to compute one gradient, in double and in single precision.
_DOUBLE, _SINGLE = 1e-7, 1e-3
# Of the squared distance at the truth.
_AT_THE_TRUTH = 1e-10
# By how much it may exceed the noise that the attacker is told of.
_ABOVE_NOISE = 3.0


def with_module_rate(client: Client, subject: Subject) -> tuple[Client, list[Problem]]:
    """The client, with the learning rate of the module's own optimizer where it declares none.

    Raises:
        ValueError: several local steps without a rate, and a module that has no plain SGD.
    """
    if client.local_steps == 1:
        return client, []
    optimizer = _optimizer(subject)
    sgd = isinstance(optimizer, torch.optim.SGD)
    if client.learning_rate is None:
        if not sgd or optimizer is None:
            raise ValueError(
                f"Expected a `learning_rate` of the client {client.name!r} for its {client.local_steps} local steps, "
                f"as the module's own optimizer is {type(optimizer).__name__ if optimizer else 'none'}, but got None."
            )
        group = optimizer.param_groups[0]
        options = {"momentum": group["momentum"], "weight_decay": group["weight_decay"]}
        return replace(client, learning_rate=float(group["lr"]), **options), []
    if optimizer is None or sgd:
        return client, []
    kind = type(optimizer).__name__
    return client, [
        Problem(
            "replace",
            "configure_optimizers",
            f"the module trains by {kind}, the client {client.name!r} is declared to take steps of SGD",
            "Nothing to do, if clients do take such steps.",
            f"The verdict is for clients of SGD; attacks can't simulate {kind} yet.",
        )
    ]


@full_precision()
def self_check(subject: Subject, client: Client, victim: Victim, seed: int) -> list[Check]:
    """Simulate a client on images of the auditor's own, in up to three ways.

    Its gradient must be that of the module's ``training_step``; its local steps those of the module's optimizer, where
    that is plain SGD; and the attacker's distance at the true images and labels must be zero, but for rounding and
    noise that is declared.
    """
    images, labels = _images(subject, client.images)
    checks = [_training_step(subject, client, images, labels, seed)]
    if checks[0].passed and client.local_steps > 1:
        checks += _local_steps(subject, client, seed)
    if all(check.passed for check in checks):
        checks.append(_truth(client, victim, images, labels, seed))
    return checks


def _images(subject: Subject, number: int) -> tuple[Tensor, Tensor]:
    rows = torch.arange(number) % len(subject.own_images)
    return subject.own_images[rows], subject.own_labels[rows]


def _training_step(subject: Subject, client: Client, images: Tensor, labels: Tensor, seed: int) -> Check:
    name = "gradient of training_step"
    size = client.local_batch_size or client.images
    images, labels = images[:size], labels[:size]
    limit = _DOUBLE
    for dtype in (torch.float64, torch.float32):
        made = copy.deepcopy(subject)
        made.module.to(dtype)
        made.network.to(dtype)
        try:
            theirs = module_gradient(made, images.to(dtype), labels, seed)
            limit = _DOUBLE if dtype == torch.float64 else _SINGLE
            break
        except RuntimeError as error:  # a module of its own precision
            if dtype == torch.float32:
                return Check(client.name, name, False, None, f"`training_step` fails on other images: {error}")
    victim = Victim(
        made.network,
        image_shape=tuple(images.shape[1:]),
        num_images=size,
        loss=subject.loss,
        reduction=subject.reduction,
    )
    ours = victim.gradients(victim.state, images.to(dtype), F.one_hot(labels, victim.protocol.num_classes).to(dtype))
    residual = difference(ours, theirs)
    if residual <= limit:
        return Check(client.name, name, True, residual, "The simulated client's gradient is that of the module.")
    return Check(client.name, name, False, residual, _explain(ours, theirs))


def module_gradient(subject: Subject, images: Tensor, labels: Tensor, seed: int) -> dict[str, Tensor]:
    """The gradient of the module's own ``training_step`` for images in [0, 1], by the names of the network."""
    module, places = subject.module, {own: name for name, own in subject.names.items()}
    parameters = {name: one for name, one in module.named_parameters() if one.requires_grad}
    with seeded(seed), torch.enable_grad():
        loss = loss_of(module, subject.to_batch(images, labels))
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    gradients = {}
    for (name, parameter), gradient in zip(parameters.items(), found, strict=True):
        gradients[places.get(name, name)] = torch.zeros_like(parameter) if gradient is None else gradient
    return gradients


def difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """How far two gradients are apart, relative to the second."""
    apart, length = 0.0, 0.0
    for name in {*ours, *theirs}:
        like = theirs.get(name, ours.get(name))
        assert like is not None
        one, other = (side.get(name, torch.zeros_like(like)).detach().double() for side in (ours, theirs))
        apart, length = apart + float((one - other).square().sum()), length + float(other.square().sum())
    return (apart / length) ** 0.5 if length else float("inf") if apart else 0.0


def _explain(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str:
    """Why two gradients differ, if it can be told."""
    vectors = [torch.cat([side[name].flatten().double() for name in sorted(theirs)]) for side in (ours, theirs)]
    factor = float(vectors[0] @ vectors[1] / vectors[0].square().sum())
    if float((factor * vectors[0] - vectors[1]).norm() / vectors[1].norm()) < _SINGLE:
        return (
            f"The module's gradient is {factor:.6g} times that of the simulated client: its loss is multiplied, or "
            "reduced in another way."
        )
    apart = {name: difference({name: ours[name]}, {name: theirs[name]}) for name in theirs if name in ours}
    worst = max(apart, key=lambda name: apart[name])
    return (
        f"The module's gradient is another one, most of all that of {worst!r}: `training_step` does more than the loss "
        "that was recognised, such as an augmentation, a penalty or a random mask."
    )


def _optimizer(subject: Subject) -> torch.optim.Optimizer | None:
    if not is_overridden("configure_optimizers", subject.module):
        return None
    try:
        made = copy.deepcopy(subject.module).configure_optimizers()
    except Exception:  # of a user, and of no use outside of a Trainer
        return None
    while isinstance(made, list | tuple) and made:
        made = made[0]
    if isinstance(made, dict):
        made = made.get("optimizer")
    return made if isinstance(made, torch.optim.Optimizer) else None


def _local_steps(subject: Subject, client: Client, seed: int) -> list[Check]:
    """The average of its steps, beside that of the module's own optimizer."""
    name = "local steps of configure_optimizers"
    made = copy.deepcopy(subject)
    made.module.double()
    made.network.double()
    optimizer = _optimizer(made)
    if not isinstance(optimizer, torch.optim.SGD) or client.learning_rate is None:
        return []
    images, labels = _images(subject, client.images)
    # Without secrets, of which there are none here.
    told = {**client.training, "reveal_learning_rate": True, "shuffle": False, "defenses": ()}
    victim = Victim(
        made.network,
        image_shape=tuple(images.shape[1:]),
        num_images=client.images,
        loss=subject.loss,
        reduction=subject.reduction,
        **told,
    )
    module = made.module
    optimizer = type(optimizer)(module.parameters(), **_plain(optimizer))
    places = {own: name for name, own in made.names.items()}
    before = {name: one.detach().clone() for name, one in module.named_parameters() if one.requires_grad}
    size = client.local_batch_size or client.images
    batches = [slice(start, start + size) for start in range(0, client.images, size)]
    with seeded(seed), torch.enable_grad():
        for step in range(client.local_steps):
            part = batches[step % len(batches)]
            optimizer.zero_grad()
            loss_of(module, made.to_batch(images[part].double(), labels[part])).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    after = dict(module.named_parameters())
    length = client.learning_rate * client.local_steps
    theirs = {places.get(name, name): (before[name] - after[name].detach()) / length for name in before}
    targets = F.one_hot(labels, victim.protocol.num_classes).double()
    ours = victim.gradients(victim.state, images.double(), targets)
    residual = difference(ours, theirs)
    if residual <= _DOUBLE * 100:
        return [Check(client.name, name, True, residual, "The simulated client's update is that of the module.")]
    return [Check(client.name, name, False, residual, _explain_steps(client, optimizer))]


def _plain(optimizer: torch.optim.SGD) -> dict[str, Any]:
    group = optimizer.param_groups[0]
    return {name: group[name] for name in ("lr", "momentum", "dampening", "weight_decay", "nesterov")}


def _explain_steps(client: Client, optimizer: torch.optim.SGD) -> str:
    group = optimizer.param_groups[0]
    declared = {"lr": client.learning_rate, "momentum": client.momentum, "weight_decay": client.weight_decay}
    words = {"lr": "learning_rate"}
    differing = [
        f"{words.get(name, name)}={value:g} is declared and {group[name]:g} in `configure_optimizers`"
        for name, value in declared.items()
        if value is not None and value != group[name]
    ]
    if differing:
        return f"The module's optimizer makes other steps: {'; '.join(differing)}."
    return "The module's optimizer makes other steps, by options that attacks do not simulate (Nesterov, dampening)."


def _truth(client: Client, victim: Victim, images: Tensor, labels: Tensor, seed: int) -> Check:
    """The attacker's own distance, at the true images and labels."""
    name = "distance at the truth"
    made = copy.deepcopy(victim)
    made.model.double()
    shared = made.share(images[None].double(), labels[None], seed=seed)
    told = made.as_told()
    if shared.protocol.shuffle or shared.protocol.learning_rate == "unknown":
        return Check(client.name, name, True, None, "Not measured: the attacker is not told order or learning rate.")
    if any(isinstance(defense, Encoding) for defense in victim.defenses):
        return Check(client.name, name, True, None, "Not measured: clients compute with other images than their own.")
    targets = F.one_hot(labels, made.protocol.num_classes).double()
    sent = {key: tensor[0] for key, tensor in shared.gradients.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is ignored is told below
        defenses = known_to(True, told)
    found = told.gradients(shared.state, images.double(), targets)
    simulated = Simulation(defenses, told)
    found = simulated(found, sent, {}, shared.state, images.double(), targets)
    distance = difference(found, sent) ** 2
    if ignored := {type(defense).__name__ for defense in victim.defenses} - {type(one).__name__ for one in defenses}:
        finding = f"Attacks match the update as if {sorted(ignored)} did nothing: one that knows more may find more."
        return Check(client.name, name, True, distance, finding)
    limit = _AT_THE_TRUTH
    if defenses:
        noise = float(relative_noise(defenses, shared)[0]) * sum(tensor.numel() for tensor in sent.values())
        limit = max(limit, _ABOVE_NOISE * noise)
    if distance <= limit:
        left = "zero, but for rounding" if distance <= _AT_THE_TRUTH else "no more than the declared noise"
        return Check(client.name, name, True, distance, f"The true images have a distance of {left}.")
    return Check(
        *(client.name, name, False, distance),
        "The true images do not reproduce the update: something is random that no option declares.",
    )
