import lightning
import pytest
import torch
from torch import nn

from leakage.clients.shared_gradient import SharedGradient
from leakage.datamodules import GroundTruth, SharedGradients, Victims
from leakage.defenses import Clip
from leakage.models import LeNet


class Recorder(lightning.LightningModule):
    """Asks for two victims every third step, as an attack does when it has room, and records what comes by."""

    def __init__(self, first=0, steps=12):
        super().__init__()
        self.next, self.steps = first, steps
        self.automatic_optimization = False
        self.dummy = nn.Parameter(torch.zeros(1))
        self.seen = []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def on_fit_start(self):
        self.ask()

    def ask(self):
        data = self.trainer.datamodule
        data.wanted = range(self.next, min(self.next + 2, data.victims))
        self.next += 2

    def training_step(self, batch, batch_idx):
        self.seen.append(batch if batch == () else batch.ids.tolist())
        done = len(self.seen)
        if done % 3 == 0 and self.next < self.trainer.datamodule.victims:
            self.ask()
        self.trainer.should_stop = done == self.steps

    def validation_step(self, batch, batch_idx):
        assert isinstance(batch, GroundTruth)
        self.seen.append(("val", batch.ids.tolist()))


def trainer(tmp_path, **kwargs):
    return lightning.Trainer(
        logger=False,
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **kwargs,
    )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_victims_come_when_they_are_wanted_and_validation_gives_all_victims(tmp_path, num_workers):
    module = Recorder()
    data = Victims("sample", victims=5, num_workers=num_workers)
    trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(module, data)
    cohorts = [batch for batch in module.seen[:12] if batch != ()]
    assert cohorts == [[0, 1], [2, 3], [4]]
    assert module.seen[0] == [0, 1]
    assert module.seen[12:] == [("val", [0, 1, 2, 3, 4])]


def test_without_ground_truth_there_is_no_validation(tmp_path):
    data = Victims("sample", victims=3)
    data.setup("fit")
    data.share(range(3)).save(tmp_path / "clients.safetensors")
    module = Recorder()
    files = SharedGradients(tmp_path / "clients.safetensors", LeNet())
    assert files.val_dataloader() == []
    trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(module, files)
    assert [batch for batch in module.seen if batch != ()] == [[0, 1], [2]]


def test_train_loader_gives_what_is_wanted_once():
    data = Victims("sample", victims=5)
    data.setup("fit")
    batches = iter(data.train_dataloader())
    assert next(batches) == ()
    data.wanted = [3, 0]
    first = next(batches)
    assert isinstance(first, SharedGradient)
    assert first.ids.tolist() == [3, 0]
    assert [next(batches) for _ in range(3)] == [(), (), ()]


def test_validation_shows_the_audited_victims_to_several_processes_too():
    data = Victims("sample", victims=5)
    data.setup("fit")
    data.audited = [4, 1]
    loader = data.val_dataloader()
    assert [batch.ids.tolist() for batch in loader] == [[4, 1]]
    # What Lightning would deal out to the processes once more.
    assert isinstance(loader.sampler, torch.utils.data.DistributedSampler)


@pytest.mark.parametrize("lanes", [0, -1, 2.0, True, "8", "Auto"])
def test_lanes_are_a_count_or_auto(lanes):
    with pytest.raises(ValueError, match=r"Expected `lanes` to be a whole number of at least 1.*, but got"):
        Victims("sample", lanes=lanes)
    assert Victims("sample").lanes == "auto"


def test_checkpoint_of_another_configuration_is_refused(tmp_path):
    path = tmp_path / "last.ckpt"
    first = trainer(tmp_path, max_epochs=1)
    first.fit(Recorder(), Victims("sample", victims=4))
    first.save_checkpoint(path)

    resumed = Recorder(first=2)
    trainer(tmp_path, max_epochs=2).fit(resumed, Victims("sample", victims=4), ckpt_path=path)
    assert resumed.seen[0] == [2, 3]

    with pytest.raises(
        ValueError,
        match="Expected a checkpoint of the same victims, but got seed 0 in the checkpoint and 7 here; content",
    ):
        trainer(tmp_path, max_epochs=2).fit(Recorder(), Victims("sample", victims=4, seed=7), ckpt_path=path)


def change_bias(model):
    model = type(model)()
    with torch.no_grad():
        model.classifier.bias += 1
    return model


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"victims": 5}, "victims 4 in the checkpoint and 5 here"),
        ({"images": 2}, "num_images 1 in the checkpoint and 2 here"),
        (
            {"loss": "mean_squared_error"},
            "loss 'cross_entropy' in the checkpoint and 'mean_squared_error' here",
        ),
        ({"images": 2, "labels": "uniform"}, "labels None in the checkpoint and 'uniform' here"),
        ({"defenses": [Clip(1.0)]}, r"defenses \[\] in the checkpoint and \['Clip\(.*\)'\] here"),
        ({"reduction": "sum"}, "reduction 'mean' in the checkpoint and 'sum' here"),
        ({"reveal_labels": True}, "reveal_labels False in the checkpoint and True here"),
        ({"weights": "shared"}, "weights 'own' in the checkpoint and '[0-9a-f]+' here"),
        (
            {"model": LeNet(width=3), "weights": "own"},
            "network '[0-9a-f]+' in the checkpoint and '[0-9a-f]+' here",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_the_refusal_names_what_differs(change, named):
    state = Victims("sample", victims=4).state_dict()
    Victims("sample", victims=4).load_state_dict(state)
    with pytest.raises(ValueError, match=named):
        Victims("sample", **({"victims": 4} | change)).load_state_dict(state)


def test_shared_weights_belong_to_the_configuration():
    model = LeNet()
    state = Victims("sample", victims=4, model=model).state_dict()
    Victims("sample", victims=4, model=model).load_state_dict(state)
    with pytest.raises(ValueError, match=r"weights '[0-9a-f]+' in the checkpoint and '[0-9a-f]+' here\.$"):
        Victims("sample", victims=4, model=LeNet()).load_state_dict(state)


@pytest.mark.parametrize("state", [None, [1], "x" * 10_000])
def test_a_state_that_is_no_configuration(state):
    with pytest.raises(
        ValueError, match=r"Expected a checkpoint of the same victims, but got (None|\[1\]|'x{10,310}\.)"
    ):
        Victims("sample", victims=4).load_state_dict(state)


@pytest.mark.parametrize("value", [torch.zeros(3), 4.0, True, [4] * 10_000])
def test_a_configuration_with_odd_values(value):
    """Tensors have no single answer to whether they are equal."""
    state = Victims("sample", victims=4).state_dict() | {"victims": value}
    with pytest.raises(ValueError, match=r"but got victims .* in the checkpoint and 4 here\.$") as refusal:
        Victims("sample", victims=4).load_state_dict(state)
    assert len(str(refusal.value)) < 500
