"""The description of a federated client: how many images it holds and what it does before it shares an update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from leakage.clients.protocol import Protocol
from leakage.defenses.base import Defense, check_defenses
from leakage.errors import check_count, check_flag, check_positive


@dataclass(frozen=True)
class Client:
    """A declared client of federated learning: one row of the audit.

    The network and the loss are those of the audited module.

    Attributes:
        images: N, the number of images behind one update.
        local_steps: the number of SGD steps before the client shares its update. With one step it shares a gradient.
        learning_rate: the learning rate of these steps. By default, that of the module's own optimizer if it is plain
            SGD. For a single step it cancels out, except for a captured update.
        local_batch_size: the number of images in one step; all by default.
        momentum: the momentum of several steps, at least 0 and below 1.
        weight_decay: the weight decay of several steps, at least 0.
        shuffle: whether the client takes its images in a new order in each pass.
        reveal_learning_rate: whether the attacker knows the learning rate.
        reveal_labels: whether the attacker knows the labels. If not, attacks read them off the update.
        dropout: whether the client trains with the module's dropout. Attackers do not know its masks, so attacks search
            for them together with the images. By default, dropout is turned off.
        defenses: objects of :mod:`leakage.defenses` that the client applies to its update, in this order.
        epochs: the number of epochs that a copy of the module is trained for, by its own optimizer, before the attacks.
        name: the name in tables and files. By default, the options in words.

    Raises:
        ValueError: a value is out of range, or options exclude each other.

    Example:
        >>> Client(images=8, local_steps=5, learning_rate=0.01).name
        '8 images, 5 local steps'
    """

    images: int = 1
    local_steps: int = 1
    learning_rate: float | None = None
    local_batch_size: int | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0
    shuffle: bool = False
    reveal_learning_rate: bool = True
    reveal_labels: bool = False
    dropout: bool = False
    defenses: Sequence[Defense] = ()
    epochs: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        check_count(images=self.images, local_steps=self.local_steps)
        check_count(0, epochs=self.epochs)
        flags = ("reveal_labels", "reveal_learning_rate", "dropout")
        check_flag(**{name: getattr(self, name) for name in flags})
        if self.learning_rate is not None:
            check_positive(learning_rate=self.learning_rate)
        check_defenses(list(self.defenses) if isinstance(self.defenses, tuple) else self.defenses)
        if not isinstance(self.name, str):
            raise ValueError(f"Expected `name` as text, but got {self.name!r}.")
        # Check the options as a protocol does, although there is no network or image yet.
        several = self.local_steps > 1
        Protocol(
            (1, 1, 1),
            2,
            self.images,
            local_steps=self.local_steps,
            learning_rate=(self.learning_rate or 1.0) if several else None,
            local_batch_size=self.local_batch_size,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            shuffle=self.shuffle,
        )
        object.__setattr__(self, "defenses", tuple(self.defenses))
        object.__setattr__(self, "name", self.name.strip() or self._words())

    def _words(self) -> str:
        words = ["1 image" if self.images == 1 else f"{self.images} images"]
        if self.local_steps > 1:
            words.append(f"{self.local_steps} local steps")
        if self.local_batch_size not in (None, self.images):
            words.append(f"batches of {self.local_batch_size}")
        if self.dropout:
            words.append("dropout")
        words += [type(defense).__name__ for defense in self.defenses]
        if self.epochs:
            words.append(f"after {self.epochs} epoch{'s' * (self.epochs > 1)}")
        if self.reveal_labels:
            words.append("labels known")
        return ", ".join(words)

    @property
    def training(self) -> dict[str, Any]:
        """The options that :class:`leakage.Victim` and :class:`leakage.datamodules.Victims` also take."""
        names = ("local_steps", "local_batch_size", "momentum", "weight_decay", "shuffle", "reveal_learning_rate")
        cancels = self.local_steps == 1 and self.reveal_learning_rate
        rate = None if cancels else self.learning_rate
        return {"learning_rate": rate, **{name: getattr(self, name) for name in (*names, "defenses")}}

    def describe(self) -> dict[str, Any]:
        """Return all options as plain values, with each defense as the attacker knows it."""
        defenses = [defense.describe() for defense in self.defenses]
        return {**{name: value for name, value in vars(self).items() if name != "defenses"}, "defenses": defenses}


def check_clients(client: Client | Sequence[Client]) -> tuple[Client, ...]:
    """Return one or more clients as a tuple.

    Raises:
        ValueError: there is no client, or two clients have the same name.
    """
    clients = (client,) if isinstance(client, Client) else tuple(client) if isinstance(client, list | tuple) else ()
    if not clients or not all(isinstance(one, Client) for one in clients):
        raise ValueError(f"Expected `client` as a Client or a list of them, but got {client!r}.")
    names = [slug(one.name) for one in clients]
    if twice := sorted({one.name for one in clients if names.count(slug(one.name)) > 1}):
        raise ValueError(f"Expected clients with different names, but got {twice} more than once. Give each a `name`.")
    return clients


def slug(name: str) -> str:
    """Turn a name into a part of a file name.

    Example:
        >>> slug("8 images, 5 local steps")
        '8_images_5_local_steps'
    """
    return "_".join("".join(letter if letter.isalnum() else " " for letter in name).split()) or "client"
