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


def test_set_lr_reaches_every_group():
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(2)]
    optimizer = optim.build("sgd", groups, 0.1, 0.0)
    optim.set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    assert optimizer.defaults["momentum"] == 0.9
    assert isinstance(optim.build("adamw", groups, 0.1, 0.01), torch.optim.AdamW)
