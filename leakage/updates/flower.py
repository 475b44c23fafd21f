"""A client mod for Flower that stores each update that leaves a client, as the server or an eavesdropper sees it."""

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
    """A client mod for Flower that writes each update to two files as it leaves the client.

    For each training message, ``<output>/round-<round>-node-<node>.before.safetensors`` holds the arrays that the
    client received, and ``....after.safetensors`` those that it sends back. Arrays are stored by name if they have
    names, and by index otherwise. :func:`~leakage.updates.read_update` reads both files. The header of the second holds
    what is sent along (``metrics``: the number of examples, and all else that the client reports). The messages are not
    changed. If a file can't be written, there is a warning, and the client's training goes on.

    Mods wrap one another in their order. Put this one **first**, so that it sees the update after privacy mods.

    Args:
        output: the folder for the files.

    Example:
        >>> from flwr.clientapp import ClientApp                      # doctest: +SKIP
        >>> app = ClientApp(mods=[CaptureUpdates("captured")])        # doctest: +SKIP
        >>> read_update("captured/round-1-node-7.before.safetensors",
        ...             "captured/round-1-node-7.after.safetensors", victim, learning_rate=0.1)  # doctest: +SKIP
    """

    def __init__(self, output: str | os.PathLike[str]) -> None:
        self.output = Path(output)

    def __call__(self, message: Any, context: Any, call_next: Callable[[Any, Any], Any]) -> Any:
        """Pass the message on and the reply back, and store the arrays of both."""
        if message.metadata.message_type.partition(".")[0] != "train":
            return call_next(message, context)
        try:
            before = _named(message)  # read now, as the client may take the arrays out of the message
        except ValueError as error:
            warnings.warn(f"An update was not captured: {error}", stacklevel=2)
            return call_next(message, context)
        stem = f"round-{_round(message)}-node-{message.metadata.dst_node_id}"
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        try:
            after = _named(reply)
            stem = self._free(stem)
            write_safetensors(self.output / f"{stem}.before.safetensors", _FORMAT, before)
            metrics = {name: dict(record) for name, record in reply.content.metric_records.items()}
            header = {"metrics": json.dumps(metrics, default=str)}
            write_safetensors(self.output / f"{stem}.after.safetensors", _FORMAT, after, header)
        except (OSError, ValueError) as error:
            warnings.warn(f"An update was not captured: {error}", stacklevel=2)
        return reply

    def _free(self, stem: str) -> str:
        """Return the stem, with a number appended if files with this name exist."""
        number, free = 1, stem
        while (self.output / f"{free}.after.safetensors").exists():
            number += 1
            free = f"{stem}-{number}"
        return free


def _round(message: Any) -> object:
    """Return the round that the strategy sends, or else an id that distinguishes messages."""
    rounds = [record["server-round"] for record in message.content.config_records.values() if "server-round" in record]
    metadata = message.metadata
    return next(iter(rounds), None) or metadata.group_id or metadata.message_id


def _named(message: Any) -> dict[str, Tensor]:
    tensors = open_weights(message, "message").tensors
    return {str(place): tensor for place, tensor in enumerate(tensors)} if isinstance(tensors, list) else tensors
