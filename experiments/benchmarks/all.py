"""Run every benchmark, one after another, within ten minutes, and write figures, pictures and a page of them.

    python experiments/benchmarks/all.py --output benchmarks
    python experiments/benchmarks/all.py --output benchmarks --minutes 30 --only throughput parts

`--minutes` decides the sizes. On a machine with a GPU, the benchmarks that support it use it. Each benchmark is a
separate process, which is ended if it takes more than the remaining time; benchmarks without time left are skipped.
`--output` is a folder: `index.md` has tables and pictures, the machine, and what was skipped or failed and why. Each
benchmark has its JSON file, its picture and its output (`.log`). If one fails, the others continue, and the exit code
is 1 at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from setting import describe_machine, show_machine  # beside this script

from leakage.errors import check_choice, check_positive
from leakage.files.whole import check_output

HERE = Path(__file__).resolve().parent
# A benchmark is not started if fewer seconds are left.
LEAST = 15.0


@dataclass
class Job:
    """A benchmark: its script, its options, and the results to show, as paths such as `a.b.c` in its JSON file."""

    name: str
    script: str
    options: list[str]
    heading: str


@dataclass
class Outcome:
    """The outcome of a job: "done", "failed" or "skipped", the reason, and how long it took."""

    status: str
    reason: str
    seconds: float = 0.0
    result: dict[str, Any] | None = None


def jobs(minutes: float, device: torch.device) -> list[Job]:
    """Return all jobs with suitable sizes, the quickest first."""
    gpu = device.type == "cuda"
    scale = minutes / 10

    def count(number: float, least: int) -> str:
        return str(max(least, round(number * scale)))

    turns = str(3 if minutes >= 20 else 2 if minutes >= 5 else 1)
    on = ["--device", device.type]
    # torch's number of threads, which respects OMP_NUM_THREADS, for benchmarks that do not choose their own.
    accelerator = ["--accelerator", device.type, "--threads", str(torch.get_num_threads())]
    return [
        Job("start", "start.py", ["--repeats", turns], "Time to the first evaluation"),
        Job(
            "attack_speed_idlg",
            "attack_speed.py",
            ["--method", "idlg", "--victims", count(200, 8), "--plain-victims", count(6, 2)],
            "iDLG and the plain published loop",
        ),
        Job(
            "attack_speed_dlg",
            "attack_speed.py",
            ["--method", "dlg", "--victims", count(100, 8), "--plain-victims", count(4, 2)],
            "DLG and the plain published loop",
        ),
        *(
            Job(
                f"inversion_speed_{network}",
                "inversion_speed.py",
                [*on, "--network", network, "--lanes", count(16, 4), "--plain-victims", "2", "--repeats", turns],
                f"Inverting Gradients and a plain loop, {written}",
            )
            for network, written in (("convnet64", "ConvNet-64"), ("resnet20", "ResNet-20"))
        ),
        Job(
            "parts",
            "parts.py",
            [*on, "--victims", "1000" if gpu else count(64, 8), "--repeats", turns],
            "Where the time goes, and the arithmetic limit",
        ),
        Job(
            "processes",
            "processes.py",
            ["--victims", count(100, 8), "--repeats", turns],
            "Several processes and one process",
        ),
        Job(
            "defense_speed",
            "defense_speed.py",
            ["--lanes", count(16, 4), "--repeats", turns],
            "Capturing and attacking with each defense and without",
        ),
        Job(
            "evaluation_speed",
            "evaluation_speed.py",
            [*on, "--networks", "4", "--epochs", count(20, 2), "--repeats", turns, "--test-images", "200"],
            "Networks evaluated at once and one after another",
        ),
        Job(
            "condensation_speed",
            "condensation_speed.py",
            [*accelerator, "--iterations", "1", "--batch-size", "64", "--width", count(64, 16)],
            "Condensation and a plain loop",
        ),
        # Last, since it adapts to the remaining time.
        Job("throughput", "throughput.py", on, "Time per victim and evaluation, and memory, by lanes"),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="all.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder; files of an earlier run are replaced")
    parser.add_argument("--minutes", type=float, default=10.0, help="time limit for all (default: %(default)s)")
    names = [job.name for job in jobs(10, torch.device("cpu"))]
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"some of {', '.join(names)} (default: all)")
    given = parser.parse_args(arguments)
    try:
        check_positive(minutes=given.minutes)
        for name in given.only or ():
            check_choice("only", name, names)
        check_output(given.output)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = [job for job in jobs(given.minutes, device) if given.only is None or job.name in given.only]
    outcomes = run_all(chosen, given)
    write_index(given.output, chosen, outcomes, describe_machine(device), given.minutes)
    print(f"\n{given.output / 'index.md'}")
    failed = [name for name, outcome in outcomes.items() if outcome.status == "failed"]
    if failed:
        sys.exit(f"all.py: error: Expected all benchmarks to succeed, but got failures in {',  '.join(failed)}.")


def run_all(chosen: list[Job], given: argparse.Namespace) -> dict[str, Outcome]:
    """Run the chosen jobs one after another within the time limit."""
    end = time.monotonic() + 60 * given.minutes
    outcomes: dict[str, Outcome] = {}
    for index, job in enumerate(chosen):
        left = end - time.monotonic()
        # Each gets at most twice its equal share, so that one that hangs leaves time for the others.
        most = min(left, 2 * left / (len(chosen) - index))
        print(f"{index + 1} of {len(chosen)}, {job.name}: {max(left, 0):.0f} s left", flush=True)
        # Remove the files of an earlier run, so that they are not mistaken for results of this one.
        for ending in (".json", ".png", ".log"):
            (given.output / (job.name + ending)).unlink(missing_ok=True)
        if most < LEAST:
            outcomes[job.name] = Outcome("skipped", f"time: {max(left, 0):.0f} s left")
        else:
            outcomes[job.name] = run(job, given.output, most)
        print(f"  {outcomes[job.name].status} {outcomes[job.name].reason}".rstrip(), flush=True)
    return outcomes


def run(job: Job, folder: Path, seconds: float) -> Outcome:
    """Run a benchmark in a separate process, which is ended after this time."""
    output, log = folder / f"{job.name}.json", folder / f"{job.name}.log"
    command = [sys.executable, str(HERE / job.script), "--output", str(output), *job.options]
    if job.script == "throughput.py":
        # The benchmark's start and its last measurement may take longer than it expects.
        command += ["--total-seconds", f"{0.8 * seconds:.0f}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        # A new session, so that the processes started by the benchmark end with it.
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            _end(process)
            return Outcome("skipped", f"time: ended after {seconds:.0f} s", time.monotonic() - began)
        except BaseException:
            _end(process)
            raise
    spent = time.monotonic() - began
    result = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else None
    if code or result is None:
        said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return Outcome("failed", f"exit code {code}: {said[-1] if said else 'no output'}", spent, result)
    return Outcome("done", "", spent, result)


def _end(process: subprocess.Popen[Any]) -> None:
    """End a process and all processes that it has started."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def write_index(
    folder: Path, chosen: list[Job], outcomes: dict[str, Outcome], machine: dict[str, Any], minutes: float
) -> None:
    """Write the page."""
    lines = [
        "# Benchmarks",
        "",
        f"Machine: {show_machine(machine)}, {machine['system']}, Python {machine['python']}. At most {minutes:g} "
        "minutes in total. Figures are comparable within one run, but not between machines, or if a machine also does "
        "other work.",
        "",
        "| benchmark | | seconds | |",
        "|---|---|---|---|",
    ]
    for job in chosen:
        outcome = outcomes[job.name]
        lines.append(
            f"| [{job.heading}](#{job.name}) | {outcome.status} | {outcome.seconds:.0f} | {_cell(outcome.reason)} |"
        )
    for job in chosen:
        outcome = outcomes[job.name]
        lines += [
            "",
            f'<a id="{job.name}"></a>',
            "",
            f"## {job.heading}",
            "",
            f"`{job.script} {' '.join(job.options)}`",
        ]
        if outcome.status != "done":
            lines += ["", f"{outcome.status.capitalize()}: {_cell(outcome.reason)}"]
        if outcome.result is not None:
            lines += ["", *tables(outcome.result)]
        if (folder / f"{job.name}.png").is_file():
            lines += ["", f"![{job.heading}]({job.name}.png)"]
        files = [f"{job.name}{ending}" for ending in (".json", ".log") if (folder / (job.name + ending)).is_file()]
        lines += ["", ", ".join(f"[{name}]({name})" for name in files)] if files else []
    partial = folder / "index.md.partial"
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.replace(folder / "index.md")


def tables(result: dict[str, Any]) -> Iterator[str]:
    """Yield the figures of a result: a table for lists of rows, lines for single values; the machine is left out."""
    methods = {name: dict(_flat(found)) for name, found in result.get("methods", {}).items()}
    if methods:
        yield from (f"| figure | {' | '.join(methods)} |", "|---" * (len(methods) + 1) + "|")
        for figure in next(iter(methods.values())):
            yield f"| {figure} | {' | '.join(_cell(found.get(figure, '')) for found in methods.values())} |"
        yield ""
    yield from ("| figure | value |", "|---|---|")
    apart = ("machine", "methods", "cells", "skipped")
    for name, value in _flat({key: value for key, value in result.items() if key not in apart}):
        yield f"| {name} | {_cell(value)} |"
    if result.get("cells"):
        lanes = sorted({row["lanes"] for cell in result["cells"] for row in cell["rows"]})
        for heading, key, unit in (
            ("ms per victim and evaluation", "seconds_per_victim_and_evaluation", 1e-3),
            ("share of the objective", "objective_share", 1.0),
            ("peak memory in MiB", "peak_bytes", 2**20),
        ):
            yield from (
                "",
                f"**{heading}**",
                "",
                f"| lanes | {' | '.join(map(str, lanes))} |",
                "|---" * (len(lanes) + 1) + "|",
            )
            for cell in result["cells"]:
                values = {row["lanes"]: row[key] / unit for row in cell["rows"]}
                yield f"| {cell['cell']} | {' | '.join(_cell(values.get(count, '')) for count in lanes)} |"
        yield from ("", "**memory over lanes**", "", "| cell | KiB per lane | fixed MiB | R² |", "|---|---|---|---|")
        for cell in result["cells"]:
            if fit := cell["memory"]:
                slope, fixed = fit["bytes_per_lane"] / 2**10, fit["fixed_bytes"] / 2**20
                yield f"| {cell['cell']} | {_cell(slope)} | {_cell(fixed)} | {fit['r_squared']:.5f} |"
    for entry in result.get("skipped", ()):
        yield from ("", f"Skipped: {entry['cell']}, lanes {entry['lanes']}: {entry['reason']} ({entry['detail']}).")


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield names and values of nested dictionaries; of long lists, only the length."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}: {key}" if name else key.replace("_", " "))
    elif isinstance(value, list):
        yield name, ", ".join(_cell(item) for item in value) if len(value) <= 8 else f"{len(value)} values"
    else:
        yield name, value


def _cell(value: Any) -> str:
    if isinstance(value, float):
        value = f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value).replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    # So that a running benchmark ends with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    main()
