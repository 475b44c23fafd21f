"""Against Flower itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from leakage import Victim
from leakage.audit import check_update
from leakage.labels import infer_labels
from leakage.updates import CaptureUpdates, read_update
from tests.updates.clients import IMAGE_SHAPE, flower_list, images, network, trained
from tests.updates.test_reading import own, same

pytest.importorskip("flwr", reason="needs Flower: pip install 'leakage[flower]'")
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters

RATE = 0.1


@pytest.fixture(autouse=True)
def _running(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages are made within a run, of whose number newer versions of Flower ask."""
    identity = pytest.importorskip("flwr.supercore.task_identity").TaskIdentity
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(identity, name, 1)


@pytest.mark.parametrize("norm", [False, True])
def test_what_clients_send_is_read(norm: bool) -> None:
    model = network(norm=norm)
    after = trained(model, 3, lr=RATE)
    victim = Victim(model, image_shape=IMAGE_SHAPE, num_images=3)
    old, new = flower_list(model), flower_list(after)
    forms: list[tuple[Any, Any]] = [
        (ndarrays_to_parameters(old), ndarrays_to_parameters(new)),
        (
            ndarrays_to_parameters(old),
            FitRes(Status(Code.OK, ""), ndarrays_to_parameters(new), num_examples=3, metrics={}),
        ),
        (ArrayRecord(model.state_dict()), ArrayRecord(after.state_dict())),
        (ArrayRecord(old), ArrayRecord(new)),
        (RecordDict({"arrays": ArrayRecord(model.state_dict())}), RecordDict({"a": ArrayRecord(after.state_dict())})),
    ]
    for before, update in forms:
        assert same(read_update(before, update, victim, learning_rate=RATE), own(victim, 3), 1e-4)
        assert all(check.passed for check in check_update(before, update, victim, learning_rate=RATE))


def client(model: nn.Module, *mods: Any, named: bool) -> ClientApp:
    """One that trains on the arrays that it is given, and takes them out of the message."""
    app = ClientApp(mods=list(mods))

    @app.train()  # type: ignore[misc]
    def train(message: Message, context: Context) -> Message:
        received = message.content.array_records.pop("arrays")
        names = [*model.state_dict()]
        state = {name: torch.tensor(array.numpy()) for name, array in zip(names, received.values(), strict=True)}
        model.load_state_dict(state)
        after = trained(model, lr=RATE)
        arrays = ArrayRecord(after.state_dict() if named else flower_list(after))
        content = {"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()  # type: ignore[misc]
    def evaluate(message: Message, context: Context) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    return app


def message(model: nn.Module, kind: str = "train", *, named: bool = True) -> Message:
    arrays = ArrayRecord(model.state_dict() if named else flower_list(model))
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1})})
    return Message(content, 7, kind)


CONTEXT = Context(run_id=1, node_id=7, node_config={}, state=RecordDict(), run_config={})


@pytest.mark.parametrize("named", [True, False])
def test_mod_keeps_what_leaves_the_client(named: bool, tmp_path: Path) -> None:
    model = network()
    victim = Victim(model, image_shape=IMAGE_SHAPE)
    app = client(network(seed=1), CaptureUpdates(tmp_path), named=named)
    plain = client(network(seed=1), named=named)
    replies = [one(message(model, named=named), CONTEXT) for one in (app, plain)]
    arrays = [[array.numpy() for array in reply.content["arrays"].values()] for reply in replies]
    assert all((one == other).all() for one, other in zip(*arrays, strict=True))
    app(message(model, "evaluate"), CONTEXT)
    app(message(model, named=named), CONTEXT)  # the same round again
    stems = ["round-1-node-7", "round-1-node-7-2"]
    ends = ("before", "after")
    assert {file.name for file in tmp_path.iterdir()} == {f"{s}.{e}.safetensors" for s in stems for e in ends}
    before, after = (tmp_path / f"round-1-node-7.{end}.safetensors" for end in ends)
    shared = read_update(before, after, victim, learning_rate=RATE)
    assert same(shared, own(victim))
    assert infer_labels(shared, victim).labels.item() == images(1)[1]
    assert all(check.passed for check in check_update(before, after, victim, learning_rate=RATE))
    from safetensors import safe_open

    with safe_open(after, framework="pt") as file:
        assert file.metadata()["metrics"] == '{"metrics": {"num-examples": 1}}'


def test_mod_sees_what_other_mods_make_of_the_update(tmp_path: Path) -> None:
    def hide(message: Message, context: Context, call_next: Any) -> Message:
        reply = call_next(message, context)
        zeros = {name: torch.zeros(array.shape) for name, array in reply.content["arrays"].items()}
        reply.content["arrays"] = ArrayRecord(zeros)
        return reply

    model = network()
    client(network(), CaptureUpdates(tmp_path), hide, named=True)(message(model), CONTEXT)
    victim = Victim(model, image_shape=IMAGE_SHAPE)
    before, after = (tmp_path / f"round-1-node-7.{end}.safetensors" for end in ("before", "after"))
    shared = read_update(before, after, victim, learning_rate=1.0)
    assert all(torch.equal(shared.gradients[name][0], tensor) for name, tensor in model.named_parameters())


def test_mod_that_can_not_write_warns_and_the_client_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    model = network()
    app = client(network(), CaptureUpdates(tmp_path / "file"), named=True)
    with pytest.warns(UserWarning, match="An update was not captured: Expected to write"):
        assert "arrays" in app(message(model), CONTEXT).content
    empty = message(model)
    app = ClientApp(mods=[CaptureUpdates(tmp_path)])
    app.train()(lambda message, context: Message(RecordDict({}), reply_to=message))
    empty.content.array_records.clear()
    with pytest.warns(UserWarning, match="An update was not captured: Expected `message` with one record of arrays"):
        app(empty, CONTEXT)
