"""Repeat whole audits of a network whose success rate is known, and count their verdicts.

    python experiments/audit/decisions.py --data fashion_mnist --output results/decisions

The network has a single hidden ReLU unit. If the unit is active, the gradient of its weights, divided by that of its
bias, is the image; otherwise, both are zero and nothing is left to find. So a closed-form attack finds an image exactly
if it activates the unit, and the bias sets the share of such images. This share is the true success rate. It is counted
over the whole data set by forward passes, without an attack.

Each audit draws new images, for the victims and for the auditor, and runs from preflight to verdict. The counts are
compared with what the intervals promise: the number of victims that are found is binomial, and Wilson's interval of it
decides. If the true rate is the limit itself, "exceeded" and "within" should each come up in about 2.5 % of the audits.

Files in the output folder: `summary.json`, with an entry for each true rate.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from scipy.stats import binom
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from leakage.audit import Client, audit
from leakage.audit.example import ExampleModule
from leakage.audit.report import DECISIONS, Figure
from leakage.audit.verdict import decide
from leakage.cli import quiet
from leakage.datamodules import Source
from leakage.errors import check_count, check_share
from leakage.files.text import write_json
from leakage.files.whole import check_output
from leakage.metrics import wilson_interval
from leakage.seeds import derive_seed

# Twice as many images as the victims hold: the auditor keeps the rest.
_IMAGES_PER_VICTIM = 2


@dataclass
class DecisionRow:
    """Repeated audits at one true success rate, an entry of ``summary.json``.

    Attributes:
        rate: true success rate.
        limit: limit of the audits.
        victims: number of victims in each audit.
        audits: number of audits.
        found: share of victims that were found in all audits together.
        decisions: number of audits with each decision.
        promised: exact probability of each decision.
    """

    rate: float
    limit: float
    victims: int
    audits: int
    found: float
    decisions: dict[str, int]
    promised: dict[str, float]


class OneUnit(ExampleModule):
    """A classifier with one hidden ReLU unit, which is active for a share of the images.

    Args:
        images: images ``(M, C, H, W)`` in [0, 1].
        rate: approximate share of them that activate the unit.
    """

    def __init__(self, images: Tensor, rate: float) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            unit = nn.Linear(images[0].numel(), 1)
            self.network = nn.Sequential(nn.Flatten(), unit, nn.ReLU(), nn.Linear(1, 10))
            unit.bias.zero_()
            ranked = unit(images.flatten(1)).flatten().sort(descending=True).values
            # Between two images, so that none lies at the kink.
            last = min(max(round(rate * len(ranked)), 1), len(ranked) - 1)
            unit.bias.copy_(-(ranked[last - 1] + ranked[last]) / 2)

    @torch.no_grad()
    def rate_on(self, images: Tensor) -> float:
        """Return the share of images that activate the unit."""
        return float((self.network[1](images.flatten(1)) > 0).double().mean())


def promised(rate: float, limit: float, victims: int) -> dict[str, float]:
    """Return the probability of each decision if each victim is found with probability ``rate``."""
    found = dict.fromkeys(DECISIONS, 0.0)
    for number in range(victims + 1):
        figure = Figure(number / victims, *wilson_interval(number / victims, victims), victims)
        found[decide(limit, figure, reached=True)] += float(binom.pmf(number, victims, rate))
    return found


def repeat(
    module: OneUnit, images: Tensor, labels: Tensor, *, limit: float, victims: int, audits: int, seed: int
) -> DecisionRow:
    """Run audits of one network, each on its own images, and count their decisions."""
    decisions, found = Counter[str](), 0.0
    for number in Tqdm(range(audits), file=sys.stderr, desc="Audits", disable=not sys.stderr.isatty()):
        own = derive_seed(seed, number, "audit")
        generator = torch.Generator().manual_seed(own)
        drawn = torch.randperm(len(images), generator=generator)[: _IMAGES_PER_VICTIM * victims]
        with tempfile.TemporaryDirectory() as folder:
            report = audit(
                module,
                DataLoader(TensorDataset(images[drawn], labels[drawn]), batch_size=50),
                Client(),
                victims=victims,
                budget="1h",
                attacks=["rgap"],
                fail_above={"success_rate": limit},
                seed=own % 2**31,
                output=folder,
            )
        decisions[report.verdict] += 1
        found += report.measured[0].metrics["success_rate"].value / audits
    rate = module.rate_on(images)
    counts = {name: decisions[name] for name in DECISIONS}
    return DecisionRow(rate, limit, victims, audits, found, counts, promised(rate, limit, victims))


def format_table(rows: Sequence[DecisionRow]) -> str:
    """Return the rows as a Markdown table, with 95 % intervals."""
    lines = [
        "| true rate | limit | audits | exceeded (promised) | within (promised) | inconclusive (promised) |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = []
        for name in ("exceeded", "within", "inconclusive"):
            low, high = wilson_interval(row.decisions[name] / row.audits, row.audits)
            share = row.decisions[name] / row.audits
            cells.append(f"{share:.1%} [{100 * low:.0f}, {100 * high:.0f}] ({row.promised[name]:.1%})")
        lines.append(f"| {row.rate:.1%} | {row.limit:.0%} | {row.audits} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for summary.json")
    parser.add_argument("--data", default="fashion_mnist", help="data set (default: %(default)s)")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.02, 0.2], help="true success rates")
    parser.add_argument("--limit", type=float, default=0.1, help="limit of the audits (default: %(default)s)")
    parser.add_argument("--audits", type=int, default=20, help="audits for each rate (default: %(default)s)")
    parser.add_argument("--at-limit", type=int, default=40, help="audits at the limit (default: %(default)s)")
    parser.add_argument("--victims", type=int, default=100, help="victims in each audit (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws (default: %(default)s)")
    given = parser.parse_args(arguments)
    quiet()
    try:
        check_count(audits=given.audits, at_limit=given.at_limit, victims=given.victims)
        check_count(0, seed=given.seed)
        check_share(limit=given.limit)
        for rate in given.rates:
            check_share(rates=rate)
        source = Source(given.data).open("train")
        check_output(given.output)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    images, labels = (torch.stack(part) for part in zip(*((i, torch.as_tensor(y)) for i, y in source), strict=True))
    rows = []
    for rate in given.rates:
        audits = given.at_limit if rate == given.limit else given.audits
        options = {"limit": given.limit, "victims": given.victims, "audits": audits, "seed": given.seed}
        rows.append(repeat(OneUnit(images, rate), images, labels, **options))
        write_json(given.output / "summary.json", [asdict(row) for row in rows])
        print(format_table(rows[-1:]), flush=True)
    print(f"\n{format_table(rows)}\n\n{given.output / 'summary.json'}")


if __name__ == "__main__":
    main()
