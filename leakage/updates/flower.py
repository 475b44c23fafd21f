"""A mod for Flower's clients that keeps what leaves them: what the server, or who listens, gets to see."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from leakage.files.tensors import write_safetensors
from leakage.updates.weights import open_weights

_FORMAT = "leakage.weights"


class CaptureUpdates:
    """A client mod of Flower that writes each update, as it leaves the client, to two files.

    For each message of training, ``<output>/round-<round>-node-<node>.before.safetensors`` has the arrays that the
    client was given, ``....after.safetensors`` those that it sends back, by their names where they have some, and else
    by their place; :func:`~leakage.updates.read_update` reads both. The header of the second has what is sent along
    (``metrics``: the number of examples, and what else the client tells). Nothing is changed on the way, and what
    can't be written is a warning, not the end of the client's training.

    Mods wrap one another in their order: put it **first**, so that it sees what mods for privacy make of the update.

    Args:
        output: the folder.

    Example:
        >>> from flwr.clientapp import ClientApp                      # doctest: +SKIP
        >>> app = ClientApp(mods=[CaptureUpdates("captured")])        # doctest: +SKIP
        >>> read_update("captured/round-1-node-7.before.safetensors",
        ...             "captured/round-1-node-7.after.safetensors", victim, learning_rate=0.1)  # doctest: +SKIP
    """

    def __init__(self, output: str | os.PathLike[str]) -> None:
        self.output = Path(output)

    def __call__(self, message: Any, context: Any, call_next: Callable[[Any, Any], Any]) -> Any:
        """Hand the message on, and the reply back, and keep the arrays of both."""
        if message.metadata.message_type.partition(".")[0] != "train":
            return call_next(message, context)
        try:
            before = _named(message)  # now: the client may take the arrays out of the message
        except ValueError as error:
            warnings.warn(f"An update is not captured: {error}", stacklevel=2)
            return call_next(message, context)
        stem = f"round-{_round(message)}-node-{message.metadata.dst_node_id}"
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        try:
            after = _named(reply)
            stem = self._free(stem)
            write_safetensors(self.output / f"{stem}.before.safetensors", _FORMAT, before)
            told = {name: dict(record) for name, record in reply.content.metric_records.items()}
            header = {"metrics": json.dumps(told, default=str)}
            write_safetensors(self.output / f"{stem}.after.safetensors", _FORMAT, after, header)
        except (OSError, ValueError) as error:
            warnings.warn(f"An update is not captured: {error}", stacklevel=2)
        return reply

    def _free(self, stem: str) -> str:
        """The same, or with a number behind it, if there are files of this name."""
        number, free = 1, stem
        while (self.output / f"{free}.after.safetensors").exists():
            number += 1
            free = f"{stem}-{number}"
        return free


def _round(message: Any) -> object:
    """As strategies tell it; else what tells messages apart."""
    told = [record["server-round"] for record in message.content.config_records.values() if "server-round" in record]
    metadata = message.metadata
    return next(iter(told), None) or metadata.group_id or metadata.message_id


def _named(message: Any) -> dict[str, Tensor]:
    tensors = open_weights(message, "message").tensors
    return {str(place): tensor for place, tensor in enumerate(tensors)} if isinstance(tensors, list) else tensors
