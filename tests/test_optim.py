"""The learning rate as a function of the step, by hand."""

import pytest
import torch

from common import optim


def test_warmup_cosine_by_hand():
    assert optim.warmup_cosine(0, 100) == 1.0
    assert optim.warmup_cosine(50, 100) == pytest.approx(0.5)
    assert optim.warmup_cosine(0, 100, 10) == pytest.approx(0.1)
    assert optim.warmup_cosine(4, 10**9, 10, first=0.1) == pytest.approx(0.1 + 0.9 * 0.5)
    assert optim.warmup_cosine(9, 10**9, 10, first=0.1) == pytest.approx(1.0)
    assert optim.warmup_cosine(99, 10**9, 10) == pytest.approx(1.0)


@pytest.mark.parametrize("lr, batch, reference, rate", [
    (0.1, 32, 32, 0.1), (0.1, 4, 32, 0.0125), (0.2, 40, 40, 0.2), (0.2, 64, 64, 0.2), (0.025, 128, 64, 0.05),
])  # fmt: skip
def test_the_rate_is_proportional_to_the_clips_of_a_step(lr, batch, reference, rate):
    assert optim.scaled_lr(lr, batch, reference)[0] == pytest.approx(rate)


def test_the_rule_is_said():
    _, said = optim.scaled_lr(0.1, 4, 32, "labelled clips")
    assert said == "learning rate 0.0125 = 0.1 x 4 / 32 labelled clips of a step"


def test_set_lr_reaches_every_group():
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(2)]
    optimizer = optim.build("sgd", groups, 0.1, 0.0)
    optim.set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    assert optimizer.defaults["momentum"] == 0.9
    assert isinstance(optim.build("adamw", groups, 0.1, 0.01), torch.optim.AdamW)


def test_warmup_steps_by_hand():
    steps = {0: 1, 19: 1, 20: 0.1, 39: 0.1, 40: 0.01, 1000: 0.01}
    assert {s: optim.warmup_steps(s, [20, 40]) for s in steps} == pytest.approx(steps)
    assert optim.warmup_steps(5, []) == 1
    # A line from 1/5 on: 0.2 + 0.8 (step + 1) / 10, and a tenth of it from step 4 on.
    assert optim.warmup_steps(0, [4], 10, first=0.2) == pytest.approx(0.28)
    assert optim.warmup_steps(3, [4], 10, first=0.2) == pytest.approx(0.52)
    assert optim.warmup_steps(4, [4], 10, first=0.2) == pytest.approx(0.06)
    assert optim.warmup_steps(0, [], 10) == pytest.approx(0.1)
    assert optim.warmup_steps(9, [20], 10) == optim.warmup_steps(19, [20], 10) == 1


def test_schedule_by_hand():
    steps = {0: 1, 199: 1, 200: 0.1, 399: 0.1, 400: 0.01, 499: 0.01}  # epochs of 10 steps
    assert {s: optim.schedule(s, 500, 10, [20, 40]) for s in steps} == pytest.approx(steps)
    assert optim.schedule(0, 500, 10, [20, 40], warmup=4) == pytest.approx(1 / 40)
    assert optim.schedule(39, 500, 10, [20, 40], 4) == optim.schedule(100, 500, 10, [20, 40], 4) == 1
    assert [optim.schedule(s, 100, 10, []) for s in (0, 50)] == pytest.approx([1, 0.5])
    assert optim.schedule(0, 100, 10, [], warmup=2) == pytest.approx(1 / 20)


def test_set_lr_knows_the_factor_of_a_group():
    weight, bias = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = optim.build("sgd", [dict(params=[weight]), dict(params=[bias], lr_factor=5.0)], 0.1, 0.0)
    for _ in range(2):  # not of what it was before
        optim.set_lr(optimizer, 0.25)
        assert [group["lr"] for group in optimizer.param_groups] == [0.25, 1.25]
    again = optim.build("sgd", [dict(params=[weight]), dict(params=[bias], lr_factor=5.0)], 0.1, 0.0)
    again.load_state_dict(optimizer.state_dict())
    optim.set_lr(again, 0.5)
    assert [group["lr"] for group in again.param_groups] == [0.5, 2.5]


def test_groups_keep_their_weight_decay():
    for name in ("sgd", "adamw"):
        groups = [dict(params=[torch.nn.Parameter(torch.ones(1))], weight_decay=d) for d in (0.0, 0.5)]
        optimizer = optim.build(name, groups, 0.1, 0.01)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.5]
