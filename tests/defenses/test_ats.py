"""ATS: what clients compute with, and attackers who find the changed images."""

from __future__ import annotations

import pytest
import torch

from leakage import LeNet, Victim
from leakage.attacks import GaussNewtonAttack
from leakage.defenses import ATS, MixUp, encoded, known_defenses
from leakage.metrics import score
from tests.kit import SmallVictims, fit

SHAPE = (1, 12, 12)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def changed(policy: str, image: torch.Tensor, seed: int = 0) -> torch.Tensor:
    images, targets = ATS(policy).encode(image[None], torch.eye(1), seeded(seed))
    assert torch.equal(targets, torch.eye(1))
    return images[0]


def test_each_transformation_is_what_its_name_says():
    image = 0.25 + 0.5 * torch.rand(1, 10, 10, generator=seeded())
    assert torch.equal(changed("invert", image), 1 - image)
    stretched = changed("autocontrast", image)
    assert (float(stretched.min()), float(stretched.max())) == (0, 1)
    for seed, shift in ((0, 3), (3, -3)):  # two seeds that draw different signs
        for name, axis in (("translate_x", 2), ("translate_y", 1)):
            kept = image.roll(shift, axis)
            gap = range(shift) if shift > 0 else range(10 + shift, 10)
            kept.index_fill_(axis, torch.tensor([*gap]), 0)
            assert torch.equal(changed(f"{name} 0.3", image, seed), kept), (name, shift)
        torch.testing.assert_close(changed("rotate 90", image, seed), image.rot90(shift // 3, (1, 2)))
        torch.testing.assert_close(changed("brightness 0.2", image, seed), image * (1 + 0.2 * shift / 3))
        spread = [float(one.std()) for one in (changed("contrast 0.2", image, seed), image)]
        assert spread[0] == pytest.approx(spread[1] * (1 + 0.2 * shift / 3), rel=1e-4)
    tall = torch.zeros(3, 10, 10)
    tall[:, :, 5] = 1
    assert changed("shear_x 0.5", tall)[0].argmax(1).unique().numel() > 3
    assert torch.equal(changed("shear_y 0.5", tall)[0].argmax(1)[3:7], torch.full((4,), 5))
    assert changed("color 0.5, sharpness 0.5, equalize", torch.rand(3, 10, 10)).shape == (3, 10, 10)


def test_one_policy_is_drawn_for_each_image_and_its_steps_follow_one_another():
    images = torch.full((40, 1, 4, 4), 0.25)
    found, _ = ATS(["invert", "invert, invert"]).encode(images, torch.ones(40, 1), seeded())
    values = found.flatten(1)[:, 0]
    assert values.unique().tolist() == [0.25, 0.75]
    assert 8 < int((values == 0.25).sum()) < 32


def test_an_attacker_finds_the_changed_images():
    clients = {"victims": 2, "reveal_labels": True, "defenses": [ATS("translate_x 0.25, contrast 0.3")]}
    victims = SmallVictims(**clients)
    attack = fit(GaussNewtonAttack(restarts=0), victims)
    assert victims.victim.protocol.defenses == ({"name": "ATS", "policies": ["translate_x 0.25, contrast 0.3"]},)
    assert repr(known_defenses(victims.victim.protocol.defenses)[0]) == repr(victims.defenses[0])
    truth = next(iter(victims.val_dataloader()))
    used, _ = encoded(victims.defenses, truth.images, torch.zeros(2, 1, 10), truth.ids.tolist(), victims.seed)
    found = attack.finished
    order = found.ids.argsort()
    psnr = score(found.images[order], found.labels[order], used, truth.labels).psnr
    assert float(psnr.min()) > 60
    assert max(attack.scores[victim].psnr for victim in (0, 1)) < 25


@pytest.mark.parametrize("policies", ["blur 0.1", "invert 0.5", "contrast", "contrast 2", "rotate 270", "", 3, [None]])
def test_bad_policies(policies):
    with pytest.raises(ValueError, match=r"^Expected `policies` such as '.*', made of .*, but got"):
        ATS([policies] if isinstance(policies, int) else policies)


def test_bad_input():
    with pytest.raises(ValueError, match=r"^Expected `policies` such as '.*', but got none"):
        ATS([])
    with pytest.raises(ValueError, match=r"Expected images with 1 or 3 channels for ATS, but got 2"):
        Victim(LeNet(channels=2, image_size=12), image_shape=(2, 12, 12), defenses=[ATS()])
    assert encoded([MixUp()], *(torch.ones(0, 2, 1),) * 2, [], 0)[0].shape == (0, 2, 1)
