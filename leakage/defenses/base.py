"""The base class of defenses, which map a client's gradient to what it shares instead."""

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
    from leakage.clients.protocol import Protocol
    from leakage.clients.shared_gradient import SharedGradient
    from leakage.clients.victim import Victim

Gradients = Mapping[str, Tensor]
# The least noise that is assumed, in units of the gradient's root mean square: about the size of rounding errors.
_LEAST_NOISE = 1e-5
# The noise that is assumed where only an interval of each entry is known. With LeNet, FashionMNIST and signs, an attack
# with a prior reaches 17.5 dB with 0.1, 19.0 dB with 0.01 (six images), and 13.4 dB with 0.001, where searches get
# stuck (four images).
_INTERVAL_NOISE = 1e-2


@dataclass(frozen=True)
class Client:
    """One client with its private data, as its own defenses see it.

    Attributes:
        victim: model, loss and protocol.
        state: weights and buffers by name.
        images: ``(N, C, H, W)``.
        targets: class probabilities ``(N, K)``.
        order: indices of the images of all local steps if the client shuffles them, else None.
    """

    victim: Victim
    state: Mapping[str, Tensor]
    images: Tensor
    targets: Tensor
    order: Tensor | None = None


@dataclass(frozen=True)
class Size:
    """The size of what one client sends.

    Attributes:
        numbers: number of gradient entries that are sent.
        bits: bits of one entry.
        more: further bits, such as those for the places of the entries and for scales.
    """

    numbers: int
    bits: int = 32
    more: int = 0

    @classmethod
    def of(cls, gradients: Gradients) -> Size:
        """Return the size of all entries in single precision."""
        return cls(sum(tensor.numel() for tensor in gradients.values()))

    @property
    def bytes(self) -> int:
        """The total size in bytes, rounded up."""
        return -(-(self.numbers * self.bits + self.more) // 8)


class Defense(Piece, ABC):
    """What a client does to its gradient before it shares it.

    To write your own, implement ``__call__``. Keep the arguments of the constructor as attributes of the same names:
    :meth:`describe` puts them into the protocol, which the attacker knows.

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
        averages_out: whether the change that it makes is zero on average, so that attacks match the shared gradient
            directly.
        keeps_zeros: whether entries that are zero stay zero, and few others become zero.
        shortens: whether it shortens gradients by a factor that is not shared.
    """

    averages_out: bool = False
    keeps_zeros: bool = False
    shortens: bool = False

    @abstractmethod
    def __call__(self, gradients: Gradients, generator: torch.Generator) -> dict[str, Tensor]:
        """Return what one client shares instead of its gradients.

        Args:
            gradients: name to a tensor of the parameter's shape, on the client's device and in its precision.
            generator: a CPU generator, seeded for this client and for the position of this defense. Random numbers
                drawn from it in float32, one tensor after another, do not depend on the device or on other clients.

        Returns:
            Tensors of the same names and shapes, with finite values.
        """

    def for_client(self, client: Client) -> Defense:
        """Return the defense for one client. Override it if the defense needs more than the client's gradient."""
        return self

    def simulate(self, gradients: Gradients, shared: Gradients) -> Gradients:
        """Return what the client would have shared if its gradients were ``gradients``.

        Of all outcomes that the defense could produce by its draws and its rounding, this is the one nearest to
        ``shared``. If ``gradients`` can be the client's gradients, the result is therefore ``shared``. The attack then
        matches the result with ``shared``.

        The method handles one victim and must be differentiable with respect to ``gradients``; ``torch.func.vmap`` runs
        it for many victims, so the rules of :class:`leakage.objectives.Term` apply. A defense that does not override it
        is matched as if it did nothing.

        Args:
            gradients: gradients of the dummy images, by name.
            shared: what the client shared, by name.
        """
        return gradients

    def noise_variance(self, shared: Gradients, images: float) -> Tensor | float:
        """Estimate the variance of the noise that :meth:`simulate` does not explain; 0 by default.

        It is the variance of one entry of the difference between what is shared and what :meth:`simulate` returns for
        the client's gradient. An attack with an image prior uses it to weigh the gradient against the prior.

        Args:
            shared: what V clients shared, name to ``(V, *shape)``.
            images: number of images that a client averages over; 1 if it sums. With local steps, whose noises average
                out, it is as much larger as the noise on their average is smaller.

        Returns:
            ``(V,)``, or one number for all victims.
        """
        return 0.0

    @property
    def example_norm(self) -> float | None:
        """The norm to which the gradient of each image is clipped; None if the defense does not clip per image."""
        return None

    @property
    def is_simulated(self) -> bool:
        """Whether the class overrides :meth:`simulate`."""
        return type(self).simulate is not Defense.simulate

    def can_be_seen_after(self, later: Sequence[Defense]) -> bool:
        """Return whether :meth:`simulate` is still correct after ``later`` defenses.

        By default, it is correct only if there are none.

        Args:
            later: the defenses that the client applies after this one.
        """
        return not later

    def check(self, victim: Victim, defenses: Sequence[Defense]) -> None:
        """Raise a ``ValueError`` if clients like ``victim``, with all of ``defenses``, can't use this defense."""

    def size(self, before: Size, gradients: Gradients) -> Size:
        """Return the size of what is sent after this defense; by default the size ``before`` it."""
        return before

    def describe(self) -> dict[str, Any]:
        """Return the description known to the attacker: the name of the class and its constructor's arguments.

        The values are numbers, strings, lists and dicts, since they are stored in a file. Override this method to
        withhold arguments: the attacker then assumes the constructor's defaults.

        Raises:
            ValueError: an argument is not kept as an attribute of its name, or is called ``name``.
        """
        arguments = self._arguments()
        if "name" in arguments:
            raise ValueError(
                f"Expected no argument `name` of {type(self).__name__}: `name` is reserved for the name of the class."
            )
        return {"name": type(self).__name__, **arguments}


def known_defenses(descriptions: Sequence[Mapping[str, Any]]) -> tuple[Defense, ...]:
    """Create the defenses that a protocol describes.

    The classes of this package are known, and your own classes once they are imported, if their names differ from
    these. The constructors are called with values from a file: they should only check and keep their arguments.

    Args:
        descriptions: the descriptions, as the ``defenses`` of a :class:`leakage.Protocol` hold them.

    Raises:
        ValueError: no class has this name, or it does not accept these arguments.

    Example:
        >>> from leakage.defenses import Clip
        >>> known_defenses([{"name": "Clip", "norm": 1.0}])
        (Clip(norm=1.0),)
    """
    classes = _subclasses(Defense)
    made = []
    for description in descriptions:
        name = description["name"]
        arguments = {key: value for key, value in description.items() if key != "name"}
        hint = "Import its class, or pass adaptive=False for an attack that ignores the defense."
        if name not in classes:
            raise ValueError(
                f"Expected a defense of the protocol to be one of {sorted(classes)}, but got {name!r}. {hint}"
            )
        try:
            made.append(classes[name](**arguments))
        except (TypeError, ValueError) as error:
            raise ValueError(f"Expected the arguments of {name}, but got {arguments}: {error} {hint}") from error
    return tuple(made)


def simulate(defenses: Sequence[Defense], gradients: Gradients, shared: Gradients) -> Gradients:
    """Apply :meth:`Defense.simulate` of all defenses: what one client would have shared of these gradients."""
    for defense in defenses:
        if not defense.averages_out:
            gradients = defense.simulate(gradients, shared)
    return gradients


def known_noise(defenses: Sequence[Defense], shared: SharedGradient) -> Tensor:
    """Return ``(V,)``, the variance of the noise on one entry of what clients shared; at least that of rounding."""
    protocol, gradients = shared.protocol, shared.gradients
    images = (protocol.step_size if protocol.reduction == "mean" else 1) * _less_noise(protocol)
    least = _LEAST_NOISE**2 * mean_square(gradients)
    added = sum(defense.noise_variance(gradients, images) for defense in defenses)
    return torch.maximum(least, added + torch.zeros_like(least))


def _less_noise(protocol: Protocol) -> float:
    """Return by what factor the noise of single steps is larger than that on their average."""
    steps, momentum = protocol.local_steps, protocol.momentum
    # The noise of a step is also in the later steps, by momentum.
    through = [(1 - momentum ** (steps - step)) / (1 - momentum) for step in range(steps)]
    return steps / math.hypot(*through)


def relative_noise(defenses: Sequence[Defense], shared: SharedGradient) -> Tensor:
    """Return ``(V,)``, the variance of :func:`known_noise` divided by the squared norm of what was shared."""
    squares = mean_square(shared.gradients) * entries(shared.gradients)
    return known_noise(defenses, shared) / torch.where(squares > 0, squares, 1)


def entries(shared: Gradients) -> int:
    """Return the number of entries in the gradient of one client."""
    return sum(tensor[0].numel() for tensor in shared.values())


def mean_square(shared: Gradients) -> Tensor:
    """Return ``(V,)``, the mean square over all entries that a client shared."""
    total = torch.stack([tensor.flatten(1).double().square().sum(1) for tensor in shared.values()]).sum(0)
    return total / entries(shared)


def _subclasses(kind: Any) -> dict[str, type[Defense]]:
    """Return the concrete subclasses of a class by name; those of this package take precedence."""
    found: dict[str, type[Defense]] = {}
    for below in kind.__subclasses__():
        for name, each in {below.__name__: below, **_subclasses(below)}.items():
            if inspect.isabstract(each):
                continue
            if name not in found or each.__module__.startswith("leakage."):
                found[name] = each
    return found


def size_sent(defenses: Sequence[Defense], gradients: Gradients) -> Size:
    """Return the size of what a client sends after its defenses; without any, all in single precision.

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
    """Return ``shared``, plus the distance by which ``gradients`` lie outside the interval from ``low`` to ``high``."""
    return shared + (gradients - gradients.clamp(low, high))


def interval_variance(shared: Gradients) -> Tensor:
    """Return ``(V,)``, the variance that is assumed where only an interval of each entry is known."""
    return _INTERVAL_NOISE**2 * mean_square(shared)


class Sparse(Defense):
    """Base class of defenses that set entries of the gradient to zero.

    An attacker who knows the defense compares only the other entries.
    """

    keeps_zeros = True

    def can_be_seen_after(self, later: Sequence[Defense]) -> bool:
        """Return whether all ``later`` defenses keep zeros."""
        return all(defense.keeps_zeros for defense in later)

    def simulate(self, gradients: Gradients, shared: Gradients) -> Gradients:
        """Return the gradients with zeros where ``shared`` is zero."""
        return {name: torch.where(shared[name] == 0, 0, tensor) for name, tensor in gradients.items()}


def whole_norm(gradients: Gradients) -> float:
    """Return the Euclidean norm of all tensors together, in double precision, so that no square underflows."""
    return math.hypot(*(float(tensor.double().norm()) for tensor in gradients.values()))


def check_defenses(defenses: Sequence[Defense]) -> tuple[Defense, ...]:
    """Return the defenses as a tuple; raise a ``ValueError`` unless each is a :class:`Defense`."""
    example = "Expected `defenses` as a list of Defense objects, such as [GaussianNoise(1e-4)], but got"
    if not isinstance(defenses, list | tuple):
        raise ValueError(f"{example} {defenses!r}.")
    for defense in defenses:
        if not isinstance(defense, Defense):
            raise ValueError(f"{example} {defense!r} in it.")
    return tuple(defenses)


def defend(
    victim: Victim, shared: SharedGradient, images: Tensor, targets: Tensor, orders: Tensor | None, seed: int
) -> dict[str, Tensor]:
    """Apply all defenses to the gradients of V clients, one client at a time.

    The client's id, ``seed`` and the position of a defense decide what it draws.

    Args:
        victim: the model, the protocol and the defenses of the clients.
        shared: the gradients before the defenses.
        images: ``(V, N, C, H, W)``.
        targets: class probabilities ``(V, N, K)``.
        orders: ``(V, images of all steps)``, the order of the images if clients shuffle them.
        seed: seed of the draws.

    Returns:
        The defended gradients, name to ``(V, *shape)``.

    Raises:
        ValueError: a defense returns other names or shapes, or numbers that are not finite.
    """
    numbers, clients = shared.ids.tolist(), []
    for row in range(len(numbers)):
        state = {name: tensor[row] for name, tensor in shared.state.items()} if shared.own_weights else shared.state
        order = None if orders is None else orders[row].to(images.device)
        clients.append(Client(victim, state, images[row], targets[row], order))
    gradients = dict(shared.gradients)
    for place, defense in enumerate(victim.defenses):
        sent = []
        for number, client, *tensors in zip(numbers, clients, *gradients.values(), strict=True):
            own = dict(zip(gradients, tensors, strict=True))
            generator = torch.Generator().manual_seed(derive_seed(seed, number, f"defense {place}"))
            defended = defense.for_client(client)(own, generator)
            _check_defended(defense, defended, own)
            sent.append(defended)
        gradients = {name: torch.stack([each[name] for each in sent]).to(like) for name, like in gradients.items()}
        _check_finite(defense, gradients, numbers)
    return gradients


def _check_defended(defense: Defense, defended: Any, gradients: Gradients) -> None:
    given = f"Expected {type(defense).__name__} to return"
    if not isinstance(defended, Mapping) or defended.keys() != gradients.keys():
        got = sorted(defended) if isinstance(defended, Mapping) else type(defended).__name__
        raise ValueError(f"{given} tensors named {sorted(gradients)}, but got {got}.")
    for name, tensor in gradients.items():
        found = defended[name]
        if not isinstance(found, Tensor) or found.shape != tensor.shape:
            got = show_shape(*found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{given} a tensor of shape {show_shape(*tensor.shape)} for {name!r}, but got {got}.")


def _check_finite(defense: Defense, gradients: Gradients, numbers: Sequence[int]) -> None:
    for name, tensor in gradients.items():
        finite = tensor.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            number = numbers[int(finite.long().argmin())]
            raise ValueError(
                f"Expected {type(defense).__name__} to return finite numbers for {name!r}, but got NaN or inf (victim "
                f"{number})."
            )
