"""Networks trained on real images, kept in several states together with their targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakage.condensation.fresh import Goal, Networks
from leakage.condensation.networks import batch_norms, take_statistics
from leakage.datamodules.labelled import ClassBatch
from leakage.models import draw_state
from leakage.models.draw import state_of
from leakage.seeds import derive_seed

# Training steps after which the state of a network is kept, and the most steps per synthetic image of a class: a
# network trained on few images does not get further.
MOMENTS = (0, 2, 5, 10, 20, 40, 80)
_STEPS_PER_IMAGE = 10
# Images in a training step, and the rate and momentum of SGD, as in the evaluation of synthetic sets.
_BATCH, _RATE, _MOMENTUM = 64, 0.01, 0.9
# Images at once on the CPU, for its caches.
_PIECE = 16

# A state of a network, and the targets of real images on it.
Kept = tuple[dict[str, Tensor], Goal]


@dataclass
class NetworkPool(Networks):
    r"""A few networks that are used repeatedly, so that the targets of real images are computed only once.

    The targets of real images do not depend on the synthetic ones. Therefore ``size`` networks are drawn and trained on
    real images by SGD. Each network n is kept in its states :math:`\theta_{n,t}` after t training steps, for t = 0, 2,
    5, 10, 20, 40 and 80 up to ten times the number of synthetic images per class. With each state the targets of a
    batch of real images of every class are kept; in gradient matching they are

    .. math:: g^*_{n,t,c} = \frac{1}{M_c} \sum_{i=1}^{M_c} \nabla_\theta \ell(x_{c,i}, c; \theta_{n,t}).

    One step of a condensation visits one state, and costs no more than its synthetic images. The states are visited
    once in order, then repeatedly in random orders. After ``passes`` visits to each state, new networks replace all of
    them. The networks are never trained on synthetic images.

    A network is trained only up to the states visited so far. It depends on the seed and its number alone, so a resumed
    run trains the same network. Targets are kept in bfloat16; its rounding error is far smaller than the difference
    between two batches of real images. With gradients, a state takes (1 + K / 2) times the memory of the network in
    float32: 430 MB in total for 8 ConvNets of 128 channels and 10 classes.

    Attributes:
        size: number of networks in the pool.
        passes: visits to each state before the networks are replaced; None to keep them.
    """

    size: int = 8
    passes: int | None = None
    _kept: dict[int, list[Kept]] = field(default_factory=dict, init=False)
    _training: dict[int, Iterator[Kept]] = field(default_factory=dict, init=False)

    @property
    def moments(self) -> list[int]:
        """Training steps after which the state of a network is kept."""
        return [moment for moment in MOMENTS if moment <= _STEPS_PER_IMAGE * self.options["images_per_class"]]

    def goal(self, batch: ClassBatch) -> Goal:
        """Load the state of this visit into the network, and return its targets."""
        number, moment = divmod(self.visited(batch.step), len(self.moments))
        for old in [other for other in self._kept if other // self.size < number // self.size]:
            del self._kept[old], self._training[old]
        kept = self._kept.setdefault(number, [])
        training = self._training.setdefault(number, self._train(number))
        seen = 0
        while len(kept) <= moment:
            kept.append(next(training))
            seen += kept[-1][1].real_images
        with self.clock("network"):
            state, goal = kept[moment]
            self.network.load_state_dict(state, strict=False)
            dtype = next(self.network.parameters()).dtype
            targets = {name: target.to(dtype) for name, target in goal.targets.items()}
        return Goal(targets, goal.transforms, seen)

    def visited(self, step: int) -> int:
        """Return the number of the state that a step visits, counted network by network."""
        count = self.size * len(self.moments)
        passed, place = divmod(step, count)
        generation, again = divmod(passed, self.passes) if self.passes else (0, passed)
        if again:
            place = int(torch.randperm(count, generator=self.generator(passed, "pool"))[place])
        return generation * count + place

    def _train(self, number: int) -> Iterator[Kept]:
        """Train a network, and yield its states and their targets in turn."""
        state = draw_state(self.network, derive_seed(self.options["seed"], number, "network"))
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=_RATE, momentum=_MOMENTUM)
        generator = self.generator(number, "pool training")
        trained = 0
        for index, moment in enumerate(self.moments, start=number * len(self.moments)):
            batch = self.data.class_batch(index)
            classes = [images.to(parameters[0].device) for images in self.split(batch)]
            with self.clock("network"):
                self.network.load_state_dict(state, strict=False)  # other states have been loaded since
                for _ in range(moment - trained):
                    self._step(optimizer, parameters, generator)
                trained = moment
                take_statistics(self.network, self.data, classes)
                state = {name: tensor.detach().clone() for name, tensor in state_of(self.network).items()}
            goal = self.take(index, classes)
            yield state, replace(goal, targets={name: target.bfloat16() for name, target in goal.targets.items()})

    def _step(self, optimizer: torch.optim.SGD, parameters: Sequence[nn.Parameter], generator: torch.Generator) -> None:
        """Make one step of SGD on random real images."""
        train, device = self.data.train, parameters[0].device
        chosen = torch.randint(len(train), (_BATCH,), generator=generator)
        norms = batch_norms(self.network)
        piece = _PIECE if device.type == "cpu" and not norms else _BATCH
        for module in norms:
            module.train()
        totals = [torch.zeros_like(parameter) for parameter in parameters]
        for some in torch.split(chosen, piece):
            images, labels = train.images[some].to(device), train.labels[some].to(device)
            loss = F.cross_entropy(self.network(self.normalise(images)), labels, reduction="sum") / _BATCH
            for total, gradient in zip(
                totals, torch.autograd.grad(loss, parameters, materialize_grads=True), strict=True
            ):
                total += gradient
        for parameter, total in zip(parameters, totals, strict=True):
            parameter.grad = total
        optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        for module in norms:
            module.eval()
