"""Checks of a client's model and data, and the search for the layer whose output is the logits."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules.batchnorm import _BatchNorm

from leakage.clients.losses import OWN
from leakage.clients.protocol import Protocol, check_labels
from leakage.errors import show_shape

_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)


def drop_unused_statistics(model: nn.Module) -> frozenset[str]:
    """Remove the running statistics that BatchNorm does not normalise by, and return their names.

    In training mode the output does not depend on them, and BatchNorm updates them in place, which ``vmap`` does not
    support.
    """
    names = []
    for prefix, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            module.track_running_stats = False
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                setattr(module, name, None)
                names.append(f"{prefix}.{name}" if prefix else name)
    return frozenset(names)


def take_affine_apart(model: nn.Module) -> None:
    """Make BatchNorm and InstanceNorm that normalise by their input apply weight and bias in a separate step.

    Otherwise ``torch.func`` differentiates the gradient of these weights wrongly if ``vmap`` is inside the derivative,
    as in ``grad(vmap(...))`` and ``vjp(vmap(...), ...)``: its rule treats the mean and the variance in that gradient as
    constants.
    """
    for module in model.modules():
        if type(module) in _NORMS and module.affine and not module.track_running_stats:
            plain = type(module)(module.num_features, eps=module.eps, affine=False, track_running_stats=False)
            module.forward = partial(_normalise, module, plain)


def _normalise(module: nn.Module, plain: nn.Module, inputs: Tensor) -> Tensor:
    normalised: Tensor = plain(inputs)
    weight, bias = (cast(Tensor, part).view(-1, *[1] * (inputs.ndim - 2)) for part in (module.weight, module.bias))
    return normalised * weight + bias


def trial_inputs(model: nn.Module, protocol: Protocol) -> tuple[Tensor, ...]:
    """Return black images for a trial run of a model, with targets if it computes its own loss."""
    parameter = next(model.parameters())
    # Two images are enough for any larger batch: BatchNorm in training mode refuses only a single value.
    number = min(protocol.step_size, 2)
    images = torch.zeros(number, *protocol.image_shape, dtype=parameter.dtype, device=parameter.device)
    return with_targets(images, protocol)


def with_targets(images: Tensor, protocol: Protocol) -> tuple[Tensor, ...]:
    """Return images ``(N, C, H, W)``, with targets that favour no class if the model computes its own loss."""
    if protocol.loss != OWN:
        return (images,)
    return images, images.new_full((len(images), protocol.num_classes), 1 / protocol.num_classes)


def inspect_model(model: nn.Module, protocol: Protocol) -> tuple[str | None, str, int]:
    """Return the linear layer whose output is the logits (None if there is none), their origin and their number.

    If the model computes its own loss, it has no known logits, and their number is that of the protocol.
    """
    given, own = trial_inputs(model, protocol), protocol.loss == OWN
    images = given[0]
    outputs: list[tuple[str, Tensor]] = []

    def record(name: str) -> Any:
        return lambda module, inputs, output: outputs.append((name, output))

    leaves = {name: module for name, module in model.named_modules() if not any(True for _ in module.children())}
    hooks = [module.register_forward_hook(record(name)) for name, module in leaves.items()]
    try:
        with torch.no_grad():
            logits = model(*given)
    except Exception as error:
        own_batch = any(isinstance(module, _BatchNorm) and module.running_mean is None for module in model.modules())
        if own_batch and "more than 1 value per channel" in str(error):
            raise ValueError(
                "Expected several values per channel for BatchNorm that normalises by the batch (in training mode, or "
                "without running statistics), but got one: a single image whose map has a single pixel. Choose "
                "`num_images` (and `local_batch_size`) of at least 2, or larger images, or call `model.eval()`."
            ) from error
        taken = f"images of shape {show_shape('N', *protocol.image_shape)}{' and targets' if own else ''}"
        raise ValueError(f"Expected `model` to take {taken}, but got: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    if own:
        if not isinstance(logits, Tensor) or logits.ndim:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"Expected `model` with loss {OWN!r} to give the loss as one number, but got {got}.")
    elif not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        number = "one image" if len(images) == 1 else f"{len(images)} images"
        raise ValueError(f"Expected `model` to give logits of shape (N, K), but got {got} for {number}.")
    try:
        with torch.no_grad():
            vmap(model)(*(tensor[None] for tensor in given))
    except Exception as error:
        raise ValueError(
            "Expected `model` to be a function of images and weights alone that `torch.func.vmap` can run "
            f"(no dropout by `torch.nn.functional`, no statistics updated in the forward pass), but got: {error}"
        ) from error
    if own:
        return None, "a loss that the model computes", protocol.num_classes
    if not outputs:
        return None, type(model).__name__, logits.shape[1]
    # An nn.Identity after the linear layer returns the same tensor.
    linear = [pair for pair in outputs if pair[1] is logits and isinstance(leaves[pair[0]], nn.Linear)]
    with_weights = [pair for pair in outputs if [*leaves[pair[0]].parameters()]]
    name, output = (linear or with_weights or outputs)[-1]
    times = sum(1 for other, _ in outputs if other == name)
    origin = f"{type(leaves[name]).__name__} {name!r}"
    origin += f", applied {times} times" if times > 1 else "" if output is logits else " and operations after it"
    return name if linear and times == 1 else None, origin, logits.shape[1]


def check_tensors(
    kind: str, given: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, victims: int | None
) -> None:
    """Raise a ``ValueError`` unless names, shapes and kinds of numbers are those of ``expected``.

    With ``victims``, each shape has a leading dimension of this size.
    """
    missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"Expected a {kind} for every tensor of the model, but got missing {missing} and unknown {unknown}."
        )
    for name, tensor in given.items():
        shape = (*(() if victims is None else (victims,)), *expected[name].shape)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"Expected the {kind} of {name!r} to have shape {shape}, but got {tuple(tensor.shape)}.")
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise ValueError(
                f"Expected the {kind} of {name!r} of a type like {expected[name].dtype}, but got {tensor.dtype}."
            )


def check_no_statistics(state: Mapping[str, Tensor], unused: frozenset[str]) -> None:
    """Raise a ``ValueError`` if a state has running statistics that BatchNorm does not normalise by."""
    # They are not ignored: a user who has statistics and a model in training mode may have forgotten `eval()`.
    if given := sorted(unused & state.keys()):
        raise ValueError(
            "Expected no running statistics of BatchNorm that normalises by the client's own batch (in training "
            f"mode, or without running statistics), but got {given}. Call `model.eval()` if the client "
            "normalised by them; otherwise leave them out of the state."
        )


def check_private(images: Tensor, labels: Tensor, protocol: Protocol) -> None:
    """Raise a ``ValueError`` unless images and labels fit clients of this protocol."""
    expected = (protocol.num_images, *protocol.image_shape)
    if images.ndim != 5 or tuple(images.shape[1:]) != expected or not len(images):
        raise ValueError(f"Expected `images` of shape {show_shape('V', *expected)}, but got {tuple(images.shape)}.")
    if not images.is_floating_point() or not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError(
            f"Expected `images` as floating-point numbers in [0, 1], but got {images.dtype} from "
            f"{images.min().item()} to {images.max().item()}."
        )
    check_labels(labels, len(images), protocol)
