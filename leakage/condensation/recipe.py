"""The recipe of a synthetic set: how it was made and what it scored. It is saved in the header of the file."""

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
    """The score of a set in an evaluation, with everything that is needed to reproduce it.

    Attributes:
        evaluation: ``"dc"`` or ``"dsa"``, the ``augmentation`` of :func:`~leakage.condensation.evaluate`.
        accuracies: test accuracies of the networks, in order, from 0 to 1.
        network: architecture of the networks, a key of :data:`leakage.models.NETWORKS`.
        epochs, seed, precision: options of their training, see :func:`~leakage.condensation.evaluate`.

    Raises:
        ValueError: a name is unknown, there are no accuracies, one is outside [0, 1], or a number is out of range.

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
            raise ValueError(f"Expected `accuracies` to be at least one number from 0 to 1, but got {given!r}.")
        object.__setattr__(self, "accuracies", tuple(given))

    @property
    def options(self) -> dict[str, Any]:
        """Options of :func:`~leakage.condensation.evaluate` that reproduce the score, except those of the networks."""
        return {
            "augmentation": self.evaluation, "epochs": self.epochs, "seed": self.seed, "precision": self.precision,
        }  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How a :class:`~leakage.condensation.SyntheticSet` was made, and what it scored.

    The data set, the classes and the images per class are in the set itself.

    Attributes:
        method: name of the method, such as ``"fast"`` or ``"random"``.
        seed: seed of all random draws.
        options: further options of the method, with values of JSON types.
        seconds: time spent on making the set, without evaluations.
        scores: scores of the set, one for each evaluation.
        version: version of the library that made it.
        commit: commit of the code, if known.

    Raises:
        ValueError: a value has another type, or JSON can't represent the options.

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
                raise ValueError(f"Expected `{name}` to be a string, but got {value!r}.")
        number = isinstance(self.seconds, int | float) and not isinstance(self.seconds, bool)
        if not number or not 0 <= self.seconds < math.inf:
            raise ValueError(f"Expected `seconds` of at least 0, but got {self.seconds!r}.")
        if not isinstance(self.scores, tuple) or not all(isinstance(score, Score) for score in self.scores):
            raise ValueError(f"Expected `scores` to be a tuple of Scores, but got {self.scores!r}.")
        try:
            options = json.loads(json.dumps(self.options, allow_nan=False))  # turns tuples into lists, as a file does
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"Expected `options` that JSON can represent, but got {self.options!r}.") from error
        if not isinstance(options, dict):
            raise ValueError(f"Expected `options` to be a dictionary, but got {self.options!r}.")
        object.__setattr__(self, "options", options)

    def score(self, evaluation: str) -> Score | None:
        """Return the score of the set in an evaluation, or None if it is not known."""
        return next((score for score in self.scores if score.evaluation == evaluation), None)

    def with_score(self, score: Score) -> Recipe:
        """Return a copy of the recipe with this score, which replaces one of the same evaluation."""
        others = (other for other in self.scores if other.evaluation != score.evaluation)
        return dataclasses.replace(self, scores=(*others, score))

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as a dictionary for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> Recipe:
        """Return the recipe that :meth:`to_json` has converted.

        Raises:
            ValueError: the content is not that of a recipe.
        """
        try:
            scores = tuple(Score(**score) for score in content["scores"])
            return cls(**{**content, "scores": scores})
        except (KeyError, TypeError) as error:
            raise ValueError(f"Expected a recipe with its scores, but got one that can't be read: {error}") from error

    @classmethod
    def of(cls, condensation: Condensation, method: str | None = None) -> Recipe:
        """Return the recipe of the current images of a condensation.

        Args:
            condensation: a condensation during or after ``Trainer.fit``.
            method: name of the method; by default that of the condensation.
        """
        options = {name: value for name, value in condensation.hparams.items() if name not in ("seed", "num_classes")}
        options |= {**dataclasses.asdict(condensation.protocol), "loops": (condensation.outer, condensation.inner)}
        options["iterations"] = condensation.iteration
        options = json.loads(json.dumps(options, default=str))
        seconds = math.fsum(spent for part, spent in condensation.seconds.items() if part != "evaluation")
        return cls(method or condensation.method, condensation.hparams["seed"], options, seconds)


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
