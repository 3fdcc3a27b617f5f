"""The backbones against published figures and torchvision, and weights that go in or are refused."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import ResNet50_Weights, resnet18, resnet50, resnet101
from torchvision.models.video import (
    R2Plus1D_18_Weights,
    R3D_18_Weights,
    S3D_Weights,
    r2plus1d_18,
    r3d_18,
    s3d,
    swin3d_b,
    swin3d_s,
    swin3d_t,
)
from torchvision.models.video.swin_transformer import SwinTransformer3d
from torchvision.ops import StochasticDepth

from common.backbones import (
    BLOCKS,
    NAMES,
    Adapter,
    Block,
    Gate,
    Padded,
    Shift,
    Subsampled,
    avoid_onednn_faults,
    build,
)
from common.errors import UserError
from common.io.weights import PUBLISHED, fetch, published_input
from common.modality import Recipe

SLOW = [name for name in NAMES if name.startswith("resnet3d")]
R3D = [name for name in NAMES if name.startswith("r3d_")]
TINY = ["resnet3d10", "resnet3d50", "resnet3d10-small", "r3d_10", "r3d_10-pool"]  # quick to compute
TINY += ["i3d10", "i3d10-small", "tsm10", "tsm50-small", "tsn10", "r2plus1d_10", "r2plus1d_10-pool"]


def tiny(name="resnet3d10", classes=5, width=1 / 16, seed=0, **more):
    torch.manual_seed(seed)
    return build(name, classes, width=width, **more)


def alike(found, wanted):
    """Whether tensors are the same up to the rounding of float32."""
    return all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(found, wanted, strict=True))


def parameters(net):
    return sum(p.numel() for p in net.parameters())


def clips(B=2, C=3, T=4, S=32, seed=0):
    return torch.randn(B, C, T, S, S, generator=torch.Generator().manual_seed(seed))


def randomise_batch_norms(net):
    """Other than the start's zeros and ones, which would hide what a batch norm does."""
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm3d)):
            for tensor in (m.weight, m.bias, m.running_mean, m.running_var):
                nn.init.uniform_(tensor, 0.2, 1.5)


def kernel(net):
    """The weight of the first convolution."""
    return net.state_dict()[net.FIRST]


def macs(net, size, frames=8):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.empty(1, 3, frames, size, size, device="meta"))
    return counter.get_total_flops() / 2


# ---------------------------------------------------------------------------------- architecture


def test_r50_has_the_published_parameters_and_operations():
    """PySlowFast's model zoo, Slow 8x8 R50, Kinetics-400: 32.45 M, 54.52 G multiply-adds at 256."""
    with torch.device("meta"):
        net = build("resnet3d50", 400)
    assert parameters(net) == 32_454_096
    assert macs(net, 256) == pytest.approx(54.52e9, rel=0.001)


@pytest.mark.parametrize("depth, millions", [(10, 8.06), (18, 20.23), (34, 39.77), (101, 60.36)])
def test_depths(depth, millions):
    with torch.device("meta"):
        net = build(f"resnet3d{depth}", 400)
    assert parameters(net) / 1e6 == pytest.approx(millions, abs=0.005)
    # Convolutions that a layer name counts: the stem, those in the branches, and the last layer.
    branches = sum(isinstance(m, nn.Conv3d) for n, m in net.named_modules() if ".shortcut" not in n)
    assert branches + 1 == depth


def test_r3d_18_has_torchvisions_tensors_and_operations():
    """torchvision documents 33,371,472 parameters and 40.70 GFLOPS (multiply-adds) for 16x112x112."""
    meta = R3D_18_Weights.KINETICS400_V1.meta
    with torch.device("meta"):
        net, theirs = build("r3d_18", 400), r3d_18(weights=None)
        pooled = build("r3d_18-pool", 400)
    assert parameters(net) == meta["num_params"] == 33_371_472
    shapes = [(k, v.shape) for k, v in theirs.state_dict().items()]
    assert [(k, v.shape) for k, v in net.state_dict().items()] == shapes
    assert [(k, v.shape) for k, v in pooled.state_dict().items()] == shapes
    assert macs(net, 112, frames=16) == pytest.approx(meta["_ops"] * 1e9, rel=1e-4)
    # The pool leaves a quarter of the work to the stages.
    others = 64 * 3 * 3 * 7 * 7 * 8 * 112 * 112 + 512 * 400  # stem and last layer
    assert macs(net, 224) - others == 4 * (macs(pooled, 224) - others)


@pytest.mark.parametrize("depth, millions", [(10, 14.57), (18, 33.37), (34, 63.68)])
@pytest.mark.parametrize("suffix", ["", "-pool"])
def test_depths_of_r3d(depth, millions, suffix):
    with torch.device("meta"):
        net = build(f"r3d_{depth}{suffix}", 400)
    assert parameters(net) / 1e6 == pytest.approx(millions, abs=0.005)
    convs = sum(isinstance(m, nn.Conv3d) for n, m in net.named_modules() if ".downsample" not in n)
    assert convs + 1 == depth


@pytest.mark.parametrize("name", ["r3d_10", "r3d_18", "r3d_34", "r2plus1d_18"])
def test_r3d_with_pool_has_the_published_sizes(name):
    """Learning from Temporal Gradient, Table 4, L = 8 frames of 224: conv1, then conv2 to conv5."""
    with torch.device("meta"):
        net, x = build(f"{name}-pool", 400), torch.empty(1, 3, 8, 224, 224)
        sizes = [tuple(f.shape[1:]) for f in [net.pool(net.stem(x)), *net.features(x)]]
    assert sizes == [(64, 8, 56, 56), (64, 8, 56, 56), (128, 4, 28, 28), (256, 2, 14, 14), (512, 1, 7, 7)]


def test_r3d_18_computes_what_torchvision_computes():
    torch.manual_seed(0)
    theirs, x = r3d_18(weights=None, num_classes=5).eval(), clips(1)
    randomise_batch_norms(theirs)
    net = build("r3d_18", 5).eval()
    net.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        y, want = theirs.stem(x), []
        for stage in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
            want.append(y := stage(y))
        assert alike(net.features(x), want)
        # Their average is AdaptiveAvgPool3d: another order of the sum.
        assert torch.allclose(net(x), theirs(x), rtol=1e-5, atol=1e-6 * theirs(x).abs().max())


def test_r2plus1d_18_has_torchvisions_tensors_and_operations():
    """torchvision documents 31,505,325 parameters and 40.52 GFLOPS (multiply-adds) for 16x112x112."""
    meta = R2Plus1D_18_Weights.KINETICS400_V1.meta
    with torch.device("meta"):
        net, theirs = build("r2plus1d_18", 400), r2plus1d_18(weights=None)
        pooled = build("r2plus1d_18-pool", 400)
    assert parameters(net) == meta["num_params"] == 31_505_325
    shapes = [(k, v.shape) for k, v in theirs.state_dict().items()]
    assert [(k, v.shape) for k, v in net.state_dict().items()] == shapes
    assert [(k, v.shape) for k, v in pooled.state_dict().items()] == shapes
    assert macs(net, 112, frames=16) == pytest.approx(meta["_ops"] * 1e9, rel=1e-4)


@pytest.mark.parametrize("depth, width, c_in", [(10, 1, 3), (34, 1, 3), (18, 1 / 2, 10), (10, 1 / 64, 3)])
def test_depths_and_widths_of_r2plus1d(depth, width, c_in):
    """Section 3.5 of the paper: a block's M gives two convolutions the parameters of the 3D one."""
    with torch.device("meta"):
        net = build(f"r2plus1d_{depth}", 400, in_channels=c_in, width=width)
    a, M = int(64 * width), round(45 * width)
    count = c_in * M * 49 + 2 * M + M * a * 3 + 2 * a
    for i, blocks in enumerate(BLOCKS[depth]):
        for _ in range(blocks):
            b = int(64 * width) * 2**i
            M = 27 * a * b // (9 * a + 3 * b)
            for c in (a, b):
                count += c * M * 9 + 2 * M + M * b * 3 + 2 * b
            count += a * b + 2 * b if a != b else 0
            a = b
    assert parameters(net) == count + a * 400 + 400


def test_r2plus1d_18_starts_as_torchvisions_and_computes_what_it_computes():
    torch.manual_seed(3)
    theirs, x = r2plus1d_18(weights=None, num_classes=5).eval(), clips(1)
    torch.manual_seed(3)
    net = build("r2plus1d_18", 5).eval()
    assert same(net, theirs)
    randomise_batch_norms(theirs)
    net.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        want = theirs(x)
        assert torch.allclose(net(x), want, rtol=1e-5, atol=1e-6 * want.abs().max())


def test_names():
    assert len({*NAMES}) == len(NAMES) == 56
    assert {"tsm50", "tsm101", "tsn50", "i3d50", "tsm18-small", "i3d10-small"} <= {*NAMES}
    assert {"r2plus1d_34", "r2plus1d_10-pool", "s3dg", "swin3d_t", "swin3d_s", "swin3d_b"} <= {*NAMES}


def test_i3d_r50_has_the_published_parameters():
    """28.04 M in PySlowFast's and PyTorchVideo's tables; and counted here from PySlowFast's kernels."""
    with torch.device("meta"):
        net = build("i3d50", 400)
    count = 64 * 3 * 5 * 7 * 7 + 2 * 64
    c_in, frames = 64, ([3, 3, 3], [3, 1, 3, 1], [3, 1, 3, 1, 3, 1], [1, 3, 1])
    for c, kernels in zip((64, 128, 256, 512), frames, strict=True):
        for i, T in enumerate(kernels):
            count += c_in * c * T + c * c * 9 + c * 4 * c + 2 * (c + c + 4 * c)
            count += c_in * 4 * c + 2 * 4 * c if i == 0 else 0
            c_in = 4 * c
    assert parameters(net) == count + 2048 * 400 + 400 == 28_043_472


@pytest.mark.parametrize("name", ["i3d50", "i3d101", "i3d18"])
def test_i3d_sees_time_by_turns(name):
    with torch.device("meta"):
        net = build(name, 7)
    assert net.stem.conv.kernel_size == (5, 7, 7) and net.stem.conv.padding == (2, 3, 3)
    turns = {"res2": (3, 3), "res3": (3, 1), "res4": (3, 1), "res5": (1, 3)}
    for layer, conv in net.named_modules():
        if isinstance(conv, nn.Conv3d) and layer != "stem.conv":
            stage, block, part, _ = layer.split(".")
            want = turns[stage][int(block) % 2] if part == "conv1" else 1
            assert conv.kernel_size[0] == want and conv.stride[0] == 1, layer
            assert conv.padding[0] == want // 2


def test_tsm_r50_has_torchvisions_tensors_and_operations():
    """24.3 M parameters with 400 classes; 33 G multiply-adds for 8 frames, eight times a picture's."""
    meta = ResNet50_Weights.IMAGENET1K_V1.meta
    with torch.device("meta"):
        theirs = resnet50()
        for net in (build("tsm50", 1000), build("tsn50-small", 1000)):
            shapes = [(k, v.shape) for k, v in theirs.state_dict().items()]
            assert [(k, v.shape) for k, v in net.state_dict().items()] == shapes
        net = build("tsm50", 1000)
        assert parameters(net) == meta["num_params"] and parameters(build("tsm50", 400)) == 24_327_632
    assert macs(net, 224) == pytest.approx(8 * meta["_ops"] * 1e9, rel=1e-3)


@pytest.mark.parametrize("depth", BLOCKS)
def test_depths_of_tsm(depth):
    with torch.device("meta"):
        net = build(f"tsm{depth}", 400)
        theirs = getattr(torchvision.models, f"resnet{depth}", lambda **_: None)(num_classes=400)
    convs = sum(isinstance(m, nn.Conv2d) for n, m in net.named_modules() if ".downsample" not in n)
    assert convs + 1 == depth
    assert depth == 10 or net.state_dict().keys() == theirs.state_dict().keys()


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


@pytest.mark.parametrize("name, model, T, every", [
    ("tsm50", resnet50, 3, 1), ("tsm18", resnet18, 1, 1), ("tsm101", resnet101, 3, 2),
])  # fmt: skip
def test_tsm_is_torchvisions_resnet_with_shifted_first_convolutions(name, model, T, every):
    """Nothing of torchvision's own forward pass is replaced: a hook shifts what conv1 of a block gets.

    As in the code of TSM: of every block, or with 23 blocks in a stage of blocks 0, 2, 4, ... of each stage.
    """
    torch.manual_seed(0)
    theirs, x = model(num_classes=5).double().eval(), clips(2, T=T).double()
    torch.manual_seed(0)
    net = build(name, 5).double().eval()
    assert same(net, theirs, skip=["fc."])  # how both start
    assert net.fc.weight.std().item() == pytest.approx(0.001, rel=0.05) and not net.fc.bias.any()
    randomise_batch_norms(theirs)
    net.load_state_dict(theirs.state_dict())
    for block in [block for i in range(1, 5) for block in getattr(theirs, f"layer{i}")[::every]]:
        block.conv1.register_forward_pre_hook(lambda module, inputs: (shift_by_hand(inputs[0]),))
    with torch.no_grad():
        want = torch.stack([theirs(clip.transpose(0, 1)).mean(0) for clip in x])
        assert torch.allclose(net(x), want, rtol=1e-9, atol=1e-9 * want.abs().max())


def test_tsn_is_torchvisions_resnet_on_each_frame():
    torch.manual_seed(0)
    theirs, x = resnet18(num_classes=5).eval(), clips(2, T=3)
    net = build("tsn18", 5).eval()
    net.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        want = torch.stack([theirs(clip.transpose(0, 1)).mean(0) for clip in x])
        assert torch.allclose(net(x), want, atol=1e-5)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last_3d])
def test_shift_moves_an_eighth_each_way_and_so_does_its_gradient(memory):
    x = torch.arange(2 * 3 * 17.0).view(2, 3, 17, 1, 1).expand(-1, -1, -1, 2, 2)
    x = x.transpose(1, 2).contiguous(memory_format=memory).transpose(1, 2).double().requires_grad_()
    y = Shift.apply(x, True)
    assert y.stride() == x.stride()
    assert all(torch.equal(a, shift_by_hand(b)) for a, b in zip(y, x, strict=True))
    assert torch.autograd.gradcheck(lambda x: Shift.apply(x, True), x)
    assert not Shift.apply(torch.ones(1, 1, 16, 1, 1), True)[:, :, :4].any()


@pytest.mark.parametrize("name", ["tsm10", "tsm50"])
def test_the_shortcut_of_tsm_is_not_shifted(name):
    """Without its branch a block gives back what it got; with the shift before it, it would not."""
    net, x = tiny(name, width=1 / 4).eval(), clips(2, T=3)
    for block in net.layer4:
        last = block.bn3 if name == "tsm50" else block.bn2
        nn.init.zeros_(last.weight)
    *_, before, after = net.features(x)
    shortcut = net.layer4[0].downsample
    want = shortcut(before.transpose(1, 2).flatten(0, 1)).relu().unflatten(0, (2, 3)).transpose(1, 2)
    assert alike([after], [want])


def test_frames_of_tsm_see_one_frame_further_with_each_block():
    x, y = clips(1, T=12), clips(1, T=12)
    y[:, :, 6] = 0
    for name, reach in (("tsm10", 4), ("tsn10", 0)):
        net = tiny(name, width=1 / 4).eval()
        changed = (net.features(x)[-1] != net.features(y)[-1]).any(1).any((2, 3))[0]
        assert changed.tolist() == [abs(t - 6) <= reach for t in range(12)]


def test_consensus_drops_for_each_frame_apart():
    net = tiny("tsm10", classes=32, dropout=0.5).train()
    nn.init.eye_(net.fc.weight)
    logits = net.classify(torch.ones(64, 32, 4, 1, 1))  # (B, K): twice the share of frames that kept k
    assert {*logits.flatten().tolist()} == {0, 0.5, 1, 1.5, 2}
    assert logits.mean().item() == pytest.approx(1, abs=0.05)


def test_tsm_compiles_without_a_break():
    net, x = tiny("tsm10-small", width=1 / 4).eval(), clips(1)
    assert alike([torch.compile(net, backend="eager", fullgraph=True)(x)], [net(x)])


def test_s3dg_is_torchvisions_s3d_and_its_gates():
    """8,320,048 parameters, documented; a gate of C channels has C^2 + C; 17.98 G multiply-adds."""
    meta = S3D_Weights.KINETICS400_V1.meta
    with torch.device("meta"):
        net, theirs = build("s3dg", 400), s3d(weights=None)
    state = net.state_dict()
    shapes = [v.shape for k, v in state.items() if ".gate." not in k and not k.startswith("fc.")]
    assert shapes == [v.shape for k, v in theirs.state_dict().items() if k.startswith("features.")]
    gates = {n: m.weight.shape[0] for n, m in net.named_modules() if isinstance(m, Gate)}
    blocks = [(2, 5), (2, 6), *[(3, n) for n in range(8, 13)], (4, 14), (4, 15)]
    branches = [f"layer{i}.{n}.branch{b}.gate" for i, n in blocks for b in range(4)]
    assert [*gates] == ["layer1.3.gate", *branches] and net.fc.weight.shape == (400, 1024)
    assert parameters(net) == meta["num_params"] + sum(C * C + C for C in gates.values()) == 9_545_056
    assert macs(net, 224, frames=16) == pytest.approx(meta["_ops"] * 1e9, rel=1e-3)
    assert {m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm3d)} == {0.1}


def test_s3dg_computes_what_torchvisions_s3d_computes(tmp_path, capsys):
    """With the gates at rest, for the one size of which torchvision's pool is the average of all."""
    torch.manual_seed(0)
    theirs, x = s3d(weights=None, num_classes=5).eval(), clips(1, T=16, S=224)
    randomise_batch_norms(theirs)
    torch.save(theirs.state_dict(), tmp_path / "s3d.pth")
    net = build("s3dg", 5, weights=tmp_path / "s3d.pth").eval()
    assert capsys.readouterr().out == ""
    want = []
    for n in (3, 6, 12, 15):
        theirs.features[n].register_forward_hook(lambda module, inputs, y: want.append(y))
    with torch.no_grad():
        logits, found = theirs(x), net.features(x)
        assert alike(found, want)
        assert torch.allclose(net.classify(found[-1]), logits, rtol=1e-5, atol=1e-6 * logits.abs().max())


def test_gate_equals_a_value_worked_by_hand():
    gate = Gate(2)
    x = torch.tensor([[[2.0, 6], [3, 5]], [[1, 3], [-2, 2]]])[None, :, :, None]  # means 4 and 1
    assert torch.equal(gate(x), x)
    x_last = torch.rand(2, 2, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d)
    assert gate(x_last).stride() == x_last.stride()
    with torch.no_grad():
        gate.weight[0, 1] = math.log(3)  # 2 sigmoid(log(3) 1) = 2 * 3/4
        gate.bias[1] = -math.log(3)  # 2 sigmoid(-log 3) = 2 * 1/4
    y = gate(torch.cat([x, 0 * x + 1, -x]))
    assert torch.allclose(y[0, :, :, 0], torch.tensor([[[3.0, 9], [4.5, 7.5]], [[0.5, 1.5], [-1, 1]]]))
    assert torch.allclose(y[1], torch.tensor([1.5, 0.5])[:, None, None, None].expand(2, 2, 1, 2))
    assert torch.allclose(y[2, 0], -x[0, 0] / 2)  # 2 sigmoid(log(3) (-1)): each clip has its own mean


def test_gates_act_on_the_ends_of_the_branches():
    net = tiny("s3dg", width=1 / 4).eval()
    block, x = net.layer2[1], torch.rand(1, 48, 2, 3, 3)
    want, ends = block(x), [0, 16, 48, 56, 64]  # a quarter of 64, 128, 32, 32
    for b, branch in enumerate(block.children()):
        nn.init.constant_(branch.gate.bias, 50)  # 2 sigmoid(50) = 2
        factor = torch.ones(64)
        factor[ends[b] : ends[b + 1]] = 2
        assert torch.allclose(block(x), want * factor[:, None, None, None])
        nn.init.zeros_(branch.gate.bias)
    x = clips(1, T=5)
    want = net.features(x)[0]
    nn.init.constant_(net.layer1[3].gate.bias, 50)
    assert torch.allclose(net.features(x)[0], 2 * want) and want.any()


@pytest.mark.parametrize("name, model", [("t", swin3d_t), ("s", swin3d_s), ("b", swin3d_b)])
def test_swin3d_has_torchvisions_tensors(name, model):
    """Documented: 28,158,070, 49,816,678, 88,048,984 parameters; for t 43.88 G multiply-adds of 16 frames."""
    meta = PUBLISHED["kinetics"][f"swin3d_{name}"].meta
    with torch.device("meta"):
        net, theirs = build(f"swin3d_{name}", 400), model()
    assert parameters(net) == meta["num_params"]
    assert [v.shape for v in net.state_dict().values()] == [v.shape for v in theirs.state_dict().values()]
    depths = [[m.p for m in n.modules() if isinstance(m, StochasticDepth)] for n in (net, theirs)]
    assert depths[0] == depths[1] and depths[0][-1] == 0.1
    if name == "t":
        assert macs(net.eval(), 224, frames=16) == pytest.approx(meta["_ops"] * 1e9, rel=1e-3)


def tiny_swin():
    """torchvision's transformer as its swin3d_t has them, with a third of the heads."""
    torch.manual_seed(3)
    sizes = dict(embed_dim=32, depths=[2, 2, 6, 2], num_heads=[1, 2, 4, 8], window_size=[8, 7, 7])
    return SwinTransformer3d([2, 4, 4], **sizes, num_classes=5).eval()


@pytest.mark.parametrize("T, H, W", [(18, 40, 36), (1, 32, 32)])
def test_swin3d_starts_as_torchvisions_and_computes_what_it_computes(T, H, W, tmp_path, capsys):
    """Windows larger and smaller than the clip, the last of one token."""
    theirs, x = tiny_swin(), torch.randn(1, 3, T, H, W, generator=torch.Generator().manual_seed(0))
    net, want = tiny("swin3d_t", width=1 / 3, seed=3, dropout=0.5).eval(), []
    for n in (0, 2, 4, 6):
        theirs.features[n].register_forward_hook(lambda module, inputs, y: want.append(y))
    with torch.no_grad():
        logits, found = theirs(x), net.features(x)
        want[3] = theirs.norm(want[3])
        assert alike(found, [b.permute(0, 4, 1, 2, 3) for b in want])
        sides = [(-(-H // s), -(-W // s)) for s in (4, 8, 16, 32)]
        sizes = [(1, 32 * 2**i, -(-T // 2), *side) for i, side in enumerate(sides)]
        assert [f.shape for f in found] == sizes
        assert torch.allclose(net(x), logits, atol=1e-6) and torch.equal(net(x), net.classify(found[-1]))
        assert torch.allclose(net.fc(net.embed(x)), logits, atol=1e-6)
        torch.save(theirs.state_dict(), tmp_path / "swin.pth")
        loaded = tiny("swin3d_t", width=1 / 3, weights=tmp_path / "swin.pth").eval()
        assert torch.equal(loaded(x), net(x)) and not loaded.new_fc and capsys.readouterr().out == ""
    flow = tiny("swin3d_t", 7, width=0.333, in_channels=10, weights=tmp_path / "swin.pth")
    assert flow.new_fc and same(flow, net, skip=["fc.", flow.FIRST]) and flow(clips(C=10)).shape == (2, 7)
    mean = theirs.patch_embed.proj.weight.mean(1)
    assert all(torch.allclose(kernel(flow)[:, c], mean, atol=1e-7) for c in range(10))


@pytest.mark.parametrize("name", ["resnet3d18", "resnet3d50", "r3d_18", "i3d50", "tsm18", "tsm50", "s3dg"])
def test_width_acts_on_every_layer(name):
    with torch.device("meta"):
        whole = build(name, 400)
        for width in (1 / 2, 1 / 4, 1 / 8):
            net = build(name, 400, width=width)
            ratio = (parameters(net) - parameters(net.fc)) / (parameters(whole) - parameters(whole.fc))
            assert ratio == pytest.approx(width**2, rel=0.06)
            for thin, thick in zip(net.parameters(), whole.parameters(), strict=True):
                if thick.shape[0] != 400:
                    assert thin.shape[0] == thick.shape[0] * width
        assert len(kernel(build(name, 400, width=0.3))) == 19


@pytest.mark.parametrize("name", SLOW)
def test_time_is_seen_in_the_last_two_stages_and_never_strided(name):
    with torch.device("meta"):
        net = build(name, 7)
    for layer, conv in net.named_modules():
        if isinstance(conv, nn.Conv3d):
            assert conv.stride[0] == 1
            temporal = layer.startswith(("res4", "res5")) and layer.endswith("conv1.conv")
            assert conv.kernel_size[0] == (3 if temporal else 1), layer


@pytest.mark.parametrize("name", R3D)
def test_r3d_sees_time_everywhere_and_strides_it_as_space(name):
    with torch.device("meta"):
        net = build(name, 7)
    strided = {f"layer{i}.0.{part}" for i in (2, 3, 4) for part in ("conv1.0", "downsample.0")}
    for layer, conv in net.named_modules():
        if isinstance(conv, nn.Conv3d) and layer != "stem.0":
            assert conv.stride == ((2, 2, 2) if layer in strided else (1, 1, 1)), layer
            assert conv.kernel_size == ((1, 1, 1) if "downsample" in layer else (3, 3, 3)), layer
    assert net.stem[0].kernel_size == (3, 7, 7) and net.stem[0].stride == (1, 2, 2)


def test_frames_mix_only_through_temporal_kernels():
    """Without them (res2, res3) a frame's features do not depend on the other frames."""
    net, x = tiny().eval(), clips(1)
    for block in (m for m in net.modules() if isinstance(m, Block)):
        nn.init.ones_((block.conv3 or block.conv2).bn.weight)
    other = x.clone()
    other[:, :, 3] = 0
    pairs = zip(net.features(x), net.features(other), strict=True)
    same = [torch.equal(a[:, :, :3], b[:, :, :3]) for a, b in pairs]
    assert same == [True, True, False, False]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("T, S", [(8, 64), (1, 32), (5, 40)])
def test_contract(name, T, S):
    net, x = tiny(name).eval(), clips(2, T=T, S=S)
    features, z = net.features(x), net.embed(x)
    r3d = name.startswith(("r3d_", "r2plus1d_"))
    side = S // 2 if name.endswith("-small") or r3d and not name.endswith("-pool") else S // 4
    c = 4 * 4 if "50" in name else 4
    assert len(features) == 4
    for i, f in enumerate(features):
        assert f.shape == (2, c * 2**i, T, side, side)
        side = -(-side // 2)
        if r3d or name.startswith("i3d") and i == 0:
            T = -(-T // 2)
    assert z.shape == (2, c * 8) == (2, net.fc.in_features)
    assert torch.allclose(z, features[-1].mean((2, 3, 4)))
    assert torch.allclose(net(x), net.fc(z), atol=1e-6)
    assert torch.equal(net(x), net.classify(features[-1]))
    assert net(x).shape == (2, 5)


S3DG_SIZES = {
    (8, 112): [(12, 4, 28, 28), (30, 4, 14, 14), (52, 2, 7, 7), (64, 1, 3, 3)],
    (16, 48): [(12, 8, 12, 12), (30, 8, 6, 6), (52, 4, 3, 3), (64, 2, 1, 1)],
    (5, 17): [(12, 3, 5, 5), (30, 3, 3, 3), (52, 2, 2, 2), (64, 1, 1, 1)],
}


@pytest.mark.parametrize("T, S", S3DG_SIZES)
def test_contract_of_s3dg(T, S):
    net, x = tiny("s3dg").eval(), clips(2, T=T, S=S)
    features, z = net.features(x), net.embed(x)
    assert [tuple(f.shape[1:]) for f in features] == S3DG_SIZES[T, S]
    assert z.shape == (2, net.fc.in_features) and torch.allclose(z, features[-1].mean((2, 3, 4)))
    assert torch.allclose(net(x), net.fc(z), atol=1e-6) and net(x).shape == (2, 5)
    assert torch.equal(net(x), net.classify(features[-1]))


@pytest.mark.parametrize("T, H, W", [(4, 32, 32), (8, 16, 32), (8, 32, 16)])
def test_s3dg_refuses_a_clip_that_is_too_small(T, H, W):
    net = tiny("s3dg").eval()
    with pytest.raises(UserError, match=f"5 frames and 17 x 17 pixels at least, not {T} of {H} x {W}$"):
        net(torch.zeros(1, 3, T, H, W))


def test_the_thinnest_s3dg_has_channels():
    assert tiny("s3dg", width=1 / 64).eval()(clips(1, T=5)).shape == (1, 5)


@pytest.mark.parametrize("name", ["resnet3d10", "r3d_10", "r3d_10-pool", "i3d10", "tsm10"])
def test_memory_format_does_not_change_the_result(name):
    net, x = tiny(name, width=1 / 4).eval(), clips()
    want, flat = net(x), name.startswith("tsm")
    net.to(memory_format=torch.channels_last if flat else torch.channels_last_3d)
    assert torch.allclose(net(x), want, atol=1e-5)
    # The memory of every frame stays that of the weights: nothing is copied to another order on the way.
    for f in net.features(x):
        assert f.is_contiguous(memory_format=torch.channels_last_3d)


def naive_conv(x, weight, stride=1):
    """Convolution of one clip (C, T, H, W) with zero padding to the same size, number by number."""
    K = weight.shape[2:]
    _, T, H, W = x.shape
    y = torch.zeros(len(weight), T, -(-H // stride), -(-W // stride), dtype=x.dtype)
    for t in range(T):
        for h in range(y.shape[2]):
            for w in range(y.shape[3]):
                for dt in range(K[0]):
                    for dh in range(K[1]):
                        for dw in range(K[2]):
                            a, b = t + dt - K[0] // 2, h * stride + dh - K[1] // 2
                            c = w * stride + dw - K[2] // 2
                            if 0 <= a < T and 0 <= b < H and 0 <= c < W:
                                y[:, t, h, w] += weight[:, :, dt, dh, dw] @ x[:, a, b, c]
    return y


@pytest.mark.parametrize("bottleneck", [True, False])
def test_block_equals_a_naive_loop(bottleneck):
    """Tx1x1, 1x3x3 with the stride, 1x1x1 (or Tx3x3 with the stride, 1x3x3) plus the projection."""
    torch.manual_seed(0)
    block = Block(3, 4, 6, 3, 2, bottleneck).double().eval()
    randomise_batch_norms(block)
    x = torch.randn(3, 4, 5, 6, dtype=torch.double)

    def layer(y, conv_bn, stride):
        bn = conv_bn.bn
        y = naive_conv(y, conv_bn.conv.weight.detach(), stride)
        scale = bn.weight / (bn.running_var + 1e-5).sqrt()
        return ((y.movedim(0, -1) - bn.running_mean) * scale + bn.bias).movedim(-1, 0).detach()

    strides = {"conv1": 1, "conv2": 2, "conv3": 1} if bottleneck else {"conv1": 2, "conv2": 1}
    y = x
    for i, (name, stride) in enumerate(strides.items()):
        y = layer(y.clamp(min=0) if i else y, getattr(block, name), stride)
    want = (y + layer(x, block.shortcut, 2)).clamp(min=0)
    assert want.shape == (6, 4, 3, 3)
    assert torch.allclose(block(x[None])[0], want)


# --------------------------------------------------------------------------------------- adapter


def test_adapter_gives_back_what_it_gets_and_then_its_formula():
    torch.manual_seed(0)
    adapter, z = Adapter(6, 3, dropout=0.5).requires_grad_(False), torch.randn(4, 6)
    assert torch.equal(adapter(z), z)
    nn.init.normal_(adapter.up.weight)
    nn.init.normal_(adapter.up.bias)
    (W, a), (V, b) = ((layer.weight, layer.bias) for layer in (adapter.down, adapter.up))
    hidden = [[sum(W[j, d] * z[i, d] for d in range(6)) + a[j] for j in range(3)] for i in range(4)]
    for i, row in enumerate(adapter.change(z)):
        for d in range(6):
            want = b[d] + sum(V[d, j] * h / (1 + math.exp(-h)) for j, h in enumerate(hidden[i]))
            assert row[d].item() == pytest.approx(want.item(), abs=1e-5)
    added, change = adapter(z) - z, adapter.change(z)
    kept = torch.isclose(added, 2 * change, atol=1e-6)
    assert torch.equal(kept, added != 0) and 0 < kept.sum() < kept.numel()
    assert torch.allclose(adapter.eval()(z), z + change)


@pytest.mark.parametrize("name", ["resnet3d10", "r3d_10", "tsm10", "s3dg"])
def test_network_with_an_adapter(name):
    """For one seed it starts as the network without; the mean over time is before the adapter in all."""
    x, plain, net = clips(T=5), tiny(name).eval(), tiny(name, adapter=7).eval()
    D = net.fc.in_features
    shapes = {"down.weight": (7, D), "down.bias": (7,), "up.weight": (D, 7), "up.bias": (D,)}
    assert {k: v.shape for k, v in net.adapter.state_dict().items()} == shapes
    assert net.state_dict().keys() - plain.state_dict().keys() == {f"adapter.{key}" for key in shapes}
    assert not any("adapter" in key for key in plain.state_dict()) and same(plain, net)
    assert torch.allclose(net(x), plain(x), atol=1e-6)
    net.freeze(4)(x).log_softmax(1)[:, 0].sum().backward()
    assert net.adapter.up.weight.grad.any() and net.adapter.up.bias.grad.any() and net.fc.weight.grad.any()
    for p in net.adapter.parameters():
        nn.init.normal_(p)
    z = net.embed(x)
    want = net.fc(z + net.adapter.up(nn.functional.silu(net.adapter.down(z))))
    assert torch.allclose(net(x), want, atol=1e-5) and torch.equal(net.head(z), net.fc(net.adapter(z)))
    assert not torch.allclose(want, plain(x), atol=1e-2)


def test_head_drops_before_the_last_layer_and_the_adapter_nothing():
    net = tiny(classes=32, dropout=0.5, adapter=4).train()
    nn.init.eye_(net.fc.weight)
    nn.init.ones_(net.adapter.up.bias)
    assert {*net.head(torch.ones(9, 32)).flatten().tolist()} == {0, 4}


# -------------------------------------------------------------------------------- initialisation


@pytest.mark.parametrize("name", ["resnet3d10", "r3d_10", "i3d10", "tsm10"])
def test_build_follows_the_seed(name):
    first, again, other = tiny(name, seed=1), tiny(name, seed=1), tiny(name, seed=2)
    for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(kernel(first), kernel(other))


def test_initialisation_is_slowfasts():
    net = tiny("resnet3d50", classes=400, width=0.25)
    std = net.res4[1].conv1.conv.weight.std().item()
    assert std == pytest.approx((2 / (3 * 64)) ** 0.5, rel=0.05)  # fan out: 64 channels, 3 frames
    assert net.fc.weight.std().item() == pytest.approx(0.01, rel=0.05) and not net.fc.bias.any()


def test_r3d_starts_as_torchvisions():
    """He normal by fan out, every batch norm 1 and 0, last layer std 0.01: all their numbers."""
    torch.manual_seed(3)
    theirs = r3d_18(weights=None)
    torch.manual_seed(3)
    assert same(build("r3d_18", 400), theirs)


@pytest.mark.parametrize("name", ["resnet3d10", "resnet3d50"])
def test_a_block_starts_as_its_shortcut(name):
    net, x = tiny(name), clips()
    for stage, before in zip((net.res3, net.res4, net.res5), net.features(x), strict=False):
        assert torch.allclose(stage[0](before), stage[0].shortcut(before).relu())
        for block in stage[1:]:
            x = torch.rand(2, block.conv1.conv.in_channels, 2, 3, 3)
            assert torch.equal(block(x), x)


def test_gates_learn_from_the_start():
    net = tiny("s3dg", width=1 / 4).train()
    net(clips(4, T=5)).log_softmax(1)[:, 0].sum().backward()
    gates = [m for m in net.modules() if isinstance(m, Gate)]
    assert len(gates) == 37 and all(m.weight.grad.any() and m.bias.grad.any() for m in gates)


@pytest.mark.parametrize("T", range(1, 10))
@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (5, 2), (7, 1)])
def test_a_clip_padded_before_a_convolution_changes_nothing(T, kernel, stride):
    conv = nn.Conv3d(2, 3, (kernel, 3, 1), (stride, 1, 2), (kernel // 2, 1, 0)).double()
    x = clips(2, 2, T, 6)
    found = gradients(conv, x)
    avoid_onednn_faults(conv)
    assert isinstance(conv, Padded) == (kernel == 7 and stride == 2)
    assert alike(gradients(conv, x), found)


@pytest.mark.parametrize(
    ("channels", "kernel", "stride"), [(4, 1, 2), (15, 1, (1, 3)), (16, 1, 2), (4, 3, 2), (4, 1, 1)]
)
def test_a_stride_taken_before_a_convolution_changes_nothing(channels, kernel, stride):
    conv = nn.Conv2d(channels, 5, kernel, stride).double()
    x = clips(2, channels, 1, 11)[:, :, 0].to(memory_format=torch.channels_last)
    found = gradients(conv, x)
    avoid_onednn_faults(conv)
    assert isinstance(conv, Subsampled) == (channels < 16 and kernel == 1 and stride != 1)
    assert alike(gradients(conv, x), found)


def gradients(conv, x):
    """[output, gradients of the input and of the parameters] in float64, which oneDNN has not."""
    x = x.double().requires_grad_()
    y = conv(x)
    return [y, *torch.autograd.grad((y * y).sum(), [x, *conv.parameters()])]


TRAINS = """
import sys, torch
from common import backbones
torch.manual_seed(0)
net = backbones.build(sys.argv[1], 5, width=float(sys.argv[2])).eval()  # batch norm enlarges rounding
x = torch.randn(*map(int, sys.argv[3:]))
for p in net.parameters():
    p.data = p.data.contiguous(memory_format=torch.channels_last if p.dim() == 4 else torch.contiguous_format)
results = []
for enabled in (False, True, True):
    with torch.backends.mkldnn.flags(enabled=enabled):
        loss = net(x).log_softmax(1)[:, 0].mean()
        results.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, net.parameters())]))
own, *others = results
print(max(((own - other).abs().max() / own.abs().max()).item() for other in others) < 1e-5)
"""


@pytest.mark.parametrize(
    "case", [*(f"s3dg 0.25 2 3 {T} 32 32" for T in (5, 6, 7, 8)), "tsm10-small 0.0625 4 3 8 128 128"]
)
def test_no_convolution_reads_or_writes_where_it_must_not(case):
    """Gradients are right; under glibc's checking allocator, if it is installed, the process lives."""
    process = subprocess.run(
        [sys.executable, "-c", TRAINS, *case.split()],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"LD_PRELOAD": "libc_malloc_debug.so.0", "GLIBC_TUNABLES": "glibc.malloc.check=3"},
        capture_output=True,
        text=True,
    )
    assert process.stdout == "True\n", process.stderr


@pytest.mark.parametrize("name", [*TINY, "s3dg", "swin3d_b"])
def test_gradients_reach_every_parameter(name):
    """DistributedDataParallel needs one for each; after a step none is zero."""
    net = tiny(name, width=1 / 16 if name in TINY else 1 / 4).train()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(clips(4, T=5)).log_softmax(1)[:, 0].sum().backward()
        assert all(p.grad is not None for p in net.parameters())
        optimizer.step()
    assert [n for n, p in net.named_parameters() if not p.grad.any()] == []


@pytest.mark.parametrize("name", ["resnet3d10", "r3d_10", "tsm10", "s3dg"])
def test_dropout_is_for_training_only(name):
    net, x = tiny(name, dropout=0.5), clips(T=5)
    net.eval()
    assert torch.equal(net(x), tiny(name).eval()(x))
    z = net.embed(x)
    net.dropout.train()
    assert not torch.allclose(net(x), net.fc(z))
    assert torch.equal(net.embed(x), z)


@pytest.mark.parametrize("name", NAMES)
def test_epsilon_is_every_batch_norms(name):
    with torch.device("meta"):
        net = build(name, 5, bn_eps=2e-3)
    norms = [m for m in net.modules() if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm3d))]
    assert {m.eps for m in norms} == (set() if name.startswith("swin3d") else {2e-3}) and net.name == name


@pytest.mark.parametrize("name", ["resnet3d10", "r3d_10", "tsm10", "s3dg"])
def test_epsilon_where_none_is_given(name):
    eps = 1e-3 if name == "s3dg" else 1e-5
    for more in ({}, {"bn_eps": None}):
        net = tiny(name, **more)
        assert {m.eps for m in net.modules() if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm3d))} == {eps}


@pytest.mark.parametrize("name", ["resnet3d10", "r3d_10", "tsm10"])
def test_epsilon_changes_the_result(name):
    x = clips()
    assert torch.equal(tiny(name, bn_eps=1e-5).eval()(x), tiny(name).eval()(x))
    assert not torch.allclose(tiny(name, bn_eps=0.5).eval()(x), tiny(name).eval()(x))


def test_names_of_tensors_are_stable():
    """Files saved earlier are read by these names."""
    names = list(tiny("resnet3d50").state_dict())
    assert len(names) == 320 and names[0] == "stem.conv.weight" and names[-1] == "fc.bias"
    assert {"stem.bn.running_mean", "res2.0.shortcut.conv.weight", "res4.5.conv3.bn.weight"} <= {*names}
    assert "res5.0.conv2.bn.num_batches_tracked" in tiny().state_dict()
    assert tiny("resnet3d10-small").state_dict().keys() == tiny().state_dict().keys()


@pytest.mark.parametrize(
    "name, more, words",
    [
        ("resnet50", {}, "resnet3d50"),
        ("tsm152", {}, "tsm101"),
        ("tsm50-pool", {}, "tsm50-small"),
        ("resnet3d10", {"width": 0}, "width of 0"),
        ("resnet3d10", {"width": float("nan")}, "width of nan"),
        ("resnet3d10", {"dropout": 1.0}, "dropout of 1.0"),
        ("r3d_10-small", {}, "r3d_10-pool"),
        ("r3d_50", {}, "r3d_34"),
        ("r2plus1d_50", {}, "r2plus1d_34-pool"),
        ("s3dg-pool", {}, "s3dg, "),
        ("s3dg18", {}, "s3dg, "),
        ("swin3d_l", {}, "swin3d_b$"),
        ("swin3d_t", {"width": 0.25}, "width of 0.25 leaves swin3d 0.75 heads for 3"),
        ("swin3d_b", {"width": 0.3}, "1.2 heads for 4"),
        ("swin3d_s", {"width": 1.5}, "4.5 heads for 3"),
        ("resnet3d10", {"adapter": -1}, "adapter cannot have -1 units"),
        ("r3d_10", {"bn_eps": 0.0}, "epsilon of 0.0"),
        ("s3dg", {"bn_eps": 1.0}, "epsilon of 1.0"),
        ("resnet3d10", {"bn_eps": float("nan")}, "epsilon of nan"),
    ],
)
def test_impossible_networks_are_refused(name, more, words):
    with pytest.raises(UserError, match=words):
        build(name, 5, **more)


# -------------------------------------------------------------------------------------- freezing

LAYERS = [("layer2.",), ("layer3.",), ("layer4.",)]
STAGES = {
    "resnet3d10": [("stem.", "res2."), ("res3.",), ("res4.",), ("res5.",)],
    "i3d10": [("stem.", "res2."), ("res3.",), ("res4.",), ("res5.",)],
    "r3d_10-pool": [("stem.", "layer1."), *LAYERS],
    "r2plus1d_10-pool": [("stem.", "layer1."), *LAYERS],
    "tsm10": [("conv1.", "bn1.", "layer1."), *LAYERS],
    "tsn10-small": [("conv1.", "bn1.", "layer1."), *LAYERS],
    "s3dg": [("layer1.",), *LAYERS],
    "swin3d_b": [("patch_embed.", "layer1."), *LAYERS[:2], ("layer4.", "norm.")],
}


@pytest.mark.parametrize("stages", [0, 1, 2, 4])
@pytest.mark.parametrize("name", STAGES)
def test_frozen_stages_stay_and_the_others_learn(name, stages):
    net = tiny(name, width=1 / 4)
    randomise_batch_norms(net)  # a block whose last batch norm is 0 has no gradients
    assert net.freeze(stages) is net
    outer = nn.Sequential(net)  # as DistributedDataParallel has it, and as a test between steps leaves it
    outer.eval()
    assert not any(m.training for m in net.modules())
    outer.train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    outer(clips(4, T=5)).log_softmax(1)[:, 0].sum().backward()
    torch.optim.SGD(net.parameters(), 0.1, weight_decay=0.1).step()
    changed = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    rest = sum(STAGES[name][:stages], ())
    assert changed == {key for key in before if not key.startswith(rest) and "position_index" not in key}
    assert [n for n, p in net.named_parameters() if p.requires_grad == n.startswith(rest)] == []


def test_freezing_again_is_from_the_stem_on():
    net = tiny("resnet3d10").eval()
    net.freeze(3).freeze(1)
    assert not any(m.training for m in net.modules())  # as it was
    net.train()
    assert not net.res2.training and net.res3.training and net.res3[0].conv1.conv.weight.requires_grad
    net.freeze(0)
    assert all(p.requires_grad for p in net.parameters()) and all(m.training for m in net.modules())


@pytest.mark.parametrize("stages", [-1, 5, 1.5])
def test_stages_that_are_not_there_cannot_be_frozen(stages):
    with pytest.raises(UserError, match=f"^{stages} stages cannot be frozen: 0 to 4 can$"):
        tiny().freeze(stages)


# --------------------------------------------------------------------------------------- weights


def same(a, b, skip=()):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[k], b[k]) for k in a if not k.startswith(tuple(skip)))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", ["resnet3d10", "r3d_10"])
def test_weights_of_a_model_file_or_a_state_dict(tmp_path, name, prefix, whole, capsys):
    source = tiny(name, seed=1)
    state = {prefix + key: value for key, value in source.state_dict().items()}
    torch.save({"net": state, "name": name} if whole else state, tmp_path / "w.pt")
    net = tiny(name, seed=2, weights=tmp_path / "w.pt")
    assert same(net, source) and capsys.readouterr().out == ""


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


@pytest.mark.parametrize(
    "name, model, file",
    [
        ("r3d_18", r3d_18, "r3d_18-b3b3357e.pth"),
        ("r2plus1d_18-pool", r2plus1d_18, "r2plus1d_18-91a641e6.pth"),
    ],
)
def test_weights_of_torchvision(hub, name, model, file, capsys):
    """Their 400 classes and RGB as they are, then for 5 classes and 10 channels; "kinetics" is that file."""
    torch.manual_seed(1)
    theirs, path = model(weights=None), hub[0] / file
    torch.save(theirs.state_dict(), path)
    assert same(build(name, 400, weights=path), theirs) and capsys.readouterr().out == ""
    net = build(name, 5, in_channels=10, weights=path)
    assert same(net, theirs, skip=["stem.0.", "fc."]) and "last layer" in capsys.readouterr().out
    mean = theirs.stem[0].weight.mean(1)
    assert all(torch.allclose(net.stem[0].weight[:, c], mean, atol=1e-7) for c in range(10))
    assert fetch(name, "kinetics") == path


def test_weights_of_torchvisions_s3d(hub, capsys):
    """Its last layer is a convolution, and never that of "kinetics"; the gates stay at their start."""
    torch.manual_seed(1)
    theirs, path = s3d(weights=None), hub[0] / "s3d-d76dad2f.pth"
    randomise_batch_norms(theirs)
    torch.save(theirs.state_dict(), path)
    net = build("s3dg", 400, weights=path)
    assert torch.equal(net.fc.weight, theirs.classifier[1].weight.flatten(1)) and not net.new_fc
    assert torch.equal(net.fc.bias, theirs.classifier[1].bias) and capsys.readouterr().out == ""

    net = build("s3dg", 400, in_channels=10, weights="kinetics").eval()
    assert net.new_fc and not net.fc.bias.any() and "last layer" in capsys.readouterr().out
    assert fetch("s3dg", "kinetics") == path and not hub[1] and net(clips(1, C=10, T=5)).shape == (1, 400)
    mean = theirs.features[0][0][0].weight.mean(1)
    assert all(torch.allclose(net.layer1[0][0][0].weight[:, c], mean, atol=1e-7) for c in range(10))
    state, old = net.state_dict(), theirs.state_dict()
    for layer, n in ((1, 3), (2, 5), (2, 6), (3, 8), (3, 12), (4, 14), (4, 15)):
        keys = [key for key in old if key.startswith(f"features.{n}.")]
        ours = [key.replace("features", f"layer{layer}") for key in keys]
        assert keys and all(torch.equal(state[a], old[b]) for a, b in zip(ours, keys, strict=True))
    assert not any(value.any() for key, value in state.items() if ".gate." in key)
    with pytest.raises(UserError, match="fits another network"):
        tiny("s3dg", weights="kinetics")


def test_weights_go_into_a_network_with_an_adapter(tmp_path):
    source, path = tiny(seed=1), tmp_path / "w.pt"
    torch.save(source.state_dict(), path)
    net = tiny(seed=2, adapter=4, weights=path)
    assert same(source, net) and same(net.adapter, tiny(seed=2, adapter=4).adapter) and not net.new_fc
    for p in net.adapter.parameters():
        nn.init.normal_(p)
    torch.save(net.state_dict(), path)
    assert same(tiny(seed=3, adapter=4, weights=path), net)
    for more in ({}, {"adapter": 5}):
        with pytest.raises(UserError, match=r"another network, [34] tensors differ: adapter\."):
            tiny(weights=path, **more)


KINETICS = S3D_Weights.KINETICS400_V1.meta["categories"]


def spelt(name):
    """A class of Kinetics as the folders of some copies are called."""
    return "".join(word.capitalize() for word in re.split("[^A-Za-z0-9]+", name))


@pytest.mark.parametrize(
    "name, weights",
    [
        ("r3d_18", "kinetics"),
        ("s3dg", "kinetics"),
        ("swin3d_b", "kinetics"),
        ("swin3d_b", "kinetics_imagenet22k"),
    ],
)
def test_published_last_layer_in_the_order_of_the_classes(hub, name, weights, capsys):
    """The file of a thin network stands in for the published one, which has a kernel in s3d's last layer."""
    width = 1 / 4 if name == "swin3d_b" else 1 / 16
    source, names = tiny(name, 400, width, seed=1), [spelt(KINETICS[(7 * i + 3) % 400]) for i in range(400)]
    nn.init.normal_(source.fc.bias)
    state = source.state_dict()
    if name == "s3dg":
        state = {re.sub(r"^layer\d", "features", k): v for k, v in state.items() if ".gate." not in k}
        for kind in ("weight", "bias"):
            state[f"classifier.1.{kind}"] = state.pop(f"fc.{kind}")
        state["classifier.1.weight"] = state["classifier.1.weight"][..., None, None, None]
    if name == "swin3d_b":
        state = {re.sub(r"^layer\d", "features", k).replace("fc.", "head."): v for k, v in state.items()}
    torch.save(state, hub[0] / PUBLISHED[weights][name].url.rpartition("/")[2])
    net = tiny(name, 400, width, seed=2, weights=weights, names=names)
    assert not hub[1] and not net.new_fc and capsys.readouterr().out == "" and same(net, source, skip=["fc."])
    for i in range(400):
        assert torch.equal(net.fc.weight[i], source.fc.weight[(7 * i + 3) % 400])
        assert net.fc.bias[i] == source.fc.bias[(7 * i + 3) % 400]
    for others in (None, [*names[:-1], "juggling chainsaws"], [*names[:-1], names[0]], names[:-1]):
        classes = len(others or names)
        net = tiny(name, classes, width, seed=2, weights=weights, names=others)
        assert net.new_fc and same(net, source, skip=["fc."]) and "last layer" in capsys.readouterr().out
        assert torch.equal(net.fc.weight, tiny(name, classes, width, seed=2).fc.weight)


@pytest.mark.parametrize("word", ["kinetics", "kinetics_imagenet22k"])
def test_input_of_published_networks(word):
    """From torchvision's own preset and the sentence in its documentation."""
    for name in PUBLISHED[word]:
        check_input(name, word)


def test_swin_of_the_paper_starts_from_imagenet22k():
    """JEDI's expert of Kinetics-400 has 81.80 % there."""
    found = [PUBLISHED[word]["swin3d_b"].meta["_metrics"]["Kinetics-400"]["acc@1"]
             for word in ("kinetics", "kinetics_imagenet22k")]  # fmt: skip
    assert found == pytest.approx([79.4, 81.6], abs=0.05)


def check_input(name, word):
    weights, found = PUBLISHED[word][name], Recipe(**published_input(name, word))
    view, docs = weights.transforms(), dict(re.findall(r"`(\w+)=(\d+)`", weights.meta["_docs"]))
    assert [found.size] * 2 == view.crop_size and found.crops == 1
    assert view.resize_size == [*(found.stretch or [found.short_side])]
    assert [*found.mean] == view.mean and [*found.std] == view.std
    assert (found.frames, found.clips) == (int(docs["clip_len"]), int(docs["clips_per_video"]))
    assert found.stride * int(docs["frame_rate"]) == 30


def test_input_where_nothing_is_published():
    assert published_input("r3d_18-pool") == published_input("r3d_18")
    for name, weights, words in (
        ("tsm50", "kinetics", "no kinetics weights for tsm50, only for r3d_18, .*swin3d_b"),
        ("r3d_34", "kinetics", "no kinetics weights for r3d_34"),
        ("tsm50", "imagenet", "no clips for imagenet weights, only for kinetics, kinetics_imagenet22k$"),
        ("swin3d_s", "kinetics_imagenet22k", "no kinetics_imagenet22k weights for swin3d_s, only for swin"),
        ("r3d_18", "runs/a/model.pt", "no clips for runs/a/model.pt weights"),
    ):
        with pytest.raises(UserError, match=words):
            published_input(name, weights)


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
            part, n = layer[:-1], layer[-1]
            path = ["backbone", *path, f"conv{n}", part]
            if layer == "conv1" and len(path) > 3 and shifted(int(path[2])):
                path.append("net")
        renamed[".".join([*path, kind])] = value
    return renamed


@pytest.mark.parametrize("name, shifted", [
    ("tsn50", lambda n: False), ("tsm50", lambda n: True), ("tsm101", lambda n: n % 2 == 0),
])  # fmt: skip
def test_weights_of_mmaction2(tmp_path, name, shifted, capsys):
    """As mmcv's ConvModule and MMAction2's TemporalShift name them, in a file with other things."""
    source, path, x = tiny(name, seed=1).eval(), tmp_path / "w.pth", clips()
    randomise_batch_norms(source)
    state = by_mmaction(source.state_dict(), shifted)
    net = "net." if "tsm" in name else ""
    assert len(state) == len(source.state_dict()) and {
        "backbone.conv1.conv.weight",
        "backbone.conv1.bn.running_mean",
        f"backbone.layer1.0.conv1.conv.{net}weight",
        f"backbone.layer3.4.conv1.conv.{net}weight",
        f"backbone.layer3.5.conv1.conv.{net * (name == 'tsm50')}weight",
        "backbone.layer4.2.conv3.bn.bias",
        "backbone.layer2.0.downsample.conv.weight",
        "backbone.layer2.0.downsample.bn.num_batches_tracked",
        "cls_head.fc_cls.weight",
    } <= {*state}
    torch.save({"meta": {"mmcv_version": "1.6.0", "CLASSES": None}, "state_dict": state}, path)
    net = tiny(name, seed=2, weights=path).eval()
    assert same(net, source) and torch.equal(net(x), source(x)) and not net.new_fc
    assert capsys.readouterr().out == ""
    other = tiny(name, 9, in_channels=10, weights=path)
    assert other.new_fc and same(other, source, skip=["conv1.", "fc."])
    shifts = 2 + 2 + 12 + 2 if name == "tsm101" else 16  # blocks of layer1 to layer4
    with pytest.raises(UserError, match=f"another network, {2 * shifts} tensors differ"):  # there and here
        tiny({"tsn50": "tsm50", "tsm50": "tsn50", "tsm101": "tsn101"}[name], weights=path)


def test_weights_of_mmaction2_with_half_of_the_shifts_are_refused(tmp_path):
    state = by_mmaction(tiny("tsm50").state_dict(), lambda n: n % 2 == 0)
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="another network, 14 tensors differ"):
        tiny("tsm50", weights=tmp_path / "w.pth")


def test_weights_of_s3dg_have_their_gates(tmp_path):
    source, path = tiny("s3dg", seed=1), tmp_path / "w.pt"
    for m in source.modules():
        if isinstance(m, Gate):
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
    torch.save({"net": source.state_dict()}, path)
    assert same(tiny("s3dg", seed=2, weights=path), source)
    torch.save({key: value for key, value in source.state_dict().items() if ".gate." not in key}, path)
    with pytest.raises(UserError, match="fits another network, 74 tensors differ"):
        tiny("s3dg", weights=path)


@pytest.mark.parametrize("name", ["resnet3d10", "r3d_10"])
def test_last_layer_of_other_classes_starts_afresh(tmp_path, name, capsys, monkeypatch):
    source, path = tiny(name, seed=1, classes=9), tmp_path / "w.pt"
    torch.save(source.state_dict(), path)
    net = tiny(name, seed=2, weights=path)
    assert same(net, source, skip=["fc."]) and torch.equal(net.fc.weight, tiny(name, seed=2).fc.weight)
    printed = capsys.readouterr().out
    assert str(path) in printed and "last layer" in printed and printed.count("\n") == 1
    torch.save({k: v for k, v in source.state_dict().items() if not k.startswith("fc.")}, path)
    monkeypatch.setenv("RANK", "1")
    assert same(tiny(name, weights=path), source, skip=["fc."]) and capsys.readouterr().out == ""


@pytest.mark.parametrize("c_from, c_to", [(3, 10), (10, 3), (3, 1)])
@pytest.mark.parametrize("name", ["resnet3d10", "r3d_10", "r2plus1d_10", "i3d10", "tsm10"])
def test_first_convolution_is_averaged_and_repeated(tmp_path, name, c_from, c_to):
    source = tiny(name, seed=1, in_channels=c_from)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    net = tiny(name, in_channels=c_to, weights=tmp_path / "w.pt")
    old, new = kernel(source), kernel(net)
    assert new.shape[1] == c_to and new.is_contiguous() and net.get_parameter(net.FIRST).requires_grad
    for c in range(c_to):
        assert torch.allclose(new[:, c], sum(old[:, j] for j in range(c_from)) / c_from, atol=1e-7)
    assert same(net, source, skip=[net.FIRST])
    assert net(clips(C=c_to)).shape == (2, 5)


def test_first_convolution_on_the_way_through_the_modalities(tmp_path):
    """RGB to flow to differences and back, by the pseudocode of Mutual Modality Learning, section 2.1."""
    net = tiny("tsm10", in_channels=3)
    W = kernel(net).clone()
    for N in (10, 15, 3):
        torch.save(net.state_dict(), tmp_path / "w.pt")
        net = tiny("tsm10", in_channels=N, weights=tmp_path / "w.pt")
        W_new = torch.zeros(4, N, 7, 7)
        for i in range(N):
            W_new[:, i] = sum(W[:, j] for j in range(W.shape[1])) / W.shape[1]
        W = W_new
        assert torch.allclose(kernel(net), W, atol=1e-7)


@pytest.mark.parametrize("depth", [10, 50])
@pytest.mark.parametrize("family", ["i3d", "resnet3d"])
def test_a_still_clip_through_the_inflated_network_is_the_picture(tmp_path, family, depth):
    """In the middle of the clip, where no kernel reaches the zeros beyond its ends."""
    flat = tiny(f"tsn{depth}").double().eval()
    randomise_batch_norms(flat)
    torch.save(flat.state_dict(), tmp_path / "w.pt")
    net = tiny(f"{family}{depth}", weights=tmp_path / "w.pt").double().eval()
    picture = clips(1, T=1).double()
    with torch.no_grad():
        pairs = [*zip(flat.features(picture), net.features(picture.expand(-1, -1, 40, -1, -1)), strict=True)]
    for want, found in pairs:
        middle = found[:, :, found.shape[2] // 2]
        assert torch.allclose(middle, want[:, :, 0], rtol=1e-5, atol=1e-5 * want.abs().max())
    assert torch.equal(flat.fc.weight, net.fc.weight)


def test_inflated_kernels_are_shared_out_over_their_frames(tmp_path):
    torch.manual_seed(1)
    theirs, path = resnet18(), tmp_path / "resnet18.pth"
    randomise_batch_norms(theirs)
    torch.save(theirs.state_dict(), path)
    net = build("i3d18", 1000, in_channels=10, weights=path)
    mean = theirs.conv1.weight.mean(1)
    assert net.stem.conv.weight.shape == (64, 10, 5, 7, 7)
    for t in range(5):
        assert torch.allclose(net.stem.conv.weight[:, 7, t], mean / 5, atol=1e-7)
    old, new = theirs.layer3[0], net.res4[0]
    assert torch.equal(new.conv1.conv.weight, torch.stack([old.conv1.weight / 3] * 3, 2))
    assert torch.equal(new.conv2.conv.weight[:, :, 0], old.conv2.weight)
    assert torch.equal(new.shortcut.conv.weight[:, :, 0], old.downsample[0].weight)
    randomised = same(new.conv2.bn, old.bn2), same(new.shortcut.bn, old.downsample[1])
    assert all(randomised) and same(net.stem.bn, theirs.bn1)
    assert torch.equal(net.fc.weight, theirs.fc.weight)


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_of_torchvisions_resnets(tmp_path, zipped, capsys):
    """Their file by its path, of a new or an old version of torch, with or without the counts of batches."""
    torch.manual_seed(1)
    theirs, path = resnet18(), tmp_path / "resnet18.pth"
    state = theirs.state_dict()
    if not zipped:
        state = {key: value for key, value in state.items() if "num_batches" not in key}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert same(build("tsm18", 1000, weights=path), theirs) and capsys.readouterr().out == ""
    assert same(build("tsn18-small", 5, weights=path), theirs, skip=["fc."])
    assert "last layer" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tsm18-small", "i3d18"])
def test_imagenet(hub, name, capsys):
    """The last layer is never ImageNet's, not even for 1000 classes."""
    torch.manual_seed(1)
    theirs, path = resnet18(), hub[0] / "resnet18-f37072fd.pth"
    torch.save(theirs.state_dict(), path)
    net = build(name, 1000, weights="imagenet")
    whole = kernel(net) if name.startswith("tsm") else kernel(net).sum(2)
    assert torch.allclose(whole, theirs.conv1.weight, atol=1e-6)
    assert theirs.fc.bias.any() and not net.fc.bias.any() and "last layer" in capsys.readouterr().out
    assert fetch(name, "imagenet") == path and not hub[1]
    with pytest.raises(UserError, match="fits another network"):
        tiny(name, weights="imagenet")


@pytest.mark.parametrize(
    "name, weights",
    [
        ("tsm10", "imagenet"),
        ("r3d_18", "imagenet"),
        ("s3dg", "imagenet"),
        ("tsm50", "kinetics"),
        ("r3d_34-pool", "kinetics"),
        ("r2plus1d_10", "kinetics"),
        ("swin3d_t", "kinetics_imagenet22k"),
    ],
)
def test_weights_that_nobody_publishes(hub, name, weights):
    with pytest.raises(UserError, match=f"no {weights} weights for {name}, only .*: a file is needed$"):
        fetch(name, weights)
    assert not hub[1]


@pytest.mark.parametrize("error", [URLError("no route"), RuntimeError("invalid hash\nvalue"), TimeoutError()])
def test_no_network_is_one_sentence(hub, error, monkeypatch):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    path = hub[0] / "resnet18-f37072fd.pth"
    url = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
    for act in (lambda: tiny("tsm18", weights="imagenet"), lambda: fetch("i3d18-small", "imagenet")):
        with pytest.raises(UserError) as caught:
            act()
        assert re.fullmatch(f"{url} cannot be downloaded .*{path}, or give .*", str(caught.value))


def test_fetch_downloads_once_and_knows_a_file(hub, monkeypatch):
    def download(url, path, hash_prefix, progress):
        assert hash_prefix == "f37072fd" and not progress
        hub[1].append(url)
        torch.save({}, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        assert fetch("tsm18", "imagenet") == hub[0] / "resnet18-f37072fd.pth"
    fetch("resnet3d18", "imagenet")
    assert len(hub[1]) == 1
    assert fetch("tsm18", "runs/a/model.pt") == Path("runs/a/model.pt")


def test_a_damaged_download_is_refused(hub):
    path = hub[0] / "resnet18-f37072fd.pth"
    path.write_bytes(b"<html>Please log in</html>")
    with pytest.raises(UserError, match=f"{path} is damaged"):
        tiny("tsm18", weights="imagenet")


@pytest.mark.parametrize(
    "other",
    [
        dict(width=1 / 8),
        dict(name="resnet3d18"),
        dict(name="resnet3d50"),
        dict(name="resnet3d18", classes=9, in_channels=2),
        dict(name="r3d_10"),
        dict(name="tsm18"),
        dict(name="tsm10", width=1 / 8),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, other, capsys):
    path = tmp_path / "w.pt"
    torch.save(tiny(**other).state_dict(), path)
    with pytest.raises(UserError, match=r"another network, \d+ tensors differ: (.* is .*; ){4}") as error:
        tiny(weights=path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert capsys.readouterr().out == ""


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def old(thing, path):
    """As torch before 1.6 saved it."""
    torch.save(thing, path, _use_new_zipfile_serialization=False)


FILES = {
    "empty": lambda p: p.write_bytes(b""),
    "text": lambda p: p.write_text("weights of the network\n"),
    "zeros": lambda p: p.write_bytes(bytes(4096)),
    "cut short": lambda p: (torch.save(tiny().state_dict(), p), os.truncate(p, p.stat().st_size // 2)),
    "last byte": lambda p: (torch.save(tiny().state_dict(), p), os.truncate(p, p.stat().st_size - 1)),
    "old, cut short": lambda p: (old(tiny().state_dict(), p), os.truncate(p, p.stat().st_size // 2)),
    "old, cut in its head": lambda p: (old(tiny().state_dict(), p), os.truncate(p, 15)),
    "old, a module": lambda p: old(tiny(), p),
    "old malice": lambda p: old(Malice(p.parent / "executed"), p),
    "a list": lambda p: torch.save([1, 2], p),
    "a number": lambda p: torch.save(3, p),
    "no tensors": lambda p: torch.save({"net": {"fc.weight": 3}}, p),
    "no net": lambda p: torch.save({"step": 3, "nets": {}}, p),
    "nothing": lambda p: torch.save({}, p),
    "numbered": lambda p: torch.save({1: torch.zeros(2)}, p),
    "other names": lambda p: torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, p),
    "a module": lambda p: torch.save(tiny(), p),
    "malice": lambda p: torch.save(Malice(p.parent / "executed"), p),
    "missing": lambda p: None,
    "folder": lambda p: p.mkdir(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FILES)
def test_foreign_and_damaged_files_are_refused(tmp_path, kind):
    path = tmp_path / "w.pt"
    FILES[kind](path)
    with pytest.raises(UserError) as error:
        tiny(weights=path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()
