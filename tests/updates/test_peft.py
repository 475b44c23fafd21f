"""Against PEFT itself."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from leakage import Victim
from leakage.audit import check_update
from leakage.closed_form import separate_features
from leakage.labels import infer_labels
from leakage.updates import read_update
from tests.updates.clients import IMAGE_SHAPE, images, network

peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'leakage[peft]'")


def test_adapters_give_labels_and_features(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["6"], modules_to_save=["8"], r=4)
    model = peft.get_peft_model(network(), config)
    after = copy.deepcopy(model)
    inputs, labels = images(3)
    F.cross_entropy(after(inputs), labels).backward()
    torch.optim.SGD(after.parameters(), lr=0.1).step()
    files = []
    for name, one in (("before", model), ("after", after)):
        one.save_pretrained(tmp_path / name)
        files.append(tmp_path / name / "adapter_model.safetensors")
    victim = Victim(model.eval(), image_shape=IMAGE_SHAPE, num_images=3)
    shared = read_update(*files, victim, learning_rate=0.1)
    own = victim.share(inputs[None], labels[None])
    assert shared.gradients.keys() == own.gradients.keys()
    for name, gradient in own.gradients.items():
        assert torch.allclose(shared.gradients[name], gradient, atol=1e-6)
    # Half of a new adapter has no gradient, which is no fault.
    assert all(check.passed for check in check_update(*files, victim, learning_rate=0.1))
    found = infer_labels(shared, victim).labels
    assert found.tolist() == [labels.sort().values.tolist()]
    features = separate_features(shared, victim, found).features[0].float()
    truth = model.base_model.model[:8](inputs)
    assert torch.cdist(features, truth).amin(0).max() < 1e-2 * truth.norm(dim=1).min()
