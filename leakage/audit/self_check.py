"""Self-check of a simulated client: it must train like the module, and the truth must be a solution of the attack."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from leakage.audit.client import Client
from leakage.audit.data import seeded
from leakage.audit.report import Check, Problem
from leakage.audit.subject import Subject, difference, loss_of
from leakage.clients.local_steps import Secrets
from leakage.clients.victim import Victim
from leakage.defenses.base import relative_noise
from leakage.defenses.encoding import Encoding
from leakage.inversion.simulation import Simulation, known_to, stepping
from leakage.models.drawing import as_buffers, draw, take_masks
from leakage.precision import full_precision

# The relative difference that rounding leaves between two ways to compute a gradient, in double and single precision.
_DOUBLE, _SINGLE = 1e-7, 1e-3
# The largest squared distance at the truth.
_AT_THE_TRUTH = 1e-10
# With declared noise, the largest ratio of that distance to the noise.
_ABOVE_NOISE = 3.0


def with_module_rate(client: Client, subject: Subject) -> tuple[Client, list[Problem]]:
    """Complete a client with the learning rate of the module's own optimizer if it declares none.

    Returns:
        The client, and a problem if the module does not train with SGD.

    Raises:
        ValueError: the client makes several local steps without a learning rate, and the module has no plain SGD.
    """
    if client.local_steps == 1:
        return client, []
    optimizer = _optimizer(subject)
    sgd = isinstance(optimizer, torch.optim.SGD)
    if client.learning_rate is None:
        if not sgd or optimizer is None:
            raise ValueError(
                f"Expected a `learning_rate` for the {client.local_steps} local steps of the client {client.name!r}, "
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
            f"the module trains with {kind}, but the client {client.name!r} is declared to take steps of SGD",
            "Nothing to do if clients really take such steps.",
            f"The verdict is for clients that use SGD; attacks can't simulate {kind} yet.",
        )
    ]


@full_precision()
def self_check(subject: Subject, client: Client, victim: Victim, seed: int) -> list[Check]:
    """Simulate a client on the auditor's own images and run up to three checks.

    - Its gradient must equal that of the module's ``training_step``. Both take the same masks of dropout.
    - Its local steps must equal those of the module's optimizer, if that is plain SGD.
    - The attacker's distance at the true images and labels must be zero, apart from rounding and declared noise.
    """
    images, labels = _images(subject, client.images)
    checks = [_training_step(subject, client, victim, images, labels, seed)]
    if checks[0].passed and client.local_steps > 1:
        checks += _local_steps(subject, client, victim, seed)
    if all(check.passed for check in checks):
        checks.append(_truth(client, victim, images, labels, seed))
    return checks


def _images(subject: Subject, number: int) -> tuple[Tensor, Tensor]:
    rows = torch.arange(number) % len(subject.own_images)
    return subject.own_images[rows], subject.own_labels[rows]


def _drawn(victim: Victim, seed: int, dtype: torch.dtype) -> Tensor | None:
    """Return the masks ``(images of all steps, D)`` that the client with the id 0 draws; None without dropout."""
    rows = victim.protocol.local_steps * victim.protocol.step_size
    return draw(victim.draws, rows, [0], seed)[0].to(dtype) if victim.draws else None


def _mask(network: nn.Module, victim: Victim, drawn: Tensor | None) -> None:
    """Make the dropout layers of a network use these masks ``(N, D)`` of N images."""
    if drawn is None:
        return
    take_masks(network)
    for name, mask in as_buffers(victim.draws, drawn).items():
        network.get_submodule(name.removesuffix("drawn").removesuffix(".")).register_buffer("drawn", mask, False)


def _training_step(
    subject: Subject, client: Client, victim: Victim, images: Tensor, labels: Tensor, seed: int
) -> Check:
    name = "gradient of training_step"
    size = client.local_batch_size or client.images
    images, labels = images[:size], labels[:size]
    limit = _DOUBLE
    for dtype in (torch.float64, torch.float32):
        made = copy.deepcopy(subject)
        made.module.to(dtype)
        made.network.to(dtype)
        drawn = _drawn(victim, seed, dtype)
        drawn = drawn if drawn is None else drawn[:size]
        _mask(made.network, victim, drawn)
        try:
            theirs = module_gradient(made, images.to(dtype), labels, seed)
            limit = _DOUBLE if dtype == torch.float64 else _SINGLE
            break
        except RuntimeError as error:  # the module may fix its precision
            if dtype == torch.float32:
                return Check(client.name, name, False, None, f"`training_step` fails on other images: {error}")
    victim = made.victim(num_images=size)
    targets = victim.protocol.targets(labels, dtype)
    ours, _ = victim.evaluate(victim.state, images.to(dtype), targets, secrets=Secrets(drawn=drawn))
    residual = difference(ours, theirs)
    if residual <= limit:
        return Check(client.name, name, True, residual, "The simulated client's gradient equals that of the module.")
    return Check(client.name, name, False, residual, _explain(ours, theirs))


def module_gradient(subject: Subject, images: Tensor, labels: Tensor, seed: int) -> dict[str, Tensor]:
    """Return the gradient of the module's ``training_step`` for images in [0, 1], by the network's parameter names."""
    module, places = subject.module, {own: name for name, own in subject.names.items()}
    parameters = {name: one for name, one in module.named_parameters() if one.requires_grad}
    with seeded(seed), torch.enable_grad():
        loss = loss_of(module, subject.to_batch(images, labels))
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    gradients = {}
    for (name, parameter), gradient in zip(parameters.items(), found, strict=True):
        gradients[places.get(name, name)] = torch.zeros_like(parameter) if gradient is None else gradient
    return gradients


def _explain(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str:
    """Explain why two gradients differ, as far as possible."""
    vectors = [torch.cat([side[name].flatten().double() for name in sorted(theirs)]) for side in (ours, theirs)]
    factor = float(vectors[0] @ vectors[1] / vectors[0].square().sum())
    if float((factor * vectors[0] - vectors[1]).norm() / vectors[1].norm()) < _SINGLE:
        return (
            f"The module's gradient is {factor:.6g} times that of the simulated client: its loss is multiplied by a "
            "factor, or reduced in another way."
        )
    apart = {name: difference({name: ours[name]}, {name: theirs[name]}) for name in theirs if name in ours}
    worst = max(apart, key=lambda name: apart[name])
    return (
        f"The module's gradient differs, most of all for {worst!r}: `training_step` does more than the loss that was "
        "recognised, such as an augmentation, a penalty or a random mask."
    )


def _optimizer(subject: Subject) -> torch.optim.Optimizer | None:
    if not is_overridden("configure_optimizers", subject.module):
        return None
    try:
        made = copy.deepcopy(subject.module).configure_optimizers()
    except Exception:  # the user's code may need its own Trainer
        return None
    while isinstance(made, list | tuple) and made:
        made = made[0]
    if isinstance(made, dict):
        made = made.get("optimizer")
    return made if isinstance(made, torch.optim.Optimizer) else None


def _local_steps(subject: Subject, client: Client, victim: Victim, seed: int) -> list[Check]:
    """Compare the average of the client's steps with that of the module's own optimizer."""
    name = "local steps of configure_optimizers"
    made = copy.deepcopy(subject)
    made.module.double()
    made.network.double()
    optimizer = _optimizer(made)
    if not isinstance(optimizer, torch.optim.SGD) or client.learning_rate is None:
        return []
    images, labels = _images(subject, client.images)
    # Without defenses, and with everything known.
    training = {**client.training, "reveal_learning_rate": True, "shuffle": False, "defenses": ()}
    victim = made.victim(num_images=client.images, **training)
    drawn = _drawn(victim, seed, torch.float64)
    module = made.module
    optimizer = type(optimizer)(module.parameters(), **_plain(optimizer))
    places = {own: name for name, own in made.names.items()}
    before = {name: one.detach().clone() for name, one in module.named_parameters() if one.requires_grad}
    size = client.local_batch_size or client.images
    batches = [slice(start, start + size) for start in range(0, client.images, size)]
    with seeded(seed), torch.enable_grad():
        for step in range(client.local_steps):
            part = batches[step % len(batches)]
            _mask(made.network, victim, drawn if drawn is None else drawn[step * size : (step + 1) * size])
            optimizer.zero_grad()
            loss_of(module, made.to_batch(images[part].double(), labels[part])).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    after = dict(module.named_parameters())
    length = client.learning_rate * client.local_steps
    theirs = {places.get(name, name): (before[name] - after[name].detach()) / length for name in before}
    targets = victim.protocol.targets(labels, torch.float64)
    ours, _ = victim.evaluate(victim.state, images.double(), targets, secrets=Secrets(drawn=drawn))
    residual = difference(ours, theirs)
    if residual <= _DOUBLE * 100:
        return [Check(client.name, name, True, residual, "The simulated client's update equals that of the module.")]
    return [Check(client.name, name, False, residual, _explain_steps(client, optimizer))]


def _plain(optimizer: torch.optim.SGD) -> dict[str, Any]:
    group = optimizer.param_groups[0]
    return {name: group[name] for name in ("lr", "momentum", "dampening", "weight_decay", "nesterov")}


def _explain_steps(client: Client, optimizer: torch.optim.SGD) -> str:
    group = optimizer.param_groups[0]
    declared = {"lr": client.learning_rate, "momentum": client.momentum, "weight_decay": client.weight_decay}
    words = {"lr": "learning_rate"}
    differing = [
        f"{words.get(name, name)}={value:g} is declared, but `configure_optimizers` has {group[name]:g}"
        for name, value in declared.items()
        if value is not None and value != group[name]
    ]
    if differing:
        return f"The module's optimizer takes other steps: {'; '.join(differing)}."
    return "The module's optimizer takes other steps, with options that attacks do not simulate (Nesterov, dampening)."


def _truth(client: Client, victim: Victim, images: Tensor, labels: Tensor, seed: int) -> Check:
    """Check that the attacker's distance is zero at the true images and labels."""
    try:
        return _at_the_truth(client, victim, images.double(), labels, seed)
    except RuntimeError:  # the module may fix its precision
        return _at_the_truth(client, victim, images, labels, seed)


def _at_the_truth(client: Client, victim: Victim, images: Tensor, labels: Tensor, seed: int) -> Check:
    name = "distance at the truth"
    made = copy.deepcopy(victim)
    made.model.to(images.dtype)
    shared = made.share(images[None], labels[None], seed=seed)
    known = made.without_secrets()
    if shared.protocol.shuffle or shared.protocol.learning_rate == "unknown":
        finding = "Not measured: the attacker does not know the order of the images or the learning rate."
        return Check(client.name, name, True, None, finding)
    if any(isinstance(defense, Encoding) for defense in victim.defenses):
        return Check(
            client.name, name, True, None, "Not measured: the clients compute their gradient on encoded images."
        )
    targets = made.protocol.targets(labels, images.dtype)
    sent = {key: tensor[0] for key, tensor in shared.gradients.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the finding below names what attacks ignore
        defenses = known_to(True, known)
    secrets = Secrets(drawn=_drawn(made, seed, images.dtype))
    found, _ = stepping(known, defenses).evaluate(shared.state, images, targets, secrets=secrets)
    simulated = Simulation(defenses, known)
    found = simulated(found, sent, {}, shared.state, images, targets)
    distance = difference(found, sent) ** 2
    if ignored := {type(defense).__name__ for defense in victim.defenses} - {type(one).__name__ for one in defenses}:
        finding = f"Attacks match the update as if {sorted(ignored)} did nothing. Better attacks may find more."
        return Check(client.name, name, True, distance, finding)
    limit = _AT_THE_TRUTH
    if defenses:
        noise = float(relative_noise(defenses, shared)[0]) * sum(tensor.numel() for tensor in sent.values())
        limit = max(limit, _ABOVE_NOISE * noise)
    if distance <= limit:
        left = "zero, up to rounding" if distance <= _AT_THE_TRUTH else "no more than the declared noise"
        return Check(client.name, name, True, distance, f"The true images have a distance of {left}.")
    return Check(
        *(client.name, name, False, distance),
        "The true images do not reproduce the update: something is random that was not declared.",
    )
