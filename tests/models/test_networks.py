"""What every network promises: sizes, derivatives, one function of weights and images."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from leakage.models import MLP, NETWORKS, VGG11, AlexNet, ConvNet, LeNet, ResNet18, ResNet20, ViT, draw_state
from leakage.models.layers import ACTIVATIONS

# Small ones where width is an option; the others are what they are.
SMALL: dict[str, Callable[..., nn.Module]] = {
    "convnet": lambda *sizes: ConvNet(*sizes, width=8),
    "mlp": lambda *sizes: MLP(*sizes, width=16),
    "lenet": LeNet,
    "alexnet": AlexNet,
    "vgg11": VGG11,
    "resnet18": ResNet18,
    "resnet20": lambda *sizes: ResNet20(*sizes, width=4, norm="instance"),
    "vit": lambda *sizes: ViT(*sizes, width=8, depth=2, heads=2),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module) -> Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]:
    def loss(state: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, state, image[None]), label[None])

    return loss


def test_all_are_tested():
    assert SMALL.keys() == NETWORKS.keys()


@pytest.mark.parametrize(
    ("name", "grey", "colour"),
    [
        ("convnet", 317_706, 320_010),
        ("mlp", 118_282, 411_146),
        ("lenet", 13_426, 15_826),
        ("alexnet", 1_865_802, 1_872_202),
        ("vgg11", 9_229_962, 9_231_114),
        ("resnet18", 11_172_810, 11_173_962),
        ("resnet20", 272_186, 272_474),
        ("vit", 803_082, 809_098),
    ],
)
def test_parameters(name, grey, colour):
    with torch.device("meta"):
        models = [NETWORKS[name](1, 28, 10), NETWORKS[name](3, 32, 10)]
    assert [sum(parameter.numel() for parameter in model.parameters()) for model in models] == [grey, colour]


@pytest.mark.parametrize("image_size", [28, 32, 64, (32, 48), (37, 28)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_image_sizes(name, image_size):
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    with torch.device("meta"):
        assert NETWORKS[name](2, image_size, 7)(torch.zeros(3, 2, height, width)).shape == (3, 7)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float64) for name in NETWORKS), ("convnet", torch.float32)], ids=str
)
def test_gradients_of_single_images(name, dtype):
    model = SMALL[name](1, 28, 3).to(dtype)
    state = draw_state(model, seed=0)
    images, labels = draw(2, 1, 28, 28).to(dtype), torch.tensor([0, 2])
    together = vmap(grad(loss_of(model)), in_dims=(None, 0, 0))(state, images, labels)
    for index in range(2):
        model.load_state_dict(state)
        model.zero_grad()
        F.cross_entropy(model(images[index, None]), labels[index, None]).backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(together[key][index], parameter.grad, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", ["convnet", "mlp", "lenet", "alexnet"])
def test_networks_of_their_own(name):
    model = SMALL[name](1, 28, 3)
    states = [draw_state(model, seed) for seed in range(3)]
    stacked = {key: torch.stack([state[key] for state in states]) for key in states[0]}
    images = draw(2, 1, 28, 28)
    together = vmap(lambda state: functional_call(model, state, images))(stacked)
    for index, state in enumerate(states):
        torch.testing.assert_close(together[index], functional_call(model, state, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_second_derivative(name):
    """The derivative of <gradient, direction> by the image, against a finite difference."""
    model = SMALL[name](1, 32 if name == "vgg11" else 16, 3).double()
    loss = loss_of(model)
    state = draw_state(model, seed=0)
    directions = {key: tensor.sign() for key, tensor in draw_state(model, seed=1).items()}
    image = draw(1, 32, 32).double() if name == "vgg11" else draw(1, 16, 16).double()
    step = draw(*image.shape, seed=1).double()

    def matched(image: Tensor) -> Tensor:
        gradient = grad(loss)(state, image, torch.tensor(1))
        return torch.stack([(gradient[key] * directions[key]).sum() for key in gradient]).sum()

    analytic = (grad(matched)(image) * step).sum()
    small = 1e-6
    numeric = (matched(image + small * step) - matched(image - small * step)) / (2 * small)
    assert analytic.abs() > 1e-6
    torch.testing.assert_close(analytic, numeric, rtol=1e-3, atol=0)


@pytest.mark.parametrize("norm", ["instance", "batch", "group", "none"])
@pytest.mark.parametrize("network", [AlexNet, VGG11, ResNet18, ResNet20])
def test_norms(network, norm):
    kind = {"batch": nn.BatchNorm2d, "none": ()}.get(norm, nn.GroupNorm)
    with torch.device("meta"):
        model = network(1, 32, 10, norm=norm).eval()
    convolutions = {AlexNet: 5, VGG11: 8, ResNet18: 20, ResNet20: 21}[network]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.GroupNorm)]
    assert all(isinstance(module, kind) for module in norms)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == convolutions
    assert len(norms) == (0 if norm == "none" else convolutions)
    assert model(torch.zeros(2, 1, 32, 32, device="meta")).shape == (2, 10)
    if norm in ("instance", "group"):
        assert {module.num_groups == module.num_channels for module in norms} == {norm == "instance"}


@pytest.mark.parametrize("network", [VGG11, ResNet18])
def test_default_norm_is_instance(network):
    with torch.device("meta"):
        norms = [module for module in network().modules() if isinstance(module, nn.GroupNorm)]
    assert norms
    assert all(module.num_groups == module.num_channels for module in norms)


ACTIVATED: dict[str, tuple[Callable[..., nn.Module], str, int]] = {
    "mlp": (lambda **options: MLP(1, 28, 3, width=16, **options), "relu", 2),
    "lenet": (lambda **options: LeNet(1, 28, 3, **options), "sigmoid", 3),
    "vgg11": (lambda **options: VGG11(1, 28, 3, **options), "relu", 8),
    "resnet18": (lambda **options: ResNet18(1, 28, 3, **options), "relu", 17),
    "resnet20": (lambda **options: ResNet20(1, 28, 3, width=4, norm="instance", **options), "relu", 19),
}
"""Each network, its default activation and how often it is applied to images."""


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ACTIVATED)
def test_activations(name, activation):
    """Each is applied everywhere, and decides neither names nor weights."""
    network, _, count = ACTIVATED[name]
    model, default = network(activation=activation), network()
    of_its_kind = type(ACTIVATIONS[activation]())
    others = tuple({nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.SiLU} - {of_its_kind})
    calls = []
    for module in model.modules():
        assert not isinstance(module, others)
        if isinstance(module, of_its_kind):
            module.register_forward_hook(lambda *_: calls.append(1))
    model(draw(1, 1, 28, 28))
    assert len(calls) == count
    state, expected = draw_state(model, seed=0), draw_state(default, seed=0)
    assert [*state] == [*expected]
    assert all(torch.equal(state[key], expected[key]) for key in state)


@pytest.mark.parametrize("name", ACTIVATED)
def test_default_activations(name):
    network, activation, _ = ACTIVATED[name]
    assert str(network()) == str(network(activation=activation))
    assert str(network()) != str(network(activation="silu"))


@pytest.mark.parametrize("name", ACTIVATED)
def test_other_activations_under_vmap(name):
    """With an activation that is none of the defaults, and nothing in place."""
    model = ACTIVATED[name][0](activation="silu").double()
    state = draw_state(model, seed=0)
    images, labels = draw(2, 1, 28, 28).double(), torch.tensor([0, 2])
    together = vmap(grad(loss_of(model)), in_dims=(None, 0, 0))(state, images, labels)
    model.load_state_dict(state)
    for index in range(2):
        model.zero_grad()
        F.cross_entropy(model(images[index, None]), labels[index, None]).backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(together[key][index], parameter.grad, rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", ACTIVATED)
def test_unknown_activations(name):
    message = r"^Expected `activation` to be one of \['gelu', 'leaky_relu', 'relu', 'sigmoid', 'silu', 'tanh'\], but"
    with pytest.raises(ValueError, match=message):
        ACTIVATED[name][0](activation="elu")


@pytest.mark.parametrize("network", [ConvNet, ResNet18, ResNet20])
def test_batch_norm_in_evaluation_mode_under_vmap(network):
    model = network(1, 16, 3, norm="batch").eval()
    state = draw_state(model, seed=0)
    images = draw(2, 1, 16, 16)
    logits = vmap(lambda image: functional_call(model, state, image[None])[0])(images)
    torch.testing.assert_close(logits, functional_call(model, state, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_happens_in_place_and_pickling(name):
    model = SMALL[name](1, 28, 3)
    assert not any(getattr(module, "inplace", False) for module in model.modules())
    images = draw(2, 1, 28, 28)
    before = images.clone()
    logits = model(images)
    assert torch.equal(images, before)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), logits)


@pytest.mark.parametrize("name", ["convnet", "alexnet", "vgg11", "resnet18"])
def test_built_and_drawn_weights_are_of_one_distribution(name):
    """Torch's own, of each layer: torchvision's constructors draw from others."""
    model = SMALL[name](1, 32, 3)
    drawn = draw_state(model, seed=0)
    for key, tensor in model.state_dict().items():
        if tensor.numel() > 1000:
            torch.testing.assert_close(tensor.std(), drawn[key].std(), rtol=0.15, atol=0)
            bound = (tensor[0].numel()) ** -0.5  # uniform up to one over the root of the fan-in
            assert tensor.abs().max() <= bound
        elif tensor.unique().numel() == 1:
            assert torch.equal(tensor, drawn[key])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("argument", ["channels", "image_size", "num_classes"])
def test_counts(name, argument):
    with pytest.raises(ValueError, match=f"^Expected `{argument}` to be a whole number of at least 1, but got 0"):
        NETWORKS[name](**{argument: 0})


@pytest.mark.parametrize("argument", ["width", "depth"])
def test_counts_of_the_perceptron(argument):
    with pytest.raises(ValueError, match=f"^Expected `{argument}` to be a whole number of at least 1, but got 0"):
        MLP(**{argument: 0})


def test_perceptron():
    model = MLP(1, (2, 3), 4, width=5)
    assert [(layer.in_features, layer.out_features) for layer in model.features[::2]] == [(6, 5), (5, 5)]
    assert (model.classifier.in_features, model.classifier.out_features) == (5, 4)
    assert [type(layer).__name__ for layer in model.features] == ["Linear", "ReLU"] * 2
    assert len(MLP(depth=1).features) == 0


@pytest.mark.parametrize("network", [AlexNet, VGG11, ResNet18])
def test_unknown_norms(network):
    for norm in ("layer", "spectral"):
        message = rf"^Expected `norm` to be one of \['batch', 'group', 'instance', 'none'\], but got '{norm}'"
        with pytest.raises(ValueError, match=message):
            network(norm=norm)


@pytest.mark.parametrize(
    ("network", "image_size", "message"),
    [
        (AlexNet, 7, "`image_size` of at least 8 pixels a side for this network, but got 7"),
        (VGG11, (64, 31), r"`image_size` of at least 32 pixels a side for this network, but got \(64, 31\)"),
        (ResNet18, 8, "`image_size` to leave more than one pixel to normalise for norm='instance', but got one"),
    ],
)
def test_images_that_are_too_small(network, image_size, message):
    with pytest.raises(ValueError, match=f"^Expected {message}"):
        network(image_size=image_size)


def test_smallest_images():
    with torch.device("meta"):
        assert AlexNet(1, 8)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
        assert ResNet18(1, (8, 9))(torch.zeros(2, 1, 8, 9)).shape == (2, 10)
        assert ResNet18(1, 1, norm="batch").eval()(torch.zeros(2, 1, 1, 1)).shape == (2, 10)


def test_transformer_sees_all_of_an_image_that_is_no_whole_number_of_patches():
    model = ViT(1, (10, 7), 3, patch_size=4, width=8, depth=1, heads=2)
    image = draw(1, 1, 10, 7).requires_grad_()
    (by_pixel,) = torch.autograd.grad(model(image)[0, 0], image)
    assert bool((by_pixel != 0).all())
    assert len(model.position.weight) == 6


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match=r"^Expected `heads` to divide `width` 128, but got 3"):
        ViT(heads=3)
