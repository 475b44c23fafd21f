"""The command line: ``leakage fit`` on LightningCLI, ``leakage demo`` and ``leakage evaluate``."""

from __future__ import annotations

import argparse
import importlib
import itertools
import logging
import math
import re
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning import Callback, LightningDataModule, LightningModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import nn

from leakage import attacks, condensation, datamodules
from leakage.attacks import DLGAttack, GaussNewtonAttack, GradientMatchingAttack, IDLGAttack
from leakage.callbacks.results import ResultsCallback
from leakage.comparison.attacks import FILES, check_output, compare, format_table
from leakage.condensation import GradientMatchingCondensation, SiameseAugmentation, SyntheticSet, evaluate
from leakage.datamodules import LABELLED_DATASETS, LabelledImages, Victims
from leakage.files.checkpoints import WholeCheckpointIO
from leakage.models import NETWORKS

_DESCRIPTION = """What a shared gradient gives away.

  leakage demo               three attacks side by side on a bundled sample, in under a minute
  leakage fit --config FILE  any attack on any victims, or the condensation of any data set, configured by a file
                             or by arguments
  leakage evaluate FILE      test accuracy of networks trained on a saved synthetic set

`leakage demo --help` and so on tell their options. For example:

  leakage fit --model IDLGAttack --data Victims --data.dataset sample --data.victims 8
  leakage fit --model GradientMatchingCondensation --data LabelledImages --data.dataset fashion_mnist
"""
_SUBCOMMANDS = ("demo", "fit", "evaluate")
# Of a configuration: those that are written by hand have fewer than a hundred.
_MOST_VALUES = 10_000
# 128 and the number of the signal, as shells have it.
_INTERRUPTED = 130

# What `leakage fit` runs with unless `trainer.callbacks` says otherwise.
_CALLBACKS: list[dict[str, Any]] = [
    {"class_path": "leakage.callbacks.AttackProgressBar"},
    {"class_path": "leakage.callbacks.VictimTable"},
    {"class_path": "leakage.callbacks.Gallery"},
    {"class_path": "leakage.callbacks.TimedCheckpoint"},
]
# The same where the model is a condensation.
_CONDENSATION_CALLBACKS = [
    {"class_path": "leakage.callbacks.CondensationProgressBar"},
    {"class_path": "leakage.callbacks.SyntheticImages"},
    {"class_path": "leakage.callbacks.TimedCheckpoint"},
]
_TRAINER = {
    "max_epochs": 1,
    # Optimizer's passes between two points of the curves `val/*`; nothing where there is no ground truth.
    "val_check_interval": 50,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "plugins": [{"class_path": "leakage.files.checkpoints.WholeCheckpointIO"}],
}
# What may stand after `--model` and `--data`.
_CLASSES: dict[str, tuple[type, tuple[object, ...]]] = {
    "model": (LightningModule, (*vars(attacks).values(), *vars(condensation).values())),
    "data": (LightningDataModule, tuple(vars(datamodules).values())),
}


class LeakageCLI(LightningCLI):
    """LightningCLI with the one thing to do with an attack or a condensation: ``fit``."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only ``fit``: there is no separate validation, test or prediction."""
        return {"fit": LightningCLI.subcommands()["fit"]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give the callbacks as defaults, so that a configuration can replace them."""
        parser.set_defaults({"trainer.callbacks": _CALLBACKS})

    def before_instantiate_classes(self) -> None:
        """Replace the callbacks that are there by default with those of a condensation, where the model is one."""
        config = self.config[self.config.subcommand]
        module, _, name = config.model.class_path.rpartition(".")
        model = getattr(importlib.import_module(module), name)
        if _is_abstract(model):
            _refuse(f"Expected `--model` to be an attack or a condensation, but got {name}, which is what they share.")
        default = [entry["class_path"] for entry in _CALLBACKS]
        given = config.trainer.callbacks or []
        found = [getattr(entry, "class_path", None) for entry in given[: len(default)]]
        if isinstance(model, type) and issubclass(model, GradientMatchingCondensation) and found == default:
            parser = LightningArgumentParser()
            parser.add_argument("--callbacks", type=list[Callback])
            fitting = parser.parse_object({"callbacks": _CONDENSATION_CALLBACKS}).callbacks
            config.trainer.callbacks = [*fitting, *given[len(default) :]]
        if isinstance(model, type) and issubclass(model, GradientMatchingCondensation):
            # Its steps take long, and there may be only a few.
            config.trainer.log_every_n_steps = config.trainer.log_every_n_steps or 1

    def instantiate_classes(self) -> None:
        """Put the clients' network into evaluation mode, which a configuration has no other way to ask for.

        Raises:
            MisconfigurationException: arguments that a class refuses; nothing has been run.
        """
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(_own_words(error) or str(error)) from error
        model = getattr(self.datamodule, "model", None)
        if isinstance(model, nn.Module):
            model.eval()

    def _parse_ckpt_path(self) -> None:
        # Lightning's own would take class and options from the file, which may be anybody's; told apart later on.
        path = self.config[self.config.subcommand].ckpt_path
        if path is not None:
            WholeCheckpointIO().load_checkpoint(path)

    def after_fit(self) -> None:
        """Tell where the results are."""
        if not self.trainer.is_global_zero:
            return
        callbacks = getattr(self.trainer, "callbacks", [])
        folders = [callback.folder for callback in callbacks if isinstance(callback, ResultsCallback)]
        for folder in dict.fromkeys(folders):
            print(f"Results: {folder}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: what follows ``leakage``; by default those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="leakage",
        usage=f"leakage [-h] {{{','.join(_SUBCOMMANDS)}}} ...",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # The rest is for the parser of the subcommand: `fit` has hundreds of options, and takes a while to build.
    parser.add_argument("command", choices=_SUBCOMMANDS, help="what to do")
    command = parser.parse_args(given[:1]).command
    try:
        if command == "fit":
            fit(given)
        else:
            {"demo": demo, "evaluate": evaluate_saved}[command](given[1:])
    except (KeyboardInterrupt, SystemExit) as end:
        # Lightning turns an interrupt within `fit` into an exit, after the callbacks have written what is done.
        if not isinstance(end, KeyboardInterrupt) and not isinstance(end.__context__, KeyboardInterrupt):
            raise
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(_INTERRUPTED)


def fit(arguments: Sequence[str]) -> None:
    """Run any attack on any victims, or any condensation; ``arguments`` begin with ``fit``."""
    quiet()
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
            # Its own way to tell an error is to print the hundreds of options before it.
            parser_kwargs={"prog": "leakage", "exit_on_error": False, "fit": {"exit_on_error": False}},
            auto_configure_optimizers=False,
            args=list(arguments),
        )
    except argparse.ArgumentError as error:
        _refuse(f"{_parsing(str(error))} See `leakage fit --help`.")
    except FloatingPointError as error:
        sys.exit(f"leakage fit: error: {_one_line(str(error))}")
    except (OSError, MisconfigurationException) as error:
        _refuse(_one_line(str(error)))
    except ValueError as error:
        # The library's own words for bad input; all else keeps its traceback.
        reason = _own_words(error)
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
    """Raise a ``ValueError`` unless a configuration is YAML of a size and depth that the parser can cope with.

    Anchors let a few lines stand for billions of values, or for one within itself.
    """
    sizes: dict[int, float] = {}

    def unfolded(node: yaml.Node) -> float:
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # what it is as long as it is found within itself
            parts = itertools.chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
            sizes[id(node)] = 1 if isinstance(node, yaml.ScalarNode) else 1 + sum(map(unfolded, parts))
        return sizes[id(node)]

    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        size = unfolded(node) if node is not None else 0
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        reason = "values nested too deeply" if isinstance(error, RecursionError) else _one_line(str(error))
        raise ValueError(f"Expected YAML in '{path}', but got: {reason}") from error
    if size > _MOST_VALUES:
        raise ValueError(
            f"Expected at most {_MOST_VALUES} values in '{path}', but got {size:.0f}, most by its anchors."
        )
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"Expected options and their values in '{path}', but got none.")


def _own_words(error: Exception) -> str | None:
    """The message of an error of this library, also where jsonargparse quotes it in a list of what it tried."""
    if str(error).startswith("Expected "):
        return _one_line(str(error))
    lines = [line.strip() for line in str(error).splitlines()]
    # jsonargparse too has lines that begin with "- Expected", but none that go on "but got".
    quoted = [line for line in lines if line.startswith("- Expected ") and ", but got " in line]
    return quoted[0].removeprefix("- ") if quoted else None


def _parsing(message: str) -> str:
    """An error of jsonargparse in one line; its words for an unknown class don't tell those that are known."""
    unknown = re.search(r'Parser key "(model|data)":.*^ *Given value: ([\w.]+)$', message, re.DOTALL | re.MULTILINE)
    if unknown is None:
        return _one_line(message).rstrip(".") + "."
    option, given = unknown.groups()
    base, found = _CLASSES[option]
    known = sorted(
        entry.__name__
        for entry in found
        if isinstance(entry, type) and issubclass(entry, base) and entry is not base and not _is_abstract(entry)
    )
    return (
        f"Expected `--{option}` to be one of {', '.join(known)}, or the import path of another subclass of "
        f"{base.__module__}.{base.__name__}, but got {given!r}."
    )


def _is_abstract(kind: type) -> bool:
    # `inspect.isabstract` sees only classes of the metaclass ABCMeta.
    return any(getattr(getattr(kind, name, None), "__isabstractmethod__", False) for name in dir(kind))


def _one_line(message: str) -> str:
    return " ".join(message.split())


def demo(arguments: Sequence[str]) -> None:
    """DLG, iDLG and Gauss-Newton side by side on the bundled sample of FashionMNIST test images."""
    parser = argparse.ArgumentParser(
        prog="leakage demo",
        description=f"{demo.__doc__} Files of an earlier demo in the same folder are replaced.",
    )
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for results (default: %(default)s)")
    parser.add_argument("--victims", type=int, default=64, help="number of victims, 1 to 1000 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of victims, networks and starts (default: %(default)s)")
    given = parser.parse_args(arguments)
    started = time.monotonic()
    quiet()
    try:
        compared: dict[str, GradientMatchingAttack] = {
            "dlg": DLGAttack(seed=given.seed),
            "idlg": IDLGAttack(seed=given.seed),
            "gauss_newton": GaussNewtonAttack(seed=given.seed),
        }
        victims = Victims("sample", victims=given.victims, seed=given.seed)
        victims.setup("fit")
        check_output(given.output)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(
        f"DLG, iDLG and Gauss-Newton on {given.victims} FashionMNIST images, a fresh random LeNet for each:", flush=True
    )
    try:
        rows = compare(compared, victims, given.output, dataset="sample", accelerator="cpu")
    except (KeyboardInterrupt, SystemExit):
        # Each attack has its folder, with what was done when the interrupt came.
        begun = [str(given.output / name) for name in compared if (given.output / name / "victims.csv").is_file()]
        print(f"\nPartial results: {', '.join(begun) or 'none yet'}", file=sys.stderr)
        raise
    except OSError as error:
        sys.exit(f"leakage demo: error: {error}")
    print(f"\n{format_table(rows)}\n")
    for name in FILES:
        print(given.output / name)
    print(f"{time.monotonic() - started:.0f} s")


def evaluate_saved(arguments: Sequence[str]) -> None:
    """Train new networks on a saved synthetic set and test them on the real test images of its data set."""
    parser = argparse.ArgumentParser(prog="leakage evaluate", description=evaluate_saved.__doc__)
    parser.add_argument("file", type=Path, help="a synthetic.safetensors")
    parser.add_argument(
        "--dataset",
        help=f"one of {', '.join(LABELLED_DATASETS)}, or a folder of images in ImageFolder layout (default: the set's)",
    )
    parser.add_argument("--root", type=Path, help="where the data sets lie (default: $LEAKAGE_DATA, ~/.cache/leakage)")
    parser.add_argument("--image-size", type=int, help="scale and crop a folder's images to this height and width")
    parser.add_argument("--network", choices=tuple(NETWORKS), default="convnet", help="default: %(default)s")
    parser.add_argument("--networks", type=int, default=10, help="how many are trained (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="of each (default: 300, or 1,000 with --augmentation)")
    parser.add_argument(
        "--augmentation", help="of their training: a strategy such as color_crop_cutout_flip_scale_rotate, or mnist"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the networks (default: %(default)s)")
    given = parser.parse_args(arguments)
    try:
        synthetic = SyntheticSet.load(given.file)
        if not (given.dataset or synthetic.dataset):
            raise ValueError("Expected `--dataset` for a set that does not name its data set, but got none.")
        data = LabelledImages(given.dataset or synthetic.dataset, root=given.root, image_size=given.image_size)
        data.prepare_data()
        data.setup("fit")
        augmentation = None
        if given.augmentation == "mnist":
            augmentation = SiameseAugmentation.mnist_evaluation()
        elif given.augmentation is not None:
            augmentation = SiameseAugmentation(given.augmentation)
        found = evaluate(
            synthetic,
            data,
            network=NETWORKS[given.network](data.image_shape[0], data.image_shape[1:], data.num_classes),
            networks=given.networks,
            epochs=given.epochs,
            augmentation=augmentation,
            seed=given.seed,
        )
    except (ValueError, OSError) as error:
        parser.error(_one_line(str(error)))
    except FloatingPointError as error:
        sys.exit(f"leakage evaluate: error: {_one_line(str(error))}")
    print(f"{given.file}: test accuracy on {data.name} {found}")


def quiet() -> None:
    """Silence Lightning's hints, which are about training and not about attacks."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")


if __name__ == "__main__":
    main()
