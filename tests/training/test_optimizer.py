import math

import pytest
from torch import nn

from medusa_ds.config.recipe import LossSpec, TrainSpec
from medusa_ds.training import optimizer as optim


def train_spec(**values) -> TrainSpec:
    return TrainSpec.model_validate({"global_batch_size": 1, "lr": 1e-3} | values)


def test_rate_rises_on_a_line_then_falls_to_its_minimum():
    spec = train_spec(warmup_ratio=0.1, min_lr_ratio=0.2)
    factors = [optim.lr_factor(step, 100, spec) for step in range(101)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.6)  # halfway down half a cosine
    assert factors[100] == pytest.approx(0.2)
    assert factors[9:] == sorted(factors[9:], reverse=True)


@pytest.mark.parametrize(("schedule", "quarter"), [("linear", 0.75), ("constant", 1.0), ("cosine", 0.8535534)])
def test_rate_a_quarter_of_the_way_down(schedule, quarter):
    spec = train_spec(schedule=schedule, warmup_ratio=0.0)
    assert optim.lr_factor(25, 100, spec) == pytest.approx(quarter)


def test_no_step_has_rate_zero_by_a_short_warm_up():
    spec = train_spec(warmup_ratio=1.0)
    assert [optim.lr_factor(step, 2, spec) for step in range(2)] == [0.5, 1.0]
    assert optim.lr_factor(0, 1, train_spec()) == 1.0


@pytest.mark.parametrize(
    ("schedule", "halfway"), [("linear", 0.1), ("sine", 0.2 * math.sin(math.pi / 4)), ("constant", 0.2)]
)
def test_coefficient_rises_from_zero(schedule, halfway):
    spec = LossSpec.model_validate(
        {"coefficient": 0.2, "coefficient_schedule": schedule, "coefficient_warmup_ratio": 0.4}
    )
    assert optim.coefficient(20, 100, spec) == pytest.approx(halfway)
    assert optim.coefficient(40, 100, spec) == 0.2
    assert optim.coefficient(0, 100, spec) == (0.2 if schedule == "constant" else 0)


def test_weights_of_the_losses():
    assert optim.loss_weights(0, 10, 2, 1, LossSpec(decay=0.5)) == [0.0, 0.5, 0.25]
    weights = optim.loss_weights(0, 10, 2, 2, LossSpec(decay=0.5, coefficient=0.2))
    assert weights == pytest.approx([1.0, 0.1, 0.05])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 5))
        self.backbone[2].weight = self.backbone[0].weight  # tied
        self.heads = nn.ModuleList([nn.Linear(4, 4)])


def test_groups_hold_each_trainable_parameter_once():
    model = Model()
    groups = {g["name"]: g for g in optim.parameter_groups(model, train_spec(weight_decay=0.1, lr_multiplier=4.0))}
    assert {name: len(group["params"]) for name, group in groups.items()} == {
        "backbone": 1,
        "backbone_no_decay": 3,
        "heads": 1,
        "heads_no_decay": 1,
    }
    assert {name: group["weight_decay"] for name, group in groups.items() if group["weight_decay"]} == {
        "backbone": 0.1,
        "heads": 0.1,
    }
    assert [groups[name]["lr_scale"] for name in ("backbone", "heads", "heads_no_decay")] == [1, 4, 4]
    model.backbone.requires_grad_(False)
    assert {g["name"] for g in optim.parameter_groups(model, train_spec())} == {"heads", "heads_no_decay"}


def test_large_projections_of_heads_are_groups_of_their_own(monkeypatch):
    """Mutation: leave them in one group, whose fp32 gradient is then as large as all of them."""
    monkeypatch.setattr(optim, "ALONE", 16)
    model = Model()
    model.heads.append(nn.Linear(4, 5, bias=False))
    model.heads.append(nn.Linear(4, 3, bias=False))
    groups = optim.parameter_groups(model, train_spec(lr_multiplier=4.0))
    sizes = sorted((group["name"], sum(param.numel() for param in group["params"])) for group in groups)
    assert sizes == [
        ("backbone", 20),
        ("backbone_no_decay", 13),
        ("heads", 12),
        ("heads", 16),
        ("heads", 20),
        ("heads_no_decay", 4),
    ]
    assert all(group["lr_scale"] == 4 for group in groups if group["name"] == "heads")
