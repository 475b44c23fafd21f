"""What every defense is: one method from a client's gradient to what it shares instead."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leakage.errors import show_shape
from leakage.pieces import Piece
from leakage.seeds import derive_seed

if TYPE_CHECKING:  # a victim has defenses
    from leakage.clients.shared_gradient import SharedGradient
    from leakage.clients.victim import Victim

Gradients = Mapping[str, Tensor]
# Noise that is always reckoned with, in units of the gradient's root mean square: about what rounding leaves.
_LEAST_NOISE = 1e-5
# Likewise where a gradient must be in an interval, inside of which nothing pulls: on LeNet, FashionMNIST, and signs a
# prior finds 17.5 dB with 0.1, 19.0 with 0.01 (six images), and with 0.001, where searches get stuck, 13.4 (four).
_INTERVAL_NOISE = 1e-2


@dataclass(frozen=True)
class Client:
    """One client, as a defense of its own may see it.

    Attributes:
        victim: model, loss and protocol.
        state: weights and buffers by name.
        images: ``(N, C, H, W)``.
        targets: class probabilities ``(N, K)``.
    """

    victim: Victim
    state: Mapping[str, Tensor]
    images: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Size:
    """Of what one client sends.

    Attributes:
        numbers: how many entries of the gradient.
        bits: of one of them.
        more: bits beside them: which entries they are, scales.
    """

    numbers: int
    bits: int = 32
    more: int = 0

    @classmethod
    def of(cls, gradients: Gradients) -> Size:
        """All entries in single precision."""
        return cls(sum(tensor.numel() for tensor in gradients.values()))

    @property
    def bytes(self) -> int:
        """All of it."""
        return -(-(self.numbers * self.bits + self.more) // 8)


class Defense(Piece, ABC):
    """What a client does to its gradient before it shares it.

    One of your own is an object with one method. It keeps the arguments of its constructor as attributes of the same
    names: from them :meth:`describe` tells the attacker what was done.

    Example:
        >>> class Signs(Defense):
        ...     '''Only the signs, all of one size.'''
        ...
        ...     def __init__(self, size: float) -> None:
        ...         self.size = size
        ...
        ...     def __call__(self, gradients, generator):
        ...         return {name: self.size * tensor.sign() for name, tensor in gradients.items()}
        >>> from leakage import LeNet, Victim
        >>> victim = Victim(LeNet(), image_shape=(1, 28, 28), defenses=[Signs(0.1)])
        >>> shared = victim.share(torch.rand(2, 1, 1, 28, 28), torch.tensor([[3], [8]]))
        >>> shared.gradients["classifier.bias"][0].abs().unique(), shared.protocol.defenses
        (tensor([0.1000]), ({'name': 'Signs', 'size': 0.1},))

    Attributes:
        averages_out: whether what it adds is zero on average, so that to match the gradients as they are is right.
        keeps_zeros: whether entries that are zero before it are so after it, and few others.
        shortens: whether it makes gradients shorter by a factor that nobody is told.
    """

    averages_out: bool = False
    keeps_zeros: bool = False
    shortens: bool = False

    @abstractmethod
    def __call__(self, gradients: Gradients, generator: torch.Generator) -> dict[str, Tensor]:
        """What is shared instead of the gradients of one client.

        Args:
            gradients: name to a tensor of the parameter's shape, on the client's device and in its precision.
            generator: of this client and this place among its defenses, on the CPU. Random numbers drawn from it
                in float32, one tensor after another, are the same on every device and whoever the other clients are.

        Returns:
            The same names and shapes, all finite.
        """

    def for_client(self, client: Client) -> Defense:
        """The same for one client, where it must see more of it than the gradient: here the defense as it is."""
        return self

    def simulate(self, gradients: Gradients, shared: Gradients) -> Gradients:
        """What the client would have shared of these gradients instead, as an attacker who knows the defense says it.

        Of all that the defense may have drawn or rounded, that which comes nearest to ``shared`` is taken: where
        ``gradients`` can be those of the client, the result is ``shared``. An attack then matches the two.

        It is a function of one victim that ``torch.func.vmap`` runs for many, differentiable by ``gradients``: the same
        rules hold as for :class:`leakage.objectives.Term`. Without one of its own, a defense is matched as if it did
        nothing.

        Args:
            gradients: of the attacker's dummies, by name.
            shared: what the client shared, by name.
        """
        return gradients

    def noise_variance(self, shared: Gradients, images: int) -> Tensor | float:
        """About how far what it shares is from what :meth:`simulate` says: the variance of one entry; 0 for not at all.

        It is what an attack that knows what images look like weighs this by.

        Args:
            shared: what V clients shared, name to ``(V, *shape)``.
            images: over how many a client takes the mean: 1 if it sums.

        Returns:
            ``(V,)``, or one number for all.
        """
        return 0.0

    @property
    def example_norm(self) -> float | None:
        """The norm that gradients of single images are shortened to, where it begins from them."""
        return None

    @property
    def is_simulated(self) -> bool:
        """Whether it has a :meth:`simulate` of its own."""
        return type(self).simulate is not Defense.simulate

    def can_be_seen_after(self, later: Sequence[Defense]) -> bool:
        """Whether :meth:`simulate` is right of what was shared after further defenses; by default after none."""
        return not later

    def check(self, victim: Victim, defenses: Sequence[Defense]) -> None:
        """Raise a ``ValueError`` if such clients, with these defenses in all, can't use it."""

    def size(self, before: Size, gradients: Gradients) -> Size:
        """What is sent after this defense, of such gradients: here as much as before."""
        return before

    def describe(self) -> dict[str, Any]:
        """What the attacker is told: the name of the class and the arguments of its constructor.

        Numbers, words, lists and dicts, since it travels in a file. Override it to withhold some: what is withheld, an
        attacker takes to be the constructor's default.

        Raises:
            ValueError: an argument is not kept as an attribute of its name, or is called ``name``.
        """
        arguments = self._arguments()
        if "name" in arguments:
            raise ValueError(
                f"Expected no argument `name` of {type(self).__name__}, as its class is told by this word."
            )
        return {"name": type(self).__name__, **arguments}


def known_defenses(told: Sequence[Mapping[str, Any]]) -> tuple[Defense, ...]:
    """The defenses of a protocol, made anew from what it tells of them.

    Those of this package, and your own whose classes have been imported and have other names. Their constructors are
    called with what a file says: let them do no more than check and keep their arguments.

    Raises:
        ValueError: a name that no class has, or arguments that it does not take.

    Example:
        >>> from leakage.defenses import Clip
        >>> known_defenses([{"name": "Clip", "norm": 1.0}])
        (Clip(norm=1.0),)
    """
    classes = _subclasses(Defense)
    made = []
    for description in told:
        name = description["name"]
        arguments = {key: value for key, value in description.items() if key != "name"}
        mend = "Import its class, or pass adaptive=False for an attack that matches gradients as if it was not there."
        if name not in classes:
            raise ValueError(
                f"Expected a defense of the protocol to be one of {sorted(classes)}, but got {name!r}. {mend}"
            )
        try:
            made.append(classes[name](**arguments))
        except (TypeError, ValueError) as error:
            raise ValueError(f"Expected the arguments of {name}, but got {arguments}: {error} {mend}") from error
    return tuple(made)


def simulate(defenses: Sequence[Defense], gradients: Gradients, shared: Gradients) -> Gradients:
    """What one client would have shared of these gradients, after all its defenses: :meth:`Defense.simulate`."""
    for defense in defenses:
        if not defense.averages_out:
            gradients = defense.simulate(gradients, shared)
    return gradients


def told_noise(defenses: Sequence[Defense], shared: SharedGradient) -> Tensor:
    """``(V,)``: the variance of the noise on an entry of what clients shared, and at least that of rounding."""
    protocol, gradients = shared.protocol, shared.gradients
    images = protocol.num_images if protocol.reduction == "mean" else 1
    least = _LEAST_NOISE**2 * mean_square(gradients)
    added = sum(defense.noise_variance(gradients, images) for defense in defenses)
    return torch.maximum(least, added + torch.zeros_like(least))


def relative_noise(defenses: Sequence[Defense], shared: SharedGradient) -> Tensor:
    """``(V,)``: the same, relative to the squared norm of what was shared."""
    squares = mean_square(shared.gradients) * entries(shared.gradients)
    return told_noise(defenses, shared) / torch.where(squares > 0, squares, 1)


def entries(shared: Gradients) -> int:
    """Entries of the gradient of one of V clients."""
    return sum(tensor[0].numel() for tensor in shared.values())


def mean_square(shared: Gradients) -> Tensor:
    """``(V,)``, over all entries that a client shared."""
    total = torch.stack([tensor.flatten(1).double().square().sum(1) for tensor in shared.values()]).sum(0)
    return total / entries(shared)


def _subclasses(kind: Any) -> dict[str, type[Defense]]:
    """All below a class that can be made, by name; those of this package come first."""
    found: dict[str, type[Defense]] = {}
    for below in kind.__subclasses__():
        for name, each in {below.__name__: below, **_subclasses(below)}.items():
            if inspect.isabstract(each):
                continue
            if name not in found or each.__module__.startswith("leakage."):
                found[name] = each
    return found


def size_sent(defenses: Sequence[Defense], gradients: Gradients) -> Size:
    """What one client sends after its defenses; without any, all numbers in single precision.

    Example:
        >>> from leakage.defenses import Quantise, TopK
        >>> size_sent([TopK(0.1), Quantise(8)], {"weight": torch.zeros(10, 100)}).bytes
        229
    """
    size = Size.of(gradients)
    for defense in defenses:
        size = defense.size(size, gradients)
    return size


def within(gradients: Tensor, low: Tensor, high: Tensor, shared: Tensor) -> Tensor:
    """What was shared where a gradient is between two bounds, else that plus by how much it is outside."""
    return shared + (gradients - gradients.clamp(low, high))


def interval_variance(shared: Gradients) -> Tensor:
    """``(V,)``, what is reckoned with where nothing but an interval is known."""
    return _INTERVAL_NOISE**2 * mean_square(shared)


class Sparse(Defense):
    """Leaves entries of the gradient out, which are zero then: an attacker who knows of it compares only the others."""

    keeps_zeros = True

    def can_be_seen_after(self, later: Sequence[Defense]) -> bool:
        """Where zeros stay zero."""
        return all(defense.keeps_zeros for defense in later)

    def simulate(self, gradients: Gradients, shared: Gradients) -> Gradients:
        """Zero where what was shared is zero."""
        return {name: torch.where(shared[name] == 0, 0, tensor) for name, tensor in gradients.items()}


def whole_norm(gradients: Gradients) -> float:
    """The Euclidean norm of all tensors together; in double precision, where no square underflows."""
    return math.hypot(*(float(tensor.double().norm()) for tensor in gradients.values()))


def check_defenses(defenses: Sequence[Defense]) -> tuple[Defense, ...]:
    """The defenses as a tuple; a ``ValueError`` unless each is a :class:`Defense`."""
    example = "Expected `defenses` as a list of Defense objects, such as [GaussianNoise(1e-4)], but got"
    if not isinstance(defenses, list | tuple):
        raise ValueError(f"{example} {defenses!r}.")
    for defense in defenses:
        if not isinstance(defense, Defense):
            raise ValueError(f"{example} {defense!r} in it.")
    return tuple(defenses)


def defend(victim: Victim, shared: SharedGradient, images: Tensor, targets: Tensor, seed: int) -> dict[str, Tensor]:
    """The gradients of V clients, name to ``(V, *shape)``, after all their defenses, each client by itself.

    A client's id, ``seed`` and the place of a defense decide what it draws.

    Args:
        victim: what the clients do.
        shared: their gradients before.
        images: ``(V, N, C, H, W)``.
        targets: class probabilities ``(V, N, K)``.
        seed: see above.

    Raises:
        ValueError: a defense returns other names or shapes, or numbers that are not finite.
    """
    sent = []
    for row, number in enumerate(shared.ids.tolist()):
        gradients = {name: tensor[row] for name, tensor in shared.gradients.items()}
        state = {name: tensor[row] for name, tensor in shared.state.items()} if shared.own_weights else shared.state
        client = Client(victim, state, images[row], targets[row])
        for place, defense in enumerate(victim.defenses):
            generator = torch.Generator().manual_seed(derive_seed(seed, number, f"defense {place}"))
            defended = defense.for_client(client)(gradients, generator)
            _check_defended(defense, defended, gradients, number)
            gradients = {name: defended[name].to(tensor) for name, tensor in gradients.items()}
        sent.append(gradients)
    return {name: torch.stack([gradients[name] for gradients in sent]) for name in shared.gradients}


def _check_defended(defense: Defense, defended: Any, gradients: Gradients, victim: int) -> None:
    given = f"Expected {type(defense).__name__} to return"
    if not isinstance(defended, Mapping) or defended.keys() != gradients.keys():
        got = sorted(defended) if isinstance(defended, Mapping) else type(defended).__name__
        raise ValueError(f"{given} tensors named {sorted(gradients)}, but got {got}.")
    for name, tensor in gradients.items():
        found = defended[name]
        if not isinstance(found, Tensor) or found.shape != tensor.shape:
            got = show_shape(*found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{given} a tensor of shape {show_shape(*tensor.shape)} for {name!r}, but got {got}.")
        if not bool(torch.isfinite(found.to(tensor)).all()):
            raise ValueError(f"{given} finite numbers for {name!r}, but got NaN or inf (victim {victim}).")
