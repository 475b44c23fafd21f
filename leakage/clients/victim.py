"""The client: a model, a loss and private images, and the gradient that it shares."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from leakage.clients.losses import LOSSES
from leakage.clients.shared_gradient import Protocol, SharedGradient, check_local_steps, show_shape
from leakage.errors import check_choice
from leakage.models.draw import draw_states, state_of

# Victims whose gradients are captured at once; bounds the memory of a capture, not its result.
_CAPTURED_AT_ONCE = 64


class Victim:
    r"""A client of federated learning: computes the gradients that it would share.

    One victim's gradient over its N images ``x`` with labels ``y`` is

    .. math:: g(\theta) = \nabla_\theta \; \mathrm{reduce}_n \; \ell(f_\theta(x_n), y_n)

    and is computed for V victims at once, their weights shared (one global model, many clients)
    or their own (the protocol of the papers: a fresh random network for each). With T ``local_steps``
    (federated averaging) the client trains by plain SGD, ``local_batch_size`` images at a time in
    their order, over and over, and shares the average gradient of its steps,

    .. math:: \theta_{t+1} = \theta_t - \eta \, g_t(\theta_t), \qquad
        \frac{1}{T} \sum_{t=0}^{T-1} g_t(\theta_t) = \frac{\theta_0 - \theta_T}{\eta T},

    which it sums step by step: the difference of the weights would lose digits.

    The model is copied: nothing is ever left behind on the one that was given, and only parameters
    that require gradients share them. BatchNorm in training mode, or without running statistics,
    normalises by the client's own batch, as real clients do, the images of one step together: every image
    is then in every gradient. Its running statistics are neither used nor updated, so that
    :attr:`state` has none; one in evaluation mode keeps its own.

    Args:
        model: any module that maps images ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)``. A model
            trained on normalised images is wrapped:
            ``nn.Sequential(torchvision.transforms.Normalize(mean, std), model)``.
        image_shape: ``(C, H, W)``.
        num_images: N, the images behind one gradient.
        loss: the training loss, a key of :data:`leakage.clients.losses.LOSSES`.
        reduction: over the images of a step, ``"mean"`` or ``"sum"``.
        local_steps: T, the steps that the client makes, at most 10,000.
        learning_rate: :math:`\eta`, required for several steps; with one it cancels out.
        local_batch_size: images of one step, by default all N. It divides N, and T steps use every image
            equally often.

    Raises:
        ValueError: an unknown loss or reduction, local steps that can't be made, a model that does not take
            such images or gives no logits, has no parameter that requires gradients, or whose gradient
            depends on more than the images and weights (dropout in training mode), or BatchNorm in
            training mode with one value per channel.

    References:
        McMahan et al., *Communication-Efficient Learning of Deep Networks from Decentralized Data*
        (federated averaging), AISTATS 2017, https://arxiv.org/abs/1602.05629.

    Example:
        >>> from leakage.models import LeNet
        >>> victim = Victim(LeNet(), image_shape=(1, 28, 28))
        >>> shared = victim.share(torch.rand(5, 1, 1, 28, 28), torch.randint(10, (5, 1)))
        >>> len(shared), shared.gradients["classifier.bias"].shape
        (5, torch.Size([5, 10]))

        Two steps on the first image, two on the second, in turns:

        >>> client = Victim(LeNet(), image_shape=(1, 28, 28), num_images=2, local_steps=4, learning_rate=0.1,
        ...                 local_batch_size=1)
        >>> len(client.share(torch.rand(5, 2, 1, 28, 28), torch.randint(10, (5, 2))))
        5
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        image_shape: tuple[int, int, int],
        num_images: int = 1,
        loss: str = "cross_entropy",
        reduction: str = "mean",
        local_steps: int = 1,
        learning_rate: float | None = None,
        local_batch_size: int | None = None,
    ) -> None:
        check_local_steps(num_images, local_steps, learning_rate, local_batch_size)
        check_choice("loss", loss, LOSSES)
        check_choice("reduction", reduction, ("mean", "sum"))
        _check_no_dropout(model)
        self.model = copy.deepcopy(model)
        self._unused_statistics = _drop_unused_statistics(self.model)
        self.model.zero_grad(set_to_none=True)
        self.trainable = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        if not self.trainable:
            raise ValueError(
                "Expected `model` to have parameters that require gradients, but got none: nothing is shared."
            )
        self.classifier, self.logits_from, num_classes = _inspect(
            self.model, tuple(image_shape), num_images if local_batch_size is None else local_batch_size
        )
        self.model.requires_grad_(False)
        self.protocol = Protocol(
            image_shape=tuple(image_shape),
            num_classes=num_classes,
            num_images=num_images,
            loss=loss,
            reduction=reduction,
            local_steps=local_steps,
            learning_rate=learning_rate,
            local_batch_size=local_batch_size,
        )

    @property
    def state(self) -> dict[str, Tensor]:
        """Weights and buffers of the model by name, without statistics that BatchNorm does not use."""
        return state_of(self.model)

    def fresh_states(self, seeds: list[int]) -> dict[str, Tensor]:
        """Newly drawn weights, one network per seed: name to ``(len(seeds), *shape)``.

        Every module draws its weights as its ``reset_parameters`` does. The global random state
        is left as it was.

        Raises:
            ValueError: a module has weights but no ``reset_parameters``, or there are no seeds.
        """
        if not seeds:
            raise ValueError("Expected `seeds` to hold one seed per victim, but got none.")
        states = draw_states(self.model, seeds, mend="Give it one, or use weights='shared'.")
        return {name: torch.stack([state[name] for state in states]) for name in states[0]}

    def gradients(self, state: Mapping[str, Tensor], images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Gradients of one victim, averaged over its local steps: pure and twice differentiable (made for ``vmap``).

        Args:
            state: weights and buffers by name.
            images: ``(N, C, H, W)``.
            targets: class probabilities ``(N, K)``.
        """
        protocol = self.protocol
        loss_per_image = LOSSES[protocol.loss]
        fixed = {name: tensor for name, tensor in state.items() if name not in self._trainable_set}

        def loss(weights: dict[str, Tensor], images: Tensor, targets: Tensor) -> Tensor:
            logits = functional_call(self.model, (weights, fixed), (images,))
            losses = loss_per_image(logits, targets)
            return losses.mean() if protocol.reduction == "mean" else losses.sum()

        weights = {name: state[name] for name in self.trainable}
        size = protocol.local_batch_size or len(images)
        gradients: dict[str, Tensor] = grad(loss)(weights, images[:size], targets[:size])
        if protocol.learning_rate is None:  # one step
            return gradients
        total = gradients
        for step in range(1, protocol.local_steps):
            weights = {name: weights[name] - protocol.learning_rate * gradients[name] for name in weights}
            first = step * size % len(images)
            batch = slice(first, first + size)
            gradients = grad(loss)(weights, images[batch], targets[batch])
            total = {name: total[name] + gradients[name] for name in total}
        return {name: tensor / protocol.local_steps for name, tensor in total.items()}

    @property
    def _trainable_set(self) -> frozenset[str]:
        return frozenset(self.trainable)

    def share(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        states: Mapping[str, Tensor] | None = None,
        ids: Tensor | None = None,
        reveal_labels: bool = False,
    ) -> SharedGradient:
        """Capture the gradients of V victims.

        Args:
            images: ``(V, N, C, H, W)``, values in [0, 1].
            labels: ``(V, N)``, class indices.
            states: one network per victim, name to ``(V, *shape)``, as :meth:`fresh_states` gives
                it. By default all victims share the model's weights.
            ids: ``(V,)`` whole numbers that name the victims, by default 0 to V - 1.
            reveal_labels: put the labels into what is shared.

        Raises:
            ValueError: images or labels of another shape or range, images of another precision than the
                weights, states that don't fit the model, or gradients that are not finite.
        """
        protocol = self.protocol
        expected = (protocol.num_images, *protocol.image_shape)
        if images.ndim != 5 or tuple(images.shape[1:]) != expected or not len(images):
            raise ValueError(f"Expected `images` of shape {show_shape('V', *expected)}, but got {tuple(images.shape)}.")
        if not images.is_floating_point() or not bool(((images >= 0) & (images <= 1)).all()):
            raise ValueError(
                f"Expected `images` as floating-point numbers in [0, 1], but got {images.dtype} from "
                f"{images.min().item()} to {images.max().item()}."
            )
        if tuple(labels.shape) != tuple(images.shape[:2]):
            raise ValueError(f"Expected `labels` of shape {tuple(images.shape[:2])}, but got {tuple(labels.shape)}.")
        if labels.is_floating_point() or not bool(((labels >= 0) & (labels < protocol.num_classes)).all()):
            raise ValueError(
                f"Expected `labels` as class indices from 0 to {protocol.num_classes - 1}, but got "
                f"{labels.dtype} from {labels.min().item()} to {labels.max().item()}."
            )
        own = states is not None
        states = dict(states) if states is not None else self.state
        if own:
            self._check_state(states, victims=len(images))
        states = {name: tensor.to(images.device) for name, tensor in states.items()}
        precision = states[self.trainable[0]].dtype
        if images.dtype != precision:
            raise ValueError(f"Expected `images` in the precision of the weights, {precision}, but got {images.dtype}.")
        targets = F.one_hot(labels.long(), protocol.num_classes).to(images.dtype)
        capture = vmap(
            self.gradients,
            in_dims=(0 if own else None, 0, 0),
            chunk_size=_CAPTURED_AT_ONCE,
        )
        with torch.no_grad():
            gradients = capture(states, images, targets)
        shared = SharedGradient(
            gradients=gradients,
            state=states,
            ids=torch.arange(len(images)) if ids is None else ids.cpu().long(),
            protocol=protocol,
            own_weights=own,
            labels=labels.long() if reveal_labels else None,
        )
        shared.check()
        return shared

    def fingerprint(self) -> str:
        """A short hash of architecture and protocol (not of the weights), to recognise a configuration."""
        shapes = [(name, tuple(tensor.shape)) for name, tensor in self.state.items()]
        return hashlib.sha256(repr((str(self.model), shapes, self.protocol)).encode()).hexdigest()[:16]

    def check(self, shared: SharedGradient) -> None:
        """Raise a ``ValueError`` unless ``shared`` fits this victim's model and protocol."""
        shared.check()
        if shared.protocol != self.protocol:
            raise ValueError(f"Expected a shared gradient of the protocol {self.protocol}, but got {shared.protocol}.")
        parameters = dict(self.model.named_parameters())
        trainable = {name: parameters[name] for name in self.trainable}
        _check_tensors("gradient", shared.gradients, trainable, victims=len(shared))
        self._check_state(shared.state, victims=len(shared) if shared.own_weights else None)

    def _check_state(self, state: Mapping[str, Tensor], *, victims: int | None) -> None:
        # Not ignored: who brings statistics and a model in training mode may just have forgotten `eval()`.
        if unused := sorted(self._unused_statistics & state.keys()):
            raise ValueError(
                "Expected no running statistics of BatchNorm that normalises by the client's own batch (in training "
                f"mode, or without running statistics), but got {unused}. Call `model.eval()` if the client "
                "normalised by them, else leave them out of the state."
            )
        _check_tensors("state", state, self.state, victims=victims)


def _check_no_dropout(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _DropoutNd) and module.training and module.p > 0:
            raise ValueError(
                f"Expected a network without dropout in training mode, but got {name!r}: its gradient "
                "depends on a random mask that the attacker does not know, so no image reproduces it. Call "
                "`model.eval()` to audit the network without dropout, or set p=0."
            )


def _drop_unused_statistics(model: nn.Module) -> frozenset[str]:
    """Take from BatchNorm the running statistics that it does not normalise by; returns the names of all such.

    In training mode it updates them in place, which ``vmap`` can't do, and its output does not depend on them.
    """
    names = []
    for prefix, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            module.track_running_stats = False
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                setattr(module, name, None)
                names.append(f"{prefix}.{name}" if prefix else name)
    return frozenset(names)


def _inspect(model: nn.Module, image_shape: tuple[int, ...], batch_size: int) -> tuple[str | None, str, int]:
    """The linear layer whose output are the logits (None if there is none), their origin and their number."""
    parameter = next(model.parameters())
    # Two images stand for any more of them: BatchNorm in training mode only refuses a single value.
    images = torch.zeros(min(batch_size, 2), *image_shape, dtype=parameter.dtype, device=parameter.device)
    outputs: list[tuple[str, Tensor]] = []

    def record(name: str) -> Any:
        return lambda module, inputs, output: outputs.append((name, output))

    leaves = {name: module for name, module in model.named_modules() if not any(True for _ in module.children())}
    hooks = [module.register_forward_hook(record(name)) for name, module in leaves.items()]
    try:
        with torch.no_grad():
            logits = model(images)
    except Exception as error:
        own_batch = any(isinstance(module, _BatchNorm) and module.running_mean is None for module in model.modules())
        if own_batch and "more than 1 value per channel" in str(error):
            raise ValueError(
                "Expected several values per channel for BatchNorm to normalise by (in training mode, or without "
                "running statistics), but got one: a single image whose map has a single pixel. Choose `num_images` "
                "(and `local_batch_size`) of at least 2, or larger images, or call `model.eval()`."
            ) from error
        raise ValueError(
            f"Expected `model` to take images of shape {show_shape('N', *image_shape)}, but got: {error}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        number = "one image" if len(images) == 1 else f"{len(images)} images"
        raise ValueError(f"Expected `model` to give logits of shape (N, K), but got {got} for {number}.")
    try:
        with torch.no_grad():
            vmap(model)(images[None])
    except Exception as error:
        raise ValueError(
            "Expected `model` to be a function of images and weights alone that `torch.func.vmap` can run "
            f"(no dropout by `torch.nn.functional`, no statistics updated on the way), but got: {error}"
        ) from error
    if not outputs:
        return None, type(model).__name__, logits.shape[1]
    # An nn.Identity behind the linear layer hands its output on.
    linear = [pair for pair in outputs if pair[1] is logits and isinstance(leaves[pair[0]], nn.Linear)]
    with_weights = [pair for pair in outputs if [*leaves[pair[0]].parameters()]]
    name, output = (linear or with_weights or outputs)[-1]
    times = sum(1 for other, _ in outputs if other == name)
    origin = f"{type(leaves[name]).__name__} {name!r}"
    origin += f", applied {times} times" if times > 1 else "" if output is logits else " and operations after it"
    return name if linear and times == 1 else None, origin, logits.shape[1]


def _check_tensors(
    kind: str, given: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, victims: int | None
) -> None:
    """Names and shapes as in the model, with a leading dimension of ``victims`` unless that is None."""
    missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"Expected a {kind} for every tensor of the model, but got missing {missing} and unknown {unknown}."
        )
    for name, tensor in given.items():
        shape = (*(() if victims is None else (victims,)), *expected[name].shape)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"Expected the {kind} of {name!r} to have shape {shape}, but got {tuple(tensor.shape)}.")
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise ValueError(
                f"Expected the {kind} of {name!r} of a type like {expected[name].dtype}, but got {tensor.dtype}."
            )
