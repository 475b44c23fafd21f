"""Layers of a module that hinder attacks: find them, and replace them where possible."""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning import LightningModule
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from leakage.audit.report import Problem


def dropout_of(module: nn.Module) -> list[str]:
    """Return the names of the dropout layers that are turned on."""
    return [name for name, layer in module.named_modules() if isinstance(layer, _DropoutNd) and _is_random(layer)]


def prepare_layers(module: LightningModule) -> list[Problem]:
    """Replace what hinders attacks in the layers of a copied module, where possible, and list the problems."""
    problems = []

    def report(kind: str, where: list[str], problem: str, fix: str, means: str) -> None:
        if where:
            shown = ", ".join(where[:4]) + (f" and {len(where) - 4} more" if len(where) > 4 else "")
            problems.append(Problem(kind, shown, problem, fix, means))

    named = {name or type(module).__name__: layer for name, layer in module.named_modules()}
    random = [name for name, layer in named.items() if _is_random(layer)]
    for name in random:
        layer = cast(Any, named[name])
        layer.training = False
        if isinstance(layer, nn.MultiheadAttention):
            layer.dropout, layer.training = 0.0, True
    dropout = [name for name in random if isinstance(named[name], _DropoutNd)]
    report(
        *("replace", dropout, "dropout in training mode"),
        "To audit clients that train with dropout, declare them with dropout=True.",
        "The verdict for other clients is without dropout. Do not rely on dropout to hide more: attacks can search for "
        "the masks together with the images.",
    )
    report(
        *("replace", [name for name in random if name not in dropout], "layers that drop connections or whole blocks"),
        "Nothing to do: the audit turns them off, as attacks can't search yet for what they drop.",
        "The verdict is for clients whose layers drop nothing.",
    )
    mixing = [name for name, layer in named.items() if isinstance(layer, _BatchNorm) and layer.training]
    report(
        *("replace", mixing, "BatchNorm in training mode: it normalises by the client's own batch"),
        "If clients train with running statistics, call `eval()` on these layers and audit again.",
        "The verdict is for training mode. With running statistics, images are easier to rebuild.",
    )
    in_place = [name for name, layer in named.items() if getattr(layer, "inplace", False) is True]
    for name in in_place:
        cast(Any, named[name]).inplace = False
    report(
        *("replace", in_place, "in-place operations", "Nothing to do: the audit replaces them, with the same results."),
        "Nothing.",
    )
    parameters = dict(module.named_parameters(remove_duplicate=False))
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    kind = "never" if len(frozen) == len(parameters) else "replace"
    report(
        *(kind, frozen, "frozen parameters: clients do not share their gradient"),
        "If clients train them, set `requires_grad`.",
        "The verdict is only for updates without these parameters.",
    )
    seen: dict[int, str] = {}
    shared = [name for name, parameter in parameters.items() if seen.setdefault(id(parameter), name) != name]
    report(
        *("not yet", shared, "parameters that several layers share", "Nothing to do, or audit with copies of them."),
        "Closed-form attacks do not apply; the others do.",
    )
    half = [name for name, parameter in parameters.items() if parameter.dtype in (torch.float16, torch.bfloat16)]
    if half:
        module.float()
    report(
        *("replace", half, "half precision", "To include the effect of rounding, add the defense HalfPrecision."),
        "The audit runs in single precision, where an update gives away at least as much.",
    )
    return problems


def _is_random(layer: nn.Module) -> bool:
    if not layer.training:
        return False
    if isinstance(layer, nn.MultiheadAttention):
        return bool(layer.dropout > 0)
    kind = type(layer).__name__
    rate = getattr(layer, "p", getattr(layer, "drop_prob", 0.0))
    drops = "Drop" in kind or kind == "StochasticDepth"
    return bool(drops and isinstance(rate, int | float) and rate > 0 and not any(True for _ in layer.children()))
