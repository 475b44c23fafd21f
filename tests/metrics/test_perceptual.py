"""LPIPS against the formula by hand, without a download."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
import torchvision
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image.lpips import _LPIPS

from leakage.metrics import perceptual, perceptual_distance

# Where SqueezeNet's features are taken, by the paper's own code.
LAYERS = (1, 4, 7, 9, 10, 11, 12)
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where torchvision looks for weights; there is no network."""

    def refuse(url: str, *args: Any, **options: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.fixture
def squeeze(hub: Path) -> torch.nn.Module:
    """A SqueezeNet of random weights in the place of the trained one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torchvision.models.squeezenet1_1().eval()
    url = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url
    torch.save(model.state_dict(), hub / Path(url).name)
    return model.features


def by_hand(features: torch.nn.Module, found: Tensor, truth: Tensor) -> Tensor:
    """Of one pair of images ``(3, H, W)`` in [0, 1]."""
    folder = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models"
    fitted = torch.load(folder / "squeeze.pth", map_location="cpu")
    values = [((image - MEAN[:, None, None]) / STD[:, None, None])[None] for image in (found, truth)]
    total = torch.zeros(())
    for place, layer in enumerate(features):
        values = [layer(value) for value in values]
        if place in LAYERS:
            one, other = (value[0] / value[0].norm(dim=0) for value in values)
            weights = fitted[f"lin{LAYERS.index(place)}.model.1.weight"][0]
            total = total + (weights * (one.nan_to_num() - other.nan_to_num()).square()).sum(0).mean()
    return total


@torch.no_grad()
def test_each_image_by_hand(squeeze: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    images, found = torch.rand(2, 2, 2, 3, 40, 36, generator=generator, dtype=torch.float64)
    found = 1.5 * found - 0.2
    before = torch.get_rng_state()
    distances = perceptual_distance(found, images, network="squeeze")
    assert torch.equal(torch.get_rng_state(), before)
    assert (distances.shape, distances.dtype) == ((2, 2), torch.float32)
    for victim in range(2):
        for image in range(2):
            pair = found[victim, image].float().clamp(0, 1), images[victim, image].float()
            torch.testing.assert_close(distances[victim, image], by_hand(squeeze, *pair), rtol=1e-3, atol=1e-5)
    assert distances.min() > 1e-3
    assert torch.equal(perceptual_distance(images, images, network="squeeze"), torch.zeros(2, 2))


@torch.no_grad()
def test_small_grey_images_are_enlarged(squeeze: torch.nn.Module) -> None:
    images, found = torch.rand(2, 1, 1, 1, 16, 24, generator=torch.Generator().manual_seed(0))
    large = [F.interpolate(tensor[0], (32, 48), mode="bilinear")[0].repeat(3, 1, 1) for tensor in (found, images)]
    distance = perceptual_distance(found, images, network="squeeze")
    torch.testing.assert_close(distance[0, 0], by_hand(squeeze, *large), rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("squeeze")
def test_reconstructions_that_are_no_numbers() -> None:
    images = torch.rand(1, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = images.clone()
    found[0, 0, 0, 0, 0], found[0, 1] = torch.nan, torch.inf
    assert perceptual_distance(found, images, network="squeeze").tolist() == [[torch.inf, torch.inf, 0.0]]
    assert perceptual_distance(found[:0], images[:0], network="squeeze").shape == (0, 3)


@pytest.mark.parametrize(
    ("network", "file"),
    [("alex", "alexnet-owt-7be5be79.pth"), ("vgg", "vgg16-397923af.pth"), ("squeeze", "squeezenet1_1-b8a52dc0.pth")],
)
def test_no_network_to_download_by(hub: Path, network: str, file: str) -> None:
    images = torch.rand(1, 1, 3, 32, 32)
    with pytest.raises(FileNotFoundError) as caught:
        perceptual_distance(images, images, network=network)
    message = str(caught.value)
    assert message.startswith(f"Expected the weights of network='{network}' in '{hub / file}', or internet access")
    assert "no route to host" in message
    assert f"Copy the file https://download.pytorch.org/models/{file} there" in message
    assert "TORCH_HOME" in message


@pytest.mark.parametrize("content", [b"", b"not weights"])
def test_weights_that_can_not_be_read(hub: Path, content: bytes) -> None:
    (hub / "squeezenet1_1-b8a52dc0.pth").write_bytes(content)
    images = torch.rand(1, 1, 3, 32, 32)
    with pytest.raises(FileNotFoundError, match=r"Expected the weights of network='squeeze' in '.*', .* but got: "):
        perceptual_distance(images, images, network="squeeze")


@pytest.mark.parametrize("network", sorted(perceptual._NETWORKS))
def test_every_network_takes_the_smallest_images(network: str) -> None:
    """As torchmetrics calls them, without weights."""
    with torch.random.fork_rng():
        model = _LPIPS(pretrained=True, net=network, pnet_rand=True).eval()
    images = torch.rand(1, 3, perceptual._SMALLEST, perceptual._SMALLEST)
    assert model(images, images).abs().item() == 0


@pytest.mark.parametrize(
    ("shapes", "network", "message"),
    [
        (((1, 1, 3, 32, 32), (1, 1, 3, 32, 32)), "resnet", r"`network` to be one of \['alex', 'squeeze', 'vgg'\], but"),
        (((1, 1, 3, 32, 32), (1, 2, 3, 32, 32)), "alex", "`reconstructed` of the same shape as `images`"),
        (((1, 2, 32, 32), (1, 2, 32, 32)), "alex", r"`images` of shape \(V, N, C, H, W\)"),
        (((1, 1, 2, 32, 32), (1, 1, 2, 32, 32)), "alex", "`images` of 1 or 3 channels, but got 2"),
    ],
)
def test_what_it_does_not_take(shapes: tuple[tuple[int, ...], ...], network: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"Expected {message}"):
        perceptual_distance(*map(torch.rand, shapes), network=network)
