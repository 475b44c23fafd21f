"""Shared code of the benchmarks: the machine, random victims, a Trainer without output, and the result files."""

from __future__ import annotations

import contextlib
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import TensorDataset

from leakage.datamodules import Victims
from leakage.files.text import write_json
from leakage.files.whole import check_output
from leakage.models import NETWORKS
from leakage.plots import save_figure

CLASSES = 10


def cores() -> int:
    """Return the number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Set the number of threads of torch within the block, and restore it afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def find_device(name: str | None) -> torch.device:
    """Return the named device, by default the GPU if there is one; raise a ``ValueError`` if it does not work."""
    found = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(found)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"Expected `--device` to be cpu or a GPU that works, but got {found!r}: {reason}") from error
    return device


def describe_machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Describe the machine that the figures depend on, without names of hosts or users."""
    device = torch.device(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def show_machine(machine: dict[str, Any]) -> str:
    """Format the description of a machine as one line."""
    gpu = f"{machine['gpu']}, " if machine["gpu"] else ""
    return f"{gpu}{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, torch {machine['torch']}"


def check_file(output: Path) -> None:
    """Raise an ``OSError`` if a result can't be written there, and a ``ValueError`` if the path is not a JSON file."""
    if output.is_dir():
        raise IsADirectoryError(f"Expected `--output` to be a file, but got the folder '{output}'.")
    if output.suffix != ".json":
        raise ValueError(f"Expected `--output` to end with .json, but got '{output}'.")
    check_output(output.parent)


def write_result(output: Path, result: dict[str, Any], figure: Figure) -> None:
    """Write the JSON file, and the picture next to it."""
    save_figure(figure, output.with_suffix(".png"))
    write_json(output, result)
    print(f"\n{output}\n{output.with_suffix('.png')}", flush=True)


def make_trainer(device: torch.device, *callbacks: Callback, **options: Any) -> Trainer:
    """Create a Trainer that runs an attack without other output."""
    return Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=options.pop("devices", 1),
        max_epochs=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.gettempdir(),
        callbacks=list(callbacks),
        **options,
    )


class Steps(Callback):
    """Record when training steps begin, by any clock."""

    def __init__(self, now: Callable[[], Any]) -> None:
        self.now = now
        self.moments: list[Any] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Record the start of a step."""
        self.moments.append(self.now())


def make_network(name: str, image_size: int) -> nn.Module:
    """Create a network of the papers from seed 0; images of 28 by 28 are grey, all others have three channels."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return NETWORKS[name](1 if image_size == 28 else 3, image_size, CLASSES).eval()


class RandomVictims(Victims):
    """Victims with random images and revealed labels, for measurements independent of the images; not scored."""

    def __init__(self, *, victims: int, images: int, image_size: int, seed: int = 0, **options: Any) -> None:
        generator = torch.Generator().manual_seed(seed)
        count, channels = victims * images, 1 if image_size == 28 else 3
        held = torch.rand(count, channels, image_size, image_size, generator=generator)
        data = TensorDataset(held, torch.arange(count) % CLASSES)
        super().__init__(
            data, victims=victims, images=images, seed=seed, num_classes=CLASSES, reveal_labels=True, **options
        )

    def val_dataloader(self) -> list[Any]:
        """Nothing."""
        return []
