"""Signals, full disks and loggers that fail: what was computed is on disk, and the run goes on where it was."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment

from leakage.attacks import IDLGAttack
from leakage.callbacks import VictimTable
from leakage.callbacks.timed_checkpoint import TimedCheckpoint
from leakage.datamodules import Victims
from leakage.files.checkpoints import WholeCheckpointIO
from leakage.inversion.reconstruction import Reconstruction
from leakage.inversion.search import Search

NEVER = 1e6
# An iteration at which two victims are done and the third is searched for.
AT = 32


def fit(
    folder: Path, *callbacks: Callback, seconds: float = NEVER, resume: bool | Path = False, **trainer: Any
) -> IDLGAttack:
    attack = IDLGAttack(max_evaluations=25, restarts=0)
    runner = Trainer(
        max_epochs=1,
        callbacks=[VictimTable(folder), TimedCheckpoint(folder, seconds), *callbacks],
        plugins=[WholeCheckpointIO(), *trainer.pop("plugins", [])],
        accelerator="cpu",
        logger=trainer.pop("logger", False),
        val_check_interval=10,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=False,
        **trainer,
    )
    checkpoint = (folder / "last.ckpt" if resume is True else resume) if resume else None
    runner.fit(attack, datamodule=Victims("sample", victims=3, lanes=2), ckpt_path=checkpoint)
    return attack


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    attack = fit(folder)
    assert attack.num_done == 3
    assert attack.iteration > AT + 10
    return folder


def iteration(folder: Path) -> int:
    saved: int = WholeCheckpointIO().load_checkpoint(folder / "last.ckpt")["leakage"]["iteration"]
    return saved


def assert_nothing_is_lost(folder: Path, whole: Path) -> None:
    """Resume, and compare with the run that was left alone."""
    saved = iteration(folder)
    first: list[int] = []

    class First(Callback):
        def on_train_batch_start(self, trainer: Trainer, attack: Any, *args: Any) -> None:
            first.append(attack.iteration)

    fit(folder, First(), resume=True)
    assert first[:1] in ([saved], [])
    assert (folder / "victims.csv").read_bytes() == (whole / "victims.csv").read_bytes()
    files = [sorted(path.name for path in one.rglob("*") if path.is_file()) for one in (folder, whole)]
    assert files[0] == files[1]
    found, expected = (
        Reconstruction.load(one / "reconstructions" / "part_0000.safetensors") for one in (folder, whole)
    )
    for name, tensor in vars(expected).items():
        assert tensor is None or torch.equal(getattr(found, name), tensor)


class Act(Callback):
    """Does something once, in a hook, when so many iterations are done."""

    def __init__(self, hook: str, act: Callable[[], Any], at: int = AT) -> None:
        self.at = at
        self.seen: list[int] = []

        def once(trainer: Trainer, attack: IDLGAttack, *args: Any) -> None:
            if attack.iteration >= self.at and not self.seen:
                self.seen.append(attack.iteration)
                act()

        setattr(self, hook, once)


def send(*numbers: int) -> Callable[[], None]:
    return lambda: [os.kill(os.getpid(), number) for number in numbers] and None


@pytest.mark.parametrize(
    ("hook", "numbers", "code"),
    [
        ("on_train_batch_start", (signal.SIGTERM, signal.SIGTERM), 143),
        ("on_train_batch_start", (signal.SIGINT,), 1),
        ("on_train_batch_end", (signal.SIGTERM,), 143),
        ("on_validation_batch_start", (signal.SIGTERM,), 143),
        ("on_validation_batch_start", (signal.SIGINT,), 1),
    ],
)
def test_a_signal_makes_a_checkpoint_of_that_very_step(
    tmp_path: Path, whole: Path, hook: str, numbers: tuple[int, ...], code: int
) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    act = Act(hook, send(*numbers))
    with pytest.raises(SystemExit) as end:
        fit(tmp_path, act)
    assert end.value.code == code
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert iteration(tmp_path) == act.seen[0] + (hook != "on_train_batch_end"), "at the end of the step it came in"
    rows = (tmp_path / "victims.csv").read_text().splitlines()[1:]
    assert len(rows) == len({row.split(",")[0] for row in rows}) > 1, "results so far"
    assert_nothing_is_lost(tmp_path, whole)


def test_a_second_ctrl_c_does_not_wait_and_saves_no_half_step(tmp_path: Path, whole: Path) -> None:
    with pytest.raises(SystemExit):
        fit(tmp_path, Act("on_train_batch_start", lambda: None), Act("on_train_batch_start", send(2, 2)), seconds=1e-9)
    assert iteration(tmp_path) == AT, "the checkpoint of the step before"
    assert_nothing_is_lost(tmp_path, whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
def test_a_signal_after_the_last_step_ends_the_program_when_all_is_written(
    tmp_path: Path, whole: Path, number: int, code: int
) -> None:
    with pytest.raises(SystemExit) as end:
        fit(tmp_path, Act("on_train_end", send(number)))
    assert end.value.code == code
    assert (tmp_path / "victims.csv").read_bytes() == (whole / "victims.csv").read_bytes()
    assert_nothing_is_lost(tmp_path, whole)


def test_slurms_requeue_waits_for_the_end_of_the_step(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"NTASKS": "1", "JOB_ID": "17", "JOB_NAME": "attack", "NODEID": "0", "LOCALID": "0", "PROCID": "0"}
    for name, value in names.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    called: list[list[str]] = []
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.signal_connector.call", called.append)
    before, step, within, saved = signal.getsignal(signal.SIGUSR1), IDLGAttack.training_step, [False], []

    def hit(self: IDLGAttack, batch: Any, batch_idx: int) -> None:
        within[0] = True
        if self.iteration == AT:
            send(signal.SIGUSR1)()
        step(self, batch, batch_idx)
        within[0] = False

    class Whole(WholeCheckpointIO):
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            saved.append((Path(path).name, checkpoint["leakage"]["iteration"], within[0]))
            super().save_checkpoint(checkpoint, path, storage_options)

    with monkeypatch.context() as patch:
        patch.setattr(IDLGAttack, "training_step", hit)
        patch.setitem(globals(), "WholeCheckpointIO", Whole)
        fit(tmp_path, plugins=[SLURMEnvironment(requeue_signal=signal.SIGUSR1)], default_root_dir=tmp_path)
    assert saved[:2] == [("last.ckpt", AT + 1, False), ("hpc_ckpt_1.ckpt", AT + 1, False)]
    assert called == [["scontrol", "requeue", "17"]]
    assert signal.getsignal(signal.SIGUSR1) == before
    again = tmp_path / "again"
    again.mkdir()
    fit(again, resume=tmp_path / "hpc_ckpt_1.ckpt", plugins=[LightningEnvironment()])
    assert (again / "victims.csv").read_bytes() == (whole / "victims.csv").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_program_keeps_its_own_handler(tmp_path: Path, number: int) -> None:
    got: list[int] = []
    before = signal.signal(number, lambda number, frame: got.append(number))
    try:
        if number == signal.SIGINT:
            assert fit(tmp_path, Act("on_train_batch_start", send(number))).num_done == 3
        else:  # Lightning's own way to end
            with pytest.raises(SystemExit):
                fit(tmp_path, Act("on_train_batch_start", send(number)))
    finally:
        signal.signal(number, before)
    assert got == [number]


def test_outside_of_the_main_thread_signals_are_left_alone(tmp_path: Path) -> None:
    done: list[int] = []
    callback = TimedCheckpoint(tmp_path)
    callback.setup(None, None, "fit")  # type: ignore[arg-type]
    before = signal.getsignal(signal.SIGTERM)

    def start() -> None:
        callback.on_train_start(Trainer(logger=False, accelerator="cpu"), None)  # type: ignore[arg-type]
        done.append(1)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert done
    assert signal.getsignal(signal.SIGTERM) == before


class FullDisk(WholeCheckpointIO):
    """Takes checkpoints up to an iteration, and none after it."""

    def __init__(self, until: int) -> None:
        super().__init__()
        self.until = until

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if checkpoint["leakage"]["iteration"] > self.until:
            raise OSError(f"Expected to write '{path}', but got: No space left on device")
        super().save_checkpoint(checkpoint, path, storage_options)


def test_a_full_disk_costs_checkpoints_and_not_the_run(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "WholeCheckpointIO", lambda: FullDisk(AT))
    with pytest.warns(UserWarning, match=r"Expected to write '.*last.ckpt'.* No space left on device"):
        assert fit(tmp_path, seconds=1e-9).num_done == 3
    monkeypatch.undo()
    assert iteration(tmp_path) == AT, "the last that was whole"
    assert_nothing_is_lost(tmp_path, whole)


def test_a_signal_on_a_full_disk_ends_the_run_and_is_told(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "WholeCheckpointIO", lambda: FullDisk(AT - 5))
    with pytest.warns(UserWarning, match="No space left"), pytest.raises(SystemExit) as end:
        fit(tmp_path, Act("on_train_batch_start", send(signal.SIGTERM)), seconds=1e-9)
    monkeypatch.undo()
    assert end.value.code == 143
    assert iteration(tmp_path) == AT - 5
    assert_nothing_is_lost(tmp_path, whole)


def test_the_time_between_two_attempts_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []

    def fail(self: Trainer, path: Path) -> None:
        tried.append(path)
        raise OSError("full")

    monkeypatch.setattr(Trainer, "save_checkpoint", fail)
    with pytest.warns(UserWarning, match=r"full\. The run continues"):
        fit(tmp_path)
    assert tried == [tmp_path / "last.ckpt"], "at the end only"


class Fails(Logger):
    def __init__(self, method: str, calls: int = 0) -> None:
        super().__init__()
        self.method, self.calls = method, calls

    name, version = "fails", 0  # type: ignore[assignment]

    def _fail(self, method: str) -> None:
        if method == self.method:
            self.calls -= 1
            if self.calls < 0:
                raise ConnectionError(f"{method} fails")

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._fail("log_metrics")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        self._fail("log_hyperparams")

    def finalize(self, status: str) -> None:
        self._fail("finalize")


@pytest.mark.parametrize(("method", "calls"), [("log_metrics", 5), ("log_metrics", 7), ("finalize", 0)])
def test_a_logger_that_fails_loses_nothing(tmp_path: Path, whole: Path, method: str, calls: int) -> None:
    with pytest.raises(ConnectionError, match=f"{method} fails"):
        fit(tmp_path, logger=Fails(method, calls))
    assert (tmp_path / "victims.csv").is_file()
    saved = (tmp_path / "last.ckpt").read_bytes()
    with pytest.raises(ConnectionError, match="log_hyperparams fails"):
        fit(tmp_path, logger=Fails("log_hyperparams"), resume=True)
    assert (tmp_path / "last.ckpt").read_bytes() == saved, "what had not begun has no state to save"
    assert_nothing_is_lost(tmp_path, whole)


def test_an_error_within_a_step_leaves_the_checkpoint_before_it(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retire = Search.retire

    def fail(self: Search, *arguments: Any, **options: Any) -> None:
        if self.iteration == AT:
            raise RuntimeError("in the middle")
        retire(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Search, "retire", fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            fit(tmp_path, seconds=1e-9)
    assert iteration(tmp_path) == AT - 1
    assert_nothing_is_lost(tmp_path, whole)


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path, whole: Path) -> None:
    with pytest.raises(SystemExit):
        fit(tmp_path, Act("on_train_batch_start", send(signal.SIGTERM)))
    (tmp_path / "last.ckpt.17.partial").write_bytes(b"half")
    (tmp_path / "reconstructions" / "part_0000.safetensors.17.partial").write_bytes(b"half")
    (tmp_path / "other.partial").touch()
    with pytest.raises(SystemExit):
        fit(tmp_path, Act("on_train_batch_start", send(signal.SIGTERM), at=AT + 3), resume=True)
    assert [path.name for path in tmp_path.rglob("*.partial")] == ["other.partial"]
    (tmp_path / "other.partial").unlink()
    assert_nothing_is_lost(tmp_path, whole)


def test_the_trainers_own_limit_leaves_a_checkpoint(tmp_path: Path, whole: Path) -> None:
    attack = fit(tmp_path, max_steps=AT)
    assert 0 < attack.iteration == iteration(tmp_path)
    assert_nothing_is_lost(tmp_path, whole)
