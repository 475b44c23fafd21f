"""Train four Flower clients with FedAvg, and capture, test and attack their updates.

    pip install "leakage[flower]" "flwr[simulation]"
    python experiments/audit/flower.py --output results/flower

In each round, each client takes one step of SGD on its images of FashionMNIST. The script reads, checks and attacks the
updates that the mod has written, and also what the library's own client shares for the same images at the same weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from leakage import LeNet, SharedGradient, Victim
from leakage.attacks import GaussNewtonAttack
from leakage.audit import check_update
from leakage.datamodules import SharedGradients, Source
from leakage.files.text import write_json
from leakage.labels import infer_labels
from leakage.metrics import ReconstructionMetrics, score
from leakage.updates import CaptureUpdates, read_update

CLIENTS = 4


def held(partition: int, round_number: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the images and labels of one client in one round."""
    source = Source("sample").open("train")
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
    first = ((round_number - 1) * CLIENTS + partition) * count
    images, labels = zip(*(source[int(place)] for place in order[first : first + count]), strict=True)
    return torch.stack([image.float() for image in images]), torch.tensor(labels)


def network() -> LeNet:
    """Return the initial network, which all clients share."""
    torch.manual_seed(0)
    return LeNet()


def simulate(captured: Path, rounds: int, count: int, rate: float) -> None:
    """Run Flower's simulation while the mod writes each update."""
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client = ClientApp(mods=[CaptureUpdates(captured)])

    @client.train()  # type: ignore[misc]
    def train(message: Message, context: Context) -> Message:
        model = network()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        partition = int(context.node_config["partition-id"])
        images, labels = held(partition, int(message.content["config"]["server-round"]), count)
        F.cross_entropy(model(images), labels).backward()
        torch.optim.SGD(model.parameters(), lr=rate).step()
        metrics = MetricRecord({"num-examples": count, "partition": partition})
        return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

    server = ServerApp()

    @server.main()  # type: ignore[misc]
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
        strategy.start(grid=grid, initial_arrays=ArrayRecord(network().state_dict()), num_rounds=rounds)

    run_simulation(server, client, num_supernodes=CLIENTS, backend_config={"client_resources": {"num_cpus": 1}})


def audit(shared: list[SharedGradient], victim: Victim, truth: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Read off the labels, run the second-order attack, and return the scores."""
    images, labels = (torch.stack(part) for part in zip(*truth, strict=True))
    read = torch.cat([infer_labels(one, victim).labels for one in shared])
    right = sum(score_of(found, true) for found, true in zip(read.tolist(), labels.tolist(), strict=True))
    attack = GaussNewtonAttack()
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    trainer.fit(attack, datamodule=SharedGradients(shared, victim))
    metrics = ReconstructionMetrics()
    metrics.update(score(attack.finished.images, attack.finished.labels, images, labels).per_victim())
    return {"labels_read": right / labels.numel(), **{name: float(value) for name, value in metrics.compute().items()}}


def score_of(found: list[int], true: list[int]) -> int:
    """Count how many labels of a client are right, in any order."""
    return sum(min(found.count(label), true.count(label)) for label in set(true))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=1, help="number of images behind one update")
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    captured = options.output / "captured"
    for file in captured.glob("*.safetensors"):
        file.unlink()
    simulate(captured, options.rounds, options.images, options.learning_rate)

    victim = Victim(network(), image_shape=(1, 28, 28), num_images=options.images)
    shared, own, truth, failed = [], [], [], []
    for after in sorted(captured.glob("*.after.safetensors")):
        before = after.with_name(after.name.replace(".after.", ".before."))
        checks = check_update(before, after, victim, learning_rate=options.learning_rate, client=after.name)
        failed += [f"{check.client}: {check.name}: {check.finding}" for check in checks if not check.passed]
        shared.append(read_update(before, after, victim, learning_rate=options.learning_rate))
        with safe_open(after, framework="pt") as file:
            partition = json.loads(file.metadata()["metrics"])["metrics"]["partition"]
        truth.append(held(partition, int(after.name.split("-")[1]), options.images))
        images, labels = (part[None] for part in truth[-1])
        states = {name: tensor[None] for name, tensor in shared[-1].state.items()}
        own.append(victim.share(images, labels, states=states))
    result = {
        "updates": len(shared),
        "failed_checks": failed,
        "captured": audit(shared, victim, truth),
        "own_client": audit(own, victim, truth),
    }
    write_json(options.output / "summary.json", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
