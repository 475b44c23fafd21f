"""Read what a client of a real system sent as a shared gradient for attacks."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from leakage.clients.protocol import UNKNOWN
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.errors import check_choice, check_positive
from leakage.files.tensors import shorten
from leakage.updates.weights import HOLDS, AnyWeights, Arrays, open_weights


@dataclass
class Update:
    """An update after reading.

    Attributes:
        shared: the shared gradient of one victim, for attacks.
        rounding: the possible error of each entry of the gradient, which is a difference of rounded weights, by name
            and in shape ``(1, *shape)``.
        before, after: weights and buffers by the model's names. ``after`` is empty if the client did not send weights.
        holds: one of :data:`~leakage.updates.weights.HOLDS`.
    """

    shared: SharedGradient
    rounding: dict[str, Tensor]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    holds: str


def read_update(
    before: AnyWeights,
    update: AnyWeights,
    victim: Victim,
    *,
    holds: str | None = None,
    learning_rate: float | None = None,
) -> SharedGradient:
    r"""Read the update of one client as a shared gradient, for :class:`~leakage.datamodules.SharedGradients`.

    A client that received the weights :math:`\theta_0` and sends :math:`\theta_T` after T steps has shared

    .. math:: g = \frac{\theta_0 - \theta_T}{\eta T},

    the gradient of its step, or the average gradient of several steps. If the victim's protocol says that the attacker
    does not know the learning rate :math:`\eta`, it is :math:`\theta_0 - \theta_T`.

    ===================================== =======================================================================
    ``before`` and ``update``             forms
    ===================================== =======================================================================
    PyTorch                               a ``state_dict()``, a module
    files                                 ``.safetensors``; ``.pt``, ``.pth``, ``.bin``, ``.ckpt`` (weights, no code);
                                          ``.npz``
    Flower                                the list of NumPy arrays, ``Parameters``, ``FitRes``, ``ArrayRecord``, and a
                                          ``RecordDict`` or a ``Message`` with one ``ArrayRecord``
    NVFlare                               ``FLModel``, ``DXO``, ``Shareable``; these objects say if they hold
                                          differences
    PEFT                                  ``adapter_model.safetensors``, if the model is a PEFT model
    ===================================== =======================================================================

    Arrays without names are taken in the order of ``state_dict()``, including BatchNorm's statistics. If their number
    is that of ``parameters()`` (all, or those that require gradients), they are taken in that order. Names may have one
    prefix more or less than the model's, such as ``module.``. No code in a file is ever run.

    Args:
        before: the weights that the client received. Missing buffers are taken from the model.
        update: what the client sent.
        victim: the client, with its model, protocol and number of images.
        holds: what ``update`` holds: ``"weights"`` after training, their ``"difference"`` (after minus before), or the
            ``"gradient"`` itself (for several steps, their average). By default, what the object says, or else weights.
        learning_rate: the learning rate of a single step, as the protocol of a single step has none.

    Returns:
        The shared gradient of one victim. :meth:`SharedGradient.cat <leakage.SharedGradient.cat>` joins those of one
        round, and :class:`~leakage.datamodules.SharedGradients` takes a list of any.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file or object has another form or is truncated; arrays have other shapes, names or types than
            those of the model, hold NaN or infinity, or can't be in the model's order; or the learning rate is missing
            or not that of the protocol.

    Example:
        >>> import copy
        >>> from leakage import LeNet
        >>> model = LeNet()
        >>> trained = copy.deepcopy(model)
        >>> loss = torch.nn.functional.cross_entropy(trained(torch.rand(1, 1, 28, 28)), torch.tensor([3]))
        >>> loss.backward()
        >>> torch.optim.SGD(trained.parameters(), lr=0.1).step()
        >>> victim = Victim(model, image_shape=(1, 28, 28))
        >>> shared = read_update(model.state_dict(), trained.state_dict(), victim, learning_rate=0.1)
        >>> int(shared.gradients["classifier.bias"].argmin())
        3

    References:
        Flower, https://flower.ai; NVIDIA FLARE, https://nvflare.readthedocs.io; PEFT,
        https://huggingface.co/docs/peft.
    """
    return as_read(before, update, victim, holds=holds, learning_rate=learning_rate).shared


def as_read(
    before: AnyWeights, update: AnyWeights, victim: Victim, *, holds: str | None, learning_rate: float | None
) -> Update:
    """Read an update like :func:`read_update`, and return all that :func:`leakage.audit.check_update` needs."""
    if not isinstance(victim, Victim):
        raise ValueError(f"Expected `victim` to be a Victim, but got {type(victim).__name__}.")
    if holds is not None:
        check_choice("holds", holds, HOLDS)
    rate = _rate(victim, learning_rate)
    start, sent = open_weights(before, "before"), open_weights(update, "update")
    if start.holds not in (None, "weights"):
        raise ValueError(f"Expected `before` to hold weights, but got an object that holds a {start.holds}.")
    if holds and sent.holds and holds != sent.holds:
        raise ValueError(f"Expected `holds` to be {sent.holds!r}, as the object says, but got {holds!r}.")
    holds = holds or sent.holds or "weights"
    if rate is None and holds != "gradient":
        raise ValueError(
            "Expected a `learning_rate`, by which the update of a single step has to be divided, but got None. If the "
            "attacker does not know it, create the victim with learning_rate='unknown'."
        )
    given = _named(start, victim, "before")
    after = _named(sent, victim, "update")
    like = next(iter(victim.state.values()))
    state = {}
    for name, own in victim.state.items():
        if name in victim.trainable and name not in given:
            raise ValueError(f"Expected `before` with the weights of {name!r}, but got none.")
        state[name] = given.get(name, own).to("cpu", own.dtype)
    gradients, rounding = {}, {}
    for name in victim.trainable:
        if name not in after:
            raise ValueError(
                f"Expected `update` with {name!r}, which the victim trains, but got none. Freeze it if the client did: "
                "`requires_grad_(False)`."
            )
        weight, array = given[name].double(), after[name].double()
        unit = max(torch.finfo(tensors[name].dtype).eps for tensors in (given, after))
        gradient = {"weights": weight - array, "difference": -array, "gradient": array}[holds]
        by = 1.0 if rate is None or holds == "gradient" else rate
        # If the client computed the difference, it did so from weights of at best the same precision.
        doubt = gradient.abs() if holds == "gradient" else torch.maximum(weight.abs(), (weight - gradient).abs())
        gradients[name] = (gradient / by).to(like.dtype)[None]
        rounding[name] = (unit * doubt / by)[None]
    shared = SharedGradient(
        gradients=gradients, state=state, ids=torch.zeros(1, dtype=torch.long), protocol=victim.protocol
    )
    victim.check(shared)
    return Update(shared, rounding, given, after if holds == "weights" else {}, holds)


def _rate(victim: Victim, learning_rate: float | None) -> float | None:
    """Return the divisor that turns the difference of weights into what was shared; None if it is not known."""
    protocol = victim.protocol
    if learning_rate is not None:
        check_positive(learning_rate=learning_rate)
        if protocol.learning_rate is not None and learning_rate != protocol.learning_rate:
            raise ValueError(
                f"Expected `learning_rate` as in the victim's protocol, {protocol.learning_rate!r}, but got "
                f"{learning_rate!r}. Leave it out."
            )
    if protocol.learning_rate == UNKNOWN:
        return 1.0
    if protocol.learning_rate is not None:
        return protocol.known_rate * protocol.local_steps
    return learning_rate


def _named(arrays: Arrays, victim: Victim, what: str) -> dict[str, Tensor]:
    """Return the arrays by the model's names, after checking their shapes and values."""
    layout, tensors = victim.layout, arrays.tensors
    named = _by_order(tensors, victim, what) if isinstance(tensors, list) else _by_name(tensors, victim, what)
    whole = {name for name, tensor in victim.state.items() if not tensor.is_floating_point()}
    for name, tensor in named.items():
        if tensor.shape != layout[name]:
            raise ValueError(
                f"Expected `{what}` with {name!r} of shape {tuple(layout[name])}, but got {tuple(tensor.shape)}."
                + (_hint(tensors, layout) if isinstance(tensors, list) else "")
            )
        counts = name in whole or name.endswith("num_batches_tracked")
        if not counts and not tensor.is_floating_point():
            raise ValueError(
                f"Expected `{what}` with floating-point numbers in {name!r}, but got {tensor.dtype}. Dequantise "
                "quantised weights first."
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"Expected `{what}` with finite numbers in {name!r}, but got NaN or inf.")
        if name.endswith("running_var") and arrays.holds in (None, "weights") and what == "before":
            _check_variance(name, tensor, what)
    return named


def _check_variance(name: str, tensor: Tensor, what: str) -> None:
    if bool((tensor < 0).any()):
        raise ValueError(
            f"Expected `{what}` with running variances of at least 0 in {name!r}, but got {tensor.min().item()}. Other "
            "arrays have taken their place: is this the order of `state_dict()`?"
        )


def _by_order(tensors: list[Tensor], victim: Victim, what: str) -> dict[str, Tensor]:
    parameters = [name for name, _ in victim.model.named_parameters()]
    orders = {"state_dict()": [*victim.layout], "parameters()": parameters, "trained parameters": victim.trainable}
    names = next((names for names in orders.values() if len(names) == len(tensors)), None)
    if names is None:
        lengths = " or ".join(f"{len(names)} ({order})" for order, names in orders.items())
        raise ValueError(f"Expected `{what}` as a list of {lengths} arrays, but got {len(tensors)}.")
    return dict(zip(names, tensors, strict=True))


def _hint(tensors: list[Tensor], layout: Mapping[str, torch.Size]) -> str:
    """Return a hint if only the order of the arrays is wrong, or else an empty text."""
    same = Counter(tuple(tensor.shape) for tensor in tensors) == Counter(map(tuple, layout.values()))
    return " The model has these shapes, but in another order: that of `state_dict()`." if same else ""


def _by_name(tensors: dict[str, Tensor], victim: Victim, what: str) -> dict[str, Tensor]:
    """Match the arrays with the model's names, whatever prefix either side has."""
    known = victim.layout.keys()
    adapted = {_in_file(name): name for name in known}
    for names in ([*tensors], [adapted.get(name, name) for name in tensors]):
        others = (other for other in _other_prefixes(names, list(known)) if {*victim.trainable} <= {*other})
        for renamed in itertools.chain([names], others):
            if {*renamed} <= known:
                return dict(zip(renamed, tensors.values(), strict=True))
    unknown = sorted(tensors.keys() - known)
    raise ValueError(
        f"Expected `{what}` with the names of the model, such as {shorten(sorted(known)[:4])}, but got unknown "
        f"{shorten(unknown[:8])}."
    )


def _other_prefixes(names: list[str], known: list[str]) -> Iterator[list[str]]:
    """Yield the names with prefixes added that the model has, and with prefixes removed that it does not have."""
    first = names[0]
    for own in known:
        if own.endswith(f".{first}"):
            yield [own.removesuffix(first) + name for name in names]
        elif first.endswith(f".{own}"):
            prefix = first.removesuffix(own)
            if all(name.startswith(prefix) for name in names):
                yield [name.removeprefix(prefix) for name in names]


def _in_file(name: str) -> str:
    """Return the name in PEFT's adapter file for a name in the model, which includes the adapter's name."""
    name = re.sub(r"\.modules_to_save\.[^.]+", "", name)
    return re.sub(r"(\.lora_\w+)\.[^.]+", r"\1", name)
