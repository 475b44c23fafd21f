"""BatchNorm that normalises by the client's own batch, and the statistics that it does not use."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.func import functional_call, jvp, vjp, vmap
from torch.nn import functional as F

from leakage import Victim
from tests.clients.networks import CLASSES, IMAGE_SHAPE, everything, one_at_a_time, private


def normalising_twice(*, statistics: bool = True) -> nn.Sequential:
    """Two BatchNorm layers, in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Conv2d(2, 3, 3),
            nn.BatchNorm2d(3, track_running_stats=statistics),
            nn.Sigmoid(),
            nn.Flatten(),
            nn.Linear(36, 5),
            nn.BatchNorm1d(5, track_running_stats=statistics),
            nn.Linear(5, CLASSES),
        )
        for layer in (model[1], model[5]):
            nn.init.uniform_(layer.weight, 0.5, 2)
        for layer in (model[1], model[5]) if statistics else ():
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    return model.double()


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("evaluating", ["", "1", "5"])
def test_batch_norm_in_training_mode(evaluating, own):
    """Each layer in its own mode; the reference is the user's model as it stands."""
    model = normalising_twice()
    if evaluating:
        model.get_submodule(evaluating).eval()
    before = everything(model)
    victim = Victim(model, image_shape=IMAGE_SHAPE, num_images=3)
    buffers = {name for name, _ in victim.model.named_buffers()}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert buffers == {f"{evaluating}.{name}" for name in statistics if evaluating}
    images, labels = private(4, 3)
    states = victim.fresh_states([1, 2, 3, 4]) if own else None
    shared = victim.share(images, labels, states=states)
    victim.check(shared)
    assert shared.state.keys() == victim.state.keys()
    assert everything(model) == before
    for index in range(4):
        state = model.state_dict() | ({} if states is None else {name: states[name][index] for name in states})
        expected = one_at_a_time(model, state, images[index], labels[index], "cross_entropy", "mean")
        for name, gradient in expected.items():
            torch.testing.assert_close(shared.gradients[name][index], gradient)


def test_batch_norm_without_running_statistics_is_that_of_training_mode():
    training, without = normalising_twice(), normalising_twice(statistics=False).eval()
    victims = [Victim(model, image_shape=IMAGE_SHAPE, num_images=2) for model in (training, without)]
    one, other = (victim.share(*private(3, 2)) for victim in victims)
    victims[0].check(other)
    for name, gradient in one.gradients.items():
        torch.testing.assert_close(other.gradients[name], gradient)
    evaluated = Victim(training.eval(), image_shape=IMAGE_SHAPE, num_images=2)
    assert victims[0].fingerprint() != evaluated.fingerprint()


def test_fresh_states_do_not_depend_on_the_mode_of_batch_norm():
    training, evaluating = (
        Victim(normalising_twice().train(mode), image_shape=IMAGE_SHAPE, num_images=2).fresh_states([4, 9])
        for mode in (True, False)
    )
    assert evaluating.keys() - training.keys() == {name for name in evaluating if "running" in name or "num_" in name}
    for name, tensor in training.items():
        assert torch.equal(tensor, evaluating[name]), name


def test_statistics_that_are_not_used_are_refused():
    evaluated, training = (
        Victim(normalising_twice().train(mode), image_shape=IMAGE_SHAPE, num_images=2) for mode in (False, True)
    )
    shared = evaluated.share(*private(2, 2))
    message = r"no running statistics of BatchNorm .* but got \['1\.num_batches_tracked'.*Call `model\.eval\(\)` if"
    with pytest.raises(ValueError, match=message):
        training.check(shared)
    with pytest.raises(ValueError, match=message):
        training.share(*private(2, 2), states=evaluated.fresh_states([0, 1]))
    with pytest.raises(ValueError, match=r"missing \['1\.num_batches_tracked', '1\.running_mean'"):
        evaluated.check(training.share(*private(2, 2)))


def test_batch_norm_with_a_single_value():
    """torch can't normalise it either; two images, or a larger map, can be."""
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))
    message = r"Expected several values per channel for BatchNorm .* but got one.*`num_images`.*`model\.eval\(\)`"
    with pytest.raises(ValueError, match=message):
        Victim(model, image_shape=IMAGE_SHAPE)
    with pytest.raises(ValueError, match=message):
        Victim(model, image_shape=IMAGE_SHAPE, num_images=2, local_steps=2, learning_rate=0.1, local_batch_size=1)
    with pytest.raises(ValueError, match=message):
        Victim(torchvision.models.resnet18(num_classes=10), image_shape=(3, 32, 32))
    Victim(model, image_shape=IMAGE_SHAPE, num_images=2)
    Victim(nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(60, 3)), image_shape=IMAGE_SHAPE)
    Victim(model.eval(), image_shape=IMAGE_SHAPE)
    normalised_groups = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.GroupNorm(2, 2), nn.Flatten(), nn.Linear(2, 3))
    with pytest.raises(ValueError, match="Expected `model` to take images"):
        Victim(normalised_groups, image_shape=IMAGE_SHAPE)


def test_statistics_updated_on_the_way():
    model = nn.Sequential(nn.InstanceNorm2d(2, track_running_stats=True), nn.Flatten(), nn.Linear(60, 3))
    with pytest.raises(ValueError, match="no statistics updated in the forward pass"):
        Victim(model, image_shape=IMAGE_SHAPE)
    Victim(model.eval(), image_shape=IMAGE_SHAPE)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("instance", [True, False])
def test_derivatives_of_all_victims_together(instance, own):
    """As Gauss-Newton takes them, forwards and backwards; ``torch.func`` alone has the weights' gradient wrong."""
    model = normalising_twice()
    if instance:
        model[1] = nn.InstanceNorm2d(3, affine=True, dtype=torch.float64)
    victim = Victim(copy.deepcopy(model), image_shape=IMAGE_SHAPE, num_images=3)
    images, labels = private(2, 3)
    direction = private(2, 3, seed=1)[0]
    targets = F.one_hot(labels, CLASSES).double()
    states = victim.fresh_states([1, 2]) if own else victim.state

    def flat(images, targets, state):
        return torch.cat([gradient.flatten() for gradient in victim.gradients(state, images, targets).values()])

    def together(images):
        return vmap(flat, in_dims=(0, 0, 0 if own else None))(images, targets, states)

    image_of = jvp(together, (images,), (direction,))[1]
    residuals, pull = vjp(together, images)
    pulled = pull(residuals)[0]
    for index in range(2):
        state = model.state_dict() | ({} if not own else {name: states[name][index] for name in states})

        def plain(images, index=index, state=state):
            given = {
                name: tensor.clone().requires_grad_() for name, tensor in state.items() if name in victim.trainable
            }
            logits = functional_call(copy.deepcopy(model), given, images)
            loss = F.cross_entropy(logits, labels[index])
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(given.values()), create_graph=True)])

        step = 1e-5 * direction[index]
        slope = (plain(images[index] + step) - plain(images[index] - step)).detach() / 2e-5
        torch.testing.assert_close(image_of[index], slope, rtol=1e-6, atol=1e-8)
        leaf = images[index].clone().requires_grad_()
        expected = torch.autograd.grad(plain(leaf).square().sum() / 2, leaf)[0]
        torch.testing.assert_close(pulled[index], expected, rtol=1e-8, atol=1e-11)
