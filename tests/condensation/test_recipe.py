"""How a set was made and what it scored, in the header of its file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import leakage
from leakage.condensation import GradientMatchingCondensation, Recipe, Score, SyntheticSet, evaluate
from leakage.files.tensors import read_safetensors, write_safetensors

SCORE = Score("dc", (0.7, 0.71), epochs=300, seed=3)
RECIPE = Recipe("fast", 5, {"iterations": 20, "loops": (1, 1)}, 54.5, (SCORE,), commit="abc")


def make(recipe: Recipe | None = RECIPE) -> SyntheticSet:
    images = torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    return SyntheticSet(images, torch.tensor([0, 1]), (0.5,), (0.5,), ("a", "b"), "toys", recipe)


def test_round_trip(tmp_path: Path) -> None:
    make().save(tmp_path / "s")
    loaded = SyntheticSet.load(tmp_path / "s").recipe
    assert loaded == RECIPE
    assert loaded is not None
    assert loaded.options == {"iterations": 20, "loops": [1, 1]}
    assert loaded.version == leakage.__version__
    assert loaded.score("dc") == SCORE
    assert loaded.score("dsa") is None


def test_files_without_a_recipe_are_as_before(tmp_path: Path) -> None:
    make(None).save(tmp_path / "s")
    assert SyntheticSet.load(tmp_path / "s").recipe is None
    header, _ = read_safetensors(tmp_path / "s", "leakage.SyntheticSet")
    assert header.keys() == {"format", "version", "mean", "std", "class_names", "dataset"}


def test_a_score_takes_the_place_of_that_of_the_same_evaluation() -> None:
    other, newer = Score("dsa", (0.8,), epochs=1000), Score("dc", (0.9,))
    both = RECIPE.with_score(other)
    assert both.scores == (SCORE, other)
    assert both.with_score(newer).scores == (other, newer)
    assert RECIPE.scores == (SCORE,)


def test_what_a_condensation_says_of_itself(kit: SimpleNamespace, tmp_path: Path) -> None:
    condensation: GradientMatchingCondensation = kit.condense(
        2, loops=(2, 1), iterations=3, seed=4, augmentation="flip", initialization="real"
    )
    condensation.save(tmp_path)
    recipe = SyntheticSet.load(tmp_path / "synthetic.safetensors").recipe
    assert recipe is not None
    assert (recipe.method, recipe.seed, recipe.scores, recipe.commit) == ("published", 4, (), None)
    expected = {
        "images_per_class": 2, "protocol": "published", "iterations": 3, "loops": [2, 1], "augmentation": "flip",
        "initialization": "real", "learning_rate": 0.1, "momentum": 0.5, "decay": False, "network_reuse": 1,
    }  # fmt: skip
    assert expected.items() <= recipe.options.items()
    spent = sum(seconds for part, seconds in condensation.seconds.items() if part != "evaluation")
    assert recipe.seconds == pytest.approx(spent)
    assert Recipe.of(condensation, "dsa").method == "dsa"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation": "idc"}, r"Expected `evaluation` to be one of \['dc', 'dsa'\], but got 'idc'"),
        ({"network": "swin"}, "Expected `network` to be one of .*but got 'swin'"),
        ({"accuracies": ()}, r"Expected `accuracies` to be at least one number from 0 to 1, but got \(\)"),
        ({"accuracies": (0.5, 70.1)}, r"from 0 to 1, but got \(0.5, 70.1\)"),
        ({"accuracies": (float("nan"),)}, "from 0 to 1, but got"),
        ({"accuracies": 0.5}, "from 0 to 1, but got 0.5"),
        ({"epochs": 0}, "Expected `epochs` to be a whole number of at least 1"),
        ({"seed": -1}, "Expected `seed` to be a whole number of at least 0"),
        ({"precision": "8"}, "Expected `precision` to be one of"),
    ],
)
def test_scores_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SCORE, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": None}, "Expected `method` to be a string, but got None"),
        ({"version": 1}, "Expected `version` to be a string, but got 1"),
        ({"commit": 1}, "Expected `commit` to be a string, but got 1"),
        ({"seed": -1}, "Expected `seed` to be a whole number of at least 0"),
        ({"seconds": -1.0}, "Expected `seconds` of at least 0, but got -1.0"),
        ({"seconds": float("inf")}, "Expected `seconds` of at least 0, but got inf"),
        ({"options": [1]}, r"Expected `options` to be a dictionary, but got \[1\]"),
        ({"options": {"a": {1}}}, "Expected `options` that JSON can represent, but got"),
        ({"options": {"a": float("nan")}}, "Expected `options` that JSON can represent, but got"),
        ({"scores": [SCORE]}, "Expected `scores` to be a tuple of Scores"),
    ],
)
def test_recipes_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RECIPE, **changes)


@pytest.mark.parametrize(
    "recipe",
    [
        "{", "5", "[]", "{}", '"fast"', '{"method": "fast"}', '{"scores": []}', '{"method": "fast", "scores": [5]}',
        '{"method": "fast", "scores": [{"evaluation": "dc"}]}', '{"method": "fast", "scores": [], "cook": "me"}',
        '{"method": "fast", "scores": [{"evaluation": "dc", "accuracies": [7]}]}', "[" * 100_000,
    ],
)  # fmt: skip
def test_broken_recipes(tmp_path: Path, recipe: str) -> None:
    header = {name: json.dumps(value) for name, value in (("mean", [0.5]), ("std", [0.5]), ("class_names", ["a", "b"]))}
    tensors = {"images": torch.zeros(2, 1, 3, 3), "labels": torch.tensor([0, 1])}
    write_safetensors(tmp_path / "s", "leakage.SyntheticSet", tensors, header | {"dataset": '""', "recipe": recipe})
    with pytest.raises(ValueError, match=r"Expected a synthetic set in .*but got"):
        SyntheticSet.load(tmp_path / "s")


def test_a_recipe_of_another_data_set(kit: SimpleNamespace) -> None:
    data = kit.data()
    condensed = kit.condense(iterations=1).synthetic_set()
    data.name = "others"
    message = "Expected the data set that the recipe of the synthetic set names, 'stripes', but got 'others'"
    with pytest.raises(ValueError, match=message):
        condensed.check_name(data)
    with pytest.raises(ValueError, match=message):
        evaluate(condensed, data, network=kit.network(), networks=1, epochs=1, device="cpu", progress=False)
    without = replace(condensed, recipe=None)
    evaluate(without, data, network=kit.network(), networks=1, epochs=1, device="cpu", progress=False)
