"""Audit four networks as a user would, by the public Python API, and compare their verdicts.

    python experiments/audit/networks.py --output results/audit_networks

A client shares the gradient of one image of the data, computed with untrained weights. The networks are an MLP with
LayerNorm and GELU, the library's ConvNet and ViT, and torchvision's ResNet-18 in evaluation mode. In training mode, the
ResNet refuses a single image of 28x28 pixels: its last BatchNorm would see one value per channel. It takes three
channels, so its module repeats a single one.

Files in the output folder: a folder with the report of each audit, from which an audit that was killed resumes, and
`summary.json`, with an entry for each attack.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from leakage.audit import Client, audit
from leakage.audit.auditing import seconds_of
from leakage.audit.example import ExampleModule
from leakage.audit.report import AuditReport, Figure
from leakage.audit.verdict import check_thresholds
from leakage.cli import quiet
from leakage.datamodules import Source
from leakage.errors import check_count
from leakage.files.text import write_json
from leakage.files.whole import check_output
from leakage.models import ConvNet, ViT

_LIMITS = {"success_rate": 0.2, "identified": 0.2}


class Repeat(nn.Module):
    """Repeat the channel of grey images to three."""

    def forward(self, images: Tensor) -> Tensor:
        """Return images ``(N, 3, H, W)``."""
        return images.expand(-1, 3, -1, -1)


def _resnet18(channels: int, size: int) -> nn.Module:
    network = resnet18(num_classes=10)
    return (network if channels == 3 else nn.Sequential(Repeat(), network)).eval()


def _mlp(channels: int, size: int) -> nn.Module:
    widths, layers = (channels * size**2, 128, 128), list[nn.Module]([nn.Flatten()])
    for before, width in pairwise(widths):
        layers += [nn.Linear(before, width), nn.LayerNorm(width), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


#: Networks for square images, by name.
NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "mlp": _mlp,
    "convnet": ConvNet,
    "vit": lambda channels, size: ViT(channels, size, width=64, depth=2),
    "resnet18": _resnet18,
}


@dataclass
class NetworkRow:
    """One attack on one network, an entry of ``summary.json``.

    Attributes:
        network: name of the network.
        parameters: number of its parameters.
        attack: name of the attack.
        victims: number of victims that were attacked.
        reason: why the attack did not run or ended early; ``""`` if it finished.
        metrics: figures of the attack.
        nearest: PSNR in dB of the auditor's nearest image.
        verdict: verdict of the audit.
    """

    network: str
    parameters: int
    attack: str
    victims: int
    reason: str
    metrics: dict[str, Figure]
    nearest: Figure | None
    verdict: str


def audited(name: str, parameters: int, report: AuditReport) -> list[NetworkRow]:
    """Return a row for each attack of an audit's plan."""
    measured = {one.attack: one for one in report.measured}
    rows = []
    for planned in report.plan:
        found = measured.get(planned.attack)
        victims, metrics = (found.victims, found.metrics) if found else (0, {})
        nearest = found.baselines.get("nearest") if found else None
        about = (planned.attack, victims, planned.reason, metrics, nearest, report.verdict)
        rows.append(NetworkRow(name, parameters, *about))
    return rows


def format_table(rows: Sequence[NetworkRow]) -> str:
    """Return the rows as a Markdown table, with 95 % intervals."""
    lines = [
        "| network | parameters | attack | victims | reconstructed | identified | PSNR | nearest | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = []
        for name in ("success_rate", "identified", "psnr"):
            figure, share = row.metrics.get(name), name != "psnr"
            shown = "" if figure is None else f"{figure.value:.0%}" if share else f"{figure.value:.1f} dB"
            interval = f" [{100 * figure.low:.0f}, {100 * figure.high:.0f}]" if figure is not None and share else ""
            cells.append(shown + interval)
        cells.append("" if row.nearest is None else f"{row.nearest.value:.1f} dB")
        start = f"| {row.network} | {row.parameters:,} | {row.attack} | {row.victims or row.reason} |"
        lines.append(f"{start} {' | '.join(cells)} | {row.verdict} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for summary.json and the reports")
    parser.add_argument(
        "--data", default="sample", help="data set of square images in 10 classes (default: %(default)s)"
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="networks to audit")
    parser.add_argument("--budget", default="6m", help="time for the attacks on each network (default: %(default)s)")
    parser.add_argument("--victims", type=int, default=20, help="victims in each audit (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws (default: %(default)s)")
    given = parser.parse_args(arguments)
    quiet()
    try:
        check_count(victims=given.victims)
        check_count(0, seed=given.seed)
        seconds_of(given.budget)
        data = Source(given.data).open()
        check_output(given.output)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    channels, size, _ = data[0][0].shape
    rows: list[NetworkRow] = []
    for name in given.networks:
        torch.manual_seed(given.seed)
        module = ExampleModule()
        module.network = NETWORKS[name](channels, size)
        report = audit(
            module,
            data,
            Client(images=1),
            victims=given.victims,
            budget=given.budget,
            fail_above=check_thresholds(_LIMITS),
            seed=given.seed,
            output=given.output / name,
            log=lambda line, name=name: print(f"{name}: {line}", flush=True),
        )
        rows += audited(name, sum(one.numel() for one in module.parameters()), report)
        write_json(given.output / "summary.json", [asdict(row) for row in rows])
    print(f"\n{format_table(rows)}\n\n{given.output / 'summary.json'}")


if __name__ == "__main__":
    main()
