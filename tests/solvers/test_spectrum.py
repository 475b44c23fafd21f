from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leakage.datamodules import GroundTruth, Victims
from leakage.solvers import ImageSpectrum


def matrix(spectrum: ImageSpectrum, unknowns: int) -> Tensor:
    return spectrum(torch.eye(unknowns, dtype=torch.float64))


@given(
    images=st.integers(1, 2),
    channels=st.sampled_from([1, 2, 3]),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    others=st.integers(0, 4),
)
def test_is_symmetric_positive_definite_and_widens_the_other_unknowns(
    images: int, channels: int, height: int, width: int, others: int
) -> None:
    size = images * channels * height * width
    product = matrix(ImageSpectrum(images, (channels, height, width)), size + others)
    torch.testing.assert_close(product, product.mT)
    assert float(torch.linalg.eigvalsh(product).min()) > 0
    identity = torch.eye(others, dtype=torch.float64)
    assert torch.equal(product[size:, size:], 100 * identity)
    assert not product[:size, size:].any()


def test_waves_are_its_eigenvectors_and_fine_ones_vary_less() -> None:
    spectrum = ImageSpectrum(1, (1, 8, 8))
    places = torch.arange(8, dtype=torch.float64) + 0.5
    last = torch.inf
    for frequency in range(8):
        wave = torch.cos(torch.pi * frequency * places / 8).repeat(8, 1)
        product = spectrum(wave.reshape(1, -1)).view(8, 8)
        value = float((product * wave).sum() / wave.square().sum())
        torch.testing.assert_close(product, value * wave)
        assert 0 < value < last
        # The amplitude is (f + 0.05)^-0.7, the eigenvalue its square.
        if frequency == 0:
            constant = value
        assert value == pytest.approx(constant * ((frequency / 8 + 0.05) / 0.05) ** -1.4)
        last = value


def test_colours_vary_less_than_brightness() -> None:
    spectrum = ImageSpectrum(1, (3, 4, 4))

    def variance(red: float, green: float, blue: float) -> float:
        image = torch.tensor([red, green, blue], dtype=torch.float64)[:, None, None].expand(3, 4, 4).reshape(1, -1)
        product = spectrum(image)
        value = float((product * image).sum() / image.square().sum())
        torch.testing.assert_close(product, value * image)
        return value

    brightness = variance(1, 1, 1)
    assert variance(1, -1, 0) == pytest.approx(0.16 * brightness)
    assert variance(1, 1, -2) == pytest.approx(0.16 * brightness)


def test_is_near_the_spectrum_of_the_sample() -> None:
    """Of real images it leaves coefficients of more nearly equal size than the images' own."""
    data = Victims("sample", victims=200)
    data.setup("fit")
    images = GroundTruth.cat(list(data.val_dataloader())).images[:, 0, 0].double()
    spectrum = ImageSpectrum(1, (1, 28, 28))
    rows, columns, power, _ = spectrum._exact
    coefficients = rows @ (images - images.mean(0)) @ columns.mT
    own = coefficients.var(0).log()
    whitened = (coefficients / power[0].sqrt()).var(0).log()
    assert float(whitened.std()) < 0.7 * float(own.std())


def test_takes_the_precision_of_the_vectors_back_and_forth() -> None:
    spectrum = ImageSpectrum(1, (3, 4, 4))
    vectors = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before, single, double = spectrum(vectors), spectrum(vectors.float()), spectrum(vectors)
    assert torch.equal(before, double), "nothing was lost on the way through single precision"
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("num_images", "shape", "name"), [(0, (1, 2, 2), "num_images"), (1, (1, 0, 2), "image_height")]
)
def test_refuses(num_images: int, shape: tuple[int, int, int], name: str) -> None:
    with pytest.raises(ValueError, match=f"Expected `{name}` to be a whole number of at least 1, but got 0"):
        ImageSpectrum(num_images, shape)


@given(
    images=st.integers(1, 2),
    channels=st.sampled_from([1, 2, 3]),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    others=st.integers(0, 4),
)
def test_its_root_times_the_roots_transpose_is_the_matrix(
    images: int, channels: int, height: int, width: int, others: int
) -> None:
    spectrum = ImageSpectrum(images, (channels, height, width))
    unknowns = images * channels * height * width + others
    transposed = spectrum.root(torch.eye(unknowns, dtype=torch.float64))  # row i is T times the i-th unit vector
    torch.testing.assert_close(transposed.mT @ transposed, matrix(spectrum, unknowns))
    size = unknowns - others
    assert torch.equal(transposed[size:, size:], 10 * torch.eye(others, dtype=torch.float64))
    assert not transposed[:size, size:].any()
    assert not transposed[size:, :size].any()


def test_its_root_leads_from_frequencies_to_pixels() -> None:
    spectrum = ImageSpectrum(1, (3, 4, 5))
    values = []
    for colour in range(2):
        frequencies = torch.zeros(3, 4, 5, dtype=torch.float64)
        frequencies[colour, 2, 0] = 1
        image = spectrum.root(frequencies.reshape(1, -1)).view(3, 4, 5)
        wave = torch.cos(torch.pi * 2 * (torch.arange(4, dtype=torch.float64) + 0.5) / 4)
        colours = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0]], dtype=torch.float64)[colour]
        expected = colours[:, None, None] * wave[:, None].expand(4, 5)
        torch.testing.assert_close(image / image.norm(), expected / expected.norm())
        values.append(float(image.norm()))
    # Lengths are the amplitudes: a colour's is 0.4 times that of brightness.
    assert values[1] == pytest.approx(0.4 * values[0])


def test_its_root_takes_the_precision_of_the_vectors() -> None:
    spectrum = ImageSpectrum(2, (1, 4, 4))
    vectors = torch.randn(3, 35, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    double, single = spectrum.root(vectors), spectrum.root(vectors.float())
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)
    assert torch.equal(spectrum.root(vectors), double)
