"""Shared gradients of a small network."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from leakage import SharedGradient, Victim


def make(victims: int = 3, *, own: bool = True, labels: bool = True) -> SharedGradient:
    """The gradients of a network that also has buffers, one of them an integer without dimensions."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)).eval()
    victim = Victim(model, image_shape=(1, 4, 4), num_images=2)
    generator = torch.Generator().manual_seed(0)
    return victim.share(
        torch.rand(victims, 2, 1, 4, 4, generator=generator),
        torch.randint(3, (victims, 2), generator=generator),
        states=victim.fresh_states(list(range(victims))) if own else None,
        ids=torch.arange(10, 10 + victims),
        reveal_labels=labels,
    )


def assert_equal(one: SharedGradient, other: SharedGradient) -> None:
    assert (one.protocol, one.own_weights) == (other.protocol, other.own_weights)
    for attribute in ("gradients", "state"):
        left, right = getattr(one, attribute), getattr(other, attribute)
        assert left.keys() == right.keys()
        for name in left:
            torch.testing.assert_close(left[name], right[name], rtol=0, atol=0, msg=f"{attribute} {name}")
    assert torch.equal(one.ids, other.ids)
    assert (one.labels is None) == (other.labels is None)
    if one.labels is not None and other.labels is not None:
        assert torch.equal(one.labels, other.labels)


def rewrite(path: Path, *, without: tuple[str, ...] = (), **header: str | None) -> None:
    """Write the file again with changed header entries (None: without it) and without some tensors."""
    with safe_open(path, framework="pt") as file:
        entries = dict(file.metadata()) | header
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items() if name not in without}
    save_file(tensors, path, {name: value for name, value in entries.items() if value is not None})
