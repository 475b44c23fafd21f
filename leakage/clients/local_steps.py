"""The steps of a client that trains before it shares, and their derivatives in little memory."""

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

# Steps from which on activations are made again, and from which on the weights before them too. Measured with a ConvNet
# of 24,714 parameters and four images, megabytes and milliseconds of one evaluation with its gradient:
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
    """What the protocol does not tell of a client's local steps: as it is, or as an attack supposes it to be.

    Attributes:
        learning_rate: by default that of the protocol; derivatives are taken by a scalar tensor.
        order: ``(steps * local_batch_size,)``, the images of all steps one after another, by default in turns.
        shares: ``(steps, N)``, in place of an order: how much of each image is in each step, from 0 to 1. Every step
            then takes all images, and derivatives are taken by their shares.
        drawn: ``(steps * images of a step, D)``, what modules have drawn for the images of all steps one after another
            (:mod:`leakage.models.drawing`); derivatives are taken by it. Also of a single step.
    """

    learning_rate: float | Tensor | None = None
    order: Tensor | None = None
    shares: Tensor | None = None
    drawn: Tensor | None = None


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
    """The average of what the client's steps take off its weights, and the activations of its first pass.

    Args:
        step_gradients: by weights, buffers, images, targets, the modules that are watched, the images' shares, or
            None, and what is drawn for them, or None: gradients of one step, and activations. It depends on no other
            tensor.
        protocol: says what steps.
        data: buffers by name, images ``(N, C, H, W)``, targets ``(N, K)``.
        weights: before the first step.
        modules: names of the modules whose activations are wanted.
        secrets: what else there is to know of the steps.
        sparing: where there are many steps, differentiate in little memory. The activations of one step are kept, and
            the weights before each, which is made once more; of very many steps T, the weights before about 2 sqrt(T)
            of them, and each is made twice more. Derivatives forwards (``torch.func.jvp``) need it False.
    """
    images, count, order = data[1], protocol.local_steps, secrets.order
    batch_size = protocol.local_batch_size or len(images)
    rate = protocol.known_rate if secrets.learning_rate is None else secrets.learning_rate
    if not isinstance(rate, Tensor):
        rate = torch.full((), rate, dtype=images.dtype, device=images.device)
    given = (*data, rate, {name: own for name in ("shares", "drawn") if (own := getattr(secrets, name)) is not None})

    def steps(
        span: range,
        lengths: Sequence[int],
        weights: _Tensors,
        velocity: _Tensors,
        data: tuple[Any, ...],
    ) -> tuple[_Tensors, _Tensors, _Tensors, dict[str, Activation]]:
        """Weights and velocity after some steps, the sum of these, and activations; in spans of the first length."""
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
    """``(V, steps * batch size)``, the images of all steps of each client that shuffles; None if clients don't."""
    if not protocol.shuffle or protocol.local_batch_size is None:
        return None
    epochs = protocol.local_steps * protocol.local_batch_size // protocol.num_images
    orders = []
    for victim in ids:
        generator = torch.Generator().manual_seed(derive_seed(seed, victim, "local order"))
        orders.append(torch.cat([torch.randperm(protocol.num_images, generator=generator) for _ in range(epochs)]))
    return torch.stack(orders)


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``, of which autograd keeps only the arguments, and computes it once more for a derivative.

    What ``torch.utils.checkpoint`` does, which ``torch.func`` can't transform. It can be differentiated backwards any
    number of times, and ``vmap`` maps over it.

    Args:
        function: of nested lists, tuples and dicts of tensors, to such; it depends on no other tensor.
        arguments: its arguments; derivatives are taken by those in floating point.

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
    """Keeps its inputs alone; so does its derivative, whose graph ``torch.func`` would else keep for all steps."""

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
