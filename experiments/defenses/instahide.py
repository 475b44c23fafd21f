r"""How many encodings of InstaHide give the images behind them away.

    python experiments/defenses/instahide.py --dataset fashion_mnist --victims 5 --output results/instahide

Each victim holds one test image of every class and mixes four of them in each encoding, so that the labels of the
encodings are the weights of the images. In every round it encodes each image once. The attacker has the encodings,
exact or with normal errors (`--errors`), their labels, and `--public` training images. With `--seeds`, clients also
train as many networks (LeNet) on such encodings, as those of `tradeoff.py` do.

Files in the output folder: `summary.json`, with an entry for each number of encodings and size of the errors; with
`--seeds`, `accuracy.json`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from defended_training import Federation, accuracies_under  # in this folder
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor

from leakage.cli import quiet
from leakage.comparison import align
from leakage.datamodules import LabelledImages, in_unit_range
from leakage.defenses import InstaHide, decode_instahide
from leakage.errors import check_count, check_not_negative
from leakage.files.text import write_json
from leakage.files.whole import check_output
from leakage.metrics import MeanOverVictims, ShareOverVictims, score
from leakage.models import LeNet
from leakage.seeds import derive_seed

MIXED = 4


def encode(images: Tensor, rounds: int, error: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the encodings ``(rounds * M, C, H, W)`` of images with classes of their own, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    hide, targets = InstaHide(mixed=MIXED, private=MIXED), torch.eye(len(images))
    encodings, labels = zip(*(hide.encode(images, targets, generator) for _ in range(rounds)), strict=True)
    found = torch.cat(encodings)
    return found + error * torch.randn(found.shape, generator=generator), torch.cat(labels)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="instahide.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", required=True, help="a data set by name, or a folder of images in ImageFolder layout")
    add("--root", type=Path, help="folder of the data sets (default: $LEAKAGE_DATA, ~/.cache/leakage)")
    add("--victims", type=int, default=5, help="default: %(default)s")
    add("--rounds", type=int, nargs="+", default=[2, 5, 10], help="encodings of each image (default: %(default)s)")
    add("--errors", type=float, nargs="+", default=[0.0, 0.01], help="standard deviations (default: %(default)s)")
    add("--seeds", type=int, default=0, help="networks to train on encodings (default: %(default)s)")
    add("--public", type=int, default=4000, help="the attacker's own images (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--output", type=Path, required=True, help="folder for results")
    given = parser.parse_args(arguments)
    quiet()
    try:
        check_count(victims=given.victims)
        check_count(0, seeds=given.seeds)
        for rounds, error in itertools.zip_longest(given.rounds, given.errors, fillvalue=1):
            check_count(rounds=rounds)
            check_not_negative(errors=error)
        data = LabelledImages(given.dataset, root=given.root, seed=given.seed)
        check_output(given.output)
        data.prepare_data()
        data.setup("fit")
        check_count(2, public=min(given.public, len(data.train)))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    own, others = (
        torch.randperm(len(part), generator=torch.Generator().manual_seed(derive_seed(given.seed, 0, name)))
        for name, part in (("test", data.test), ("train", data.train))
    )
    by_class = [own[data.test.labels[own] == label][: given.victims] for label in range(data.num_classes)]
    truth = in_unit_range(data.test.images[torch.stack(by_class, 1)].flatten(0, 1)).unflatten(0, (-1, data.num_classes))
    public = in_unit_range(data.train.images[others[: given.public]])
    labels = torch.arange(data.num_classes).expand(len(truth), -1)
    rows: list[dict[str, Any]] = []
    cells = list(itertools.product(given.rounds, given.errors))
    bar = Tqdm(total=len(cells) * len(truth), file=sys.stderr, desc="Victims", disable=not sys.stderr.isatty())
    for rounds, error in cells:
        decoded = []
        for victim, images in enumerate(truth):
            encodings = encode(images, rounds, error, derive_seed(given.seed, victim, "rounds"))
            decoded.append(decode_instahide(*encodings, public))
            bar.update()
        found = torch.stack(decoded)
        scores = score(found, labels, truth, labels)
        psnr, success = MeanOverVictims()(scores.psnr.mean(1)), ShareOverVictims()((scores.mse < 1e-3).double().mean(1))
        rows.append(
            {
                "encodings": rounds * data.num_classes,
                "images": data.num_classes,
                "error": error,
                "victims": len(truth),
                "psnr_mean": psnr.value,
                "psnr_ci": (psnr.low, psnr.high),
                "success_rate": success.value,
                "success_ci": (success.low, success.high),
            }
        )
        write_json(given.output / "summary.json", rows)
    bar.close()
    lines = [["encodings", "error", "PSNR, dB", "success"]]
    for row in rows:
        psnr_ci, share_ci = "[{:.1f}, {:.1f}]".format(*row["psnr_ci"]), [100 * share for share in row["success_ci"]]
        success_ci = "[{:.0f}, {:.0f}]".format(*share_ci)
        lines.append(
            [
                str(row["encodings"]),
                f"{row['error']:g}",
                f"{row['psnr_mean']:.1f} {psnr_ci}",
                f"{100 * row['success_rate']:.0f} % {success_ci}",
            ]
        )
    print(f"{align(lines)}\n\n{given.output / 'summary.json'}", flush=True)
    if given.seeds:
        network = LeNet(data.image_shape[0], data.image_shape[1:], data.num_classes)
        hidden = [InstaHide(mixed=MIXED, private=MIXED)]
        path = given.output / "accuracy.json"
        trained = accuracies_under(network, hidden, data, Federation(), given.seeds, given.seed, path)
        low, high = trained["test_accuracy_ci"]
        print(f"test accuracy {100 * trained['test_accuracy']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]\n{path}")


if __name__ == "__main__":
    main()
