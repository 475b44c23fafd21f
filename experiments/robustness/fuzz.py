"""Fuzz all inputs from untrusted sources: files of gradients and images, configurations, image folders.

    python experiments/robustness/fuzz.py --examples 1000 --seed 0 --output fuzz.json

Every input must be read or refused with an error of the library, in limited time and memory, without running its
code. The counts are of the inputs tried. `config` is slower than the other kinds and gets a fifth of the inputs.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fuzz_configs  # these are beside this script
import fuzz_image_folders
import fuzz_tensor_files
import torch
from fuzz_common import BrokenError, Outcome
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from leakage.cli import quiet
from leakage.errors import check_count
from leakage.files.whole import check_output

# Seconds between two progress messages.
_PAUSE = 5.0
# The number of failing inputs kept for each kind.
_KEPT = 20
_SHARE = {"config": 5}


@dataclass
class Tally:
    """Counts of the outcomes of one kind of input.

    Attributes:
        inputs: number of inputs tried.
        loaded: number of inputs read.
        refused: number of refusals by kind of message.
        failures: number of failures by description.
        examples: an input for each of the first failures.
        seconds: time taken.
    """

    inputs: int = 0
    loaded: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def properties(folder: Path) -> dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], Outcome]]]:
    """Return, for each kind, the strategy of its inputs and the check of each input."""
    marker = folder / "marker"
    kinds: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], Outcome]]] = {
        kind: (
            fuzz_tensor_files.inputs(kind, marker),
            lambda data, kind=kind: fuzz_tensor_files.check(kind, data, folder, marker),
        )
        for kind in fuzz_tensor_files.SOUND
    }
    return kinds | {
        "config": (fuzz_configs.inputs(marker), lambda data: fuzz_configs.check(data, folder, marker)),
        "images": (
            fuzz_image_folders.inputs(marker),
            lambda given: fuzz_image_folders.check(*given, folder, marker),
        ),
    }


def tally(
    kind: str, inputs: st.SearchStrategy[Any], check: Callable[[Any], Outcome], examples: int, seed: int
) -> Tally:
    """Try this many inputs, however many of them fail."""
    found, started = Tally(), time.monotonic()
    last_message = started

    @seeded(seed)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def run(data: Any) -> None:
        nonlocal last_message
        found.inputs += 1
        try:
            outcome = check(data)
        except BrokenError as error:
            reason = str(error)[:300]
            found.failures[reason] += 1
            if len(found.examples) < _KEPT:
                found.examples.setdefault(reason, repr(data)[:2000])
        else:
            if outcome.refusal:
                found.refused[outcome.refusal] += 1
            else:
                found.loaded += 1
        if time.monotonic() - last_message > _PAUSE:
            last_message = time.monotonic()
            print(f"{kind}: {found.inputs} of {examples} inputs", file=sys.stderr, flush=True)

    run()
    found.seconds = time.monotonic() - started
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000, help="inputs of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", help="kinds of inputs (default: all)")
    parser.add_argument("--output", type=Path, help="a JSON file for the counts")
    options = parser.parse_args(arguments)
    quiet()
    logging.getLogger("lightning.pytorch").propagate = False
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            check_count(examples=options.examples)
            if options.output is not None:
                check_output(options.output.parent)
            everything = properties(Path(folder))
            if unknown := set(options.kinds or []) - set(everything):
                raise ValueError(f"Expected `--kinds` among {list(everything)}, but got {sorted(unknown)}.")
        except (ValueError, OSError) as error:
            parser.error(str(error))
        tallies = {}
        for kind in options.kinds or everything:
            inputs, check = everything[kind]
            examples = max(options.examples // _SHARE.get(kind, 1), 1)
            found = tallies[kind] = tally(kind, inputs, check, examples, options.seed)
            print(
                f"{kind:20} {found.inputs:7} inputs: {found.loaded} loaded, {found.refused.total()} refused in "
                f"{len(found.refused)} ways, {found.failures.total()} failures, {found.seconds:.0f} s",
                flush=True,
            )
            if options.output is not None:
                record = {"examples": options.examples, "seed": options.seed, "torch": torch.__version__}
                kinds = {kind: vars(found) for kind, found in tallies.items()}
                options.output.write_text(json.dumps(record | {"kinds": kinds}, indent=1), encoding="utf-8")
    sys.exit(any(found.failures for found in tallies.values()))


if __name__ == "__main__":
    main()
