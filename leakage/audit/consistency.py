"""Consistency checks of a captured update: does it fit the declared client, and if not, what would explain it?"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.linalg import svdvals, vector_norm
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from leakage.audit.last_layer import LastLayerTest, failed
from leakage.audit.report import Check
from leakage.clients.activations import recorded
from leakage.clients.inspection import trial_inputs
from leakage.clients.losses import OWN
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.labels.auxiliary import natural_noise
from leakage.precision import full_precision
from leakage.updates.reading import Update, as_read
from leakage.updates.weights import AnyWeights

# Relative rounding of a gradient, in units of the precision of the weights.
_ROUNDING = 64.0
# The largest share of a bias' gradient outside of the column space of the weights' gradient. Rounding may hide many
# directions, but the gradient of another layer is nearly all outside.
_OUTSIDE = 0.5
# Directions beyond the expected rank, to notice a higher rank.
_SPARE = 8


def check_update(
    before: AnyWeights,
    update: AnyWeights,
    victim: Victim,
    *,
    holds: str | None = None,
    learning_rate: float | None = None,
    client: str = "client",
) -> list[Check]:
    r"""Test whether a captured update fits the declared client, before any attack.

    An attack on an update with another sign, learning rate, model or order of arrays finds nothing, and this says
    nothing about what leaks. Each check tests a property that holds for every client of this model and protocol,
    whatever its images:

    ===================== =============================================================================================
    check                 property
    ===================== =============================================================================================
    ``arrays``            names, shapes, types and order are those of the model, and all numbers are finite
    ``trained``           trained parameters have changed, and frozen ones have not
    ``BatchNorm``         statistics have changed in training mode, with one count per local step, and only then
    ``bias sum``          with cross-entropy, the gradient of the last bias sums to zero
    ``classes``           the gradient of the last bias is negative for at most N classes
    ``rank``              the gradient of a linear layer has a rank of at most N T, with N images per step and T steps
    ``biases``            :math:`g_b = \Delta^\top 1` lies in the space of the columns of :math:`g_W = \Delta^\top X`,
                          and a row of :math:`g_W` is zero only where :math:`g_b` is zero
    ``last layer``        labels and features read off the last layer's gradient reproduce it, including its length
    ``features``          these features are not negative after a ReLU or a sigmoid
    ===================== =============================================================================================

    If ``classes`` or ``last layer`` fails, common mistakes are tried (sign, exchanged before and after, learning rate,
    sum instead of mean, number of images and steps). The finding names a mistake that would explain the update. A check
    that can't be made (declared defenses, another loss, too many images) passes, and its finding begins with
    "Not tested".

    The checks do not notice if two layers of the same shape, far from the last one, are exchanged. The objective of an
    attack then stays high.

    Args:
        before, update, victim, holds, learning_rate: see :func:`leakage.updates.read_update`.
        client: the name of the client in the checks.

    Returns:
        The checks, in the order of the table.

    Raises:
        FileNotFoundError: a file does not exist.

    Example:
        >>> import copy
        >>> from leakage import LeNet
        >>> model = LeNet()
        >>> trained = copy.deepcopy(model)
        >>> loss = torch.nn.functional.cross_entropy(trained(torch.rand(1, 1, 28, 28)), torch.tensor([3]))
        >>> loss.backward()
        >>> torch.optim.SGD(trained.parameters(), lr=0.1).step()
        >>> victim = Victim(model, image_shape=(1, 28, 28))
        >>> all(check.passed for check in check_update(model, trained, victim, learning_rate=0.1))
        True
        >>> checks = check_update(trained, model, victim, learning_rate=0.1)
        >>> [check.finding for check in checks if check.name == "last layer"]
        ['The update is explained if `before` and `update` are exchanged.']
    """
    try:
        read = as_read(before, update, victim, holds=holds, learning_rate=learning_rate)
    except ValueError as error:
        return [Check(client, "arrays", passed=False, residual=None, finding=str(error))]
    exchanged = None
    if read.after:
        try:
            exchanged = as_read(update, before, victim, holds="weights", learning_rate=learning_rate).shared
        except ValueError:  # the update lacks frozen parameters
            exchanged = None
    return list(_checks(read, victim, client, exchanged, learning_rate))


def check_shared(shared: SharedGradient, victim: Victim, *, client: str = "client") -> list[Check]:
    """Run the checks of :func:`check_update` on shared gradients, one victim after the other.

    Args:
        shared: the gradients of V victims.
        victim: their model and protocol.
        client: the name of the client in the checks. With several victims, their ids are appended: ``client 0``, ...

    Returns:
        The checks of all victims.
    """
    try:
        victim.check(shared)
    except ValueError as error:
        return [Check(client, "arrays", passed=False, residual=None, finding=str(error))]
    checks: list[Check] = []
    for place, victim_id in enumerate(shared.ids.tolist()):
        one = shared.select(torch.tensor([place]))
        eps = {name: torch.finfo(tensor.dtype).eps for name, tensor in one.gradients.items()}
        rounding = {name: eps[name] * tensor.abs().double() for name, tensor in one.gradients.items()}
        name = f"{client} {victim_id}" if len(shared) > 1 else client
        checks += _checks(Update(one, rounding, {}, {}, "gradient"), victim, name, None, None)
    return checks


@torch.no_grad()
@full_precision()
def _checks(
    read: Update, victim: Victim, client: str, exchanged: SharedGradient | None, rate: float | None
) -> Iterator[Check]:
    finding = f"{len(read.shared.gradients)} arrays fit the model."
    yield Check(client, "arrays", passed=True, residual=None, finding=finding)

    def report(name: str, found: tuple[bool, float | None, str] | str | None) -> Iterator[Check]:
        if isinstance(found, str):
            yield Check(client, name, passed=True, residual=None, finding=f"Not tested: {found}.")
        elif found is not None:
            yield Check(client, name, *found)

    yield from report("trained", _trained(read, victim))
    yield from report("BatchNorm", _batch_norm(read, victim))
    if not any(bool(tensor.any()) for tensor in read.shared.gradients.values()):
        return  # `trained` has failed
    test = LastLayerTest(read, victim, exchanged, rate)
    why_not = _why_not(victim)
    for name, find in {
        "bias sum": test.bias_sum,
        "classes": test.classes,
        "rank": lambda: _ranks(read, victim),
        "biases": lambda: _biases(read, victim),
        "last layer": test.last_layer,
        "features": test.features,
    }.items():
        yield from report(name, why_not or find())


def _why_not(victim: Victim) -> str | None:
    defenses = victim.protocol.defenses
    return f"the declared defenses change the gradient ({defenses[0]['name']}, ...)" if defenses else None


def _trained(read: Update, victim: Victim) -> tuple[bool, float | None, str]:
    gradients = read.shared.gradients
    if not any(bool(tensor.any()) for tensor in gradients.values()):
        return failed("Nothing has changed: before and after are the same.")
    still = [name for name, tensor in gradients.items() if tensor[0].ndim > 1 and not bool(tensor.any())]
    own = _of_noise(read, victim) if still else {}
    still = [name for name in still if bool(own[name].any())]
    if still:
        return failed(
            f"{_some(still)} did not change. If the client froze them, freeze them in the model: "
            "`requires_grad_(False)`.",
        )
    parameters = dict(victim.model.named_parameters())
    frozen = parameters.keys() - {*victim.trainable}
    moved = sorted(name for name in frozen & read.after.keys() if _differ(read, name))
    if moved:
        return failed(f"{_some(moved)} changed, though they are frozen in the model: call `requires_grad_(True)`.")
    return True, None, "All trained parameters have changed."


def _of_noise(read: Update, victim: Victim) -> dict[str, Tensor]:
    """Gradients for images of noise: zero where no image has a gradient, as in half of a new adapter."""
    protocol, state = victim.protocol, read.shared.state
    images = natural_noise(protocol.num_images, protocol.image_shape, 0).to(state[victim.trainable[0]])
    classes = torch.arange(len(images), device=images.device) % protocol.num_classes
    targets = F.one_hot(classes, protocol.num_classes).to(images)
    return victim.evaluate({name: tensor.to(images.device) for name, tensor in state.items()}, images, targets)[0]


def _batch_norm(read: Update, victim: Victim) -> tuple[bool, float | None, str] | None:
    layers = {name: module for name, module in victim.model.named_modules() if isinstance(module, _BatchNorm)}
    seen = [name for name in layers if f"{name}.running_mean" in read.before.keys() & read.after.keys()]
    if not seen:
        return None
    steps = victim.protocol.local_steps
    for name in seen:
        moved = any(_differ(read, f"{name}.{part}") for part in ("running_mean", "running_var"))
        own_batch = f"{name}.running_mean" not in victim.state
        if moved and not own_batch:
            return failed(
                f"The statistics of {name!r} changed: the client normalised by its own batch. Put the model in "
                "training mode: `model.train()`.",
            )
        if own_batch and not moved:
            return failed(
                f"The statistics of {name!r} did not change: the client normalised by them. Put the model in "
                "evaluation mode: `model.eval()`.",
            )
        counter = f"{name}.num_batches_tracked"
        if moved and counter in read.before.keys() & read.after.keys():
            counted = int(read.after[counter]) - int(read.before[counter])
            if counted != steps:
                words = f"{name!r} counted {counted} batches, but the declared number of local steps is {steps}."
                return failed(words, left=float(counted))
    return True, None, "Statistics changed as declared."


def _differ(read: Update, name: str) -> bool:
    return name in read.before and name in read.after and not torch.equal(read.before[name], read.after[name])


def _rows(victim: Victim) -> int:
    """Return the number of input rows behind the gradient of a linear layer."""
    protocol = victim.protocol
    return (protocol.local_batch_size or protocol.num_images) * protocol.local_steps


def _linear_layers(victim: Victim) -> list[str]:
    """Return the trained linear layers that see each image exactly once."""
    layers = [
        name
        for name, module in victim.model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in victim.trainable
    ]
    calls = dict.fromkeys(layers, 0)
    hooks = [
        victim.model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: calls.update({name: calls[name] + 1})
        )
        for name in layers
    ]
    try:
        with recorded(victim.model, layers) as seen:
            victim.model(*trial_inputs(victim.model, victim.protocol))
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name in layers if calls[name] == 1 and seen[name].inputs.ndim == 2]


def _space(read: Update, name: str, rows: int) -> tuple[Tensor, float]:
    """Return columns that span the gradient of a layer's weights, more than its expected rank, and their rounding."""
    gradient, rounding = read.shared.gradients[name][0].double(), read.rounding[name][0].double()
    if gradient.shape[1] > rows + _SPARE:
        directions = torch.randn(gradient.shape[1], rows + _SPARE, generator=torch.Generator().manual_seed(0)).double()
        gradient = gradient @ directions.to(gradient) / math.sqrt(rows + _SPARE)
    eps = torch.finfo(read.shared.gradients[name].dtype).eps
    unsure = float(_ROUNDING * eps * vector_norm(gradient) + 3 * vector_norm(rounding))
    return gradient, unsure


def _added(victim: Victim) -> str | None:
    """Return what adds to the gradient of each layer; None if nothing does."""
    if victim.protocol.loss == OWN:
        return "the loss may have terms that add to every gradient"
    return "weight decay adds to every gradient" if victim.protocol.weight_decay else None


def _ranks(read: Update, victim: Victim) -> tuple[bool, float | None, str] | str:
    rows, found = _rows(victim), []
    if added := _added(victim):
        return added
    for layer in _linear_layers(victim):
        name = f"{layer}.weight"
        if min(read.shared.gradients[name].shape[1:]) <= rows:
            continue
        columns, unsure = _space(read, name, rows)
        strengths = svdvals(columns)
        rank = int((strengths > unsure).sum())
        left = float(strengths[rows] / strengths[0].clamp(min=torch.finfo(strengths.dtype).tiny))
        if rank > rows:
            of = f"{rows} images" if victim.protocol.local_steps == 1 else f"{rows} images in all steps"
            more = f"{rank} or more" if rank == min(columns.shape) else f"{rank}"
            return failed(
                f"The gradient of {name!r} has rank {more}, but at most {rows} is expected: more than the declared "
                f"{of} are behind it, it belongs to another layer, or it is noisy.",
                left=left,
            )
        found.append((rank, left, name))
    if not found:
        return f"no linear layer is wider than the {rows} images in all steps"
    rank, left, name = max(found)
    fewer = "" if rank == rows else " (images are alike, or predicted with certainty, or fewer than declared)"
    return True, max(one[1] for one in found), f"{name!r} has rank {rank}{fewer}; at most {rows} is expected."


def _biases(read: Update, victim: Victim) -> tuple[bool, float | None, str] | str:
    rows, gradients, worst, tested = _rows(victim), read.shared.gradients, 0.0, 0
    if added := _added(victim):
        return added
    linear = set(_linear_layers(victim))
    for layer, module in victim.model.named_modules():
        names = f"{layer}.weight", f"{layer}.bias"
        if not isinstance(module, nn.Linear | _ConvNd) or not {*names} <= {*victim.trainable}:
            continue
        weight, bias = (gradients[name][0].double() for name in names)
        if getattr(module, "transposed", False) or len(weight) != len(bias) or not bool(weight.any()):
            continue
        tested += 1
        large = torch.maximum(1e-3 * bias.abs().amax(), 100 * read.rounding[names[1]][0].double())
        large = torch.maximum(large, 100 * read.rounding[names[0]][0].double().flatten(1).amax(1))
        empty = ((weight.flatten(1) == 0).all(1) & (bias.abs() > large)).nonzero().flatten().tolist()
        if empty:
            return failed(
                f"Rows {_some(empty)} of the gradient of {names[0]!r} are zero, but those of {names[1]!r} are not: "
                "one of the two belongs to another layer.",
            )
        if layer not in linear or len(bias) <= rows:
            continue
        columns, unsure = _space(read, names[0], rows)
        basis, strengths, _ = torch.linalg.svd(columns, full_matrices=False)
        basis = basis[:, strengths > unsure]
        if 2 * basis.shape[1] > len(bias):
            continue
        size = vector_norm(bias).clamp(min=torch.finfo(bias.dtype).tiny)
        left = float(vector_norm(bias - basis @ (basis.mT @ bias)) / size)
        doubt = float(10 * vector_norm(read.rounding[names[1]].double()) / size)
        worst = max(worst, left)
        if left > _OUTSIDE + doubt:
            return failed(
                f"The gradient of {names[1]!r} does not come from the images behind {names[0]!r}: one of the two "
                "belongs to another layer, or is noisy.",
                left=left,
            )
    return (True, worst, f"Weights and biases of {tested} layers agree.") if tested else "no layer has both"


def _some(names: list[str] | list[int], most: int = 3) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
