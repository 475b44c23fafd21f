"""Whether a checkpoint belongs to the attack that is to go on from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check_checkpoint(checkpoint: Mapping[str, Any], attack: str, options: Mapping[str, Any], precision: object) -> None:
    """Raise a ``ValueError`` unless the checkpoint is of this attack, with these options, in this precision.

    Args:
        checkpoint: as Lightning hands it to ``on_load_checkpoint``.
        attack: the name of the attack's class.
        options: its hyper-parameters.
        precision: the Trainer's.
    """
    saved = checkpoint.get("leakage")
    if saved is None or saved["attack"] != attack:
        raise ValueError(
            f"Expected a checkpoint of {attack}, but got one of {saved['attack'] if saved else 'another module'}."
        )
    stored = checkpoint["hyper_parameters"]
    differing = {name: (stored.get(name), value) for name, value in options.items() if stored.get(name) != value}
    if differing:
        listed = ", ".join(f"{name}={old!r} (now {new!r})" for name, (old, new) in differing.items())
        raise ValueError(f"Expected the configuration of the checkpoint, but got another: it has {listed}.")
    if saved["precision"] != precision:
        raise ValueError(f"Expected the checkpoint's precision {saved['precision']!r}, but got {precision!r}.")
