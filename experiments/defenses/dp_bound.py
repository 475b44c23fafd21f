r"""DP-SGD against its bound: how often the likeliest of the candidate images behind a gradient is the right one.

    python experiments/defenses/dp_bound.py --dataset fashion_mnist --network lenet --victims 1000 \
        --output results/dp_bound

The game is that of :mod:`leakage.audit.bounds`. The attacker knows the network, the protocol of the clients, and a
thousand candidate images with their labels, one of which is the client's image. It sees the gradient of this image
after DP-SGD, clipped to a norm and noisy, and names the candidate whose own clipped gradient is the nearest. As the
noise is normal, this is the likeliest one, and no attacker does better in this game. The noise multipliers are those
that one step needs for each of `--epsilons` at `--delta`. The output compares the share of victims whose image is named
rightly, with a Wilson interval, with the bound that holds for every attacker. Victims share one network; candidates are
test images.

Files in the output folder: `summary.json`, with an entry for each epsilon, and `dp_bound.png`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from scipy.optimize import brentq
from torch import Tensor, nn

from leakage import Victim
from leakage.audit import gaussian_success_bound
from leakage.cli import quiet
from leakage.comparison import align
from leakage.datamodules import LabelledImages, in_unit_range
from leakage.defenses import DPSGD
from leakage.errors import check_count, check_positive, check_share
from leakage.files.text import write_json
from leakage.files.whole import check_output
from leakage.metrics import wilson_interval
from leakage.plots import COLOURS, INK, PALE, new_figure, save_figure
from leakage.seeds import derive_seed

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("comparison", "inverting_gradients")]
from records import holds_results
from table_networks import WRITTEN, add_options, make_network

_EPSILONS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
# Number of victims whose noisy gradients are in memory at once.
_AT_ONCE = 100


@dataclass
class BoundRow:
    """One strength of the noise, an entry of ``summary.json``.

    Attributes:
        epsilon: epsilon of one step, at ``delta``.
        delta: delta of ``epsilon``.
        noise_multiplier: standard deviation of the noise, in units of the norm.
        victims: number of victims.
        candidates: number of candidates for each victim.
        success_rate: share of the victims whose image is named.
        success_ci: its 95 % Wilson interval.
        bound: bound on ``success_rate`` for every attacker.
    """

    epsilon: float
    delta: float
    noise_multiplier: float
    victims: int
    candidates: int
    success_rate: float
    success_ci: tuple[float, float]
    bound: float


def multiplier(epsilon: float, delta: float) -> float:
    """Return the noise multiplier with which one step, in which every image takes part, has this epsilon."""

    def over(log_multiplier: float) -> float:
        return math.log(DPSGD(math.exp(log_multiplier), norm=1.0).epsilon(1, 1.0, delta) / epsilon)

    return math.exp(brentq(over, math.log(1e-3), math.log(1e3), xtol=1e-6))


def play(
    model: nn.Module, images: Tensor, labels: Tensor, *, noise_multiplier: float, norm: float, victims: int, seed: int
) -> int:
    """Return the number of victims whose image is named among all candidates.

    Args:
        model: network of all victims.
        images: candidates ``(M, C, H, W)``.
        labels: their labels ``(M,)``.
        noise_multiplier, norm: options of DP-SGD.
        victims: number of games.
        seed: seed of the victims' images and of the noise.
    """
    shape = tuple(images.shape[1:])

    def shared(defense: DPSGD, chosen: Tensor, ids: range) -> Tensor:
        victim = Victim(model, image_shape=shape, defenses=[defense])
        sent = victim.share(
            images[chosen, None], labels[chosen, None], ids=torch.tensor([*ids]), seed=derive_seed(seed, 0, "noise")
        )
        return torch.cat([tensor.flatten(1) for tensor in sent.gradients.values()], dim=1)

    every = torch.arange(len(images))
    candidates = torch.cat([shared(DPSGD(0.0, norm), part, range(len(part))) for part in every.split(_AT_ONCE)])
    generator = torch.Generator().manual_seed(derive_seed(seed, 0, "images of victims"))
    held = torch.randint(len(images), (victims,), generator=generator)
    named = 0
    for first in range(0, victims, _AT_ONCE):
        part = held[first : first + _AT_ONCE]
        seen = shared(DPSGD(noise_multiplier, norm), part, range(first, first + len(part)))
        distances = candidates.square().sum(1) / 2 - seen @ candidates.T
        named += int((distances.argmin(1) == part).sum())
    return named


def plot(rows: Sequence[BoundRow], title: str) -> Figure:
    """Plot success and bound over epsilon."""
    figure = new_figure(6.4, 3.9)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    epsilons = [row.epsilon for row in rows]
    prior, delta = 1 / rows[0].candidates, rows[0].delta
    line = torch.logspace(math.log10(min(epsilons)), math.log10(max(epsilons)), 60).tolist()
    bounds = [100 * gaussian_success_bound(prior, multiplier(epsilon, delta)) for epsilon in line]
    axes.plot(line, bounds, color=COLOURS[1], label="bound on any attacker")
    found = [100 * row.success_rate for row in rows]
    low, high = zip(*(row.success_ci for row in rows), strict=True)
    ends = [
        [share - 100 * end for share, end in zip(found, low, strict=True)],
        [100 * end - share for share, end in zip(found, high, strict=True)],
    ]
    axes.errorbar(epsilons, found, ends, fmt="o", color=COLOURS[0], capsize=3, label="named by the likeliest gradient")
    axes.axhline(100 / rows[0].candidates, color=PALE, linestyle=":", label="a guess without any gradient")
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_yticks([0, 0.1, 1, 10, 100], ["0", "0.1", "1", "10", "100"])
    axes.set_ylim(0, 130)
    axes.set_xlabel(f"epsilon of one step of DP-SGD, delta {rows[0].delta:g}", color=INK)
    axes.set_ylabel(f"right among {rows[0].candidates:,} candidates, %", color=INK)
    axes.set_title(title, fontsize=10, color=INK)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def format_table(rows: Sequence[BoundRow]) -> str:
    """Format the rows as a table for the terminal."""
    lines = [["epsilon", "noise multiplier", "named rightly", "bound"]]
    for row in rows:
        low, high = row.success_ci
        success = f"{100 * row.success_rate:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        lines.append([f"{row.epsilon:g}", f"{row.noise_multiplier:.3g}", success, f"{100 * row.bound:.2g} %"])
    return align(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="dp_bound.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, network="lenet", victims=1000)
    parser.add_argument("--candidates", type=int, default=1001, help="number of candidates (default: %(default)s)")
    parser.add_argument(
        "--epsilons", nargs="+", type=float, default=list(_EPSILONS), help="epsilons of one step (default: 1 to 1,000)"
    )
    parser.add_argument("--delta", type=float, default=1e-5, help="delta of DP-SGD (default: %(default)s)")
    parser.add_argument("--norm", type=float, default=1.0, help="clipping norm (default: %(default)s)")
    parser.set_defaults(batch_norm="evaluation")
    given = parser.parse_args(arguments)
    quiet()
    try:
        check_count(victims=given.victims, candidates=given.candidates)
        check_share(delta=given.delta)
        check_positive(norm=given.norm)
        for epsilon in given.epsilons:
            check_positive(epsilons=epsilon)
        data = LabelledImages(
            given.dataset, root=given.root, image_size=given.image_size, benchmark=given.benchmark, seed=given.seed
        )
        check_output(given.output)
        if holds_results(given.output):
            raise ValueError(
                f"Expected `--output` to be a folder without results, but got '{given.output}'. Choose another folder."
            )
        data.prepare_data()
        data.setup("fit")
        if not 2 <= given.candidates <= len(data.test):
            raise ValueError(
                f"Expected `--candidates` from 2 to {len(data.test)}, the test images of {data.name!r}, but got "
                f"{given.candidates}."
            )
        network = make_network(given, data, given.epochs)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    generator = torch.Generator().manual_seed(derive_seed(given.seed, 0, "candidates"))
    chosen = torch.randperm(len(data.test), generator=generator)[: given.candidates]
    images, labels = in_unit_range(data.test.images[chosen]), data.test.labels[chosen].long()
    rows: list[BoundRow] = []
    for epsilon in sorted(given.epsilons):
        noise = multiplier(epsilon, given.delta)
        named = play(
            network.model,
            images,
            labels,
            noise_multiplier=noise,
            norm=given.norm,
            victims=given.victims,
            seed=given.seed,
        )
        share = named / given.victims
        interval = wilson_interval(share, given.victims)
        bound = gaussian_success_bound(1 / len(images), noise)
        rows.append(BoundRow(epsilon, given.delta, noise, given.victims, len(images), share, interval, bound))
        print(f"epsilon {epsilon:g}: {named} of {given.victims}", flush=True)
        write_json(given.output / "summary.json", [asdict(row) for row in rows])
    epochs = f"after {given.epochs} epochs" if given.epochs else "untrained"
    title = f"{data.name}, {WRITTEN[given.network]}, {epochs}, {given.victims:,} victims of one image"
    save_figure(plot(rows, title), given.output / "dp_bound.png")
    print(f"\n{format_table(rows)}\n")
    for name in ("summary.json", "dp_bound.png"):
        print(given.output / name)


if __name__ == "__main__":
    main()
