"""Several processes: dividing the victims, synchronising, and gathering the results."""

from __future__ import annotations

import secrets
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, distributed

from leakage.files.checkpoints import part_of
from leakage.inversion.reconstruction import Reconstruction
from leakage.inversion.strategy import VictimParallel
from leakage.metrics import VictimScore


def check_strategy(trainer: Trainer) -> None:
    """Raise a ``ValueError`` if there are several processes and the strategy is not ``"victim_parallel"``."""
    if trainer.world_size > 1 and not isinstance(trainer.strategy, VictimParallel):
        raise ValueError(
            "Expected a Trainer with one process, or strategy='victim_parallel', which divides the "
            f"victims among processes, but got {trainer.world_size} processes and {type(trainer.strategy).__name__}."
        )


def new_deal(trainer: Trainer) -> str:
    """Return a random name for a division of victims, equal in all processes.

    Checkpoint parts with different names do not belong together.
    """
    deal: str = trainer.strategy.broadcast(secrets.token_hex(8))
    return deal


def sum_over_processes(trainer: Trainer, number: int) -> int:
    """Return the sum of ``number`` over all processes, in each of them."""
    if trainer.world_size == 1:
        return number
    total = torch.tensor(number, device=trainer.strategy.root_device)
    distributed.all_reduce(total)
    return int(total)


def is_first_process() -> bool:
    """Return whether this process writes results, by the environment; works before a Trainer exists."""
    return not getattr(rank_zero_only, "rank", 0)


def from_first(value: Any) -> Any:
    """Return the first process' value, in all processes."""
    values = [value]
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast_object_list(values)
    return values[0]


def gather(
    trainer: Trainer, finished: Reconstruction, places: list[int], scores: dict[int, VictimScore]
) -> tuple[list[Reconstruction], list[int], dict[int, VictimScore]]:
    """Return the results of all processes, in the order of the victims, in the first process.

    The other processes return only their own results.
    """
    parts: list[Any] = [(vars(finished), places, scores)]
    if trainer.world_size > 1:
        all_parts: list[Any] = [None] * trainer.world_size
        first = trainer.is_global_zero
        # The first process sends nothing: all messages are padded to the largest part, which may well be its own.
        distributed.gather_object(None if first else parts[0], all_parts if first else None)
        parts = [parts[0], *all_parts[1:]] if first else parts
    joined = Reconstruction.cat([Reconstruction(**part) for part, _, _ in parts])
    order = torch.tensor([place for _, places, _ in parts for place in places], dtype=torch.long).sort()
    all_scores = {victim: result for _, _, scores in parts for victim, result in scores.items()}
    joined = joined.select(order.indices)
    ordered = {victim: all_scores[victim] for victim in joined.ids.tolist() if victim in all_scores}
    return [joined], order.values.tolist(), ordered | all_scores


def take_part(trainer: Trainer, checkpoint: dict[str, Any], victims: int) -> None:
    """Replace the content of ``checkpoint`` by the part with which this process continues.

    A checkpoint has one part for each process that wrote it.

    Raises:
        ValueError: if the parts belong to different runs.
        OSError: if a part is missing.
    """
    processes = checkpoint["leakage"]["processes"]
    if processes == trainer.world_size == 1:
        return
    path = str(trainer.ckpt_path)
    load = trainer.strategy.checkpoint_io.load_checkpoint
    parts = [checkpoint, *(load(part_of(path, process)) for process in range(1, processes))]
    for process, part in enumerate(parts):
        if _configuration(trainer, part) != _configuration(trainer, checkpoint):
            raise ValueError(
                f"Expected the parts of one run beside '{path}', but got '{part_of(path, process)}' with another "
                "configuration or other victims. It was left by an earlier run."
            )
    deals = {part["leakage"]["deal"] for part in parts}
    done = [place for part in parts for place in part["leakage"]["places"]]
    # After a finished run, the first part has the results of all processes, so victims occur twice.
    if processes == trainer.world_size and len(deals) == 1 and len(set(done)) == len(done):
        for name in ("leakage", "optimizer_states", "state_dict"):
            checkpoint[name] = parts[trainer.global_rank][name]
        return
    _deal_anew(trainer, checkpoint, parts, victims)


def _configuration(trainer: Trainer, part: dict[str, Any]) -> list[Any]:
    """Return what the parts of one run have in common: the attack, its options and its victims."""
    victims = type(getattr(trainer, "datamodule", None)).__qualname__
    return [part["leakage"]["module"], part["leakage"]["precision"], part["hyper_parameters"], part.get(victims)]


def _deal_anew(trainer: Trainer, checkpoint: dict[str, Any], parts: list[dict[str, Any]], victims: int) -> None:
    """Give finished victims to the first process; divide all others among the processes, to start over."""
    finished: list[dict[str, Tensor]] = []
    done: list[int] = []
    scores: dict[int, Any] = {}
    for part in parts:
        saved = part["leakage"]
        known = set(done)
        places = saved["places"]
        new = [row for row, place in enumerate(places) if place not in known]
        if new:
            joined = Reconstruction.cat([Reconstruction(**one) for one in saved["finished"]])
            finished.append(vars(joined.select(torch.tensor(new))))
            done += [places[row] for row in new]
        scores |= {victim: result for victim, result in saved["scores"].items() if result["final"]}
    # Victims that had ended but were still in a lane start over too, and are scored again.
    ids = {victim for part in finished for victim in part["ids"].tolist()}
    scores = {victim: result for victim, result in scores.items() if victim in ids}
    rest = sorted(set(range(victims)) - set(done))
    first = trainer.is_global_zero
    checkpoint["leakage"] |= {
        "processes": trainer.world_size,
        "deal": "",
        "queue": {"waiting": rest[trainer.global_rank :: trainer.world_size], "asked": [], "asked_at": -1},
        "most_lanes": 0,
        "lanes": {"kept": {}, "shared": None},
        "finished": finished if first else [],
        "places": done if first else [],
        "scores": scores if first else {},
    }
    for name, tensor in checkpoint["state_dict"].items():
        if name.startswith("unknowns."):  # the weights of pieces that are modules are also here
            checkpoint["state_dict"][name] = tensor[:0]
    for state in checkpoint["optimizer_states"]:
        state["state"][0] = {name: tensor[:0] for name, tensor in state["state"][0].items()}
