"""The client: it has a model, a loss and private images, and shares a gradient."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from leakage.clients.activations import Activation, check_names, recorded
from leakage.clients.capture import capture
from leakage.clients.examples import clipped_examples
from leakage.clients.inspection import (
    check_no_statistics,
    check_private,
    check_tensors,
    drop_unused_statistics,
    inspect_model,
    take_affine_apart,
    trial_inputs,
)
from leakage.clients.local_steps import Secrets, draw_orders, train
from leakage.clients.losses import LOSSES, OWN
from leakage.clients.low_rank import evaluate_in_basis
from leakage.clients.protocol import UNKNOWN, Protocol, protocol_rate
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.smoothing import smoothed, without_sharpness
from leakage.defenses.base import Defense, check_defenses, defend
from leakage.defenses.encoding import encoded
from leakage.errors import check_count
from leakage.models.draw import draw_states, state_of
from leakage.models.drawing import as_buffers, find_draws, take_masks, take_penalties
from leakage.precision import full_precision


class Victim:
    r"""A client of federated learning, which computes the gradients that it would share.

    The gradient of one victim over its N images ``x`` with labels ``y`` is

    .. math:: g(\theta) = \nabla_\theta \; \mathrm{reduce}_n \; \ell(f_\theta(x_n), y_n)

    It is computed for V victims at once, which share their weights (one global model, many clients) or have their own
    (as in the papers: a fresh random network for each). With T ``local_steps`` (federated averaging), the client trains
    by SGD on ``local_batch_size`` images at a time, in order and repeatedly, and shares the average of its steps.
    Without momentum and weight decay, these are its gradients:

    .. math:: v_t = \mu v_{t-1} + g_t(\theta_t) + \lambda \theta_t, \qquad \theta_{t+1} = \theta_t - \eta v_t,
        \qquad \frac{1}{T} \sum_{t=0}^{T-1} v_t = \frac{\theta_0 - \theta_T}{\eta T} .

    The average is summed step by step, because the difference of the weights would lose digits. If the learning rate is
    secret, the client shares its update :math:`\theta_0 - \theta_T` instead.

    The model is copied and never changed. Only parameters that require gradients share them. Dropout in training mode,
    and other modules that draw random numbers (:class:`~leakage.defenses.PRECODE`), draw anew for each client and step.
    These numbers are secret; attacks search for them (:class:`~leakage.dummies.Drawn`). BatchNorm in training mode, or
    without running statistics, normalises the images of one step together, as real clients do, so that each image
    influences the gradients of the others. Its running statistics are neither used nor updated, and :attr:`state` does
    not contain them. BatchNorm in evaluation mode keeps its statistics.

    Attributes:
        layout: shapes of the model's ``state_dict()`` by name, in its order and with all running statistics.

    Args:
        model: any module that maps images ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)``. Wrap a model for normalised
            images: ``nn.Sequential(torchvision.transforms.Normalize(mean, std), model)``.
        image_shape: ``(C, H, W)``.
        num_images: N, the number of images behind one gradient.
        loss: the training loss, a key of :data:`leakage.clients.losses.LOSSES`; or ``"own"`` for any other loss, which
            the model computes: ``model(images, targets)`` must then return it as one number for images
            ``(N, C, H, W)`` and targets ``(N, K)``, as :meth:`Protocol.targets` returns them. Such labels can't be read
            off the gradient, and closed forms do not apply.
        reduction: reduction over the images of a step, ``"mean"`` or ``"sum"``.
        local_steps: T, number of steps that the client makes, at most 10,000.
        learning_rate: :math:`\eta`, required for several steps; with one step it cancels out. With ``"unknown"``, the
            victim describes a client whose rate is secret, and can't :meth:`share`.
        local_batch_size: number of images in one step, by default all N. It must divide N, and T steps must use every
            image equally often.
        momentum, weight_decay: :math:`\mu`, from 0 to below 1, and :math:`\lambda`, both for several steps.
        shuffle: whether the client takes its images in a new, secret order in each pass over them.
        reveal_learning_rate: whether the attacker knows :math:`\eta`, also that of a single step.
        defenses: defenses that the client applies, in order, to the gradient (with local steps, to their average)
            before it shares it: objects of :class:`leakage.defenses.Defense`.
        label_smoothing, class_weights: options of cross-entropy, as in :class:`torch.nn.CrossEntropyLoss`; only one of
            them, and class weights (K numbers) only with ``reduction="mean"`` and without ``shuffle``. The attacker
            knows them.
        label_kind: ``"classes"``, ``"probabilities"`` (soft labels) or ``"values"``, see :class:`Protocol`.
        num_classes: K, only with loss ``"own"``; otherwise the model tells it.

    Raises:
        ValueError: the loss or reduction is unknown; the local steps are not possible; ``defenses`` holds other
            objects; the model does not take such images, does not return logits, or has no parameter that requires
            gradients; its gradient depends on more than the images, the weights and the numbers that modules draw (such
            as functional dropout); or BatchNorm in training mode has one value per channel.

    References:
        McMahan et al., *Communication-Efficient Learning of Deep Networks from Decentralized Data*
        (federated averaging), AISTATS 2017, https://arxiv.org/abs/1602.05629.

    Example:
        >>> from leakage.models import LeNet
        >>> victim = Victim(LeNet(), image_shape=(1, 28, 28))
        >>> shared = victim.share(torch.rand(5, 1, 1, 28, 28), torch.randint(10, (5, 1)))
        >>> len(shared), shared.gradients["classifier.bias"].shape
        (5, torch.Size([5, 10]))

        Four steps, on the first and the second image in turn:

        >>> client = Victim(LeNet(), image_shape=(1, 28, 28), num_images=2, local_steps=4, learning_rate=0.1,
        ...                 local_batch_size=1)
        >>> len(client.share(torch.rand(5, 2, 1, 28, 28), torch.randint(10, (5, 2))))
        5

        Noise on what is shared:

        >>> from leakage.defenses import GaussianNoise
        >>> Victim(LeNet(), image_shape=(1, 28, 28), defenses=[GaussianNoise(1e-4)]).protocol.defenses
        ({'name': 'GaussianNoise', 'std': 0.0001, 'relative': False},)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        image_shape: tuple[int, ...],
        num_images: int = 1,
        loss: str = "cross_entropy",
        reduction: str = "mean",
        local_steps: int = 1,
        learning_rate: float | str | None = None,
        local_batch_size: int | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        shuffle: bool = False,
        reveal_learning_rate: bool = True,
        defenses: Sequence[Defense] = (),
        label_smoothing: float = 0.0,
        class_weights: tuple[float, ...] | None = None,
        label_kind: str = "classes",
        num_classes: int | None = None,
    ) -> None:
        if (num_classes is None) != (loss != OWN):
            raise ValueError(
                f"Expected `num_classes` with loss {OWN!r}, and only then, but got {num_classes} with {loss!r}."
            )
        self.defenses = check_defenses(defenses)
        protocol = Protocol(
            image_shape=image_shape,
            # The model tells the number below.
            num_classes=num_classes or (len(class_weights) if isinstance(class_weights, list | tuple) else 1),
            num_images=num_images,
            loss=loss,
            reduction=reduction,
            local_steps=local_steps,
            learning_rate=protocol_rate(learning_rate, reveal=reveal_learning_rate),
            local_batch_size=local_batch_size,
            momentum=momentum,
            weight_decay=weight_decay,
            shuffle=shuffle,
            defenses=tuple(defense.describe() for defense in self.defenses),
            label_smoothing=label_smoothing,
            class_weights=class_weights,
            label_kind=label_kind,
        )
        # Secret like the client's defenses: attacks get a victim without it, see `without_secrets`.
        self._hidden_rate = None if reveal_learning_rate else cast(float, learning_rate)
        self._example_norm: float | None = None
        # Federated systems identify arrays by their order, so this includes what the next lines remove.
        self.layout = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self.model = copy.deepcopy(model)
        self._unused_statistics = drop_unused_statistics(self.model)
        take_affine_apart(self.model)
        take_masks(self.model)
        self.model.zero_grad(set_to_none=True)
        self.trainable = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        if not self.trainable:
            raise ValueError(
                "Expected `model` to have parameters that require gradients, but got none: nothing is shared."
            )
        self.classifier, self.logits_from, num_classes = inspect_model(self.model, protocol)
        self.draws = find_draws(self.model, trial_inputs(self.model, protocol))
        self.model.requires_grad_(False)
        self.protocol = dataclasses.replace(protocol, num_classes=num_classes)
        for defense in self.defenses:
            defense.check(self, self.defenses)

    @classmethod
    def of(cls, model: nn.Module, protocol: Protocol) -> Victim:
        """Create the client that a protocol describes, with nothing but the attacker's knowledge.

        It has no defense objects: if the protocol describes defenses, the client can't :meth:`share`.

        Raises:
            ValueError: the model does not fit the protocol.

        Example:
            >>> from leakage import LeNet
            >>> Victim.of(LeNet(), Protocol((1, 28, 28), 10, defenses=({"name": "Secret"},))).protocol.defenses
            ({'name': 'Secret'},)
        """
        hidden = ("defenses",) if protocol.loss == OWN else ("defenses", "num_classes")
        options = {name: value for name, value in vars(protocol).items() if name not in hidden}
        victim = cls(model, **options)
        if victim.protocol.num_classes != protocol.num_classes:
            raise ValueError(
                f"Expected a `model` for the protocol with num_classes={protocol.num_classes}, but got one with "
                f"num_classes={victim.protocol.num_classes}."
            )
        victim.protocol = dataclasses.replace(protocol)
        return victim

    def without_secrets(self) -> Victim:
        """Return a copy with only the attacker's knowledge, without a secret learning rate and defense objects."""
        known = copy.copy(self)
        known.defenses, known._hidden_rate = (), None
        return known

    def without_draws(self) -> Victim:
        """Return a copy whose modules draw no random numbers, as in evaluation mode."""
        plain = copy.copy(self)
        plain.draws = {}
        return plain

    def clipping(self, norm: float) -> Victim:
        """Return a copy that clips the gradient of each image to a norm, in each of its local steps (DP-SGD)."""
        private = copy.copy(self)
        private._example_norm = norm
        return private

    @property
    def state(self) -> dict[str, Tensor]:
        """Weights and buffers of the model by name, without running statistics that BatchNorm does not use."""
        return state_of(self.model)

    def fresh_states(self, seeds: list[int]) -> dict[str, Tensor]:
        """Draw new weights, one network per seed: name to ``(len(seeds), *shape)``.

        Each module draws its weights by its ``reset_parameters``. The global random state does not change.

        Raises:
            ValueError: a module has weights but no ``reset_parameters``, or there are no seeds.
        """
        if not seeds:
            raise ValueError("Expected `seeds` to hold one seed per victim, but got none.")
        states = draw_states(self.model, seeds, hint="Add this method, or use weights='shared'.")
        return {name: torch.stack([state[name] for state in states]) for name in states[0]}

    def gradients(self, state: Mapping[str, Tensor], images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the gradients of one victim before its defenses, averaged over its local steps.

        This is a pure, twice differentiable function that works under ``vmap``. Arguments are those of
        :meth:`evaluate`.
        """
        return self.evaluate(state, images, targets)[0]

    def evaluate(
        self,
        state: Mapping[str, Tensor],
        images: Tensor,
        targets: Tensor,
        modules: Sequence[str] = (),
        basis: Tensor | None = None,
        *,
        secrets: Secrets | None = None,
        sparing: bool = False,
    ) -> tuple[dict[str, Tensor], dict[str, Activation]]:
        """Return the gradients of one victim, and the activations of some modules in the same forward pass.

        Args:
            state: weights and buffers by name, optionally with :data:`~leakage.clients.smoothing.SHARPNESS`.
            images: ``(N, C, H, W)``.
            targets: class probabilities ``(N, K)``, as :meth:`Protocol.targets` returns them.
            modules: names of modules that pass :meth:`check_modules`.
            basis: ``(K, N)``, a basis for the last layer's gradient, for one step. That gradient is then given in its
                coordinates, with the part outside under a further name, and ``state`` must hold the transposed weights
                (:mod:`leakage.clients.low_rank`).
            secrets: what the protocol does not reveal; by default as the protocol suggests.
            sparing: whether to save memory if there are many local steps, by computing each again for a derivative;
                reverse mode only.

        Returns:
            Gradients and activations by name, both differentiable. With local steps, the activations are those of the
            first pass over all images, batch after batch.
        """
        if basis is not None:
            return evaluate_in_basis(self, state, images, targets, modules, basis)
        protocol = self.protocol
        fixed = {name: tensor for name, tensor in state.items() if name not in frozenset(self.trainable)}
        weights = {name: state[name] for name in self.trainable}
        step_gradients = grad(self.step_loss, has_aux=True) if self._example_norm is None else self._clipped
        secrets = secrets or Secrets()
        if protocol.local_steps == 1:
            found: tuple[dict[str, Tensor], dict[str, Activation]]
            found = step_gradients(weights, fixed, images, targets, modules, None, secrets.drawn)
            return found
        data = fixed, images, targets
        return train(step_gradients, protocol, data, weights, modules, secrets, sparing=sparing)

    def _clipped(
        self,
        weights: dict[str, Tensor],
        fixed: dict[str, Tensor],
        images: Tensor,
        targets: Tensor,
        modules: Sequence[str],
        share: Tensor | None,
        drawn: Tensor | None,
    ) -> tuple[dict[str, Tensor], dict[str, Activation]]:
        """Return the gradients of one step, clipped for each image, and the activations of its forward pass."""
        assert self._example_norm is not None
        activations = self.step_loss(weights, fixed, images, targets, modules, share, drawn)[1] if modules else {}
        return clipped_examples(self, {**fixed, **weights}, images, targets, self._example_norm, share), activations

    def step_loss(
        self,
        weights: dict[str, Tensor],
        fixed: dict[str, Tensor],
        images: Tensor,
        targets: Tensor,
        modules: Sequence[str] = (),
        share: Tensor | None = None,
        drawn: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Activation]]:
        """Return the loss of one step, and the activations of its forward pass."""
        fixed, sharpness = without_sharpness(fixed)
        if drawn is not None:
            fixed |= as_buffers(self.draws, drawn)
        own = self.protocol.loss == OWN
        with recorded(self.model, modules) as activations, smoothed(sharpness):
            outputs = functional_call(self.model, (weights, fixed), (images, targets) if own else (images,))
        penalties = take_penalties(self.model) if self.draws else ()
        if own:
            return outputs + sum(penalty.mean() for penalty in penalties), activations
        return self.loss(outputs, targets, share, penalties), activations

    def loss(
        self, logits: Tensor, targets: Tensor, share: Tensor | None = None, penalties: Sequence[Tensor] = ()
    ) -> Tensor:
        """Return the loss of one step, a scalar.

        Args:
            logits: ``(N, K)``.
            targets: class probabilities ``(N, K)``.
            share: ``(N,)``, how much of each image is in the step, by default all.
            penalties: terms ``(N,)`` that modules add to the losses.
        """
        protocol = self.protocol
        losses = LOSSES[protocol.loss](logits, targets)
        for penalty in penalties:
            losses = losses + penalty
        total = losses.sum() if share is None else (share * losses).sum()
        if protocol.reduction == "sum":
            return total
        return losses.mean() if share is None else total / protocol.step_size

    @property
    def mixes_images(self) -> bool:
        """Whether the images of a step influence one another, through BatchNorm that normalises by the batch."""
        return bool(self._unused_statistics)

    def check_modules(self, modules: Sequence[str]) -> None:
        """Raise a ``ValueError`` unless :meth:`evaluate` can return the activations of these modules.

        The model runs once on black images.
        """
        check_names(self.model, modules)
        with torch.no_grad(), recorded(self.model, modules):
            self.model(*trial_inputs(self.model, self.protocol))

    @full_precision()
    def share(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        states: Mapping[str, Tensor] | None = None,
        ids: Tensor | None = None,
        reveal_labels: bool = False,
        seed: int = 0,
    ) -> SharedGradient:
        """Compute what V victims share: their gradients in full precision, after their defenses.

        Args:
            images: ``(V, N, C, H, W)``, values in [0, 1].
            labels: ``(V, N)``, class indices, or ``(V, N, K)`` with another :attr:`Protocol.label_kind`.
            states: one network per victim, name to ``(V, *shape)``, as :meth:`fresh_states` returns them. By default
                all victims share the model's weights.
            ids: ``(V,)``, whole numbers that identify the victims, by default 0 to V - 1.
            reveal_labels: whether to share the labels too.
            seed: together with a victim's id, it determines what its defenses and its network draw, and the order of
                its images. Two calls with the same seed and ids add the same noise, which cancels in the difference of
                what they share: use a different seed for each round.

        Raises:
            ValueError: images or labels have another shape or range; images have another precision than the weights;
                states don't fit the model; gradients are not finite; a defense returns anything but finite gradients;
                or the victim has no defense objects or learning rate for those that its protocol describes.
        """
        protocol, hidden = self.protocol, self._hidden_rate
        if len(self.defenses) != len(protocol.defenses):
            raise ValueError(
                "Expected a victim with defense objects to share, but got one whose protocol only describes "
                f"{[defense['name'] for defense in protocol.defenses]}. Create it by Victim(model, ..., "
                "defenses=[...])."
            )
        if protocol.learning_rate == UNKNOWN and hidden is None:
            raise ValueError(
                f"Expected a victim with a known learning rate to share, but got one whose rate is {UNKNOWN!r}. "
                "Create it by Victim(model, ..., learning_rate=0.1, reveal_learning_rate=False)."
            )
        check_count(0, seed=seed)
        check_private(images, labels, protocol)
        own = states is not None
        if states is not None:
            self._check_state(states, victims=len(images))
        states = {name: tensor.to(images.device) for name, tensor in (states or self.state).items()}
        precision = states[self.trainable[0]].dtype
        if images.dtype != precision:
            raise ValueError(f"Expected `images` in the precision of the weights, {precision}, but got {images.dtype}.")
        targets = protocol.targets(labels, images.dtype)
        ids = torch.arange(len(images)) if ids is None else ids.cpu().long()
        images, targets = encoded(self.defenses, images, targets, ids.tolist(), seed)
        gradients = capture(self, states, own, images, targets, ids.tolist(), hidden, seed)
        revealed = labels.long() if protocol.label_kind == "classes" else labels
        shared = SharedGradient(
            gradients=gradients,
            state=states,
            ids=ids,
            protocol=protocol,
            own_weights=own,
            labels=revealed if reveal_labels else None,
        )
        shared.check()
        if self.defenses:
            shared.gradients = defend(self, shared, images, targets, draw_orders(protocol, ids.tolist(), seed), seed)
        return shared

    def fingerprint(self) -> str:
        """Return a short hash of the architecture and the protocol, but not of the weights."""
        shapes = [(name, tuple(tensor.shape)) for name, tensor in self.state.items()]
        return hashlib.sha256(repr((str(self.model), shapes, self.protocol)).encode()).hexdigest()[:16]

    def check(self, shared: SharedGradient) -> None:
        """Raise a ``ValueError`` unless ``shared`` fits this victim's model and protocol."""
        shared.check()
        if shared.protocol != self.protocol:
            here, there = vars(self.protocol), vars(shared.protocol)
            names = [name for name in here if here[name] != there[name]]
            expected, got = (", ".join(f"{name}={side[name]!r}" for name in names) for side in (here, there))
            raise ValueError(
                f"Expected a shared gradient of the victim's protocol, with {expected}, but got {got}. Create a victim "
                "for it by Victim.of(network, shared.protocol), or pass the network itself to SharedGradients. "
                "Gradients of different protocols each need a separate SharedGradients."
            )
        parameters = dict(self.model.named_parameters())
        trainable: dict[str, Tensor] = {name: parameters[name] for name in self.trainable}
        victims, state = len(shared) if shared.own_weights else None, shared.state
        if shared.basis is not None:
            name = f"{self.classifier}.weight"
            trainable[name] = trainable[name][: shared.basis.shape[2]]
            state = {**state, name: state[name].mT}
        check_tensors("gradient", shared.gradients, trainable, victims=len(shared))
        self._check_state(state, victims=victims)

    def _check_state(self, state: Mapping[str, Tensor], *, victims: int | None) -> None:
        check_no_statistics(state, self._unused_statistics)
        check_tensors("state", state, self.state, victims=victims)
