"""Compare the seconds per victim of an attack of this library and a plain loop, on the same victims.

    python experiments/benchmarks/attack_speed.py --output speed.json
    python experiments/benchmarks/attack_speed.py --method dlg --output speed_dlg.json
    python experiments/benchmarks/attack_speed.py --dataset fashion_mnist --output speed_fashion_mnist.json
    python experiments/benchmarks/attack_speed.py --method gauss_newton --threshold 1e-6 --output speed_exact.json
    python experiments/benchmarks/attack_speed.py --dataset cifar10 --num-classes 1000 --victims 48 --output many.json

The plain loop follows the published protocol: one victim at a time, ordinary autograd and `torch.optim.LBFGS` without
line search, from N(0, 1), at most 300 calls of 20 iterations, stopped if the gradient distance, checked every 10
calls, is below 1e-6. It reads the label from the gradient (iDLG); with `--method dlg` it also searches for the label
(DLG). The other side is `IDLGAttack`, or the attack in `--method`, with its defaults in `Trainer.fit`. Each victim has
one image and a new random LeNet; the plain loop takes the first `--plain-victims` of the victims. Without `--dataset`
the images are from MNIST, or from the bundled sample if MNIST is not found.

Each side runs with one thread or with all cores, whichever was faster for it in a test before. The time of the library
is that of the whole `Trainer.fit`, including shared gradients and scores; that of the plain loop is the search only.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmark_plots import plot_parts
from lightning import Trainer
from setting import check_file, cores, describe_machine, write_result  # beside this script
from torch import Tensor, nn
from torch.nn import functional as F

from leakage.attacks import DLGAttack, GaussNewtonAttack, GradientInversion, IDLGAttack, RGAPAttack
from leakage.cli import quiet
from leakage.clients.shared_gradient import SharedGradient
from leakage.datamodules import DATASETS, GroundTruth, Victims
from leakage.errors import check_count, check_positive
from leakage.metrics import score, wilson_interval
from leakage.models import LeNet
from leakage.seeds import derive_seed

# The published protocol.
CALLS, ITERATIONS, CHECK_EVERY, TOLERANCE = 300, 20, 10, 1e-6
# An image counts as reconstructed if its mean squared error is below this.
THRESHOLD = 1e-3
METHODS: dict[str, Callable[..., GradientInversion]] = {
    "idlg": IDLGAttack,
    "dlg": DLGAttack,
    "rgap": RGAPAttack,
    "gauss_newton": GaussNewtonAttack,
}
PROBE_VICTIMS, PROBE_PLAIN_VICTIMS = 64, 2


@dataclass
class Outcome:
    """The result of one side: ids ``(V,)``, images ``(V, 1, C, H, W)`` and labels ``(V, 1)`` found, and the cost."""

    seconds: float
    ids: Tensor
    images: Tensor
    labels: Tensor
    evaluations: Tensor

    @property
    def seconds_per_victim(self) -> float:
        """Mean over victims."""
        return self.seconds / len(self.ids)


def attack_plainly(
    model: nn.Module, gradients: dict[str, Tensor], start: Tensor, logits: Tensor | None = None
) -> tuple[Tensor, int, int]:
    """Run the published search for one victim; returns the image ``(1, C, H, W)``, the label and the evaluations.

    With ``logits`` ``(1, K)``, the label is searched for (DLG); without, it is read from the gradient (iDLG).
    """
    parameters = dict(model.named_parameters())
    weights, targets = [parameters[name] for name in gradients], list(gradients.values())
    image = start.clone().requires_grad_()
    inferred = gradients["classifier.bias"].argmin().reshape(1)
    searched = [] if logits is None else [logits.clone().requires_grad_()]
    unknowns = [image, *searched]
    optimizer = torch.optim.LBFGS(unknowns, lr=1.0, max_iter=ITERATIONS, history_size=100)
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        loss = F.cross_entropy(model(image), searched[0].softmax(1) if searched else inferred)
        found = torch.autograd.grad(loss, weights, create_graph=True)
        distance = torch.stack(
            [(gradient - target).square().sum() for gradient, target in zip(found, targets, strict=True)]
        ).sum()
        # `backward` would also compute the gradient of the weights, which is not needed.
        for unknown, gradient in zip(unknowns, torch.autograd.grad(distance, unknowns), strict=True):
            unknown.grad = gradient
        return distance.detach()

    for call in range(CALLS):
        distance = float(optimizer.step(closure))  # type: ignore[no-untyped-call]
        if call % CHECK_EVERY == 0:
            distance = float(closure())
            if distance < TOLERANCE:
                break
        if not math.isfinite(distance):  # the search cannot recover
            break
    return image.detach(), int(searched[0].argmax() if searched else inferred), evaluations


def run_plainly(victims: Victims, count: int, seed: int, method: str = "idlg") -> Outcome:
    """Attack the first ``count`` victims one after another; ``method`` is that of the library's side."""
    shared: SharedGradient = victims.share(range(count))
    model = copy.deepcopy(victims.victim.model).requires_grad_()
    images, labels, evaluations, seconds = [], [], [], 0.0
    for index in range(count):
        model.load_state_dict({name: tensor[index] for name, tensor in shared.state.items()})
        gradients = {name: tensor[index] for name, tensor in shared.gradients.items()}
        generator = torch.Generator().manual_seed(derive_seed(seed, index, "plain start"))
        start = torch.randn(1, *victims.victim.protocol.image_shape, generator=generator)
        logits = torch.randn(1, victims.victim.protocol.num_classes, generator=generator) if method == "dlg" else None
        began = time.perf_counter()
        image, label, count_of_victim = attack_plainly(model, gradients, start, logits)
        seconds += time.perf_counter() - began
        images.append(image)
        labels.append([label])
        evaluations.append(count_of_victim)
    return Outcome(seconds, shared.ids, torch.stack(images), torch.tensor(labels), torch.tensor(evaluations))


def run_ours(victims: Victims, seed: int, precision: Any = "32-true", method: str = "idlg") -> Outcome:
    """Attack all victims with ``Trainer.fit``."""
    attack = METHODS[method](seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            precision=precision,
            max_epochs=1,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        began = time.perf_counter()
        trainer.fit(attack, datamodule=victims)
        seconds = time.perf_counter() - began
    found = attack.finished
    return Outcome(seconds, found.ids, found.images, found.labels, found.evaluations)


def best_threads(name: str, run: Callable[[], Outcome]) -> int:
    """Return 1 or the number of cores, whichever is faster."""
    seconds = {}
    for threads in sorted({1, cores()}):
        torch.set_num_threads(threads)
        seconds[threads] = run().seconds_per_victim
        print(f"  {name}, {threads} threads: {seconds[threads]:.3f} s per victim", flush=True)
    return min(seconds, key=lambda threads: seconds[threads])


def rate(outcome: Outcome, victims: Victims, threshold: float = THRESHOLD) -> dict[str, Any]:
    """Return the shares of images below the threshold and of labels found, with 95 % intervals."""
    truth = GroundTruth.cat(list(victims.val_dataloader()))
    ids = outcome.ids
    scores = score(outcome.images, outcome.labels, truth.images[ids], truth.labels[ids])
    success = float((scores.mse < threshold).double().mean())
    labels = float(scores.label_correct.double().mean())
    return {
        "success_rate": success,
        "success_rate_ci": list(wilson_interval(success, len(ids))),
        "mse_median": float(scores.mse.median()),
        "label_accuracy": labels,
        "label_accuracy_ci": list(wilson_interval(labels, len(ids))),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="attack_speed.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file; the picture is written next to it")
    parser.add_argument("--method", choices=tuple(METHODS), default="idlg", help="the attack (default: %(default)s)")
    parser.add_argument(
        "--threshold",
        type=float,
        default=THRESHOLD,
        help="an image with a lower MSE counts as reconstructed (default: %(default)s)",
    )
    parser.add_argument(
        "--dataset", help=f"one of {', '.join(DATASETS)}, or a folder of images in ImageFolder layout (default: mnist)"
    )
    parser.add_argument(
        "--num-classes", type=int, help="logits of the network, at least the data set's classes (default: as many)"
    )
    parser.add_argument("--victims", type=int, default=500, help="for the library (default: %(default)s)")
    parser.add_argument("--plain-victims", type=int, default=20, help="for the plain loop (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (default: %(default)s)")
    parser.add_argument("--root", type=Path, help="folder of the data sets (default: $LEAKAGE_DATA, ~/.cache/leakage)")
    parser.add_argument("--image-size", type=int, help="scale and crop a folder's images to this height and width")
    parser.add_argument("--lanes", type=int, help="victims attacked at once (default: automatic)")
    parser.add_argument(
        "--precision", choices=("32-true", "64-true"), default="32-true", help="of the library (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    quiet()
    try:
        check_count(victims=given.victims, plain_victims=given.plain_victims)
        check_positive(threshold=given.threshold)
        if given.plain_victims > given.victims:
            raise ValueError(
                f"Expected `--plain-victims` to be at most {given.victims}, the number of victims, but got "
                f"{given.plain_victims}."
            )
        check_file(given.output)
        dataset, victims = _victims(given, given.victims)
        _, probe = _victims(given, min(PROBE_VICTIMS, given.victims))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    threads_before = torch.get_num_threads()
    try:
        _measure(given, dataset, victims, probe)
    finally:
        torch.set_num_threads(threads_before)


def _measure(given: argparse.Namespace, dataset: str, victims: Victims, probe: Victims) -> None:
    machine = describe_machine() | {"threads": None}  # each side has its own
    print(f"{dataset}: finding the best number of threads", flush=True)
    probed = min(PROBE_PLAIN_VICTIMS, given.plain_victims)
    threads = {
        "leakage": best_threads("leakage", lambda: run_ours(probe, given.seed, given.precision, given.method)),
        "plain": best_threads("plain", lambda: run_plainly(probe, probed, given.seed, given.method)),
    }
    print(f"{given.victims} victims with leakage, then {given.plain_victims} of them with the plain loop", flush=True)
    torch.set_num_threads(threads["leakage"])
    outcomes = {"leakage": run_ours(victims, given.seed, given.precision, given.method)}
    torch.set_num_threads(threads["plain"])
    outcomes["plain"] = run_plainly(victims, given.plain_victims, given.seed, given.method)
    rates = {name: rate(outcome, victims, given.threshold) for name, outcome in outcomes.items()}
    seconds = {name: outcome.seconds_per_victim for name, outcome in outcomes.items()}
    evaluations = {name: float(outcome.evaluations.double().mean()) for name, outcome in outcomes.items()}
    ratio = seconds["plain"] / seconds["leakage"]
    result: dict[str, Any] = {
        "ratio": ratio,
        "dataset": dataset,
        "method": given.method,
        "threshold": given.threshold,
        "precision": {"leakage": given.precision, "plain": "32-true"},
        "seconds_per_victim": seconds,
        **{key: {name: rates[name][key] for name in rates} for key in rates["plain"]},
        "evaluations_per_victim": evaluations,
        "victims": {name: len(outcome.ids) for name, outcome in outcomes.items()},
        "threads": threads,
        "seed": given.seed,
        "machine": machine,
    }
    success = f"MSE < {given.threshold:g}"
    print(f"\n{'':8} {'victims':>8} {'threads':>8} {'s / victim':>11} {'evaluations':>12} {success:>22}")
    for name in ("plain", "leakage"):
        share = result["success_rate"][name]
        low, high = result["success_rate_ci"][name]
        success = f"{100 * share:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        print(
            f"{name:8} {len(outcomes[name].ids):>8} {threads[name]:>8} {seconds[name]:>11.3f} "
            f"{evaluations[name]:>12.0f} {success:>22}"
        )
    print(f"\n{ratio:.1f} times fewer seconds per victim")
    bars = {
        f"{side}, {given.method}": {"seconds per victim": seconds[name]}
        for name, side in (("plain", "plain loop"), ("leakage", "leakage"))
    }
    figure = plot_parts(bars, xlabel="seconds", title=f"{machine['cpu']}: {dataset}, {ratio:.1f} times faster")
    write_result(given.output, result, figure)


def _victims(given: argparse.Namespace, count: int) -> tuple[str, Victims]:
    """Return the victims, ready to share their gradients, and the name of their data set."""
    options: dict[str, Any] = {"victims": count, "seed": given.seed}
    if given.lanes is not None:
        options["lanes"] = given.lanes
    dataset, found = _found(given, options)
    if given.num_classes is not None:
        channels, height, width = found.victim.protocol.image_shape
        model = LeNet(channels=channels, image_size=(height, width), num_classes=given.num_classes)
        dataset, found = _found(given, options | {"model": model, "weights": "own"})
        dataset = f"{dataset}, {given.num_classes} classes"
    return dataset, found


def _found(given: argparse.Namespace, options: dict[str, Any]) -> tuple[str, Victims]:
    """Return the victims of the given data set, by default of MNIST or else of the bundled sample."""
    if given.dataset is not None:
        victims = Victims(given.dataset, root=given.root, image_size=given.image_size, **options)
        victims.prepare_data()
        victims.setup("fit")
        return victims.name, victims
    mnist = Victims("mnist", root=given.root, download=False, **options)
    try:
        mnist.setup("fit")
    except FileNotFoundError:
        print("MNIST was not found (see --root), so the bundled sample of FashionMNIST is used.", flush=True)
    else:
        return "mnist", mnist
    sample = Victims("sample", **options)
    sample.setup("fit")
    return "sample", sample


if __name__ == "__main__":
    main()
