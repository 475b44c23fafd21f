from __future__ import annotations

import pytest

from leakage.audit import Client
from leakage.audit.client import check_clients
from leakage.defenses import Clip


def test_is_named_by_its_options() -> None:
    assert Client().name == "1 image"
    client = Client(images=8, local_steps=4, learning_rate=0.1, local_batch_size=4, defenses=[Clip(1.0)], epochs=2)
    assert client.name == "8 images, 4 local steps, batches of 4, Clip, after 2 epochs"
    assert client.describe()["defenses"] == [{"name": "Clip", "norm": 1.0}]
    assert Client(name="hospital").name == "hospital"


def test_a_single_step_has_no_rate_but_for_what_was_captured() -> None:
    client = Client(learning_rate=0.5)
    assert client.training["learning_rate"] is None
    assert client.describe()["learning_rate"] == 0.5
    assert Client(local_steps=2, learning_rate=0.5).training["learning_rate"] == 0.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"images": 0}, "Expected `images` to be a whole number of at least 1, but got 0"),
        ({"epochs": -1}, "Expected `epochs` to be a whole number of at least 0"),
        ({"learning_rate": 0.0}, "Expected `learning_rate` to be positive"),
        ({"reveal_labels": 1}, "Expected `reveal_labels` to be True or False"),
        ({"name": 3}, "Expected `name` as text, but got 3"),
        ({"defenses": [Clip]}, "Expected `defenses` as a list of Defense objects"),
        ({"images": 4, "local_batch_size": 3}, "Expected `local_batch_size` to divide"),
    ],
)
def test_refuses(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Client(**options)  # type: ignore[arg-type]


def test_refuses_clients_of_one_name() -> None:
    assert check_clients([Client(), Client(images=2)])[1].images == 2
    with pytest.raises(ValueError, match=r"Expected clients with different names, but got \['1 image', '1, image'\]"):
        check_clients([Client(), Client(images=2, name="1, image")])
    with pytest.raises(ValueError, match="Expected `client` as a Client or a list of them, but got 3"):
        check_clients(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected `client` as a Client or a list of them"):
        check_clients([])
