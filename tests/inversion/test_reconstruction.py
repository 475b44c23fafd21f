"""What an attack returns, and its file."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from leakage import LeNet, Victim
from leakage.files.tensors import write_safetensors
from leakage.inversion.reconstruction import Reconstruction


def make(victims: int, generator: torch.Generator) -> Reconstruction:
    return Reconstruction(
        ids=torch.randperm(50, generator=generator)[:victims],
        images=torch.randn(victims, 2, 1, 4, 5, generator=generator),
        labels=torch.randint(10, (victims, 2), generator=generator),
        loss=torch.rand(victims, generator=generator),
        iterations=torch.randint(100, (victims,), generator=generator),
        evaluations=torch.randint(100, (victims,), generator=generator),
        restarts=torch.randint(3, (victims,), generator=generator),
        status=torch.randint(5, (victims,), generator=generator),
    )


def assert_equal(one: Reconstruction, other: Reconstruction) -> None:
    for field in dataclasses.fields(Reconstruction):
        left, right = getattr(one, field.name), getattr(other, field.name)
        torch.testing.assert_close(left, right, rtol=0, atol=0, msg=field.name)


@pytest.mark.parametrize("told", [True, False])
def test_file_round_trip(tmp_path, generator, told):
    rate = None if told else torch.rand(5, generator=generator)
    whole = dataclasses.replace(make(5, generator), learning_rate=rate)
    whole.save(tmp_path / "folder" / "r.safetensors")
    assert_equal(Reconstruction.load(tmp_path / "folder" / "r.safetensors"), whole)


def test_select_and_cat(generator):
    whole = make(5, generator)
    assert len(whole) == 5
    assert_equal(Reconstruction.cat([whole.select(torch.tensor([0, 1])), whole.select(torch.arange(2, 5))]), whole)
    picked = whole.select(torch.tensor([3, 1]))
    assert picked.ids.tolist() == whole.ids[[3, 1]].tolist()
    assert torch.equal(picked.images, whole.images[[3, 1]])
    masked = whole.select(whole.loss > whole.loss.median())
    assert len(masked) == 2
    assert_equal(masked, whole.select((whole.loss > whole.loss.median()).nonzero()[:, 0]))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Expected a safetensors file at '.*none.safetensors'"):
        Reconstruction.load(tmp_path / "none.safetensors")


def test_truncated_file(tmp_path, generator):
    path = tmp_path / "r.safetensors"
    make(3, generator).save(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"Expected a whole safetensors file, but got '.*r.safetensors'"):
        Reconstruction.load(path)


def test_file_of_another_kind(tmp_path):
    path = tmp_path / "shared.safetensors"
    victim = Victim(LeNet(image_size=4), image_shape=(1, 4, 4))
    victim.share(torch.rand(2, 1, 1, 4, 4), torch.zeros(2, 1, dtype=torch.long)).save(path)
    with pytest.raises(
        ValueError, match=r"Expected format 'leakage\.Reconstruction' .*but got 'leakage\.SharedGradient'"
    ):
        Reconstruction.load(path)


def test_missing_tensor(tmp_path, generator):
    path = tmp_path / "r.safetensors"
    tensors = {name: tensor for name, tensor in vars(make(3, generator)).items() if tensor is not None}
    del tensors["status"]
    write_safetensors(path, "leakage.Reconstruction", tensors)
    with pytest.raises(
        ValueError, match=r"Expected tensors \[.*'status'\] in '.*', but got \['evaluations'.*'restarts'\]"
    ):
        Reconstruction.load(path)
