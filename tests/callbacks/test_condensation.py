from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning import LightningModule

from leakage.callbacks import CondensationProgressBar, SyntheticEvaluation, SyntheticImages, read_accuracies
from leakage.models import ConvNet
from tests.callbacks.condensation_runs import fit, module, quick


class Other(LightningModule):
    def on_fit_start(self) -> None:
        raise AssertionError("It shall be refused before anything is done.")

    def training_step(self, batch: Any, batch_idx: int) -> None:
        raise AssertionError

    def configure_optimizers(self) -> None:
        return None


@pytest.mark.parametrize("callback", [CondensationProgressBar, SyntheticImages, SyntheticEvaluation])
def test_other_modules_are_refused(callback, tmp_path: Path) -> None:
    expected = f"Expected {callback.__name__} with a condensation, but got Other"
    with pytest.raises(ValueError, match=expected):
        fit(Other(), callback(), default_root_dir=tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SyntheticImages(moments=5), "Expected `moments` as a list of whole numbers, but got 5"),
        (lambda: SyntheticImages(moments=(0, -1)), "Expected `moments` to be a whole number of at least 0, but got -1"),
        (lambda: SyntheticEvaluation((0, 1.5)), "Expected `at` to be a whole number of at least 0, but got 1.5"),
        (lambda: SyntheticEvaluation(networks=0), "Expected `networks` to be a whole number of at least 1, but got 0"),
        (lambda: SyntheticEvaluation(epochs=0), "Expected `epochs` to be a whole number of at least 1, but got 0"),
        (lambda: SyntheticEvaluation(seed=-1), "Expected `seed` to be a whole number of at least 0, but got -1"),
        (lambda: SyntheticEvaluation(precision="8"), "Expected `precision` to be one of .* but got '8'"),
        (
            lambda: SyntheticEvaluation(augmentation="idc"),
            r"Expected `augmentation` to be one of \['dc', 'dsa'\], but got",
        ),
        (lambda: SyntheticEvaluation(network="mlp"), r"Expected `network` to be a torch\.nn\.Module, but got str"),
    ],
)
def test_options_out_of_range(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_network_for_other_images_is_refused(tmp_path: Path) -> None:
    condensation = module()
    with pytest.raises(ValueError, match="Expected a `network` for images"):
        fit(condensation, quick(tmp_path, at=(), network=ConvNet(3, 8, 3, width=2, depth=1)))
    assert condensation.step == 0, "at the start, not at the first test"


def test_there_is_no_last_test_before_the_first() -> None:
    with pytest.raises(RuntimeError, match="Expected at least one completed test, but got none yet"):
        _ = SyntheticEvaluation().last


def test_another_file_is_no_curve(tmp_path: Path) -> None:
    (tmp_path / "accuracy.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"Expected an `accuracy\.csv` of SyntheticEvaluation, but got"):
        read_accuracies(tmp_path / "accuracy.csv")
