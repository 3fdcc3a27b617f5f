"""The backbones against published figures and torchvision, and weights that go in or are refused."""

import os

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.video import R3D_18_Weights, r3d_18

from common import UserError
from common.backbones import NAMES, Block, build

SLOW = [name for name in NAMES if name.startswith("resnet3d")]
R3D = [name for name in NAMES if name.startswith("r3d_")]
TINY = ["resnet3d10", "resnet3d50", "resnet3d10-small", "r3d_10", "r3d_10-pool"]  # quick to compute


def tiny(name="resnet3d10", classes=5, width=1 / 16, seed=0, **more):
    torch.manual_seed(seed)
    return build(name, classes, width=width, **more)


def parameters(net):
    return sum(p.numel() for p in net.parameters())


def clips(B=2, C=3, T=4, S=32, seed=0):
    return torch.randn(B, C, T, S, S, generator=torch.Generator().manual_seed(seed))


def randomise_batch_norms(net):
    """Other than the start's zeros and ones, which would hide what a batch norm does."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm3d):
            for tensor in (m.weight, m.bias, m.running_mean, m.running_var):
                nn.init.uniform_(tensor, 0.2, 1.5)


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


@pytest.mark.parametrize("depth", [10, 18, 34])
def test_r3d_with_pool_has_the_published_sizes(depth):
    """Learning from Temporal Gradient, Table 4, L = 8 frames of 224: conv1, then conv2 to conv5."""
    with torch.device("meta"):
        net, x = build(f"r3d_{depth}-pool", 400), torch.empty(1, 3, 8, 224, 224)
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
        assert all(torch.equal(a, b) for a, b in zip(net.features(x), want, strict=True))
        # Their average is AdaptiveAvgPool3d: another order of the sum.
        assert torch.allclose(net(x), theirs(x), rtol=1e-5, atol=1e-6 * theirs(x).abs().max())


@pytest.mark.parametrize("name", ["resnet3d18", "resnet3d50", "r3d_18"])
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
        assert build(name, 400, width=0.3).stem[0].out_channels == 19


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
    side = S // 2 if name in ("resnet3d10-small", "r3d_10") else S // 4
    c = 4 * 4 if "50" in name else 4
    assert len(features) == 4
    for i, f in enumerate(features):
        assert f.shape == (2, c * 2**i, T, side, side)
        side = -(-side // 2)
        if name.startswith("r3d_"):
            T = -(-T // 2)
    assert z.shape == (2, c * 8) == (2, net.fc.in_features)
    assert torch.allclose(z, features[-1].mean((2, 3, 4)))
    assert torch.allclose(net(x), net.fc(z), atol=1e-6)
    assert net(x).shape == (2, 5)


@pytest.mark.parametrize("name", ["resnet3d10", "r3d_10", "r3d_10-pool"])
def test_memory_format_does_not_change_the_result(name):
    net, x = tiny(name).eval(), clips()
    want = net(x)
    assert torch.allclose(net.to(memory_format=torch.channels_last_3d)(x), want, atol=1e-5)


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


# -------------------------------------------------------------------------------- initialisation


@pytest.mark.parametrize("name", ["resnet3d10", "r3d_10"])
def test_build_follows_the_seed(name):
    first, again, other = tiny(name, seed=1), tiny(name, seed=1), tiny(name, seed=2)
    for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.stem[0].weight, other.stem[0].weight)


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


@pytest.mark.parametrize("name", TINY)
def test_gradients_reach_every_parameter(name):
    """DistributedDataParallel needs one for each; after a step none is zero."""
    net = tiny(name).train()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(clips(4)).log_softmax(1)[:, 0].sum().backward()
        assert all(p.grad is not None for p in net.parameters())
        optimizer.step()
    assert [n for n, p in net.named_parameters() if not p.grad.any()] == []


@pytest.mark.parametrize("name", ["resnet3d10", "r3d_10"])
def test_dropout_is_for_training_only(name):
    net, x = tiny(name, dropout=0.5), clips()
    net.eval()
    assert torch.equal(net(x), tiny(name).eval()(x))
    z = net.embed(x)
    net.dropout.train()
    assert not torch.equal(net(x), net.fc(z))
    assert torch.equal(net.embed(x), z)


@pytest.mark.parametrize("name", NAMES)
def test_epsilon_is_every_batch_norms(name):
    def epsilons(**more):
        return {m.eps for m in build(name, 5, **more).modules() if isinstance(m, nn.BatchNorm3d)}

    with torch.device("meta"):
        assert epsilons() == {1e-5} and epsilons(bn_eps=1e-3) == {1e-3}


@pytest.mark.parametrize("name", ["resnet3d10", "r3d_10"])
def test_epsilon_changes_the_result(name):
    x = clips()
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
        ("resnet3d10", {"width": 0}, "width of 0"),
        ("resnet3d10", {"width": float("nan")}, "width of nan"),
        ("resnet3d10", {"dropout": 1.0}, "dropout of 1.0"),
        ("r3d_10-small", {}, "r3d_10-pool"),
        ("r3d_50", {}, "r3d_34"),
        ("r3d_10", {"bn_eps": 0.0}, "epsilon of 0.0"),
        ("resnet3d10", {"bn_eps": float("nan")}, "epsilon of nan"),
    ],
)
def test_impossible_networks_are_refused(name, more, words):
    with pytest.raises(UserError, match=words):
        build(name, 5, **more)


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


@pytest.mark.parametrize("name", ["r3d_18", "r3d_18-pool"])
def test_weights_of_torchvision(tmp_path, name, capsys):
    """Their 400 classes and RGB as they are, then for 5 classes and 10 channels."""
    torch.manual_seed(1)
    theirs, path = r3d_18(weights=None), tmp_path / "r3d_18.pth"
    torch.save(theirs.state_dict(), path)
    assert same(build(name, 400, weights=path), theirs) and capsys.readouterr().out == ""
    net = build(name, 5, in_channels=10, weights=path)
    assert same(net, theirs, skip=["stem.0.", "fc."]) and "last layer" in capsys.readouterr().out
    mean = theirs.stem[0].weight.mean(1)
    assert all(torch.allclose(net.stem[0].weight[:, c], mean, atol=1e-7) for c in range(10))


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
@pytest.mark.parametrize("name, first", [("resnet3d10", "stem.conv."), ("r3d_10", "stem.0.")])
def test_first_convolution_is_averaged_and_repeated(tmp_path, name, first, c_from, c_to):
    source = tiny(name, seed=1, in_channels=c_from)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    net = tiny(name, in_channels=c_to, weights=tmp_path / "w.pt")
    old, new = source.stem[0].weight, net.stem[0].weight
    assert new.shape[1] == c_to and new.is_contiguous() and new.requires_grad
    for c in range(c_to):
        assert torch.allclose(new[:, c], sum(old[:, j] for j in range(c_from)) / c_from, atol=1e-7)
    assert same(net, source, skip=[first])
    assert net(clips(C=c_to)).shape == (2, 5)


@pytest.mark.parametrize(
    "other",
    [
        dict(width=1 / 8),
        dict(name="resnet3d18"),
        dict(name="resnet3d50"),
        dict(name="resnet3d18", classes=9, in_channels=2),
        dict(name="r3d_10"),
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


FILES = {
    "empty": lambda p: p.write_bytes(b""),
    "text": lambda p: p.write_text("weights of the network\n"),
    "zeros": lambda p: p.write_bytes(bytes(4096)),
    "cut short": lambda p: (torch.save(tiny().state_dict(), p), os.truncate(p, p.stat().st_size // 2)),
    "last byte": lambda p: (torch.save(tiny().state_dict(), p), os.truncate(p, p.stat().st_size - 1)),
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
