"""Table 1 of iDLG: how often DLG and iDLG recover the label and the image, per data set.

    python experiments/idlg/table1.py --dataset mnist --victims 1000 --protocol published --output results/mnist
    python experiments/idlg/table1.py --dataset mnist --victims 500 --methods idlg rgap gauss_newton --threshold 1e-6 \
        --output results/mnist_exact

Each victim has one image and a freshly drawn LeNet. The paper used 1,000 victims per data set
(https://arxiv.org/abs/2001.02610); the printed table shows its figures beside ours. `--protocol published` searches as
the paper does, `--protocol robust` as this library does by default. R-GAP and Gauss-Newton (second order), available
with `--methods`, have only one protocol.

To divide the victims among several processes, use for example `--devices 2`, with two cores or two GPUs.

To continue an interrupted run, repeat the command with `--resume`; its results are those of an uninterrupted run.
Without `--resume`, a folder that holds results is refused, so that none are lost by mistake.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from leakage.attacks import DLGAttack, GaussNewtonAttack, GradientInversion, IDLGAttack, RGAPAttack
from leakage.cli import quiet
from leakage.comparison import FILES, format_table
from leakage.datamodules import DATASETS, Victims
from leakage.errors import check_count
from leakage.files.whole import check_output
from leakage.inversion.processes import is_first_process

sys.path.append(str(Path(__file__).parents[1] / "comparison"))
from comparing import compare
from records import holds_results

METHODS: dict[str, Callable[..., GradientInversion]] = {
    "dlg": DLGAttack,
    "idlg": IDLGAttack,
    "rgap": RGAPAttack,
    "gauss_newton": GaussNewtonAttack,
}
# Methods with a published protocol, those of the paper's table.
SEARCHES = ("dlg", "idlg")
# Label accuracy from table 1 of the paper.
PUBLISHED = {
    "mnist": {"dlg": 0.899, "idlg": 1.0},
    "cifar100": {"dlg": 0.833, "idlg": 1.0},
    "lfw": {"dlg": 0.791, "idlg": 1.0},
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    given = parser.parse_args(arguments)
    quiet()
    try:
        check_count(devices=given.devices)
        victims = _victims(given)
        if given.protocol == "published" and not set(given.methods) & set(SEARCHES):
            raise ValueError(
                f"Expected `--protocol published` with one of {', '.join(SEARCHES)}, but got {given.methods}."
            )
        options = {"seed": given.seed, "success_threshold": given.threshold}
        attacks = {
            name: METHODS[name](**options, **({"protocol": given.protocol} if name in SEARCHES else {}))
            for name in given.methods
        }
        check_output(given.output)
        if is_first_process() and not given.resume and holds_results(given.output):
            raise ValueError(
                f"Expected `--output` to be a folder without results, but got '{given.output}'. Add --resume to "
                "continue that run, or choose another folder."
            )
        victims.prepare_data()
        victims.setup("fit")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    written = "/".join(given.methods)
    print(f"{written} ({given.protocol}) on {victims.victims} victims of {victims.name}:", flush=True)
    try:
        rows = compare(
            attacks,
            victims,
            given.output,
            dataset=victims.name,
            published=PUBLISHED.get(Path(given.dataset).name),
            resume=given.resume,
            accelerator=given.accelerator,
            devices=given.devices,
            strategy="victim_parallel" if given.devices > 1 else "auto",
            precision=given.precision,
        )
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) or str(error).startswith("Expected "):
            sys.exit(f"{parser.prog}: error: {error}")
        raise
    if not is_first_process():
        return
    print(f"\n{format_table(rows)}\n")
    for name in FILES:
        print(given.output / name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="table1.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dataset",
        required=True,
        help=f"one of {', '.join(DATASETS)}, or a folder of images in ImageFolder layout, <folder>/<class>/<image>",
    )
    parser.add_argument("--victims", type=int, default=1000, help="number of victims (default: %(default)s)")
    parser.add_argument(
        "--protocol", choices=("published", "robust"), default="robust", help="search protocol (default: %(default)s)"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=tuple(METHODS), default=list(SEARCHES), help="default: dlg idlg"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=1e-3,
        help="MSE below which an image counts as reconstructed (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for results")
    parser.add_argument("--resume", action="store_true", help="continue the run in the output folder, if there is one")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of victims, networks and starts (default: %(default)s)"
    )
    parser.add_argument("--root", type=Path, help="folder of the data sets (default: $LEAKAGE_DATA, ~/.cache/leakage)")
    parser.add_argument("--image-size", type=int, help="scale and crop a folder's images to this height and width")
    parser.add_argument("--lanes", type=int, help="victims attacked at once (default: chosen automatically)")
    parser.add_argument(
        "--precision",
        choices=("32-true", "64-true"),
        default="32-true",
        help="64-true helps victims that stall in 32-true (default: %(default)s)",
    )
    parser.add_argument(
        "--devices",
        type=int,
        default=1,
        help="number of processes or GPUs to divide the victims among (default: %(default)s)",
    )
    parser.add_argument("--accelerator", default="auto", help="as for Lightning's Trainer (default: %(default)s)")
    return parser


def _victims(given: argparse.Namespace) -> Victims:
    options: dict[str, Any] = {} if given.lanes is None else {"lanes": given.lanes}
    return Victims(
        given.dataset,
        root=given.root,
        image_size=given.image_size,
        victims=given.victims,
        seed=given.seed,
        **options,
    )


if __name__ == "__main__":
    main()
