"""Whether a captured update can be what its client is said to have done, and if not, what would explain it."""

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
from leakage.clients.inspection import black_images
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.labels.auxiliary import natural_noise
from leakage.precision import full_precision
from leakage.updates.reading import Update, as_read
from leakage.updates.weights import AnyWeights

# Relative rounding of a gradient that is computed in the weights' precision, in units of it.
_ROUNDING = 64.0
# What may be left of a bias' gradient outside of the space of its weights' columns: directions that rounding hides may
# be a good part of it, but those of another layer are nearly all outside.
_OUTSIDE = 0.5
# Directions beside those that are expected of a gradient, by which a higher rank is seen.
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
    r"""Test a captured update before any attack: does it fit the client that is declared?

    An attack on an update of another sign, learning rate, model or order of arrays finds nothing, and says nothing
    about what leaks. Each check is something that holds for every client of this model and protocol, whatever its
    images:

    ===================== =============================================================================================
    check                 holds
    ===================== =============================================================================================
    ``arrays``            names, shapes, types and order are the model's, all numbers finite
    ``trained``           what is trained has moved, what is frozen has not
    ``BatchNorm``         its statistics have moved in training mode, by one count for each local step, and else not
    ``bias sum``          with cross-entropy the gradient of the last bias sums to zero
    ``classes``           its entries are below zero for at most N classes
    ``rank``              the gradient of a linear layer is of rank N T at most, with N images a step and T steps
    ``biases``            :math:`g_b = \Delta^\top 1` lies in the space of the columns of :math:`g_W = \Delta^\top X`,
                          and a row of :math:`g_W` is zero only where :math:`g_b` is
    ``last layer``        labels and features that the last layer's gradient tells make this gradient, in its length
    ``features``          the features that it tells are not negative behind a ReLU or a sigmoid
    ===================== =============================================================================================

    Where ``classes`` or ``last layer`` fail, what people get wrong is tried (sign, before and after exchanged, learning
    rate, sum for mean, number of images and steps), and named where it would explain the update. Checks that can't be
    made (declared defenses, another loss, too many images) pass, and their finding begins with "Not tested".

    Exchanged layers of the same shape far from the last one are not noticed here: the objective of an attack then stays
    high.

    Args:
        before, update, victim, holds, learning_rate: see :func:`leakage.updates.read_update`.
        client: what to call it.

    Raises:
        FileNotFoundError: there is no such file.

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
        except ValueError:  # what was sent lacks what is frozen
            exchanged = None
    return list(_checks(read, victim, client, exchanged, learning_rate))


def check_shared(shared: SharedGradient, victim: Victim, *, client: str = "client") -> list[Check]:
    """:func:`check_update` of gradients that were shared as such; those of several victims one after the other.

    Args:
        shared: of V victims, called ``client``, or ``client 0`` and so on by their ids if there are several.
        victim: their model and protocol.
        client: see above.
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
    yield Check(client, "arrays", passed=True, residual=None, finding=f"{len(read.shared.gradients)} arrays fit.")

    def told(name: str, found: tuple[bool, float | None, str] | str | None) -> Iterator[Check]:
        if isinstance(found, str):
            yield Check(client, name, passed=True, residual=None, finding=f"Not tested: {found}.")
        elif found is not None:
            yield Check(client, name, *found)

    yield from told("trained", _trained(read, victim))
    yield from told("BatchNorm", _batch_norm(read, victim))
    if not any(bool(tensor.any()) for tensor in read.shared.gradients.values()):
        return  # `trained` has told
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
        yield from told(name, why_not or find())


def _why_not(victim: Victim) -> str | None:
    defenses = victim.protocol.defenses
    return f"the declared defenses change the gradient ({defenses[0]['name']}, ...)" if defenses else None


def _trained(read: Update, victim: Victim) -> tuple[bool, float | None, str]:
    gradients = read.shared.gradients
    if not any(bool(tensor.any()) for tensor in gradients.values()):
        return failed("Nothing has moved: before and after are the same.")
    still = [name for name, tensor in gradients.items() if tensor[0].ndim > 1 and not bool(tensor.any())]
    own = _of_noise(read, victim) if still else {}
    still = [name for name in still if bool(own[name].any())]
    if still:
        return failed(
            f"{_some(still)} did not move. If the client froze them, freeze them in the model: "
            "`requires_grad_(False)`.",
        )
    parameters = dict(victim.model.named_parameters())
    frozen = parameters.keys() - {*victim.trainable}
    moved = sorted(name for name in frozen & read.after.keys() if _differ(read, name))
    if moved:
        return failed(f"{_some(moved)} moved, though frozen in the model: `requires_grad_(True)`.")
    return True, None, "All that is trained has moved."


def _of_noise(read: Update, victim: Victim) -> dict[str, Tensor]:
    """What our own client shares of noise: zero where no image has a gradient, as in half of a new adapter."""
    protocol, state = victim.protocol, read.shared.state
    images = natural_noise(protocol.num_images, protocol.image_shape, 0).to(state[victim.trainable[0]])
    targets = F.one_hot(torch.arange(len(images)) % protocol.num_classes, protocol.num_classes).to(images)
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
                f"The statistics of {name!r} moved: the client normalised by its own batch. Give the model in "
                "training mode: `model.train()`.",
            )
        if own_batch and not moved:
            return failed(
                f"The statistics of {name!r} did not move: the client normalised by them. Give the model in "
                "evaluation mode: `model.eval()`.",
            )
        counter = f"{name}.num_batches_tracked"
        if moved and counter in read.before.keys() & read.after.keys():
            counted = int(read.after[counter]) - int(read.before[counter])
            if counted != steps:
                words = f"{name!r} has counted {counted} batches, not the {steps} local steps that are declared."
                return failed(words, left=float(counted))
    return True, None, "Statistics moved as declared."


def _differ(read: Update, name: str) -> bool:
    return name in read.before and name in read.after and not torch.equal(read.before[name], read.after[name])


def _rows(victim: Victim) -> int:
    """Rows of inputs that are behind the gradient of a linear layer."""
    protocol = victim.protocol
    return (protocol.local_batch_size or protocol.num_images) * protocol.local_steps


def _linear_layers(victim: Victim) -> list[str]:
    """Linear layers that see each image once, whose weights share a gradient."""
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
    images = black_images(victim.model, victim.protocol.image_shape, victim.protocol.num_images)
    try:
        with recorded(victim.model, layers) as seen:
            victim.model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name in layers if calls[name] == 1 and seen[name].inputs.ndim == 2]


def _space(read: Update, name: str, rows: int) -> tuple[Tensor, float]:
    """Columns that span the gradient of a layer's weights, of more directions than it should have; and its rounding."""
    gradient, rounding = read.shared.gradients[name][0].double(), read.rounding[name][0].double()
    if gradient.shape[1] > rows + _SPARE:
        directions = torch.randn(gradient.shape[1], rows + _SPARE, generator=torch.Generator().manual_seed(0)).double()
        gradient = gradient @ directions.to(gradient) / math.sqrt(rows + _SPARE)
    eps = torch.finfo(read.shared.gradients[name].dtype).eps
    unsure = float(_ROUNDING * eps * vector_norm(gradient) + 3 * vector_norm(rounding))
    return gradient, unsure


def _ranks(read: Update, victim: Victim) -> tuple[bool, float | None, str] | str:
    rows, found = _rows(victim), []
    if victim.protocol.weight_decay:
        return "weight decay is in every gradient"
    for layer in _linear_layers(victim):
        name = f"{layer}.weight"
        if min(read.shared.gradients[name].shape[1:]) <= rows:
            continue
        columns, unsure = _space(read, name, rows)
        strengths = svdvals(columns)
        rank = int((strengths > unsure).sum())
        left = float(strengths[rows] / strengths[0].clamp(min=torch.finfo(strengths.dtype).tiny))
        if rank > rows:
            of = f"{rows} images" if victim.protocol.local_steps == 1 else f"{rows} images of all steps"
            more = f"{rank} or more" if rank == min(columns.shape) else f"{rank}"
            return failed(
                f"The gradient of {name!r} is of rank {more}, not at most {rows}: more than the declared {of} are "
                "behind it, or it is another layer's or noisy.",
                left=left,
            )
        found.append((rank, left, name))
    if not found:
        return f"no linear layer is wider than the {rows} images of all steps"
    rank, left, name = max(found)
    fewer = "" if rank == rows else " (alike or certain images, or fewer than declared)"
    return True, max(one[1] for one in found), f"{name!r} is of rank {rank}{fewer}, at most {rows} is expected."


def _biases(read: Update, victim: Victim) -> tuple[bool, float | None, str] | str:
    rows, gradients, worst, tested = _rows(victim), read.shared.gradients, 0.0, 0
    if victim.protocol.weight_decay:
        return "weight decay is in every gradient"
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
                f"Rows {_some(empty)} of the gradient of {names[0]!r} are zero, those of {names[1]!r} are not: "
                "one of them is another layer's.",
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
                f"The gradient of {names[1]!r} is not of the images that are behind {names[0]!r}: one of them "
                "is another layer's, or noisy.",
                left=left,
            )
    return (True, worst, f"Weights and biases of {tested} layers agree.") if tested else "no layer has both"


def _some(names: list[str] | list[int], most: int = 3) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
