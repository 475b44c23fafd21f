"""Against NVFlare itself."""

from __future__ import annotations

from typing import Any

import pytest

from leakage import Victim
from leakage.updates import read_update
from tests.updates.clients import IMAGE_SHAPE, network, trained
from tests.updates.test_reading import own, same

pytest.importorskip("nvflare", reason="needs NVFlare: pip install 'leakage[nvflare]'")
from nvflare.apis.dxo import DXO, DataKind, MetaKey
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType

RATE = 0.1


def test_what_clients_send_is_read() -> None:
    model = network(norm=True)
    after = trained(model, 3, lr=RATE)
    victim = Victim(model, image_shape=IMAGE_SHAPE, num_images=3)
    old = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    new = {name: tensor.numpy() for name, tensor in after.state_dict().items()}
    difference = {name: new[name] - old[name] for name in old}
    forms: list[tuple[Any, Any]] = [
        (FLModel(params=old), FLModel(params_type=ParamsType.FULL, params=new)),
        (FLModel(params=model.state_dict()), FLModel(params_type="DIFF", params=difference)),
        (DXO(DataKind.WEIGHTS, data=old), DXO(DataKind.WEIGHTS, data=new)),
        (DXO(DataKind.WEIGHTS, data=old).to_shareable(), DXO(DataKind.WEIGHT_DIFF, data=difference).to_shareable()),
        (model, DXO(DataKind.WEIGHT_DIFF, data=difference)),
    ]
    for before, update in forms:
        assert same(read_update(before, update, victim, learning_rate=RATE), own(victim, 3), 1e-4)


def test_what_holds_no_weights_is_refused() -> None:
    model = network()
    victim = Victim(model, image_shape=IMAGE_SHAPE)
    encrypted = DXO(DataKind.WEIGHTS, data={"0.weight": b"1"}, meta={MetaKey.PROCESSED_ALGORITHM: "HE"})
    for update, match in (
        (DXO(DataKind.METRICS, data={"loss": 1.0}), "Expected `update` of a kind among .*, but got 'METRICS'"),
        (encrypted, "Expected `update` as plain arrays, but got arrays processed by 'HE'"),
        (FLModel(metrics={"loss": 1.0}), "Expected `update`"),
    ):
        with pytest.raises(ValueError, match=match):
            read_update(model, update, victim, learning_rate=RATE)
