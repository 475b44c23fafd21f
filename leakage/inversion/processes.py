"""Several processes: who attacks whom, when all are done, and how the results come together."""

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
    """Raise a ``ValueError`` if there are several processes whose strategy would average the dummy images."""
    if trainer.world_size > 1 and not isinstance(trainer.strategy, VictimParallel):
        raise ValueError(
            "Expected a Trainer with one process, or strategy='victim_parallel', which shares the "
            f"victims out among them, but got {trainer.world_size} processes and {type(trainer.strategy).__name__}."
        )


def new_deal(trainer: Trainer) -> str:
    """A name, the same in all processes, for who has which victims: parts of two deals do not go together."""
    deal: str = trainer.strategy.broadcast(secrets.token_hex(8))
    return deal


def sum_over_processes(trainer: Trainer, number: int) -> int:
    """The sum of a number of each process, in all of them."""
    if trainer.world_size == 1:
        return number
    total = torch.tensor(number, device=trainer.strategy.root_device)
    distributed.all_reduce(total)
    return int(total)


def is_first_process() -> bool:
    """Whether this is the process that writes results; known before a Trainer is made, from the environment."""
    return not getattr(rank_zero_only, "rank", 0)


def from_first(value: Any) -> Any:
    """The first process' value, in all of them."""
    values = [value]
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast_object_list(values)
    return values[0]


def gather(
    trainer: Trainer, finished: Reconstruction, places: list[int], scores: dict[int, VictimScore]
) -> tuple[list[Reconstruction], list[int], dict[int, VictimScore]]:
    """What all processes have found, in the order of the victims, in the first one; the others keep their own."""
    parts: list[Any] = [(vars(finished), places, scores)]
    if trainer.world_size > 1:
        all_parts: list[Any] = [None] * trainer.world_size
        first = trainer.is_global_zero
        # The first keeps its own, which may be far the largest: what is sent is padded to the size of the largest.
        distributed.gather_object(None if first else parts[0], all_parts if first else None)
        parts = [parts[0], *all_parts[1:]] if first else parts
    joined = Reconstruction.cat([Reconstruction(**part) for part, _, _ in parts])
    order = torch.tensor([place for _, places, _ in parts for place in places], dtype=torch.long).sort()
    all_scores = {victim: result for _, _, scores in parts for victim, result in scores.items()}
    joined = joined.select(order.indices)
    ordered = {victim: all_scores[victim] for victim in joined.ids.tolist() if victim in all_scores}
    return [joined], order.values.tolist(), ordered | all_scores


def take_part(trainer: Trainer, checkpoint: dict[str, Any], victims: int) -> None:
    """Make of a checkpoint's parts, one for each process that wrote it, the one that this process goes on with.

    Raises:
        ValueError: parts of different runs.
        OSError: a part is missing.
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
                f"Expected the parts of one run beside '{path}', but got '{part_of(path, process)}' of another "
                "configuration or of other victims: it was left by an earlier run."
            )
    deals = {part["leakage"]["deal"] for part in parts}
    done = [place for part in parts for place in part["leakage"]["places"]]
    # When a run is over the first one has the results of all.
    if processes == trainer.world_size and len(deals) == 1 and len(set(done)) == len(done):
        for name in ("leakage", "optimizer_states", "state_dict"):
            checkpoint[name] = parts[trainer.global_rank][name]
        return
    _deal_anew(trainer, checkpoint, parts, victims)


def _configuration(trainer: Trainer, part: dict[str, Any]) -> list[Any]:
    """What the parts of one run have in common: the attack, its options and its victims."""
    victims = type(getattr(trainer, "datamodule", None)).__qualname__
    return [part["leakage"]["module"], part["leakage"]["precision"], part["hyper_parameters"], part.get(victims)]


def _deal_anew(trainer: Trainer, checkpoint: dict[str, Any], parts: list[dict[str, Any]], victims: int) -> None:
    """What is done goes to the first process; all other victims are shared out, and begin anew."""
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
    # A victim that had ended in its lane begins anew too, and is scored anew.
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
        if name.startswith("unknowns."):  # a piece that is a module has its weights there too
            checkpoint["state_dict"][name] = tensor[:0]
    for state in checkpoint["optimizer_states"]:
        state["state"][0] = {name: tensor[:0] for name, tensor in state["state"][0].items()}
