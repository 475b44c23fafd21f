"""What a user can get wrong, and rules that the messages name."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakage.clients.victim import Victim
from leakage.labels import NEEDS, RULES, Auxiliary, LabelReader, infer_labels
from tests.labels.by_hand import auxiliary_images, images_and_labels, network, victim_of

pytestmark = pytest.mark.usefixtures("hasty_posterior")

NOT_FROM_GRADIENTS: list[Any] = [
    pytest.param(
        nn.Sequential(nn.Flatten(), nn.Linear(12, 3)),
        {"loss": "mean_squared_error"},
        r"Expected a victim with loss 'cross_entropy'.*, but got loss 'mean_squared_error'\. Use DLGAttack.*reveal",
        id="loss",
    ),
    pytest.param(
        nn.Sequential(nn.Conv2d(3, 5, 2), nn.Flatten()),
        {},
        r"Expected logits that are the output of an nn\.Linear layer.*, but got logits from Conv2d '0' and "
        r"operations after it\. Use DLGAttack",
        id="convolution",
    ),
    pytest.param(
        nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Softplus()),
        {},
        r"Expected logits that are the output of an nn\.Linear layer.*, but got logits from Linear '1' and ",
        id="activation",
    ),
    pytest.param(
        nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Linear(3, 3).requires_grad_(False)),
        {},
        r"Expected the last layer '2' to share its gradient, but got frozen weights\. Use DLGAttack",
        id="frozen",
    ),
]


@pytest.mark.parametrize("rule", ["auto", "llg"])
@pytest.mark.parametrize(("model", "options", "message"), NOT_FROM_GRADIENTS)
def test_gradients_that_tell_no_labels(model: nn.Module, options: dict[str, Any], message: str, rule: str) -> None:
    victim = victim_of(model, 1, **options)
    with pytest.raises(ValueError, match=message):
        LabelReader(rule).check(victim)
    images, labels = images_and_labels(0, 2, 1, 3)
    shared = victim.share(images, labels)
    with pytest.raises(ValueError, match=message):
        infer_labels(shared, victim, rule=rule)


def test_a_linear_layer_that_is_applied_twice() -> None:
    layer = nn.Linear(12, 12)
    victim = victim_of(nn.Sequential(nn.Flatten(), layer, nn.Sigmoid(), layer), 1)
    images, labels = images_and_labels(0, 2, 1, 3)
    with pytest.raises(ValueError, match=r"but got logits from Linear '1', applied 2 times\. Use DLGAttack"):
        infer_labels(victim.share(images, labels), victim)


def test_a_model_that_is_one_layer() -> None:
    class Flat(nn.Linear):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.flatten(1))

    with pytest.raises(
        ValueError, match=r"output of an nn\.Linear layer.*, but got logits from Flat ''\. Use DLGAttack"
    ):
        LabelReader().check(victim_of(Flat(12, 3), 1))


def frozen(name: str) -> nn.Module:
    model = network(0, classes=5)
    getattr(model[-1], name).requires_grad_(False)
    return model


def signed() -> nn.Module:
    return network(0, classes=5, activation=nn.Tanh())


def ordinary() -> nn.Module:
    return network(0, classes=5)


NO_WEIGHT = r"Expected the last layer's weights to share their gradient for rule='{}', but got frozen ones\. "
NO_BIAS = r"Expected the last layer's bias to share its gradient for rule='{}', but got none\. "
NEGATIVE = r"Expected inputs of the last layer that can't be negative, .* for rule='{}', but got negative ones\. "
NO_IMAGES = r"Expected `auxiliary` images for rule='{}', but got none\. "
OWN = r"Expected victims that share their weights for rule='{}', but got a network for each\. "
UNMET: list[Any] = [
    ("row_minimum", lambda: frozen("weight"), 3, NO_WEIGHT, {}),
    ("llg", lambda: frozen("weight"), 3, NO_WEIGHT, {}),
    ("mean_feature", lambda: frozen("weight"), 3, NO_WEIGHT, {}),
    ("posterior", lambda: frozen("weight"), 3, NO_WEIGHT, {"auxiliary": True}),
    ("ilrg", lambda: frozen("bias"), 3, NO_BIAS, {}),
    ("mean_feature", lambda: network(0, classes=5, bias=False), 3, NO_BIAS, {}),
    ("rlu", lambda: network(0, classes=5, bias=False), 3, NO_BIAS, {"auxiliary": True}),
    ("idlg", ordinary, 3, r"Expected one image per gradient for rule='{}', but got 3\. ", {}),
    ("idlg", ordinary, 3, r"Expected one image per gradient for rule='{}', but got 3\. ", {"auxiliary": True}),
    (
        "idlg",
        ordinary,
        3,
        r"Expected one image per gradient for rule='{}', but got 3\. ",
        {"auxiliary": True, "own": True},
    ),
    (
        "row_minimum",
        ordinary,
        6,
        r"Expected at most as many images as classes for rule='{}', but got 6 images and 5 classes\. ",
        {},
    ),
    (
        "rlg",
        ordinary,
        5,
        r"Expected at least two images fewer than .* for rule='{}', but got 5 images and 5 classes\. ",
        {},
    ),
    ("llg", signed, 3, NEGATIVE, {}),
    ("llg_star", signed, 3, NEGATIVE, {}),
    ("llg_plus", signed, 3, NEGATIVE, {"auxiliary": True}),
    ("llg_plus", ordinary, 3, NO_IMAGES, {}),
    ("rlu", ordinary, 3, NO_IMAGES, {}),
    ("rlu", ordinary, 3, OWN, {"auxiliary": True, "own": True}),
    ("posterior", ordinary, 3, OWN, {"auxiliary": True, "own": True}),
]


@pytest.mark.parametrize(("rule", "model", "count", "message", "options"), UNMET)
def test_what_a_rule_needs_and_which_would_work(
    rule: str, model: Any, count: int, message: str, options: dict[str, bool]
) -> None:
    victim = victim_of(model(), count)
    images, labels = images_and_labels(0, 2, count, 5)
    shared = victim.share(images, labels, states=victim.fresh_states([0, 1]) if options.get("own") else None)
    auxiliary = auxiliary_images(0, 5) if options.get("auxiliary") else None
    message = message.format(rule)
    if message != OWN.format(rule):
        with pytest.raises(ValueError, match=message):
            LabelReader(rule, auxiliary=auxiliary).check(victim)
    with pytest.raises(ValueError, match=message + "Rules that would work: ") as raised:
        infer_labels(shared, victim, rule=rule, auxiliary=auxiliary)
    named = re.findall(r"'(\w+)'", str(raised.value).partition("would work:")[2])
    assert "auto" in named
    assert rule not in named
    for name in named:
        inferred = infer_labels(shared, victim, rule=name, auxiliary=auxiliary)
        assert inferred.rule == name or name == "auto"
    for name in RULES.keys() - set(named):
        with pytest.raises(ValueError, match=f"for rule={name!r}"):
            infer_labels(shared, victim, rule=name, auxiliary=auxiliary)


def test_all_needs_have_been_missed() -> None:
    """But the learning rate, for which ``test_local_steps.py`` has a test."""
    assert {need for rule in RULES.values() for need in rule.needs} == NEEDS.keys() - {"learning rate"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "ilgr"}, r"Expected `rule` to be one of \['auto', 'geng'.*\], but got 'ilgr'\."),
        ({"seed": -1}, r"Expected `seed` to be a whole number of at least 0, but got -1\."),
        ({"seed": 0.5}, r"Expected `seed` to be a whole number of at least 0, but got 0\.5\."),
        ({"seed": 2**63}, r"Expected `seed` to be a whole number of at least 0 and below 2\*\*63"),
        ({"rule": "idlg", "count": 2}, r"Expected one image per gradient for rule='idlg', but got 2\."),
        (
            {"rule": "rlg", "count": 7},
            r"Expected at least two images fewer than .*, but got 7 images and 5 classes\.",
        ),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    options = dict(options)
    count = options.pop("count", 1)
    victim = victim_of(ordinary(), count)
    images, labels = images_and_labels(0, 2, count, 5)
    shared = victim.share(images, labels)
    with pytest.raises(ValueError, match=message):
        infer_labels(shared, victim, **options)
    if "seed" not in options:
        with pytest.raises(ValueError, match=message):
            LabelReader(options.get("rule", "auto")).check(victim)


IMAGES, LABELS = torch.full((10, 3, 2, 2), 0.5), torch.arange(10) % 5


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES[0], LABELS, r"Expected `auxiliary` images as floats \(M, C, H, W\), but got torch.float32 \(3, 2, 2\)"),
        (IMAGES[:0], LABELS[:0], r"Expected `auxiliary` images as floats .*, but got torch.float32 \(0, 3, 2, 2\)"),
        ((255 * IMAGES).byte(), LABELS, r"Expected `auxiliary` images as floats .*, but got torch.uint8"),
        (IMAGES - 1, LABELS, r"Expected `auxiliary` images in \[0, 1\], but got -0.5 to -0.5\."),
        (3 * IMAGES, LABELS, r"Expected `auxiliary` images in \[0, 1\], but got 1.5 to 1.5\."),
        (IMAGES * torch.nan, LABELS, r"Expected `auxiliary` images in \[0, 1\], but got nan to nan\."),
        (IMAGES, LABELS[:9], r"Expected `auxiliary` labels as whole numbers \(10,\), but got torch.int64 \(9,\)\."),
        (IMAGES, LABELS.float(), r"Expected `auxiliary` labels as whole numbers \(10,\), but got torch.float32"),
        (IMAGES, LABELS > 2, r"Expected `auxiliary` labels as whole numbers \(10,\), but got torch.bool \(10,\)\."),
    ],
)
def test_auxiliary_images(images: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Auxiliary(images, labels)


@pytest.mark.parametrize("rule", ["auto", "llg", "posterior"])
@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            IMAGES[:, :1],
            LABELS,
            r"Expected `auxiliary` images of shape \(3, 2, 2\), as the victims', but got \(1, 2, 2\)\.",
        ),
        (IMAGES, LABELS + 1, r"Expected `auxiliary` labels from 0 to 4, but got 5\."),
        (IMAGES, LABELS - 1, r"Expected `auxiliary` labels from 0 to 4, but got -1\."),
        (IMAGES, LABELS.clamp(max=3), r"Expected at least two `auxiliary` images of every class, but got .* of \[4\]"),
        (IMAGES[:9], LABELS[:9], r"Expected at least two `auxiliary` images of every class, but got .* of \[4\]"),
    ],
)
def test_auxiliary_images_that_do_not_fit(images: Tensor, labels: Tensor, message: str, rule: str) -> None:
    victim = victim_of(ordinary(), 3)
    auxiliary = Auxiliary(images, labels)
    with pytest.raises(ValueError, match=message):
        LabelReader(rule, auxiliary=auxiliary).check(victim)
    own, true = images_and_labels(0, 2, 3, 5)
    with pytest.raises(ValueError, match=message):
        infer_labels(victim.share(own, true), victim, rule=rule, auxiliary=auxiliary)


def test_one_image_without_a_label_can_not_be_split() -> None:
    with pytest.raises(ValueError, match=r"Expected at least two `auxiliary` images, but got one\."):
        LabelReader(auxiliary=Auxiliary(IMAGES[:1])).check(victim_of(ordinary(), 3))
    LabelReader(auxiliary=Auxiliary(IMAGES[:2])).check(victim_of(ordinary(), 3))


def test_many_rare_classes_are_not_all_listed() -> None:
    victim = Victim(nn.Sequential(nn.Flatten(), nn.Linear(12, 50)), image_shape=(3, 2, 2), num_images=2)
    with pytest.raises(ValueError, match=r"got fewer of \[0, 1, 2, 3, 4, 5, 6, 7, 8, 9\], \.\.\.\."):
        LabelReader(auxiliary=Auxiliary(torch.rand(50, 3, 2, 2), torch.arange(50))).check(victim)


def test_a_gradient_of_the_last_layer_is_missing() -> None:
    victim = victim_of(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), 2)
    shared = victim.share(*images_and_labels(0, 2, 2, 5))
    del shared.gradients[f"{victim.classifier}.bias"]
    with pytest.raises(ValueError, match=r"Expected a gradient for every tensor of the model, but got missing .*bias'"):
        infer_labels(shared, victim)


def test_gradients_of_another_victim() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    shared = victim_of(model, 4).share(*images_and_labels(0, 2, 4, 5))
    for other in (victim_of(model, 8), victim_of(model, 4, reduction="sum")):
        with pytest.raises(ValueError, match="Expected a shared gradient of the victim's protocol, with "):
            infer_labels(shared, other)
    shared.gradients["1.bias"][0] = torch.nan
    with pytest.raises(ValueError, match=r"Expected finite numbers in the gradient of '1\.bias'"):
        infer_labels(shared, victim_of(model, 4))


def test_auxiliary_images_of_another_kind() -> None:
    victim = victim_of(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), 4)
    shared = victim.share(*images_and_labels(0, 2, 4, 5))
    images: Any = torch.rand(3, 3, 2, 2)
    with pytest.raises(ValueError, match=r"Expected `auxiliary` to be a leakage\.labels\.Auxiliary .*, but got Tensor"):
        infer_labels(shared, victim, auxiliary=images)
    with pytest.raises(ValueError, match="Expected `auxiliary` labels as a tensor, but got list"):
        Auxiliary(images, [0, 1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected `auxiliary` images as a tensor, but got list"):
        Auxiliary([1.0])  # type: ignore[arg-type]


def test_a_rule_for_one_network_is_not_named_to_victims_with_their_own() -> None:
    victim = victim_of(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), 4)
    with pytest.raises(ValueError, match="for rule='posterior', but got a network for each") as raised:
        LabelReader("posterior").check(victim, own_weights=True)
    assert "'posterior'" not in str(raised.value).split("would work")[1]
