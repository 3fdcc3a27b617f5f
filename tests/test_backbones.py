"""The backbones against published figures and torchvision, and weights that go in or are refused."""

import math
import os
import re
from functools import partial
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18, resnet50, resnet101
from torchvision.models.video import r2plus1d_18, r3d_18, s3d, swin3d_b, swin3d_s, swin3d_t
from torchvision.models.video.swin_transformer import SwinTransformer3d
from torchvision.ops import StochasticDepth

from common import backbones
from common.backbones import NAMES, Gate, Shift, Swin3D, build
from common.errors import UserError
from common.io.onednn import Padded, Subsampled, avoid_onednn_faults
from common.io.weights import PUBLISHED, fetch, published_input
from common.modality import Recipe

TINY = ["resnet3d10", "resnet3d50", "resnet3d10-small", "r3d_10", "r3d_10-pool"]  # quick to compute
TINY += ["i3d10", "i3d10-small", "tsm10", "tsm50-small", "tsn10", "r2plus1d_10", "r2plus1d_10-pool"]
NORMS = nn.BatchNorm2d, nn.BatchNorm3d


def tiny(name="resnet3d10", classes=5, width=1 / 16, seed=0, **more):
    torch.manual_seed(seed)
    return build(name, classes, width=1 if name.startswith(("s3dg", "swin3d")) else width, **more)


def small_swin(**more):
    """torchvision's transformer as swin3d_t has it, with a third of its heads."""
    sizes = dict(embed_dim=32, depths=[2, 2, 6, 2], num_heads=[1, 2, 4, 8], window_size=[8, 7, 7])
    return SwinTransformer3d([2, 4, 4], **sizes, **more)


@pytest.fixture
def swin(monkeypatch):
    """Makes swin3d_b small enough for a test."""
    monkeypatch.setitem(backbones.NETWORKS, "swin3d_b", partial(Swin3D, model=small_swin))


def alike(tensors, expected):
    """Whether tensors are the same up to the rounding of float32."""
    return all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(tensors, expected, strict=True))


def same(a, b, skip=()):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[k], b[k]) for k in a if not k.startswith(tuple(skip)))


def clips(B=2, C=3, T=4, S=32, seed=0):
    return torch.randn(B, C, T, S, S, generator=torch.Generator().manual_seed(seed))


def randomise_batch_norms(net):
    """Numbers other than the start's zeros and ones, which would hide what a batch norm does."""
    for m in net.modules():
        if isinstance(m, NORMS):
            for tensor in (m.weight, m.bias, m.running_mean, m.running_var):
                nn.init.uniform_(tensor, 0.2, 1.5)
    return net


def randomise(net):
    for p in net.parameters():
        nn.init.normal_(p)
    return net


def kernel(net):
    """The weight of the first convolution."""
    return net.state_dict()[net.FIRST]


# ---------------------------------------------------------------------------------- architecture


@pytest.mark.parametrize("name, n_parameters, macs, frames, size", [
    ("resnet3d50", 32_454_096, 54.52, 8, 256),  # PySlowFast's model zoo, Slow 8x8 R50
    ("i3d50", 28_043_472, None, 8, 224),  # 28.04 M in PySlowFast's and PyTorchVideo's tables
    ("tsm50", 24_327_632, 8 * 4.089, 8, 224),  # eight times torchvision's ResNet-50
    # torchvision's documentation; a gate of C channels has C^2 + C parameters.
    ("r3d_18", 33_371_472, 40.697, 16, 112), ("r2plus1d_18", 31_505_325, 40.519, 16, 112),
    ("s3dg", 8_320_048 + 1_225_008, 17.979, 16, 224), ("swin3d_t", 28_158_070, 43.882, 16, 224),
    ("swin3d_s", 49_816_678, None, 16, 224), ("swin3d_b", 88_048_984, None, 16, 224),
])  # fmt: skip
def test_published_parameters_and_multiply_adds(name, n_parameters, macs, frames, size):
    with torch.device("meta"):
        net = build(name, 400).eval()
    assert sum(p.numel() for p in net.parameters()) == n_parameters
    if macs:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.empty(1, 3, frames, size, size, device="meta"))
        assert counter.get_total_flops() / 2 == pytest.approx(macs * 1e9, rel=1e-3)


@pytest.mark.parametrize("name, model", [
    ("r3d_18", r3d_18), ("r3d_18-pool", r3d_18), ("r2plus1d_18", r2plus1d_18),
    ("r2plus1d_18-pool", r2plus1d_18), ("tsm50", resnet50), ("tsn50-small", resnet50), ("tsm101", resnet101),
    ("s3dg", s3d), ("swin3d_t", swin3d_t), ("swin3d_s", swin3d_s), ("swin3d_b", swin3d_b),
])  # fmt: skip
def test_tensors_have_torchvisions_names_and_shapes(name, model):
    with torch.device("meta"):
        net, original = build(name, 400), model(num_classes=400)
    shapes = {k: v.shape for k, v in net.state_dict().items()}
    if name.startswith(("s3dg", "swin3d")):
        shapes = {re.sub(r"^layer\d", "features", k): shape for k, shape in shapes.items()}
    last = {"s3dg": "classifier.1.", "swin": "head."}.get(name[:4], "fc.")
    expected = {k.replace(last, "fc."): v.shape for k, v in original.state_dict().items()}
    assert shapes.pop("fc.weight") == expected.pop("fc.weight")[:2]
    assert {k: v for k, v in shapes.items() if ".gate." not in k} == expected
    depths = [[m.p for m in n.modules() if isinstance(m, StochasticDepth)] for n in (net, original)]
    assert depths[0] == depths[1]


@pytest.mark.parametrize("name", [name for name in NAMES if re.search(r"\d\d", name)])
def test_depth_counts_the_layers_with_weights(name):
    """The stem, the convolutions of the branches, and the last layer; R(2+1)D has two for one."""
    with torch.device("meta"):
        layers = [n for n, m in build(name, 400).named_modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))]
    convs = sum("shortcut" not in n and "downsample" not in n for n in layers)
    assert convs / (2 if name.startswith("r2plus1d") else 1) + 1 == int(re.search(r"\d\d+", name)[0])


def stages_of(original, names, x):
    """(outputs of four of its modules, its output)."""
    outputs = []
    for name in names:
        original.get_submodule(name).register_forward_hook(lambda m, i, y: outputs.append(y))
    with torch.no_grad():
        y = original(x)
    return outputs, y


@pytest.mark.parametrize("name, model", [("r3d_18", r3d_18), ("r2plus1d_18", r2plus1d_18)])
def test_r3d_starts_as_torchvisions_and_computes_what_it_computes(name, model):
    torch.manual_seed(3)
    original, x = model(num_classes=5).eval(), clips(1)
    net = tiny(name, width=1, seed=3).eval()
    assert same(net, original)
    net.load_state_dict(randomise_batch_norms(original).state_dict())
    features, logits = stages_of(original, ["layer1", "layer2", "layer3", "layer4"], x)
    assert alike(net.features(x), features)
    # Their average is AdaptiveAvgPool3d: another order of the sum.
    assert torch.allclose(net(x), logits, rtol=1e-5, atol=1e-6 * logits.abs().max())


@pytest.mark.parametrize("name, turns", [
    ("resnet3d18", [(1,), (1,), (3,), (3,)]), ("resnet3d101", [(1,), (1,), (3,), (3,)]),
    ("i3d18", [(3,), (3, 1), (3, 1), (1, 3)]), ("i3d101", [(3,), (3, 1), (3, 1), (1, 3)]),
])  # fmt: skip
def test_temporal_kernels_of_resnet3d_and_i3d(name, turns):
    with torch.device("meta"):
        net = build(name, 7)
    stem = 5 if name.startswith("i3d") else 1
    assert net.stem.conv.kernel_size == (stem, 7, 7) and net.stem.conv.padding == (stem // 2, 3, 3)
    for layer, conv in net.named_modules():
        if isinstance(conv, nn.Conv3d) and layer != "stem.conv":
            stage, block, branch, _ = layer.split(".")
            kernels = turns[int(stage[-1]) - 2] if branch == "conv1" else (1,)
            T = kernels[int(block) % len(kernels)]
            assert (conv.kernel_size[0], conv.padding[0], conv.stride[0]) == (T, T // 2, 1), layer


def shift_by_hand(x):
    """Frame by frame and channel by channel, x (T, C, H, W)."""
    y = torch.zeros_like(x)
    T, C = x.shape[:2]
    for t in range(T):
        for c in range(C):
            source = t + 1 if c < C // 8 else t - 1 if c < C // 8 * 2 else t
            if 0 <= source < T:
                y[t, c] = x[source, c]
    return y


@pytest.mark.parametrize("name, model, T, step", [
    ("tsm50", resnet50, 3, 1), ("tsm18", resnet18, 1, 1), ("tsm101", resnet101, 3, 2),
    ("tsn18", resnet18, 3, 0),
])  # fmt: skip
def test_tsm_is_torchvisions_resnet_with_shifted_first_convolutions(name, model, T, step):
    """Nothing of torchvision's own forward pass is replaced: a hook shifts what conv1 of a block gets.

    As in the code of TSM: of every block, or with 23 blocks in a stage of blocks 0, 2, 4, ... of each stage.
    """
    torch.manual_seed(0)
    original, x = model(num_classes=5).double().eval(), clips(2, T=T).double()
    net = tiny(name, width=1).double().eval()
    assert same(net, original, skip=["fc."])
    assert net.fc.weight.std().item() == pytest.approx(0.001, rel=0.05) and not net.fc.bias.any()
    net.load_state_dict(randomise_batch_norms(original).state_dict())
    shifted = [block for i in range(1, 5) for block in getattr(original, f"layer{i}")[:: step or 1]]
    for block in shifted if step else []:
        block.conv1.register_forward_pre_hook(lambda module, inputs: (shift_by_hand(inputs[0]),))
    with torch.no_grad():
        want = torch.stack([original(clip.transpose(0, 1)).mean(0) for clip in x])
        assert torch.allclose(net(x), want, rtol=1e-9, atol=1e-9 * want.abs().max())


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last_3d])
def test_shift_moves_an_eighth_each_way_and_so_does_its_gradient(memory):
    x = torch.arange(2 * 3 * 17.0).view(2, 3, 17, 1, 1).expand(-1, -1, -1, 2, 2)
    x = x.transpose(1, 2).contiguous(memory_format=memory).transpose(1, 2).double().requires_grad_()
    y = Shift.apply(x, True)
    assert y.stride() == x.stride()
    assert all(torch.equal(a, shift_by_hand(b)) for a, b in zip(y, x, strict=True))
    assert torch.autograd.gradcheck(lambda x: Shift.apply(x, True), x)


def test_consensus_drops_for_each_frame_apart():
    net = tiny("tsm10", classes=32, dropout=0.5).train()
    nn.init.eye_(net.fc.weight)
    logits = net.classify(torch.ones(64, 32, 4, 1, 1))  # (B, K): twice the share of frames that kept k
    assert {*logits.flatten().tolist()} == {0, 0.5, 1, 1.5, 2}
    assert logits.mean().item() == pytest.approx(1, abs=0.05)


def test_tsm_compiles_without_a_break():
    net, x = tiny("tsm10-small", width=1 / 4).eval(), clips(1)
    assert alike([torch.compile(net, backend="eager", fullgraph=True)(x)], [net(x)])


def test_gates_of_s3dg_are_last_in_their_branches():
    """In all four branches of nine blocks, and in the stem."""
    with torch.device("meta"):
        layers = dict(build("s3dg", 400).named_modules())
    gated = [name.removesuffix(".gate") for name, layer in layers.items() if isinstance(layer, Gate)]
    assert (
        gated == ["layer1.3", *(name for name in layers if re.search(r"branch\d$", name))]
        and len(gated) == 37
    )
    assert all(isinstance([*layers[name].children()][-1], Gate) for name in gated)


def test_s3dg_computes_what_torchvisions_s3d_computes(tmp_path):
    """With the gates at their start, for the one size of which torchvision's pool is the average of all."""
    torch.manual_seed(0)
    original, x = randomise_batch_norms(s3d(num_classes=5)).eval(), clips(1, T=16, S=224)
    torch.save(original.state_dict(), tmp_path / "s3d.pth")
    net = tiny("s3dg", weights=tmp_path / "s3d.pth").eval()
    features, logits = stages_of(original, [f"features.{n}" for n in (3, 6, 12, 15)], x)
    with torch.no_grad():
        assert alike(net.features(x), features)
        assert torch.allclose(net.classify(features[-1]), logits, rtol=1e-5, atol=1e-6 * logits.abs().max())


def test_gate_equals_a_value_worked_by_hand():
    gate = Gate(2)
    x = torch.tensor([[[2.0, 6], [3, 5]], [[1, 3], [-2, 2]]])[None, :, :, None]  # means 4 and 1
    assert torch.equal(gate(x), x)
    x_last = torch.rand(2, 2, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d)
    assert gate(x_last).stride() == x_last.stride()
    with torch.no_grad():
        gate.weight[0, 1] = math.log(3)  # 2 sigmoid(log(3) 1) = 2 * 3/4
        gate.bias[1] = -math.log(3)  # 2 sigmoid(-log 3) = 2 * 1/4
    y = gate(torch.cat([x, -x]))
    assert torch.allclose(y[0], x[0] * torch.tensor([1.5, 0.5]).view(2, 1, 1, 1))
    assert torch.allclose(y[1, 0], -x[0, 0] / 2)  # 2 sigmoid(log(3) (-1)): each clip has its own mean


@pytest.mark.parametrize("T, H, W", [(18, 40, 36), (1, 32, 32)])
def test_swin3d_starts_as_torchvisions_and_computes_what_it_computes(T, H, W, swin):
    """Windows larger and smaller than the clip, the last of one token."""
    torch.manual_seed(3)
    original = small_swin(num_classes=5).eval()
    x = torch.randn(1, 3, T, H, W, generator=torch.Generator().manual_seed(0))
    net = tiny("swin3d_b", seed=3, dropout=0.5).eval()
    expected, logits = stages_of(original, [f"features.{n}" for n in (0, 2, 4, 6)], x)
    with torch.no_grad():
        features, expected[3] = net.features(x), original.norm(expected[3])
        assert alike(features, [f.permute(0, 4, 1, 2, 3) for f in expected])
        for i, (f, s) in enumerate(zip(features, (4, 8, 16, 32), strict=True)):
            assert f.shape == (1, 32 * 2**i, -(-T // 2), -(-H // s), -(-W // s))
        assert torch.allclose(net(x), logits, atol=1e-6) and torch.equal(net(x), net.classify(features[-1]))
        assert torch.allclose(net.fc(net.embed(x)), logits, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet3d18", "resnet3d50", "r3d_18", "tsm18", "tsm50"])
def test_width_acts_on_every_layer(name):
    with torch.device("meta"):
        whole = build(name, 400)
        for width in (1 / 2, 1 / 8):
            thin = build(name, 400, width=width)
            for a, b in zip(thin.parameters(), whole.parameters(), strict=True):
                assert len(a) == len(b) * (1 if len(b) == 400 else width)
        assert len(kernel(build(name, 400, width=0.3))) == 19
        assert build("r2plus1d_10", 400, width=0.25).stem[0].out_channels == 11  # of 45


S3DG = {112: [(28, 4), (14, 4), (7, 2), (3, 1)], 17: [(5, 3), (3, 3), (2, 2), (1, 1)]}


@pytest.mark.parametrize("name, T, S", [
    *((name, T, S) for name in TINY for T, S in ((8, 64), (1, 32), (5, 40))),
    ("s3dg", 8, 112), ("s3dg", 5, 17),
])  # fmt: skip
def test_contract(name, T, S):
    net, x = tiny(name).eval(), clips(2, T=T, S=S)
    features, z = net.features(x), net.embed(x)
    r3d, i3d = name.startswith(("r3d_", "r2plus1d_")), name.startswith("i3d")
    side = S // 2 if name.endswith("-small") or r3d and not name.endswith("-pool") else S // 4
    sizes = []  # (T, H) of the stages
    for i in range(4):
        sizes.append((side, T))
        side, T = -(-side // 2), -(-T // 2) if r3d or i3d and i == 0 else T
    sizes = S3DG[S] if name == "s3dg" else sizes
    width = (
        [192, 480, 832, 1024] if name == "s3dg" else [(16 if "50" in name else 4) * 2**i for i in range(4)]
    )
    shapes = [(2, C, T, side, side) for C, (side, T) in zip(width, sizes, strict=True)]
    assert [tuple(f.shape) for f in features] == shapes
    assert z.shape == (2, net.fc.in_features) and torch.allclose(z, features[-1].mean((2, 3, 4)))
    assert torch.allclose(net(x), net.fc(z), atol=1e-6) and net(x).shape == (2, 5)
    assert torch.equal(net(x), net.classify(features[-1]))
    # The memory of every frame stays that of the weights: nothing is copied to another order on the way.
    net.to(memory_format=torch.channels_last if name[:2] == "ts" else torch.channels_last_3d)
    last = net.features(x)
    assert alike(last, features)
    last_3d = [f.is_contiguous(memory_format=torch.channels_last_3d) for f in last]
    assert all(last_3d) or name not in ("resnet3d10", "r3d_10", "r3d_10-pool", "i3d10", "tsm10")
    net.dropout.p = 0.5
    net.dropout.train()
    assert not torch.allclose(net(x), net.fc(z), atol=1e-6) and alike([net.embed(x)], [z])


@pytest.mark.parametrize("T, H, W", [(4, 32, 32), (8, 16, 32), (8, 32, 16)])
def test_clips_that_are_too_small_for_s3dg(T, H, W):
    with pytest.raises(UserError, match=f"5 frames and 17 x 17 pixels at least, not {T} of {H} x {W}$"):
        tiny("s3dg").eval()(torch.zeros(1, 3, T, H, W))


# ---------------------------------------------------------------------- adapter, start, training


@pytest.mark.parametrize("name", ["resnet3d10", "r3d_10", "tsm10", "s3dg"])
def test_network_with_an_adapter(name):
    """For one seed it starts as the network without; the mean over time is before the adapter in all."""
    x, plain, net = clips(T=5), tiny(name).eval(), tiny(name, adapter=7).eval()
    assert same(plain, net) and torch.allclose(net(x), plain(x), atol=1e-6)
    assert net.adapter.down.weight.shape == (7, net.fc.in_features)
    z, down, up = net.embed(x), randomise(net.adapter).down, net.adapter.up
    want = net.fc(z + up(nn.functional.silu(down(z))))
    assert torch.allclose(net(x), want, atol=1e-4) and torch.equal(net.head(z), net.fc(net.adapter(z)))
    assert not torch.allclose(want, plain(x), atol=1e-2)


@pytest.mark.parametrize("name", ["resnet3d10", "resnet3d50"])
def test_resnet3d_starts_as_slowfasts(name):
    """From the seed; He normal by fan out, small last layer, every block the identity or its shortcut."""
    net, x = tiny(name, classes=400, width=1 / 4), clips()
    assert same(net, tiny(name, classes=400, width=1 / 4)) and not same(net, tiny(name, 400, 1 / 4, seed=1))
    std = net.res4[0].conv1.conv.weight.std().item()
    assert std == pytest.approx((2 / (net.res4[0].conv1.conv.weight[:, 0].numel())) ** 0.5, rel=0.05)
    assert net.fc.weight.std().item() == pytest.approx(0.01, rel=0.05) and not net.fc.bias.any()
    for stage, before in zip((net.res3, net.res4, net.res5), net.features(x), strict=False):
        assert torch.allclose(stage[0](before), stage[0].shortcut(before).relu())
        for block in stage[1:]:
            x = torch.rand(2, block.conv1.conv.in_channels, 2, 3, 3)
            assert torch.equal(block(x), x)


@pytest.mark.parametrize("name", NAMES)
def test_every_network_has_its_epsilon_and_no_convolution_that_onednn_gets_wrong(name):
    with torch.device("meta"):
        for eps in (2e-3, None):
            net = tiny(name, bn_eps=eps)
            norms = [m for m in net.modules() if isinstance(m, NORMS)]
            assert {m.eps for m in norms} <= {eps or (1e-3 if name == "s3dg" else 1e-5)}
            assert bool(norms) != name.startswith("swin") and {m.momentum for m in norms} <= {0.1}
    for m in net.modules():
        if type(m) is nn.Conv2d:
            assert m.kernel_size != (1, 1) or m.stride == (1, 1) or m.in_channels >= 16
        assert type(m) is not nn.Conv3d or m.stride[0] == 1 or m.padding[0] <= m.stride[0]
    assert net.name == name and len({*NAMES}) == len(NAMES) == 56


@pytest.mark.parametrize("conv, x, faulty", [
    *((nn.Conv3d(2, 3, (k, 3, 1), (stride, 1, 2), (k // 2, 1, 0)), clips(2, 2, T, 6), k == 7 and stride == 2)
      for T in range(1, 10) for k, stride in ((7, 2), (5, 2), (7, 1))),
    *((nn.Conv2d(c, 5, k, stride), clips(2, c, 1, 11)[:, :, 0], c < 16 and k == 1 and stride != 1)
      for c, k, stride in ((4, 1, 2), (15, 1, (1, 3)), (16, 1, 2), (4, 3, 2), (4, 1, 1))),
])  # fmt: skip
def test_a_convolution_computed_in_another_way_gives_the_same(conv, x, faulty):
    """In float64, which oneDNN has not."""
    conv, x, results = conv.double(), x.double().requires_grad_(), []
    for _ in range(2):
        y = conv(x)
        results.append([y, *torch.autograd.grad((y * y).sum(), [x, *conv.parameters()])])
        avoid_onednn_faults(conv)
    assert isinstance(conv, (Padded, Subsampled)) == faulty and alike(*results)


@pytest.mark.parametrize("name, more, words", [
    ("resnet50", {}, "resnet3d50"), ("tsm152", {}, "tsm101"), ("tsm50-pool", {}, "tsm50-small"),
    ("r3d_10-small", {}, "r3d_10-pool"), ("r2plus1d_50", {}, "r2plus1d_34-pool"), ("swin3d_l", {}, "_b$"),
    ("resnet3d10", {"width": 0}, "width of 0"), ("resnet3d10", {"width": math.nan}, "width of nan"),
    ("s3dg", {"width": 0.5}, "width of 0.5: its only width is 1"), ("swin3d_t", {"width": 2}, "width is 1"),
    ("resnet3d10", {"dropout": 1.0}, "dropout of 1.0"), ("r3d_10", {"bn_eps": 0.0}, "epsilon of 0.0"),
    ("resnet3d10", {"bn_eps": math.nan}, "epsilon of nan"),
    ("resnet3d10", {"adapter": -1}, "adapter cannot have -1 units"),
])  # fmt: skip
def test_impossible_networks_are_refused(name, more, words):
    with pytest.raises(UserError, match=words):
        build(name, 5, **more)


LAYERS = [("layer2.",), ("layer3.",), ("layer4.",)]
STAGES = {
    "resnet3d10": [("stem.", "res2."), ("res3.",), ("res4.",), ("res5.",)],
    "r2plus1d_10-pool": [("stem.", "layer1."), *LAYERS],
    "tsm10": [("conv1.", "bn1.", "layer1."), *LAYERS],
    "s3dg": [("layer1.",), *LAYERS],
    "swin3d_b": [("patch_embed.", "layer1."), *LAYERS[:2], ("layer4.", "norm.")],
}


@pytest.mark.parametrize("stages", [0, 1, 2, 4])
@pytest.mark.parametrize("name", STAGES)
def test_frozen_stages_stay_and_the_others_learn(name, stages, swin):
    """From the stem on, whatever was frozen before; DistributedDataParallel needs a gradient for the rest."""
    net = randomise_batch_norms(tiny(name, width=1 / 4)).eval()  # the start's zeros stop gradients
    assert net.freeze(3).freeze(stages) is net and not any(m.training for m in net.modules())
    outer = nn.Sequential(net)  # as DistributedDataParallel has it
    outer.train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    outer(clips(4, T=5)).log_softmax(1)[:, 0].sum().backward()
    torch.optim.SGD(net.parameters(), 0.1, weight_decay=0.1).step()
    changed = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    frozen = sum(STAGES[name][:stages], ())
    assert changed == {key for key in before if not key.startswith(frozen) and "position_index" not in key}
    assert [n for n, p in net.named_parameters() if p.requires_grad == n.startswith(frozen)] == []


@pytest.mark.parametrize("stages", [-1, 5, 1.5])
def test_stages_that_are_not_there(stages):
    with pytest.raises(UserError, match=f"^{stages} stages cannot be frozen: 0 to 4 can$"):
        tiny().freeze(stages)


# --------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("name", ["resnet3d10", "r3d_10", "s3dg"])
def test_weights_of_a_model_file_or_a_state_dict(tmp_path, name, prefix, capsys):
    source = randomise(tiny(name, seed=1))  # gates start with zeros
    state = {prefix + key: value for key, value in source.state_dict().items()}
    for content in ({"net": state, "name": name}, {"state_dict": state}, state):
        torch.save(content, tmp_path / "w.pt")
        net = tiny(name, seed=2, weights=tmp_path / "w.pt")
        assert same(net, source) and not net.new_fc and capsys.readouterr().out == ""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of torch.hub, and no network. Returns the cache and the list of what was asked for."""
    asked = []

    def refuse(url, *_, **__):
        asked.append(url)
        raise URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints", asked


@pytest.mark.parametrize("name, model, file, word", [
    ("r3d_18", r3d_18, "r3d_18-b3b3357e.pth", "kinetics"),
    ("r2plus1d_18-pool", r2plus1d_18, "r2plus1d_18-91a641e6.pth", "kinetics"),
    ("s3dg", s3d, "s3d-d76dad2f.pth", "kinetics"),
    ("tsm18-small", resnet18, "resnet18-f37072fd.pth", "imagenet"),
])  # fmt: skip
def test_weights_of_torchvision(hub, name, model, file, word, capsys):
    """By path their last layer fits; by word only if the classes are known. Then for 10 channels."""
    torch.manual_seed(1)
    original, path = randomise_batch_norms(model()), hub[0] / file
    state = original.state_dict()
    # An old version of torch wrote another kind of file, and no counts of batches.
    state = {key: value for key, value in state.items() if "num_batches" not in key or word != "imagenet"}
    torch.save(state, path, _use_new_zipfile_serialization=word != "imagenet")
    classes = 1000 if word == "imagenet" else 400
    net = build(name, classes, weights=path)
    assert not net.new_fc and capsys.readouterr().out == "" and fetch(name, word) == path
    given = [value for key, value in net.state_dict().items() if ".gate." not in key]
    pairs = zip(given, original.state_dict().values(), strict=True)
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in pairs)
    flow = build(name, classes, in_channels=10, weights=word)
    assert flow.new_fc and not flow.fc.bias.any() and "last layer" in capsys.readouterr().out and not hub[1]
    assert same(flow, net, skip=["fc.", net.FIRST])
    if name != "s3dg":
        with pytest.raises(UserError, match="fits another network"):
            tiny(name, weights=word)


def test_weights_go_into_a_network_with_an_adapter(tmp_path):
    source, path, fresh = tiny(seed=1), tmp_path / "w.pt", tiny(seed=2, adapter=4)
    torch.save(source.state_dict(), path)
    net = tiny(seed=2, adapter=4, weights=path)
    assert same(source, net) and same(net.adapter, fresh.adapter) and not net.new_fc
    torch.save(randomise(fresh).state_dict(), path)
    assert same(tiny(seed=3, adapter=4, weights=path), fresh)
    for more in ({}, {"adapter": 5}):
        with pytest.raises(UserError, match=r"another network, [34] tensors differ: adapter\."):
            tiny(weights=path, **more)


@pytest.mark.parametrize("name, weights", [
    ("r3d_18", "kinetics"), ("swin3d_b", "kinetics"), ("swin3d_b", "kinetics_imagenet22k"),
])  # fmt: skip
def test_published_last_layer_in_the_order_of_the_classes(hub, name, weights, capsys, swin):
    """The file of a small network stands in for the published one; names as the folders of some copies."""
    order, entry = [(7 * i + 3) % 400 for i in range(400)], PUBLISHED[weights][name]
    names = [re.sub("[^A-Za-z0-9]", "", entry.meta["categories"][i].title()) for i in order]
    source = tiny(name, 400, seed=1)
    nn.init.normal_(source.fc.bias)
    state = source.state_dict()
    if name == "swin3d_b":
        state = {re.sub(r"^layer\d", "features", k).replace("fc.", "head."): v for k, v in state.items()}
    torch.save(state, hub[0] / entry.url.rpartition("/")[2])
    net = tiny(name, 400, seed=2, weights=weights, names=names)
    assert not hub[1] and not net.new_fc and capsys.readouterr().out == "" and same(net, source, skip=["fc."])
    assert torch.equal(net.fc.weight, source.fc.weight[order])
    assert torch.equal(net.fc.bias, source.fc.bias[order])
    for others in (None, [*names[:-1], "juggling chainsaws"], [*names[:-1], names[0]], names[:-1]):
        net = tiny(name, len(others or names), seed=2, weights=weights, names=others)
        assert net.new_fc and same(net, source, skip=["fc."]) and "last layer" in capsys.readouterr().out
        assert same(net.fc, tiny(name, len(others or names), seed=2).fc)


@pytest.mark.parametrize("word, name", [(w, n) for w in PUBLISHED if w != "imagenet" for n in PUBLISHED[w]])
def test_input_of_published_networks(word, name):
    """From torchvision's own preset and the sentence in its documentation."""
    weights, recipe = PUBLISHED[word][name], Recipe(**published_input(name, word))
    view, docs = weights.transforms(), dict(re.findall(r"`(\w+)=(\d+)`", weights.meta["_docs"]))
    assert [recipe.size] * 2 == view.crop_size and recipe.crops == 1
    assert view.resize_size == [*(recipe.stretch or [recipe.short_side])]
    assert [*recipe.mean] == view.mean and [*recipe.std] == view.std
    assert (recipe.frames, recipe.clips) == (int(docs["clip_len"]), int(docs["clips_per_video"]))
    assert recipe.stride * int(docs["frame_rate"]) == 30


@pytest.mark.parametrize("act, name, weights, words", [
    (published_input, "tsm50", "kinetics", "no kinetics weights for tsm50, only for r3d_18, .*swin3d_b"),
    (published_input, "tsm50", "imagenet", "no clips for imagenet weights, only for kinetics, kinetics_"),
    (published_input, "r3d_18", "runs/a/model.pt", "no clips for runs/a/model.pt weights"),
    (fetch, "tsm10", "imagenet", "no imagenet weights for tsm10, only .*: a file is needed$"),
    (fetch, "r3d_34-pool", "kinetics", "no kinetics weights for r3d_34-pool, only "),
    (fetch, "swin3d_t", "kinetics_imagenet22k", "no kinetics_imagenet22k weights for swin3d_t, only "),
])  # fmt: skip
def test_weights_that_nobody_publishes(hub, act, name, weights, words):
    with pytest.raises(UserError, match=words):
        act(name, weights)
    assert not hub[1] and published_input("r3d_18-pool") == published_input("r3d_18")


def by_mmaction(state, shifted):
    """A network's tensors under MMAction2's names; `shifted` says which numbers of blocks are TSM's."""
    renamed = {}
    for key, value in state.items():
        *path, layer, kind = key.split(".")
        if layer == "fc":
            path = ["cls_head", "fc_cls"]
        elif path[-1:] == ["downsample"]:
            path = ["backbone", *path, ("conv", "bn")[int(layer)]]
        else:
            path = ["backbone", *path, f"conv{layer[-1]}", layer[:-1]]
            if layer == "conv1" and len(path) > 3 and shifted(int(path[2])):
                path.append("net")
        renamed[".".join([*path, kind])] = value
    return renamed


@pytest.mark.parametrize("name, shifted, other, differing", [
    ("tsn50", lambda n: False, "tsm50", 32), ("tsm50", lambda n: True, "tsn50", 32),
    ("tsm101", lambda n: n % 2 == 0, "tsn101", 36), ("tsm101", lambda n: n % 2 == 0, "tsm50", ".*"),
])  # fmt: skip
def test_weights_of_mmaction2(tmp_path, name, shifted, other, differing, capsys):
    """As mmcv's ConvModule and MMAction2's TemporalShift name them, in a file with other things."""
    source, path = randomise_batch_norms(tiny(name, seed=1)), tmp_path / "w.pth"
    state = by_mmaction(source.state_dict(), shifted)
    net = "net." if "tsm" in name else ""
    assert {"backbone.conv1.bn.running_mean", f"backbone.layer3.4.conv1.conv.{net}weight",
            "backbone.layer2.0.downsample.conv.weight", "cls_head.fc_cls.weight"} <= {*state}  # fmt: skip
    torch.save({"meta": {"mmcv_version": "1.6.0", "CLASSES": None}, "state_dict": state}, path)
    net = tiny(name, seed=2, weights=path)
    assert same(net, source) and not net.new_fc and capsys.readouterr().out == ""
    flow = tiny(name, 9, in_channels=10, weights=path)
    assert flow.new_fc and same(flow, source, skip=["conv1.", "fc."])
    # Of each shifted block, the name in the file and the name in the network.
    with pytest.raises(UserError, match=f"another network, {differing} tensors differ"):
        tiny(other, weights=path)


def test_last_layer_of_other_classes_starts_afresh(tmp_path, capsys, monkeypatch):
    source, path = tiny(seed=1, classes=9), tmp_path / "w.pt"
    torch.save(source.state_dict(), path)
    net = tiny(seed=2, weights=path)
    assert same(net, source, skip=["fc."]) and same(net.fc, tiny(seed=2).fc)
    printed = capsys.readouterr().out
    assert str(path) in printed and "last layer" in printed and printed.count("\n") == 1
    torch.save({k: v for k, v in source.state_dict().items() if not k.startswith("fc.")}, path)
    monkeypatch.setenv("RANK", "1")
    assert same(tiny(weights=path), source, skip=["fc."]) and capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["resnet3d10", "r3d_10", "r2plus1d_10", "i3d10", "tsm10", "swin3d_b"])
def test_first_convolution_is_averaged_and_repeated(tmp_path, name, swin):
    """RGB to flow to differences and back, by the pseudocode of Mutual Modality Learning, section 2.1."""
    net, path = tiny(name, in_channels=3), tmp_path / "w.pt"
    W = kernel(net).clone()
    for N in (10, 15, 3, 1):
        torch.save(net.state_dict(), path)
        source, net = net, tiny(name, in_channels=N, weights=path)
        W = torch.stack([sum(W[:, j] for j in range(W.shape[1])) / W.shape[1]] * N, 1)
        assert torch.allclose(kernel(net), W, atol=1e-7) and same(net, source, skip=[net.FIRST])
        assert kernel(net).is_contiguous() and net(clips(C=N)).shape == (2, 5)


@pytest.mark.parametrize("depth", [10, 50])
@pytest.mark.parametrize("family", ["i3d", "resnet3d"])
def test_a_still_clip_through_the_inflated_network_is_the_picture(tmp_path, family, depth):
    """In the middle of the clip, where no kernel reaches the zeros beyond its ends."""
    flat = randomise_batch_norms(tiny(f"tsn{depth}").double().eval())
    torch.save(flat.state_dict(), tmp_path / "w.pt")
    net = tiny(f"{family}{depth}", weights=tmp_path / "w.pt").double().eval()
    picture = clips(1, T=1).double()
    with torch.no_grad():
        stages = zip(net.features(picture.expand(-1, -1, 40, -1, -1)), flat.features(picture), strict=True)
        assert all(alike([f[:, :, f.shape[2] // 2]], [want[:, :, 0]]) for f, want in stages)
    for module in net.modules():  # all frames of a kernel are the same
        if isinstance(module, nn.Conv3d):
            assert torch.equal(module.weight, module.weight[:, :, :1].expand_as(module.weight))
    assert torch.equal(flat.fc.weight, net.fc.weight)


def test_fetch_downloads_once_and_a_failure_is_one_sentence(hub, monkeypatch):
    path, url = hub[0] / "resnet18-f37072fd.pth", "https://download.pytorch.org/models/resnet18-f37072fd.pth"
    errors = [URLError("no route"), RuntimeError("invalid hash\nvalue"), TimeoutError()]

    def download(url, path, hash_prefix, progress):
        assert hash_prefix == "f37072fd" and not progress
        if errors:
            raise errors.pop()
        hub[1].append(url)
        torch.save({}, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(3):
        with pytest.raises(UserError) as caught:
            fetch("i3d18-small", "imagenet")
        assert re.fullmatch(f"{url} cannot be downloaded .*{path}, or give .*", str(caught.value))
    for name in ("tsm18", "tsm18", "resnet3d18"):
        assert fetch(name, "imagenet") == path
    assert len(hub[1]) == 1 and fetch("tsm18", "runs/a/model.pt") == Path("runs/a/model.pt")


@pytest.mark.parametrize("other", [
    dict(width=1 / 8), dict(name="resnet3d18", classes=9, in_channels=2), dict(name="tsm18"),
])  # fmt: skip
def test_weights_of_another_network_are_refused(tmp_path, other):
    path = tmp_path / "w.pt"
    torch.save(tiny(**other).state_dict(), path)
    with pytest.raises(
        UserError, match=rf"^[^\n]*{path}.*another network, \d+ tensors differ: (.* is .*; ){{4}}"
    ):
        tiny(weights=path)


class Malice:
    def __reduce__(self):
        return os.mkdir, ("executed",)


FILES = {
    "text": b"<html>Please log in</html>\n", "missing": None, "cut short": tiny().state_dict(),
    "malice": Malice(), "a list": [1, 2], "no tensors": {"net": {"fc.weight": 3}},
    "no net": {"step": 3, "nets": {}}, "numbered": {1: torch.zeros(2)},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("new", [True, False])  # or as torch before 1.6 saved it
@pytest.mark.parametrize("kind", FILES)
def test_foreign_and_damaged_files_are_refused(tmp_path, kind, new, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if kind == "text":
        Path("w.pt").write_bytes(FILES[kind])
    elif FILES[kind]:
        torch.save(FILES[kind], "w.pt", _use_new_zipfile_serialization=new)
    if kind == "cut short":
        os.truncate("w.pt", os.path.getsize("w.pt") // 2)
    with pytest.raises(UserError, match=r"^[^\n]*w.pt[^\n]*$"):
        tiny(weights="w.pt")
    assert not Path("executed").exists()
