"""Full precision inside, the user's settings after."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from leakage import Victim
from leakage.clients import full_precision

BY_OPERATION = hasattr(torch.backends, "fp32_precision")
needs_settings = pytest.mark.skipif(not BY_OPERATION, reason="torch has no settings by operation")
ALL = [(backend, operation) for backend in ("cuda", "mkldnn") for operation in ("conv", "rnn", "matmul")]


def read(ask: Callable[[], object]) -> object:
    try:
        return ask()
    except RuntimeError:
        return "contradicts"


def settings() -> dict[str, object]:
    """All that can be read; torch refuses to read a flag that contradicts a newer setting."""
    found = {
        "cudnn": read(lambda: torch.backends.cudnn.allow_tf32),
        "matmul": read(lambda: torch.backends.cuda.matmul.allow_tf32),
        "precision": read(torch.get_float32_matmul_precision),
    }
    if BY_OPERATION:
        for backend, operation in [*ALL, ("cuda", "all"), ("mkldnn", "all"), ("generic", "all")]:
            found[f"{backend} {operation}"] = torch._C._get_fp32_precision_getter(backend, operation)
    return found


def assert_full() -> None:
    now = settings()
    assert now["cudnn"] is False or now["cudnn"] == "contradicts"
    assert now["precision"] in ("highest", "contradicts")
    if BY_OPERATION:
        assert {now[f"{backend} {operation}"] for backend, operation in ALL} <= {"ieee", "none"}


def set_operation(backend: str, operation: str, value: str) -> None:
    torch._C._set_fp32_precision_setter(backend, operation, value)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    if BY_OPERATION:
        for backend, operation in [*ALL, ("cuda", "all"), ("mkldnn", "all"), ("generic", "all")]:
            set_operation(backend, operation, "none")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


FLAGS = {
    "as torch has it": lambda: None,
    "without TF32": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "matmul": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
}
SETTINGS = {
    "convolutions alone": lambda: set_operation("cuda", "conv", "ieee"),
    "matrix products": lambda: set_operation("cuda", "matmul", "tf32"),
    "all of CUDA": lambda: set_operation("cuda", "all", "tf32"),
    "all": lambda: set_operation("generic", "all", "tf32"),
    "all but CUDA": lambda: [set_operation("generic", "all", "tf32"), set_operation("cuda", "all", "ieee")],
    "oneDNN": lambda: set_operation("mkldnn", "matmul", "bf16"),
    "both ways": lambda: [torch.set_float32_matmul_precision("high"), set_operation("generic", "all", "tf32")],
}
MODES = [pytest.param(change, id=name) for name, change in FLAGS.items()]
MODES += [pytest.param(change, id=name, marks=needs_settings) for name, change in SETTINGS.items()]


@pytest.mark.parametrize("change", MODES)
def test_inside_and_after(change):
    change()
    before = settings()
    with full_precision():
        assert_full()
        with full_precision():
            assert_full()
        assert_full()
    assert settings() == before


@pytest.mark.parametrize("change", MODES)
def test_after_an_exception(change):
    change()
    before = settings()
    with pytest.raises(ZeroDivisionError), full_precision():
        raise ZeroDivisionError
    assert settings() == before


@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in FLAGS.items()])
def test_flags_can_be_read_inside(change):
    change()
    with full_precision():
        assert torch.backends.cuda.matmul.allow_tf32 is False
        with torch.backends.cudnn.flags(enabled=False):  # reads them all
            pass
        assert_full()


@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in FLAGS.items()])
def test_by_flags_alone_as_before_torch_2_9(change, monkeypatch):
    monkeypatch.setattr("leakage.precision._BY_OPERATION", False)
    change()
    before = [torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()]
    with full_precision():
        assert_full()
    assert [torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()] == before


@needs_settings
@pytest.mark.parametrize("above", [("generic", "all"), ("cuda", "all")], ids="-".join)
def test_what_follows_another_setting_goes_on_following_it(above):
    set_operation("cuda", "conv", "none")
    set_operation(*above, "tf32")
    with full_precision():
        pass
    set_operation(*above, "ieee")
    now = settings()
    assert now["cuda conv"] == now["cuda matmul"] == "ieee"
    assert now["cuda rnn"] == "tf32"  # it has a setting of its own from the start


def test_a_capture_is_in_full_precision():
    seen: list[dict[str, object]] = []

    class Looks(nn.Linear):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(settings())
            return super().forward(images)

    victim = Victim(nn.Sequential(nn.Flatten(), Looks(4, 3)), image_shape=(1, 2, 2))
    seen.clear()
    victim.share(torch.rand(2, 1, 1, 2, 2), torch.zeros(2, 1, dtype=torch.long))
    assert seen
    assert {now["cudnn"] for now in seen} == {False}
    assert torch.backends.cudnn.allow_tf32 is True
