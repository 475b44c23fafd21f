"""Counts from a posterior that is learnt on simulated clients, which works on trained networks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakage.labels.auxiliary import LabelledFeatures
from leakage.labels.from_gradients import Found
from leakage.labels.last_layer import LastLayer
from leakage.labels.simulation import draw_images, simulate
from leakage.seeds import derive_seed

# The number of simulated clients keeps clients * images * classes near the product, between the two limits.
_PRODUCT, _FEWEST, _MOST = 2**23, 4096, 16384
# Clients simulated and reduced to statistics at once, and the numbers in memory for it.
_CLIENTS_AT_ONCE, _NUMBERS_AT_ONCE = 2048, 2**25
# Width of the posterior's network, and its training: passes, batch size, learning rate and weight decay.
_WIDTH, _PASSES, _BATCH, _LEARNING_RATE, _WEIGHT_DECAY = 96, 20, 256, 3e-3, 1e-3
# Maximum number of bins for the number of images of a class.
_BINS = 64
# Victims whose posterior is computed at once.
_VICTIMS_AT_ONCE = 256


@dataclass
class LabelPosterior:
    r"""A learnt posterior of how many images of each class are behind a gradient, trained on simulated clients.

    A trained network predicts most images with confidence, so their :math:`p - y`, and with it
    their share of any sum over images, nearly vanishes. Rules that divide a sum by the share of one image
    count the few hard images and miss the others. But an image need not have a large share to be visible. If
    features are not negative, entries of row k of the weight gradient are made negative only by images of class k,
    and each image has features that others lack. This rule therefore looks at the *distribution* of
    each row's entries, over many orders of magnitude, and learns which counts they indicate:

    1. Clients are simulated. Label counts are drawn (half of the clients uniform, half Dirichlet), then
       labelled images of the attacker. From these follows what the last layer would share (:mod:`.simulation`).
    2. The row of each class becomes a few statistics: mean, negative mean, root mean square, smallest and largest
       entry, share of negative entries, the bias gradient, and the row along its own weights. Each is taken at two or
       three scales through asinh, together with its mean, smallest and largest value over the classes.
    3. A small network, shared by all classes but given the index of the class, learns
       :math:`P(n_k \mid \text{statistics})` by cross-entropy.
    4. The counts that maximise the expected instance recall, :math:`\sum_k E \min(\hat n_k, n_k)`, are the
       N largest of all :math:`P(n_k \ge c)`, c = 1, 2, ...

    If a gradient reveals nothing, the posterior is the prior. So the rule hardly falls below the trivial guess if
    it learns from images of the victims' kind. If it learns from noise, it may do so on a trained network.
    This rule was developed for this library.
    """

    num_images: int
    scale: Tensor  # mean absolute value of the features
    centre: Tensor  # mean of the statistics over the simulated clients
    spread: Tensor  # standard deviation of the statistics over the simulated clients
    edges: Tensor  # the first count of each bin
    network: nn.Module  # statistics to logits of the bins

    @classmethod
    def learn(cls, layer: LastLayer, known: LabelledFeatures, seed: int) -> LabelPosterior:
        """Learn the posterior for the network that all victims share."""
        scale = known.features.abs().mean().clamp(min=1e-12)
        clients = min(max(_PRODUCT // (layer.num_images * layer.num_classes), _FEWEST), _MOST)
        drawn, counts = draw_images(known.labels, layer, clients, derive_seed(seed, 0, "posterior's clients"))
        statistics = torch.cat(
            [_statistics(simulate(layer, known, part), scale) for part in torch.split(drawn, _at_once(layer))]
        )
        centre, spread = statistics.mean(0), statistics.std(0) + 1e-6
        edges = _edges(counts).to(statistics.device)
        bins = torch.bucketize(counts.to(statistics.device), edges, right=True) - 1
        network = _learn(_normalised(statistics, centre, spread), bins, len(edges), seed)
        return cls(layer.num_images, scale, centre, spread, edges, network)

    def state_dict(self) -> dict[str, Any]:
        """Return the posterior as tensors and numbers."""
        return vars(self) | {"network": dict(self.network.state_dict())}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> LabelPosterior:
        """Restore a posterior from its :meth:`state_dict`."""
        width, inputs = state["network"]["0.weight"].shape
        with torch.device("meta"):  # the initial weights are not used, so no random numbers are drawn for them
            network = _network(inputs, width, len(state["edges"])).requires_grad_(False)
        network.load_state_dict(state["network"], assign=True)
        return cls(**state | {"network": network})

    def to(self, device: torch.device) -> LabelPosterior:
        """Return the posterior on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("scale", "centre", "spread", "edges", "network")}
        return dataclasses.replace(self, **moved)

    @torch.no_grad()
    def __call__(self, layer: LastLayer) -> Found:
        """Return counts and expected counts of the victims."""
        victims = torch.arange(len(layer), device=layer.weight.device)
        statistics = [_statistics(layer.select(part), self.scale) for part in torch.split(victims, _at_once(layer))]
        inputs = _normalised(torch.cat(statistics), self.centre, self.spread)
        parts = [self._find(part) for part in torch.split(inputs, _VICTIMS_AT_ONCE)]
        counts, expected = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return counts, expected.to(layer.gradients), None

    def _find(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = self.network(inputs).softmax(dim=2)
        at_least = probabilities.flip(2).cumsum(2).flip(2)  # P(n_k >= edge)
        tails = _between(at_least, self.edges, self.num_images)
        # The tails of a class decrease, so the largest ones are the first tails of each class.
        largest = tails.flatten(1).topk(self.num_images, dim=1).indices // self.num_images
        counts = torch.zeros(inputs.shape[:2], dtype=torch.long, device=inputs.device)
        counts.scatter_add_(1, largest, torch.ones_like(largest))
        return counts, tails.sum(2)


def _statistics(layer: LastLayer, scale: Tensor) -> Tensor:
    """Return the statistics of each row, ``(V, K, F)``."""
    rows = layer.weight_gradient
    assert rows is not None
    push = layer.bias_gradient if layer.bias_gradient is not None else torch.zeros_like(rows[..., 0])
    push = push * layer.num_images
    rows = rows * (layer.num_images / scale)
    # The row along its own weights: the sum of (p - y) times the logit, less the mean logit.
    apart = layer.weight - layer.weight.mean(1, keepdim=True)
    along = (rows * apart).sum(2) * scale
    negative = rows.clamp(max=0).mean(2)
    shape = [rows.mean(2), negative, rows.square().mean(2).sqrt(), rows.amin(2), rows.amax(2)]
    sums, entries = torch.stack([push, along], dim=2), torch.stack(shape, dim=2)
    statistics = torch.cat(
        [
            *(sums, (sums / 0.3).asinh(), (sums / 0.01).asinh()),
            *((20 * entries / 0.3).asinh(), (20 * entries / 0.01).asinh()),
            (rows < 0).to(rows).mean(2, keepdim=True),
        ],
        dim=2,
    )
    over_classes = [statistics.mean(1), statistics.amin(1), statistics.amax(1)]
    around = torch.cat(over_classes, dim=1)[:, None].expand(-1, statistics.shape[1], -1)
    return torch.cat([statistics, around], dim=2)


def _normalised(statistics: Tensor, centre: Tensor, spread: Tensor) -> Tensor:
    # Clamp, because victims may lie outside the range that was simulated.
    inputs = ((statistics - centre) / spread).clamp(-6, 6)
    classes = torch.eye(inputs.shape[1]).to(inputs)
    return torch.cat([inputs, classes.expand(len(inputs), -1, -1)], dim=2)


def _network(inputs: int, width: int, outputs: int) -> nn.Sequential:
    hidden = nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(width, outputs))


@torch.inference_mode(False)  # learning also works if the caller records no gradients
@torch.enable_grad()
def _learn(inputs: Tensor, bins: Tensor, num_bins: int, seed: int) -> nn.Module:
    inputs, bins = inputs.clone(), bins.clone()
    generator = torch.Generator().manual_seed(derive_seed(seed, 0, "posterior's batches"))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, 0, "posterior's weights"))
        network = _network(inputs.shape[2], _WIDTH, num_bins).to(inputs)
    steps = _PASSES * len(inputs) // _BATCH
    optimizer = torch.optim.AdamW(network.parameters(), _LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps)
    for _ in range(steps):
        batch = torch.randint(len(inputs), (_BATCH,), generator=generator).to(inputs.device)
        loss = F.cross_entropy(network(inputs[batch]).flatten(0, 1), bins[batch].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return network.requires_grad_(False)


def _at_once(layer: LastLayer) -> int:
    """Return the number of clients whose rows are held in memory at once."""
    return max(1, min(_CLIENTS_AT_ONCE, _NUMBERS_AT_ONCE // layer.weight[0].numel()))


def _edges(counts: Tensor) -> Tensor:
    """Return the first count of each bin, ascending from 0: every count that occurs, or quantiles of the counts."""
    occurring = torch.unique(counts)
    if len(occurring) > _BINS:
        quantiles = counts.flatten().sort().values
        places = torch.linspace(0, len(quantiles) - 1, _BINS).long()
        tail = torch.linspace(int(quantiles[places[-2]]), int(quantiles[-1]), _BINS // 2).long()
        occurring = torch.unique(torch.cat([quantiles[places], tail]))
    edges: Tensor = torch.unique(torch.cat([torch.zeros(1, dtype=torch.long), occurring]))
    return edges


def _between(at_least: Tensor, edges: Tensor, num_images: int) -> Tensor:
    r"""Interpolate :math:`P(n \ge e)` at the edges, ``(V, K, E)``, linearly to P(n >= c) for c from 1 to N."""
    wanted = torch.arange(1, num_images + 1, device=edges.device)
    ends = torch.cat([edges, edges[-1:] + 1])
    values = torch.cat([at_least, torch.zeros_like(at_least[..., :1])], dim=2)
    above = torch.searchsorted(ends, wanted).clamp(max=len(ends) - 1)
    below = (above - 1).clamp(min=0)
    part = ((wanted - ends[below]) / (ends[above] - ends[below]).clamp(min=1)).clamp(0, 1)
    return values[..., below] * (1 - part) + values[..., above] * part
