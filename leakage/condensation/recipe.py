"""How a synthetic set was made and what it scored, as it stands in the header of its file."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import leakage
from leakage.condensation.training import EVALUATIONS, evaluation_options
from leakage.errors import check_choice, check_count
from leakage.models import NETWORKS

if TYPE_CHECKING:
    from leakage.condensation.condensation import Condensation


@dataclass(frozen=True)
class Score:
    """What a set scored in an evaluation, and all that is needed to have the same figure again.

    Attributes:
        evaluation: ``"dc"`` or ``"dsa"``, the ``augmentation`` of :func:`~leakage.condensation.evaluate`.
        accuracies: of the networks, in their order, from 0 to 1.
        network: their architecture, a key of :data:`leakage.models.NETWORKS`.
        epochs, seed, precision: of their training, see :func:`~leakage.condensation.evaluate`.

    Raises:
        ValueError: an unknown name, no accuracies or some outside of [0, 1], or a number out of its range.

    Example:
        >>> Score("dc", (0.70, 0.71, 0.69), epochs=300).options
        {'augmentation': 'dc', 'epochs': 300, 'seed': 0, 'precision': '32-true'}
    """

    evaluation: str
    accuracies: tuple[float, ...]
    network: str = "convnet"
    epochs: int = 300
    seed: int = 0
    precision: str = "32-true"

    def __post_init__(self) -> None:
        check_choice("evaluation", self.evaluation, EVALUATIONS)
        check_choice("network", self.network, NETWORKS)
        evaluation_options("", epochs=self.epochs, seed=self.seed, precision=self.precision)
        given = self.accuracies
        if not isinstance(given, list | tuple) or not given or not all(map(_is_share, given)):
            raise ValueError(f"Expected `accuracies` as at least one number from 0 to 1, but got {given!r}.")
        object.__setattr__(self, "accuracies", tuple(given))

    @property
    def options(self) -> dict[str, Any]:
        """Of :func:`~leakage.condensation.evaluate`, but for the networks."""
        return {
            "augmentation": self.evaluation, "epochs": self.epochs, "seed": self.seed, "precision": self.precision,
        }  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How a :class:`~leakage.condensation.SyntheticSet` was made, and what it scored.

    Data set, classes and images per class are those of the set.

    Attributes:
        method: what it was made by, such as ``"fast"`` or ``"random"``.
        seed: of all that was drawn.
        options: further ones of the method, as JSON has them.
        seconds: spent on making it, without tests.
        scores: what it scored, each evaluation once.
        version: of the library that made it.
        commit: of its code, where it is known.

    Raises:
        ValueError: values of other types, or options that JSON can't hold.

    Example:
        >>> recipe = Recipe("fast", options={"iterations": 20}, scores=(Score("dc", (0.70, 0.71)),))
        >>> recipe.score("dc").accuracies, recipe.score("dsa"), Recipe.from_json(recipe.to_json()) == recipe
        ((0.7, 0.71), None, True)
    """

    method: str
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    scores: tuple[Score, ...] = ()
    version: str = leakage.__version__
    commit: str | None = None

    def __post_init__(self) -> None:
        check_count(0, seed=self.seed)
        words = {"method": self.method, "version": self.version, "commit": self.commit or ""}
        for name, value in words.items():
            if not isinstance(value, str):
                raise ValueError(f"Expected `{name}` as words, but got {value!r}.")
        number = isinstance(self.seconds, int | float) and not isinstance(self.seconds, bool)
        if not number or not 0 <= self.seconds < math.inf:
            raise ValueError(f"Expected `seconds` of at least 0, but got {self.seconds!r}.")
        if not isinstance(self.scores, tuple) or not all(isinstance(score, Score) for score in self.scores):
            raise ValueError(f"Expected `scores` as a tuple of Scores, but got {self.scores!r}.")
        try:
            options = json.loads(json.dumps(self.options, allow_nan=False))  # lists for tuples, as in a file
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"Expected `options` that JSON can hold, but got {self.options!r}.") from error
        if not isinstance(options, dict):
            raise ValueError(f"Expected `options` by their names, but got {self.options!r}.")
        object.__setattr__(self, "options", options)

    def score(self, evaluation: str) -> Score | None:
        """What the set scored in an evaluation, None if that is not known."""
        return next((score for score in self.scores if score.evaluation == evaluation), None)

    def with_score(self, score: Score) -> Recipe:
        """The same with a score, in place of the one of that evaluation."""
        others = (other for other in self.scores if other.evaluation != score.evaluation)
        return dataclasses.replace(self, scores=(*others, score))

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> Recipe:
        """What :meth:`to_json` gave; a ``ValueError`` for anything else."""
        try:
            scores = tuple(Score(**score) for score in content["scores"])
            return cls(**{**content, "scores": scores})
        except (KeyError, TypeError) as error:
            raise ValueError(f"Expected a recipe with its scores, but got one that can't be read: {error}") from error

    @classmethod
    def of(cls, condensation: Condensation, method: str | None = None) -> Recipe:
        """How the images of a condensation came about, as far as it has got.

        Args:
            condensation: during or after ``Trainer.fit``.
            method: what to call it; by default what the condensation calls itself.
        """
        options = {name: value for name, value in condensation.hparams.items() if name not in ("seed", "num_classes")}
        options |= {**dataclasses.asdict(condensation.protocol), "loops": (condensation.outer, condensation.inner)}
        options["iterations"] = condensation.iteration
        options = json.loads(json.dumps(options, default=str))
        seconds = math.fsum(spent for part, spent in condensation.seconds.items() if part != "evaluation")
        return cls(method or condensation.method, condensation.hparams["seed"], options, seconds)


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
