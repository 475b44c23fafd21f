"""What an engineer says of a federated client: how many images it holds, and what it does before it shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from leakage.clients.protocol import Protocol
from leakage.defenses.base import Defense, check_defenses
from leakage.errors import check_count, check_flag, check_positive


@dataclass(frozen=True)
class Client:
    """A client of federated learning, as an audit is told of it: one row of the audit.

    Network and loss are those of the audited module.

    Attributes:
        images: N, the images behind one update.
        local_steps: steps of SGD before the client shares its update; with one it shares a gradient.
        learning_rate: of these steps. By default that of the module's own optimizer, where it is plain SGD. Of a single
            step it cancels out, but for a captured update.
        local_batch_size: images of one step, by default all.
        momentum: of several steps, from 0 to below 1.
        weight_decay: of several steps, at least 0.
        shuffle: whether the client takes its images in a new order in each pass.
        reveal_learning_rate: whether the attacker is told the rate.
        reveal_labels: whether the attacker is told the labels; else they are read off the update.
        defenses: what the client does to its update, objects of :mod:`leakage.defenses`, in their order.
        epochs: further training of a copy of the module by the module's own optimizer, before the attacks.
        name: in tables and files; by default its options in words.

    Raises:
        ValueError: a value out of its range, or options that don't go together.

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
    defenses: Sequence[Defense] = ()
    epochs: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        check_count(images=self.images, local_steps=self.local_steps)
        check_count(0, epochs=self.epochs)
        check_flag(reveal_labels=self.reveal_labels, reveal_learning_rate=self.reveal_learning_rate)
        if self.learning_rate is not None:
            check_positive(learning_rate=self.learning_rate)
        check_defenses(list(self.defenses) if isinstance(self.defenses, tuple) else self.defenses)
        if not isinstance(self.name, str):
            raise ValueError(f"Expected `name` as text, but got {self.name!r}.")
        # All that a protocol says of such options, before there is a network or an image.
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
        words += [type(defense).__name__ for defense in self.defenses]
        if self.epochs:
            words.append(f"after {self.epochs} epoch{'s' * (self.epochs > 1)}")
        if self.reveal_labels:
            words.append("labels told")
        return ", ".join(words)

    @property
    def training(self) -> dict[str, Any]:
        """Those of its options that :class:`leakage.Victim` and :class:`leakage.datamodules.Victims` take too."""
        names = ("local_steps", "local_batch_size", "momentum", "weight_decay", "shuffle", "reveal_learning_rate")
        cancels = self.local_steps == 1 and self.reveal_learning_rate
        rate = None if cancels else self.learning_rate
        return {"learning_rate": rate, **{name: getattr(self, name) for name in (*names, "defenses")}}

    def describe(self) -> dict[str, Any]:
        """All of it as plain values, defenses as the attacker is told of them."""
        told = [defense.describe() for defense in self.defenses]
        return {**{name: value for name, value in vars(self).items() if name != "defenses"}, "defenses": told}


def check_clients(client: Client | Sequence[Client]) -> tuple[Client, ...]:
    """One client or several as a tuple; a ``ValueError`` unless there is one, and all have names of their own."""
    clients = (client,) if isinstance(client, Client) else tuple(client) if isinstance(client, list | tuple) else ()
    if not clients or not all(isinstance(one, Client) for one in clients):
        raise ValueError(f"Expected `client` as a Client or a list of them, but got {client!r}.")
    names = [slug(one.name) for one in clients]
    if twice := sorted({one.name for one in clients if names.count(slug(one.name)) > 1}):
        raise ValueError(f"Expected clients of different names, but got {twice} more than once. Give them a `name`.")
    return clients


def slug(name: str) -> str:
    """A name as part of a file's.

    Example:
        >>> slug("8 images, 5 local steps")
        '8_images_5_local_steps'
    """
    return "_".join("".join(letter if letter.isalnum() else " " for letter in name).split()) or "client"
