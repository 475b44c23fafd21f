"""``leakage fit``: run any attack on any victims, or any condensation, with LightningCLI."""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning import Callback, LightningDataModule, LightningModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import nn

# Once its module is imported, a class can be given by its name alone.
from leakage import attacks, datamodules, models  # noqa: F401
from leakage.callbacks.results import ResultsCallback
from leakage.cli import quiet
from leakage.cli.fit_help import help_asked_for
from leakage.cli.refusals import explain, one_line, own_words
from leakage.condensation import Condensation
from leakage.files.checkpoints import WholeCheckpointIO

# Limit of the values in a configuration; hand-written ones have fewer than a hundred.
_MOST_VALUES = 10_000

# The callbacks of `leakage fit` unless `trainer.callbacks` says otherwise.
_CALLBACKS: list[dict[str, Any]] = [
    {"class_path": "leakage.callbacks.AttackProgressBar"},
    {"class_path": "leakage.callbacks.VictimTable"},
    {"class_path": "leakage.callbacks.Gallery"},
    {"class_path": "leakage.callbacks.TimedCheckpoint"},
]
# The callbacks if the model is a condensation.
_CONDENSATION_CALLBACKS = [
    {"class_path": "leakage.callbacks.CondensationProgressBar"},
    {"class_path": "leakage.callbacks.SyntheticImages"},
    {"class_path": "leakage.callbacks.TimedCheckpoint"},
]
_TRAINER = {
    "max_epochs": 1,
    # Number of training steps between two points of the `val/*` curves, which need ground truth.
    "val_check_interval": 50,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "plugins": [{"class_path": "leakage.files.checkpoints.WholeCheckpointIO"}],
}


class LeakageCLI(LightningCLI):
    """A LightningCLI with a single subcommand, ``fit``."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return ``fit`` only: there is no separate validation, test or prediction."""
        return {"fit": LightningCLI.subcommands()["fit"]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set the callbacks as defaults, so that a configuration can replace them."""
        parser.set_defaults({"trainer.callbacks": _CALLBACKS})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments and refuse a seed that NumPy does not accept."""
        super().parse_arguments(parser, args)
        seed = self.config[self.config.subcommand].seed_everything
        if isinstance(seed, int) and not 0 <= seed < 2**32:
            raise ValueError(f"Expected `seed_everything` from 0 to {2**32 - 1}, but got {seed}.")

    def before_instantiate_classes(self) -> None:
        """If the model is a condensation, replace the default callbacks with those of a condensation."""
        config = self.config[self.config.subcommand]
        module, _, name = config.model.class_path.rpartition(".")
        model = getattr(importlib.import_module(module), name)
        if not isinstance(model, type) or not issubclass(model, Condensation):
            return
        # The steps of a condensation are long, and there may be only a few.
        config.trainer.log_every_n_steps = config.trainer.log_every_n_steps or 1
        default = [entry["class_path"] for entry in _CALLBACKS]
        given = config.trainer.callbacks or []
        found = [getattr(entry, "class_path", None) for entry in given[: len(default)]]
        if found == default:
            parser = LightningArgumentParser()
            parser.add_argument("--callbacks", type=list[Callback])
            fitting = parser.parse_object({"callbacks": _CONDENSATION_CALLBACKS}).callbacks
            config.trainer.callbacks = [*fitting, *given[len(default) :]]

    def instantiate_classes(self) -> None:
        """Create the objects and put the clients' network into evaluation mode, for which there is no option.

        Raises:
            MisconfigurationException: a class refuses its arguments. Nothing has been run.
        """
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(own_words(error) or str(error)) from error
        model = getattr(self.datamodule, "model", None)
        if isinstance(model, nn.Module):
            model.eval()

    def _parse_ckpt_path(self) -> None:
        # Lightning's own method would take class and options from the file, which is not trusted. They are compared
        # later.
        path = self.config[self.config.subcommand].ckpt_path
        if path is not None:
            WholeCheckpointIO().load_checkpoint(path)

    def after_fit(self) -> None:
        """Print where the results are."""
        if not self.trainer.is_global_zero:
            return
        callbacks = getattr(self.trainer, "callbacks", [])
        folders = [callback.folder for callback in callbacks if isinstance(callback, ResultsCallback)]
        for folder in dict.fromkeys(folders):
            print(f"Results: {folder}")


def fit(arguments: Sequence[str]) -> None:
    """Run any attack on any victims, or any condensation."""
    quiet()
    if text := help_asked_for(arguments):
        print(text)
        sys.exit()
    try:
        for path in _configs(arguments):
            check_config(path)
        LeakageCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=False,
            save_config_kwargs={"overwrite": True},
            trainer_defaults=_TRAINER,
            # By default, it prints hundreds of options before the error.
            parser_kwargs={"prog": "leakage", "exit_on_error": False, "fit": {"exit_on_error": False}},
            auto_configure_optimizers=False,
            args=["fit", *arguments],
        )
    except argparse.ArgumentError as error:
        _refuse(f"{explain(str(error))} See `leakage fit --help`.")
    except FloatingPointError as error:
        sys.exit(f"leakage fit: error: {one_line(str(error))}")
    except (OSError, MisconfigurationException) as error:
        _refuse(one_line(str(error)))
    except ValueError as error:
        # Only errors of this library about bad input become one line; all others keep their traceback.
        reason = own_words(error)
        if reason is None:
            raise
        _refuse(reason)


def _refuse(reason: str) -> NoReturn:
    sys.stderr.write(f"leakage fit: error: {reason}\n")
    sys.exit(2)


def _configs(arguments: Sequence[str]) -> list[Path]:
    named = [value for option, value in itertools.pairwise(arguments) if option in ("-c", "--config")]
    named += [argument.removeprefix("--config=") for argument in arguments if argument.startswith("--config=")]
    return [Path(name) for name in named if Path(name).is_file()]


def check_config(path: Path) -> None:
    """Raise a ``ValueError`` unless a configuration is YAML of a size and depth that the parser can handle.

    With anchors, a few lines can stand for billions of values, or contain themselves.
    """
    sizes: dict[int, float] = {}

    def unfolded(node: yaml.Node) -> float:
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # the size of a node that contains itself
            parts = itertools.chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
            sizes[id(node)] = 1 if isinstance(node, yaml.ScalarNode) else 1 + sum(map(unfolded, parts))
        return sizes[id(node)]

    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        size = unfolded(node) if node is not None else 0
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        reason = "values nested too deeply" if isinstance(error, RecursionError) else one_line(str(error))
        raise ValueError(f"Expected YAML in '{path}', but got: {reason}") from error
    if size > _MOST_VALUES:
        raise ValueError(
            f"Expected at most {_MOST_VALUES} values in '{path}', but got {size:.0f}, most of them from anchors."
        )
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"Expected options and their values in '{path}', but got none.")
