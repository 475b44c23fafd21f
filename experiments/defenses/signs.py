"""What the signs of a gradient say about an image: how many of them change when the image changes.

    python experiments/defenses/signs.py --dataset fashion_mnist --network lenet --victims 50 --measured 8 \
        --results results/defenses --output results/signs

The victims are those of `tradeoff.py` with the same options, each with one test image. The auditor, who knows the
images, compares the signs of each gradient in double precision with those of other images: the true one with white
noise of a given MSE; a training image of the same class; and, with `--results`, what `--attack` found behind `--defense
sign` in the results of `tradeoff.py`. `signs.json` in the output folder has a row for each of these.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from leakage.cli import quiet
from leakage.comparison import align, read_reconstructions
from leakage.datamodules import GroundTruth, LabelledImages, Victims, in_unit_range
from leakage.errors import check_count
from leakage.files.text import write_json
from leakage.files.whole import check_output
from leakage.seeds import derive_seed

sys.path.append(str(Path(__file__).parents[1] / "inverting_gradients"))
from table_networks import Network, add_options, make_network

# MSE of the white noise.
_NOISE = (1e-2, 1e-3)


@dataclass
class SignsRow:
    """How many signs differ between the true images and others.

    Attributes:
        images: what the other images are.
        mse: their mean MSE from the true images.
        victims: number of victims.
        last_layer: mean number of signs that differ in the gradient of the last layer.
        other_layers: mean number of signs that differ in all other layers.
        least, most: smallest and largest number of signs of a victim that differ.
        entries: number of entries of the gradient.
        last_layer_entries: number of entries in the last layer.
    """

    images: str
    mse: float
    victims: int
    last_layer: float
    other_layers: float
    least: int
    most: int
    entries: int
    last_layer_entries: int


class Signs:
    """Counts the signs that differ from those of the true images."""

    def __init__(self, victims: Victims, truth: GroundTruth) -> None:
        self.victim, self.truth = copy.copy(victims.victim), truth
        self.victim.model = copy.deepcopy(self.victim.model).double()
        shared = victims.share(truth.ids.tolist())
        self._own = shared.own_weights
        self._state = {name: tensor.double() for name, tensor in shared.state.items()}
        sizes = {name: tensor[0].numel() for name, tensor in shared.gradients.items()}
        last = [name.rpartition(".")[0] == self.victim.classifier for name in sizes]
        self._last = torch.tensor(last).repeat_interleave(torch.tensor([*sizes.values()]))
        self._true = self._of(truth.images)

    def compare(self, written: str, images: Tensor) -> SignsRow:
        """Compare the signs of ``images`` ``(V, 1, C, H, W)`` with those of the true images."""
        wrong = self._of(images) != self._true
        counts = wrong.sum(1)
        return SignsRow(
            images=written,
            mse=float((images - self.truth.images).square().mean()),
            victims=len(images),
            last_layer=float(wrong[:, self._last].sum(1).double().mean()),
            other_layers=float(wrong[:, ~self._last].sum(1).double().mean()),
            least=int(counts.min()),
            most=int(counts.max()),
            entries=wrong.shape[1],
            last_layer_entries=int(self._last.sum()),
        )

    def _of(self, images: Tensor) -> Tensor:
        """Return the signs of the gradients, ``(V, M)``."""
        targets = F.one_hot(self.truth.labels, self.victim.protocol.num_classes).double()
        signs = []
        for place, own in enumerate(images.double()):
            state = {name: tensor[place] if self._own else tensor for name, tensor in self._state.items()}
            gradients = self.victim.evaluate(state, own, targets[place])[0]
            signs.append(torch.cat([tensor.detach().sign().flatten() for tensor in gradients.values()]))
        return torch.stack(signs)


def measure(victims: Victims, data: LabelledImages, measured: int, found: Path | None, seed: int) -> list[SignsRow]:
    """Compare the signs of the first ``measured`` victims with those of noisy, other and found images."""
    truth = GroundTruth.cat(list(victims.val_dataloader()))
    truth = GroundTruth(truth.ids[:measured], truth.images[:measured], truth.labels[:measured])
    signs, generator = Signs(victims, truth), torch.Generator().manual_seed(derive_seed(seed, 0, "signs"))
    noise = torch.randn(truth.images.shape, generator=generator)
    unit = noise / noise.square().flatten(1).mean(1).sqrt().view(-1, 1, 1, 1, 1)
    rows = [signs.compare(f"white noise, MSE {mse:g}", truth.images + mse**0.5 * unit) for mse in _NOISE]
    others = []
    for label in truth.labels[:, 0].tolist():
        places = (data.train.labels == label).nonzero().squeeze(1)
        others.append(int(places[torch.randint(len(places), (1,), generator=generator)]))
    rows.append(signs.compare("another image of the class", in_unit_range(data.train.images[others])[:, None]))
    if found is not None:
        images = read_reconstructions(found, truth.ids.tolist()).images
        rows.append(signs.compare("found by the attack", images))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="signs.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, network="lenet", victims=50)
    parser.add_argument("--measured", type=int, default=8, help="victims to measure (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="results of tradeoff.py for the same victims, with `sign`")
    parser.add_argument("--attack", default="idlg", help="the attack of these results (default: %(default)s)")
    parser.set_defaults(batch_norm="evaluation")
    given = parser.parse_args(arguments)
    quiet()
    try:
        check_count(victims=given.victims, measured=given.measured)
        check_output(given.output)
        data = LabelledImages(
            given.dataset, root=given.root, image_size=given.image_size, benchmark=given.benchmark, seed=given.seed
        )
        data.prepare_data()
        data.setup("fit")
        network: Network = make_network(given, data, given.epochs)
        victims = Victims(
            data.test,
            num_classes=data.num_classes,
            victims=given.victims,
            seed=given.seed,
            model=network.model,
            weights="own" if network.own else "shared",
        )
        victims.prepare_data()
        victims.setup("fit")
        found = None if given.results is None else given.results / "cells" / "sign_1" / f"{given.attack}_adaptive"
        rows = measure(victims, data, given.measured, found, given.seed)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    write_json(given.output / "signs.json", [asdict(row) for row in rows])
    lines = [["", "MSE", "signs that differ", "of the last layer", "least", "most"]]
    for row in rows:
        numbers = [f"{row.last_layer + row.other_layers:.1f}", f"{row.last_layer:.1f}", str(row.least), str(row.most)]
        lines.append([row.images, f"{row.mse:.4f}", *numbers])
    print(align(lines))
    print(f"{rows[0].entries:,} signs, {rows[0].last_layer_entries:,} of the last layer, {rows[0].victims} victims")


if __name__ == "__main__":
    main()
