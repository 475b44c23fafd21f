"""The scenarios of the soak test, and the checks that nothing was lost."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from soak_child import (
    VALIDATED_EVERY,
    Ending,
    Job,
    full_disk,
    killed_before_replacing,
    killed_while_writing,
    raising_logger,
    run,
    signalled_while_writing,
    unreachable_wandb,
)

from leakage.files.checkpoints import WholeCheckpointIO
from leakage.inversion.reconstruction import Reconstruction

# How runs are killed: first each way once, then at random with these weights.
_KINDS = {"iteration": 10, "start": 2, "checkpoint half written": 2, "file not yet replaced": 2}
_REPLACED = ("last.ckpt", "part_", "victims.csv")
# Seconds between a scheduler's SIGTERM and its SIGKILL.
_GRACE = 30.0
_WANDB_SECONDS = 3.0
_NEVER = 1e6


@dataclass
class Verdict:
    """The outcome of a scenario.

    Attributes:
        scenario: name of the scenario.
        problems: what was lost or wrong.
        figures: counts by name.
    """

    scenario: str
    problems: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    passed: bool = True

    def expect(self, holds: bool, problem: str) -> None:
        """Record a problem unless a condition holds."""
        if not holds:
            self.problems.append(problem)
            self.passed = False

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {value}" for name, value in self.figures.items())
        said = "".join(f"\n    {problem}" for problem in self.problems)
        return f"{self.scenario}: {'ok' if self.passed else 'FAILED'} ({figures}){said}"


def lost(whole: Path, other: Path, victims: int) -> tuple[list[str], dict[str, int]]:
    """Return how the results of a run differ from those of the undisturbed run, and counts of victims."""
    problems = []
    for name in ("victims.csv", "idlg/victims.csv", "gallery.png", "fidelity.png", "idlg/gallery.png"):
        if not (other / name).is_file() or (whole / name).read_bytes() != (other / name).read_bytes():
            problems.append(f"{name} differs from that of the undisturbed run")
    rows = [_summary(folder / "summary.json") for folder in (whole, other)]
    if rows[0] != rows[1]:
        problems.append(f"summary.json has {rows[1]}, not {rows[0]}")
    results = [_results(folder) for folder in (whole, other)]
    times = Counter(results[1].ids.tolist()) if results[1] is not None else Counter()
    counts = {
        "victims": len(times),
        "missing": len(set(range(victims)) - set(times)),
        "repeated": sum(count > 1 for count in times.values()),
        "different": 0,
    }
    if results[0] is None or results[1] is None or counts["missing"] or counts["repeated"] or len(times) != victims:
        return [*problems, f"not every victim is present once: {counts}"], counts
    first, second = (found.select(found.ids.argsort()) for found in results if found is not None)
    differs = torch.zeros(victims, dtype=torch.bool)
    for name, tensor in vars(first).items():
        if tensor is None and getattr(second, name) is None:
            continue
        differs |= (tensor != getattr(second, name)).reshape(victims, -1).any(1)
    counts["different"] = int(differs.sum())
    if counts["different"]:
        problems.append(f"{counts['different']} victims differ")
    left = sorted(str(path.relative_to(other)) for path in other.rglob("*") if _is_debris(path))
    if left:
        problems.append(f"files were left behind: {left[:5]}")
    return problems, counts


def _is_debris(path: Path) -> bool:
    return path.name.endswith(".partial") or path.name in ("last.ckpt", "unfinished.safetensors")


def _summary(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def _results(folder: Path) -> Reconstruction | None:
    parts = [
        Reconstruction.load(path) for path in sorted((folder / "idlg" / "reconstructions").glob("part_*.safetensors"))
    ]
    parts = [part for part in parts if len(part)]
    return Reconstruction.cat(parts) if parts else None


def _compare(verdict: Verdict, whole: Job, job: Job) -> None:
    problems, counts = lost(whole.output, job.output, job.victims)
    verdict.figures |= counts
    for problem in problems:
        verdict.expect(False, problem)


def _saved_at(job: Job) -> int:
    """Return the iteration of the checkpoint, 0 without one."""
    path = job.output / "idlg" / "last.ckpt"
    saved: int = WholeCheckpointIO().load_checkpoint(path)["leakage"]["iteration"] if path.is_file() else 0
    return saved


def _expect_resumed(verdict: Verdict, ending: Ending, saved: int) -> None:
    """Check that the run resumed from its checkpoint, unless it ended before its first step or had none left."""
    verdict.expect(ending.first in (saved, -1), f"resumed from {ending.first}, but the checkpoint is of {saved}")


def _resume(verdict: Verdict, whole: Job, job: Job) -> Ending:
    """Resume without failures to the end, and compare the results."""
    saved = _saved_at(job)
    ending = run(replace(job, checkpoint_seconds=whole.checkpoint_seconds))
    _expect_resumed(verdict, ending, saved)
    verdict.expect(ending.code == 0, f"resuming ended with {ending.code}: {ending.said[-500:]}")
    verdict.figures["resumed at"] = ending.first
    _compare(verdict, whole, job)
    return ending


def killed(whole: Job, kills: int, progress: Callable[[], Any]) -> Verdict:
    """Compare an undisturbed run with one that is killed this many times and resumed each time."""
    verdict = Verdict("killed")
    alone = run(whole)
    progress()
    if alone.code:
        raise RuntimeError(f"Expected the run in '{whole.output}' to succeed, but got: {alone.said[-2000:]}")
    job = replace(whole, output=whole.output.with_name("killed"))
    chance = random.Random(whole.seed)
    kinds = [*_KINDS][:kills]
    kinds += chance.choices([*_KINDS], [*_KINDS.values()], k=kills - len(kinds))
    chance.shuffle(kinds)
    moments = sorted(chance.randrange(alone.completed) for _ in range(kills))
    repeated = resumed = done = 0
    for at, kind in zip(moments, kinds, strict=True):
        saved = _saved_at(job)
        if kind == "iteration":
            ending = run(job, signals=[signal.SIGKILL], at=at, after=chance.uniform(0, 0.02))
        elif kind == "start":
            ending = run(job, signals=[signal.SIGKILL], after=chance.uniform(0, 1))
        elif kind == "checkpoint half written":
            ending = run(job, killed_while_writing(at, chance.random()))
        else:
            # Results are written at every validation, and after the last one only at the end of the run.
            name = chance.choice(_REPLACED) if at + VALIDATED_EVERY < alone.completed else _REPLACED[0]
            ending = run(job, killed_before_replacing(at, name))
        verdict.expect(
            ending.code == -signal.SIGKILL, f"{kind} at {at}: ended with {ending.code}: {ending.said[-500:]}"
        )
        _expect_resumed(verdict, ending, saved)
        if ending.first >= 0:
            repeated += done - ending.first
            resumed += ending.first > 0
            done = max(ending.completed, ending.first)
        progress()
    verdict.figures |= {"kills": kills, "kinds": dict(Counter(kinds)), "iterations": alone.completed}
    ending = _resume(verdict, whole, job)
    progress()
    verdict.figures |= {
        "resumed from a checkpoint": resumed + (ending.first > 0),
        "iterations repeated": repeated + done - ending.first,
    }
    return verdict


def told_to_end(number: int, code: int, signals: int = 1) -> Callable[[Job, int], Verdict]:
    """Create a scenario that sends a signal once or more; the only checkpoint is made because of the signal."""
    name = signal.Signals(number).name.lower() + ("" if signals == 1 else f"_{signals}_times")

    def scenario(whole: Job, iterations: int) -> Verdict:
        verdict = Verdict(name)
        job = replace(whole, output=whole.output.with_name(name), checkpoint_seconds=_NEVER)
        again = signalled_while_writing(number) if signals > 1 else None
        ending = run(job, again, signals=[number] * signals, at=iterations // 2)
        verdict.figures |= {"exit code": ending.code, "seconds to end": round(ending.seconds or 0.0, 2)}
        verdict.figures["iterations"] = ending.completed
        verdict.expect(ending.code == code, f"ended with {ending.code}: {ending.said[-500:]}")
        verdict.expect((ending.seconds or 0.0) < _GRACE, f"took {ending.seconds} s to end")
        _expect_results_so_far(verdict, job)
        resumed = _resume(verdict, whole, job)
        verdict.expect(resumed.first == ending.completed, f"resumed from {resumed.first}, not from {ending.completed}")
        return verdict

    return scenario


def _expect_results_so_far(verdict: Verdict, job: Job) -> None:
    """Check that the table has rows, with each victim at most once."""
    table = job.output / "idlg" / "victims.csv"
    rows = table.read_text(encoding="utf-8").splitlines()[1:] if table.is_file() else []
    verdict.figures["rows so far"] = len(rows)
    verdict.expect(bool(rows), "no results so far were written")
    verdict.expect(len({row.split(",")[0] for row in rows}) == len(rows), "a victim is present twice")


def killed_before_it_replaces(whole: Job, iterations: int) -> Verdict:
    """Kill the process when each kind of file is complete but has not replaced the earlier one."""
    verdict = Verdict("killed_before_it_replaces")
    for name in _REPLACED:
        job = replace(whole, output=whole.output.with_name(f"replaced_{name.split('.')[0]}"))
        ending = run(job, killed_before_replacing(iterations // 2, name))
        verdict.expect(ending.code == -signal.SIGKILL, f"{name}: ended with {ending.code}: {ending.said[-500:]}")
        left = list(job.output.rglob(f"{name}*.partial"))
        verdict.expect(bool(left), f"{name}: nothing was being written")
        _resume(verdict, whole, job)
    return verdict


def disk_full(whole: Job, iterations: int) -> Verdict:
    """Fill the disk halfway, after the first checkpoints; the run must complete and report what is missing."""
    verdict = Verdict("disk_full")
    with _small_disk(whole.output.with_name("disk")) as (folder, filler):
        verdict.figures["disk"] = "limit on the length of files" if filler is None else "tmpfs"
        job = replace(whole, output=folder / "run", checkpoint_seconds=min(whole.checkpoint_seconds, 0.05))
        ending = run(job, full_disk(iterations // 2, filler))
        verdict.figures |= {"exit code": ending.code, "iterations": ending.completed}
        verdict.expect(ending.code not in (0, None) and ending.code > 0, f"ended with {ending.code}")
        verdict.expect(ending.completed == iterations, f"ended after {ending.completed} of {iterations} iterations")
        for words in (
            "last.ckpt', but got",
            "The run continues and will try again later",
            "Expected VictimTable to write all",
        ):
            verdict.expect(words in ending.said, f"did not say {words!r}: {ending.said[-1500:]}")
        saved = _saved_at(job)
        verdict.figures["last whole checkpoint"] = saved
        verdict.expect(0 < saved <= iterations // 2 + 1, f"the last checkpoint is of iteration {saved}")
        if filler is not None:
            filler.unlink()
        resumed = _resume(verdict, whole, job)
        verdict.expect(resumed.first == saved, f"resumed from {resumed.first}, not from {saved}")
    return verdict


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[tuple[Path, Path | None]]:
    """Yield a folder on a small disk and a file that may fill it, None if mounting is not allowed."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=64m", "leakage-soak", str(folder)]
    with tempfile.TemporaryFile() as said:
        try:
            mounted = subprocess.run(["mount", *options], stderr=said, check=False).returncode == 0
        except OSError:
            mounted = False
    try:
        yield folder, folder / "filler" if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def logger_raises(whole: Job, iterations: int) -> Verdict:
    """Let a logger fail at the start, in the middle, at the end, and at the start of a resumed run."""
    verdict = Verdict("logger_raises")
    for method, calls in (("log_hyperparams", 0), ("log_metrics", iterations // 2), ("finalize", 0)):
        job = replace(whole, output=whole.output.with_name(f"logger_{method}"), checkpoint_seconds=_NEVER)
        ending = run(job, raising_logger(method, calls))
        verdict.figures[f"{method}: iterations"] = ending.completed
        verdict.expect(ending.code == 1, f"{method}: ended with {ending.code}: {ending.said[-500:]}")
        if method != "log_hyperparams":
            _expect_results_so_far(verdict, job)
            again = run(job, raising_logger("log_hyperparams"))  # this must not damage the checkpoint
            verdict.expect(again.code == 1, f"{method}: the second time ended with {again.code}")
        resumed = _resume(verdict, whole, job)
        verdict.figures[f"{method}: resumed at"] = verdict.figures.pop("resumed at")
        expected = 0 if method == "log_hyperparams" else ending.completed
        verdict.expect(
            resumed.first == expected or expected == iterations,
            f"{method}: resumed from {resumed.first}, not {expected}",
        )
    return verdict


def wandb_out_of_reach(whole: Job, iterations: int) -> Verdict:
    """Make W&B's server unreachable: the run must be logged offline."""
    verdict = Verdict("wandb_out_of_reach")
    if importlib.util.find_spec("wandb") is None:
        verdict.figures["skipped"] = "wandb is not installed"
        return verdict
    job = replace(whole, output=whole.output.with_name("wandb"))
    ending = run(job, unreachable_wandb(_WANDB_SECONDS))
    verdict.figures["exit code"] = ending.code
    verdict.expect(ending.code == 0, f"ended with {ending.code}: {ending.said[-1000:]}")
    verdict.expect("W&B can't be used online" in ending.said, f"did not warn: {ending.said[-1000:]}")
    verdict.expect(any(whole.output.parent.glob("wandb_wandb/wandb/offline-run-*")), "was not logged offline")
    _compare(verdict, whole, job)
    return verdict


def command_line(whole: Job, iterations: int) -> Verdict:
    """Send SIGTERM to `leakage fit`, and resume with `--ckpt_path`."""
    verdict = Verdict("command_line")
    folder = whole.output.with_name("command_line")
    options = ["--model", "IDLGAttack", "--model.seed", whole.seed]
    options += ["--data", "Victims", "--data.dataset", whole.dataset]
    options += ["--data.victims", whole.victims, "--data.lanes", whole.lanes, "--data.seed", whole.seed]
    options += ["--model.max_evaluations", whole.max_evaluations] if whole.max_evaluations is not None else []
    options += ["--data.root", whole.root] if whole.root is not None else []
    options += ["--trainer.logger", "false", "--trainer.default_root_dir", folder, "--trainer.accelerator", "cpu"]
    command = [sys.executable, "-m", "leakage", "fit", *map(str, options)]
    _end_and_resume(
        verdict, command, folder / "victims.csv", ["--ckpt_path", str(folder / "checkpoints" / "last.ckpt")]
    )
    table = folder / "victims.csv"
    verdict.figures["rows"] = len(table.read_text(encoding="utf-8").splitlines()) - 1
    verdict.expect(table.read_bytes() == (whole.output / "idlg" / "victims.csv").read_bytes(), "victims.csv differs")
    return verdict


def two_processes(whole: Job, iterations: int) -> Verdict:
    """Send SIGTERM to the first of two processes; both must write their part of the checkpoint."""
    verdict = Verdict("two_processes")
    alone, job = (replace(whole, output=whole.output.with_name(f"two_{name}")) for name in ("whole", "ended"))
    job = replace(job, checkpoint_seconds=_NEVER)
    commands = [
        [sys.executable, str(Path(__file__).with_name("soak_child.py")), json.dumps(vars(one), default=str)]
        for one in (alone, job)
    ]
    first = subprocess.run(commands[0], capture_output=True, text=True, check=False, timeout=600)
    verdict.expect(first.returncode == 0, f"undisturbed, it ended with {first.returncode}: {first.stderr[-500:]}")
    _end_and_resume(verdict, commands[1], job.output / "idlg" / "victims.csv", [])
    _compare(verdict, alone, job)
    return verdict


def _end_and_resume(verdict: Verdict, command: list[str], table: Path, resume: list[str]) -> None:
    """Run a command, send it SIGTERM when the table appears (in the middle of the run), and run it again."""
    # One thread, like the undisturbed run: with more threads, sums are rounded differently.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        while process.poll() is None and not table.is_file():
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        log.seek(0)
        said = log.read().decode(errors="replace")
    verdict.figures["exit code"] = code
    verdict.expect(code == 128 + signal.SIGTERM, f"ended with {code}: {said[-500:]}")
    parts = sorted(table.parent.rglob("last.ckpt*"))
    saved = [WholeCheckpointIO().load_checkpoint(part)["leakage"]["iteration"] for part in parts]
    verdict.figures["checkpoints at"] = saved
    verdict.expect(min(saved, default=0) > 0, f"the checkpoints are of the iterations {saved}")
    again = subprocess.run(
        [*command, *resume], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    verdict.expect(again.returncode == 0, f"resuming ended with {again.returncode}: {again.stderr[-500:]}")


SCENARIOS: dict[str, Callable[[Job, int], Verdict]] = {
    "killed_before_it_replaces": killed_before_it_replaces,
    "disk_full": disk_full,
    "wandb_out_of_reach": wandb_out_of_reach,
    "logger_raises": logger_raises,
    "sigterm": told_to_end(signal.SIGTERM, 128 + signal.SIGTERM),
    "sigterm_2_times": told_to_end(signal.SIGTERM, 128 + signal.SIGTERM, 2),
    "sigint": told_to_end(signal.SIGINT, 1),
    "command_line": command_line,
    "two_processes": two_processes,
}
