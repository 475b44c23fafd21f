"""The local steps of a client that trains before it shares, and their derivatives in little memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from leakage.clients.activations import Activation, joined
from leakage.clients.protocol import Protocol
from leakage.seeds import derive_seed

# Number of steps from which on activations are recomputed, and from which on weights are recomputed too. Measured with
# a ConvNet of 24,714 parameters and four images: megabytes and milliseconds of one evaluation with its gradient.
#
#     steps   all kept      weights kept   weights of spans kept
#         2   14.4    42     6.9    62      7.1    84
#         5   32.8    97     7.5   148      7.6   203
#        20  124.4   391    10.5   545      8.3   733
_SPARING_FROM, _IN_SPANS_FROM = 8, 64

_Tensors = dict[str, Tensor]
_StepGradients = Callable[..., tuple[_Tensors, dict[str, Activation]]]


@dataclass
class Secrets:
    """What the protocol does not reveal about local steps: the true values, or an attack's estimates.

    Attributes:
        learning_rate: by default that of the protocol; differentiable if it is a scalar tensor.
        order: ``(steps * local_batch_size,)``, indices of the images of all steps; by default the images take turns.
        shares: ``(steps, N)``, used in place of ``order``: how much of each image is in each step, from 0 to 1. Every
            step then takes all images. Differentiable.
        drawn: ``(steps * images of a step, D)``, the random numbers of modules for the images of all steps
            (:mod:`leakage.models.drawing`). Differentiable. It also applies to a single step.
        noise: what is added to the gradient of each step, name to ``(steps, *shape)``.
    """

    learning_rate: float | Tensor | None = None
    order: Tensor | None = None
    shares: Tensor | None = None
    drawn: Tensor | None = None
    noise: dict[str, Tensor] | None = None


def train(
    step_gradients: _StepGradients,
    protocol: Protocol,
    data: tuple[_Tensors, Tensor, Tensor],
    weights: _Tensors,
    modules: Sequence[str],
    secrets: Secrets,
    *,
    sparing: bool,
) -> tuple[_Tensors, dict[str, Activation]]:
    """Return the average of the client's steps, without the learning rate, and the activations of its first pass.

    Args:
        step_gradients: a function that returns the gradients and the activations of one step. Its arguments are
            weights, buffers, images, targets, names of recorded modules, shares of the images (or None) and drawn
            numbers (or None). It must not depend on other tensors.
        protocol: number and kind of the steps.
        data: buffers by name, images ``(N, C, H, W)``, targets ``(N, K)``.
        weights: weights before the first step.
        modules: names of the modules whose activations are recorded.
        secrets: what the protocol does not reveal about the steps.
        sparing: whether to save memory if there are many steps. Only the activations of one step and the weights before
            each step are kept, and each step is computed once more for a derivative. With very many steps T, only the
            weights before about 2 sqrt(T) steps are kept, and each step is computed twice more. Forward-mode
            derivatives (``torch.func.jvp``) need False.
    """
    images, count, order = data[1], protocol.local_steps, secrets.order
    batch_size = protocol.local_batch_size or len(images)
    rate = protocol.known_rate if secrets.learning_rate is None else secrets.learning_rate
    if not isinstance(rate, Tensor):
        rate = torch.full((), rate, dtype=images.dtype, device=images.device)
    names = "shares", "drawn", "noise"
    given = (*data, rate, {name: own for name in names if (own := getattr(secrets, name)) is not None})

    def steps(
        span: range,
        lengths: Sequence[int],
        weights: _Tensors,
        velocity: _Tensors,
        data: tuple[Any, ...],
    ) -> tuple[_Tensors, _Tensors, _Tensors, dict[str, Activation]]:
        """Return weights and velocity after a span of steps, the sum of the steps, and activations.

        ``lengths`` are the lengths of the nested spans that are recomputed, outermost first.
        """
        total: _Tensors = {}
        passed = []
        for start in span[:: lengths[0] if lengths else 1]:
            if lengths:
                part = range(start, min(start + lengths[0], span.stop))
                weights, velocity, taken, seen = recomputed(partial(steps, part, lengths[1:]), weights, velocity, data)
            else:
                buffers, images, targets, rate, own = data
                size = len(images) if "shares" in own else batch_size
                first = start * size % len(images)
                batch: slice | Tensor = slice(first, first + size)
                if order is not None:
                    batch = order[start * size : (start + 1) * size]
                watched = modules if start * size < len(images) else ()
                share = own["shares"][start] if "shares" in own else None
                drawn = own["drawn"][start * size : (start + 1) * size] if "drawn" in own else None
                taken, seen = step_gradients(weights, buffers, images[batch], targets[batch], watched, share, drawn)
                if "noise" in own:
                    taken = {name: taken[name] + own["noise"][name][start] for name in taken}
                if protocol.weight_decay:
                    taken = {name: taken[name] + protocol.weight_decay * weights[name] for name in taken}
                if velocity:
                    taken = {name: taken[name] + protocol.momentum * velocity[name] for name in taken}
                if protocol.momentum:
                    velocity = taken
                weights = {name: weights[name] - rate * taken[name] for name in weights}
            total = {name: total[name] + taken[name] for name in total} if total else taken
            passed += [seen] if seen else []
        return weights, velocity, total, joined(passed) if passed else {}

    lengths: tuple[int, ...] = ()
    if sparing and count >= _SPARING_FROM:
        lengths = (1,) if count < _IN_SPANS_FROM else (math.isqrt(count), 1)
    *_, total, seen = steps(range(count), lengths, weights, {}, given)
    return {name: tensor / count for name, tensor in total.items()}, seen


def draw_orders(protocol: Protocol, ids: Sequence[int], seed: int) -> Tensor | None:
    """Draw ``(V, steps * batch size)``, the order of images of each client; None if clients do not shuffle."""
    if not protocol.shuffle or protocol.local_batch_size is None:
        return None
    epochs = protocol.local_steps * protocol.local_batch_size // protocol.num_images
    orders = []
    for victim in ids:
        generator = torch.Generator().manual_seed(derive_seed(seed, victim, "local order"))
        orders.append(torch.cat([torch.randperm(protocol.num_images, generator=generator) for _ in range(epochs)]))
    return torch.stack(orders)


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``function(*arguments)``, of which autograd saves only the arguments.

    The rest is recomputed for a derivative. It does what ``torch.utils.checkpoint`` does, but works with
    ``torch.func``: it can be differentiated any number of times in reverse mode, and ``vmap`` maps over it.

    Args:
        function: maps nested lists, tuples and dicts of tensors to such; it must not depend on other tensors.
        arguments: its arguments; those in floating point are differentiable.

    Example:
        >>> from torch.func import grad
        >>> grad(lambda x: recomputed(torch.sin, x))(torch.zeros(()))
        tensor(1.)
    """
    leaves, given = tree_flatten(arguments)
    found: list[TreeSpec] = []

    def flat(*leaves: Tensor) -> tuple[Tensor, ...]:
        outputs, structure = tree_flatten(function(*tree_unflatten(leaves, given)))
        found[:] = [structure]
        return tuple(outputs)

    return tree_unflatten(_Recomputed.apply(flat, *leaves), found[0])


class _Recomputed(torch.autograd.Function):
    """Saves only its inputs. So does its derivative, whose graph ``torch.func`` would otherwise keep for all steps."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Callable[..., tuple[Tensor, ...]], *leaves: Tensor) -> tuple[Tensor, ...]:
        return function(*leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.function, *leaves = inputs
        ctx.save_for_backward(*leaves)

    @staticmethod
    def backward(ctx: Any, *by_outputs: Tensor) -> tuple[Tensor | None, ...]:
        function, leaves = ctx.function, ctx.saved_tensors
        wanted = [place for place, needed in enumerate(ctx.needs_input_grad[1:]) if needed]

        def pulled(*tensors: Tensor) -> tuple[Tensor, ...]:
            fixed = list(tensors[: len(leaves)])

            def of_wanted(*moved: Tensor) -> tuple[Tensor, ...]:
                for place, tensor in zip(wanted, moved, strict=True):
                    fixed[place] = tensor
                outputs: tuple[Tensor, ...] = function(*fixed)
                return outputs

            pull = vjp(of_wanted, *[fixed[place] for place in wanted])[1]
            found: tuple[Tensor, ...] = pull(tensors[len(leaves) :])
            return found

        found = _Recomputed.apply(pulled, *leaves, *by_outputs)
        gradients: list[Tensor | None] = [None] * (len(leaves) + 1)
        for place, tensor in zip(wanted, found, strict=True):
            gradients[place + 1] = tensor
        return tuple(gradients)
