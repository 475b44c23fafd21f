r"""Infer labels from gradients: recall of every rule over batch size, training, distribution and local steps.

    python experiments/labels/restoration.py --dataset mnist --network mlp --batch-sizes 8 24 64 128 \
        --auxiliary-images 0 --output results/mnist
    python experiments/labels/restoration.py --dataset fashion_mnist --network convnet --epochs 0 1 5 20 \
        --batch-sizes 24 --rules ilrg llg_plus rlu posterior --output results/trained
    python experiments/labels/restoration.py --dataset cifar10 --network lenet --init torch --classes 100 \
        --batch-sizes 64 256 --output results/hundred_classes

Victims hold training images that their network was not trained on (with `--seen`, images that it was trained on). The
attacker's auxiliary images are test images. Small untrained networks are drawn separately for each victim; a trained
network is shared by all victims. Rules that can't be used are left out, and the reason is printed; for example, some
rules learn about one network, but each victim has its own. The results always include `auto`, and the trivial guess,
which uses no gradient.

Results are written after each cell, a combination of epochs, batch size, distribution and local steps. To continue an
interrupted run, or to add cells to a finished one, run the command with `--resume`. Without it, a folder that holds
results is refused.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from restoration_clients import Cell, Clients, Network  # these three modules are in the folder of this script
from restoration_options import check_together, make_parser
from restoration_results import WRITTEN, RestorationRow, behind_best, draw_pictures, format_table, read_rows
from torch import Tensor

from leakage.cli import quiet
from leakage.clients.victim import Victim
from leakage.datamodules import LabelledImages
from leakage.errors import check_count
from leakage.files.text import write_json
from leakage.files.whole import check_output
from leakage.labels import RULES, LabelCounts, LabelReader, infer_labels
from leakage.metrics import LabelMetrics, score_labels, trivial_score
from leakage.metrics.labels import LabelScore
from leakage.pieces import digest

sys.path.append(str(Path(__file__).parents[1] / "comparison"))
from records import holds_results, read_record

# Victims with their own networks that are in memory at once.
_NETWORKS_AT_ONCE = 64


@dataclass
class Record:
    """The stored results of a cell."""

    rows: list[dict[str, Any]]


class Restoration:
    """All cells of a run, prepared and checked first, then measured one by one.

    Raises:
        ValueError: options exclude each other, or with ``resume`` the results have another configuration.
        OSError: a folder can't be written.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        check_count(victims=given.victims)
        check_count(0, seed=given.seed, **{} if given.classes is None else {"classes": given.classes})
        for name in ("epochs", "batch_sizes", "local_steps"):
            for value in getattr(given, name):
                check_count(0 if name == "epochs" else 1, **{name: value})
        data = LabelledImages(given.dataset, root=given.root, image_size=given.image_size, seed=given.seed)
        self.dataset = data.name
        check_output(given.output)
        if not given.resume and holds_results(given.output):
            raise ValueError(
                f"Expected `--output` to be a folder without results, but got '{given.output}'. Add --resume to "
                "continue that run, or choose another folder."
            )
        check_together(given)
        data.prepare_data()
        data.setup("fit")
        self.cells = [
            Cell(*choice)
            for choice in itertools.product(
                *map(dict.fromkeys, (given.epochs, given.distribution, given.local_steps, given.batch_sizes))
            )
        ]
        self.rules = [*dict.fromkeys(rule for rule in given.rules or RULES if rule != "auto"), "auto"]
        self.clients = Clients(given, self.dataset, data, self.cells)
        self.reported: set[tuple[str, str]] = set()
        self.configurations = {cell: self._configuration(cell) for cell in self.cells}
        # Compare the configurations of earlier results before anything is run.
        self.finished: dict[Cell, list[RestorationRow]] = {}
        for cell, configuration in self.configurations.items() if given.resume else ():
            record = read_record(given.output / cell.folder, configuration, Record)
            if record is not None:
                self.finished[cell] = read_rows(given.output / cell.folder, record["rows"])
        victims = {cell: self.clients.victim(self.clients.network, cell) for cell in self.cells if given.rules}
        for rule in self.rules if given.rules else ():
            reasons = [self._left_out(rule, victims[cell], cell) for cell in self.cells]
            if all(reasons):
                raise ValueError(f"Expected `--rules` that can be used in some cell, but got {rule!r}. {reasons[0]}.")

    def _left_out(self, rule: str, victim: Victim, cell: Cell) -> str:
        """Return why a rule can't be used, or an empty string if it can."""
        clients = self.clients
        try:
            LabelReader(rule, auxiliary=clients.auxiliary).check(victim, own_weights=clients.own(cell))
        except ValueError as error:
            return str(error).split(". Rules that would work")[0]
        return ""

    def _configuration(self, cell: Cell) -> dict[str, Any]:
        given, clients = self.given, self.clients
        ignored = ("batch_size", "seed")
        known = None if clients.auxiliary is None else vars(clients.auxiliary)
        training = {"images": clients.train_images, "learning_rate": given.learning_rate, "precision": given.precision}
        return {
            "data": {name: value for name, value in clients.data.configuration.items() if name not in ignored},
            "network": str(clients.network),
            "init": given.init,
            "mode": clients.mode,
            "classes": given.classes,
            "training": training if cell.epochs else None,
            "seen": given.seen if cell.epochs else None,
            "weights": "own" if clients.own(cell) else "shared",
            "auxiliary": known and digest({name: tensor for name, tensor in known.items() if tensor is not None}),
            "victims": given.victims,
            "rules": self.rules,
            "local_learning_rate": given.local_learning_rate if cell.local_steps > 1 else None,
            "local_batch_size": given.local_batch_size if cell.local_steps > 1 else None,
            "seed": given.seed,
            **asdict(cell),
        }

    def run(self, progress: bool = True) -> list[RestorationRow]:
        """Measure all cells, and write the results after each."""
        output = self.given.output
        left = [cell for cell in self.cells if cell not in self.finished]
        networks = {epochs: self.clients.train(epochs) for epochs in dict.fromkeys(cell.epochs for cell in left)}
        for cell in left:
            self.clients.draw(cell, networks[cell.epochs].images, victims=0)  # the last check that can fail
        pause = 0.1 if sys.stderr.isatty() else 30.0
        with Tqdm(
            total=len(left) * len(self.rules),
            disable=not progress,
            file=sys.stderr,
            desc="Rules",
            bar_format="{desc}: {percentage:3.0f} %|{bar}| {elapsed}<{remaining}",
            dynamic_ncols=True,
            mininterval=pause,
            maxinterval=max(pause, 10),
        ) as bar:
            for cell in left:
                self.finished[cell] = self._measure(cell, networks[cell.epochs], bar)
                rows = [asdict(row) for row in self.finished[cell]]
                record = {"configuration": self.configurations[cell], "row": {"rows": rows}}
                write_json(output / cell.folder / "run.json", record)
                self._write_summary()
        return self._write_summary()

    def _write_summary(self) -> list[RestorationRow]:
        # The summary includes cells of an earlier run whose turn has not come yet.
        rows = [row for cell in self.cells for row in self.finished.get(cell, [])]
        write_json(self.given.output / "summary.json", [asdict(row) for row in rows])
        return rows

    def _measure(self, cell: Cell, network: Network, bar: Tqdm) -> list[RestorationRow]:
        given, clients = self.given, self.clients
        drawn = clients.draw(cell, network.images, given.victims)
        seen_by_rules = clients.victim(network.model, cell)
        rules = []
        for rule in self.rules:
            reason = self._left_out(rule, seen_by_rules, cell)
            if not reason:
                rules.append(rule)
            elif (report := (rule, reason.split(", but got")[0])) not in self.reported:
                self.reported.add(report)
                reason = reason.replace(f" for rule={rule!r}", "")
                bar.write(f"No {rule} for batch size {cell.batch_size}: {reason}.", file=sys.stdout)
        bar.update(len(self.rules) - len(rules))
        client = seen_by_rules if cell.local_steps == 1 else clients.victim(network.model, cell, all_layers=True)
        # Rules learn about a shared network once for all victims.
        groups = torch.arange(given.victims).split(_NETWORKS_AT_ONCE if clients.own(cell) else given.victims)
        found: dict[str, list[LabelCounts]] = {rule: [] for rule in rules}
        seconds = dict.fromkeys(rules, 0.0)
        for group in groups:
            shared = clients.share(client, seen_by_rules.trainable, cell, drawn[group], group)
            for rule in rules:
                bar.set_description_str(f"Batch size {cell.batch_size}, {rule}", refresh=sys.stderr.isatty())
                start = time.perf_counter()
                found[rule].append(
                    infer_labels(shared, seen_by_rules, rule=rule, auxiliary=clients.auxiliary, seed=given.seed)
                )
                seconds[rule] += time.perf_counter() - start
                bar.update(len(group) / given.victims)
        labels = clients.labels[drawn]
        scores = {rule: _scores(parts, labels) for rule, parts in found.items()}
        rows = [
            self._row(rule, cell, network, labels, scores[rule], found[rule][0].rule, seconds[rule]) for rule in rules
        ]
        best, behind, interval = behind_best({rule: [one.irec for one in scores[rule]] for rule in rules})
        rows[rules.index("auto")].best_other = best
        rows[rules.index("auto")].behind_best = behind
        rows[rules.index("auto")].behind_best_ci = interval
        return rows

    def _row(
        self,
        rule: str,
        cell: Cell,
        network: Network,
        labels: Tensor,
        scores: list[LabelScore],
        chosen: str,
        seconds: float,
    ) -> RestorationRow:
        clients, auxiliary = self.clients, self.clients.auxiliary
        metrics, guess = LabelMetrics(), LabelMetrics()
        metrics.update(scores)
        guess.update(trivial_score(labels, clients.num_classes))
        estimates, trivial = metrics.compute(), guess.compute()
        return RestorationRow(
            rule=rule,
            dataset=self.dataset,
            network=self.given.network,
            activation=clients.activation,
            victims=len(labels),
            seconds=seconds,
            chosen=chosen if rule == "auto" else None,
            weights="own" if clients.own(cell) else "shared",
            seen=self.given.seen if cell.epochs else None,
            norm=clients.norm,
            mode=clients.mode,
            classes=self.given.classes,
            init=self.given.init,
            auxiliary_images=0 if auxiliary is None else len(auxiliary),
            auxiliary_labels=None if auxiliary is None else auxiliary.labels is not None,
            test_accuracy=network.accuracy,
            **asdict(cell),
            **{name: estimate.value for name, estimate in estimates.items()},
            **{f"{name}_ci": [estimate.low, estimate.high] for name, estimate in estimates.items()},
            **{f"trivial_{name}": estimate.value for name, estimate in trivial.items()},
        )


def _scores(found: list[LabelCounts], labels: Tensor) -> list[LabelScore]:
    counts, present = (torch.cat([getattr(part, name) for part in found]) for name in ("counts", "present"))
    return score_labels(counts, labels, present=present)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    given = parser.parse_args(arguments)
    quiet()
    try:
        restoration = Restoration(given)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{WRITTEN[given.network]} on {restoration.dataset}, {given.victims} victims:", flush=True)
    try:
        rows = restoration.run()
        pictures = draw_pictures(rows, given.output)
    except (ValueError, OSError, FloatingPointError) as error:
        if isinstance(error, OSError) or str(error).startswith("Expected "):
            sys.exit(f"{parser.prog}: error: {error}")
        raise
    print(f"\n{format_table(rows)}\n")
    for path in (given.output / "summary.json", *pictures):
        print(path)


if __name__ == "__main__":
    main()
