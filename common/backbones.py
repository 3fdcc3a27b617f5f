"""Networks for clips, with one contract.

    net = build("resnet3d50", classes=400)
    net(x)            (B, K) logits, x a float clip (B, C, T, H, W)
    net.features(x)   list of the outputs of the four stages, each (B, C', T', H', W')
    net.embed(x)      (B, D) the average of the last stage over time and space

resnet3d{10,18,34,50,101} is the slow-only 3D-ResNet of Feichtenhofer et al., SlowFast Networks for
Video Recognition, ICCV 2019 (the Slow pathway of Table 1): no temporal stride anywhere, temporal
kernels of 3 in the last two stages only. 10, 18 and 34 have basic blocks, 50 and 101 bottlenecks.
resnet3d10-small and so on leave out the max-pool, for pictures of 32 to 64 pixels: the last stage
has stride 16 in place of 32, at about three times the operations.

r3d_{10,18,34} is R3D of Tran et al., A Closer Look at Spatiotemporal Convolutions for Action
Recognition, CVPR 2018, of torchvision's parts: r3d_18 is torchvision's, tensor by tensor. Temporal
kernels of 3 everywhere, and the last three stages have stride 2 in time as in space.
r3d_18-pool and so on, with the same tensors, have SlowFast's max-pool after the stem. That is the
network of Xiao et al., Learning from Temporal Gradient, CVPR 2022 (Table 4: conv1 gives L x 56 x 56
from 224, conv5 L/8 x 7 x 7); torchvision's, without it, has four times the operations in the stages.

What rebuilds a network is plain values: build(name, classes, in_channels, width, dropout, bn_eps).
"""

import os

import torch
from torch import nn
from torchvision.models.video.resnet import BasicBlock, Conv3DSimple

from common import UserError, files

BLOCKS = {
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
}
NAMES = tuple(f"resnet3d{depth}{suffix}" for suffix in ("", "-small") for depth in BLOCKS)
NAMES += tuple(f"r3d_{depth}{suffix}" for suffix in ("", "-pool") for depth in (10, 18, 34))


def build(
    name: str,
    classes: int,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.0,
    weights: str | None = None,
    bn_eps: float = 1e-5,
) -> nn.Module:
    """A network by its name (one of NAMES), initialised from torch's default generator.

    Args:
        classes: number of logits K.
        in_channels: C of the clips: 3 for RGB, 10 for a stack of five flows, ...
        width: factor on the channels of every layer, the stem included (1/4 has about 1/16 of the
            parameters).
        dropout: probability before the last layer, in training only (SlowFast trains with 0.5).
        weights: file to start from, see `load_weights`.
        bn_eps: epsilon of every batch norm (the code of Learning from Temporal Gradient has 1e-3).

    Raises:
        UserError: unknown name, impossible width, dropout or epsilon, unfit weights.
    """
    if name not in NAMES:
        raise UserError(f"there is no backbone {name!r}: choose one of {', '.join(NAMES)}")
    if not 1 / 64 <= width <= 16:  # also catches NaN
        raise UserError(f"a backbone width of {width} is not between 1/64 and 16")
    if not 0 <= dropout < 1:
        raise UserError(f"a dropout of {dropout} is not in [0, 1)")
    if not 0 < bn_eps < 1:
        raise UserError(f"a batch-norm epsilon of {bn_eps} is not between 0 and 1")
    family = R3D if name.startswith("r3d_") else ResNet3D
    depth, _, suffix = name.removeprefix("r3d_").removeprefix("resnet3d").partition("-")
    pool = suffix == "pool" if family is R3D else suffix != "small"
    net = family(int(depth), classes, in_channels, width, dropout, pool)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.eps = bn_eps
    if weights is not None:
        load_weights(net, weights)
    return net


class ConvBN(nn.Sequential):
    """Convolution without bias, batch norm. `kernel` is (time, height, width), `stride` spatial."""

    def __init__(self, c_in, c_out, kernel, stride=1):
        super().__init__()
        padding = tuple(k // 2 for k in kernel)
        self.conv = nn.Conv3d(c_in, c_out, kernel, (1, stride, stride), padding, bias=False)
        self.bn = nn.BatchNorm3d(c_out)


class Block(nn.Module):
    """y = ReLU(shortcut(x) + branch(x)), the residual block of SlowFast.

    The branch is Tx1x1, 1x3x3, 1x1x1 (bottleneck) or Tx3x3, 1x3x3 (basic), T = kernel_t; the stride
    is in the first convolution that looks at space.
    """

    def __init__(self, c_in, c_mid, c_out, kernel_t, stride, bottleneck):
        super().__init__()
        if bottleneck:
            self.conv1 = ConvBN(c_in, c_mid, (kernel_t, 1, 1))
            self.conv2 = ConvBN(c_mid, c_mid, (1, 3, 3), stride)
            self.conv3 = ConvBN(c_mid, c_out, (1, 1, 1))
        else:
            self.conv1 = ConvBN(c_in, c_mid, (kernel_t, 3, 3), stride)
            self.conv2 = ConvBN(c_mid, c_out, (1, 3, 3))
            self.conv3 = None
        project = c_in != c_out or stride > 1
        self.shortcut = ConvBN(c_in, c_out, (1, 1, 1), stride) if project else None
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.conv2(self.relu(self.conv1(x)))
        if self.conv3 is not None:
            y = self.conv3(self.relu(y))
        return self.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Backbone(nn.Module):
    """What the families share; each has its `features`, `dropout` and `fc`."""

    FIRST: str  # name of the first convolution's weight

    def _initialise(self):
        """He normal by fan out, last layer std 0.01; SlowFast's blocks have their last batch norm 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Block):
                # Modules come parents first, and batch norms already hold ones and zeros.
                nn.init.zeros_((module.conv3 or module.conv2).bn.weight)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """(B, D) average of the last stage over time and space; D is `net.fc.in_features`."""
        return self.features(x)[-1].mean((2, 3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.dropout(self.embed(x)))


def max_pool():
    return nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))


class ResNet3D(Backbone):
    """The slow-only 3D-ResNet; see the top of this file and `build`."""

    FIRST = "stem.conv.weight"

    def __init__(self, depth, classes, in_channels=3, width=1.0, dropout=0.0, pool=True):
        super().__init__()
        bottleneck = depth >= 50
        c_in = round(64 * width)
        self.stem = ConvBN(in_channels, c_in, (1, 7, 7), stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.pool = max_pool() if pool else nn.Identity()
        for i, blocks in enumerate(BLOCKS[depth]):
            c_mid = round(64 * 2**i * width)
            c_out = 4 * c_mid if bottleneck else c_mid
            kernel_t = 1 if i < 2 else 3
            stage = nn.Sequential()
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(Block(c_in, c_mid, c_out, kernel_t, stride, bottleneck))
                c_in = c_out
            self.add_module(f"res{i + 2}", stage)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(c_in, classes)
        self._initialise()

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Outputs of res2 to res5, each (B, C', T, H', W') with the T of the clip."""
        x = self.pool(self.relu(self.stem(x)))
        stages = []
        for stage in (self.res2, self.res3, self.res4, self.res5):
            x = stage(x)
            stages.append(x)
        return stages


class R3D(Backbone):
    """R3D with the names, and for one seed the weights, of torchvision's; see the top of this file."""

    FIRST = "stem.0.weight"

    def __init__(self, depth, classes, in_channels=3, width=1.0, dropout=0.0, pool=False):
        super().__init__()
        c_in = round(64 * width)
        self.stem = nn.Sequential(
            nn.Conv3d(in_channels, c_in, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False),
            nn.BatchNorm3d(c_in),
            nn.ReLU(inplace=True),
        )
        self.pool = max_pool() if pool else nn.Identity()
        for i, blocks in enumerate(BLOCKS[depth]):
            c_out = round(64 * 2**i * width)
            stage = nn.Sequential()
            for j in range(blocks):
                stride, project = 1, None
                if i > 0 and j == 0:
                    stride = 2
                    project = nn.Sequential(
                        nn.Conv3d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm3d(c_out)
                    )
                stage.append(BasicBlock(c_in, c_out, Conv3DSimple, stride, project))
                c_in = c_out
            self.add_module(f"layer{i + 1}", stage)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(c_in, classes)
        self._initialise()

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Outputs of layer1 to layer4, each (B, C', T', H', W'); T' is T, T/2, T/4, T/8, rounded up."""
        x = self.pool(self.stem(x))
        stages = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            stages.append(x)
        return stages


def load_weights(net: Backbone, path: str) -> None:
    """Fill a network from a file: a model.pt of a run, or a bare state_dict saved by torch.save.

    - Prefixes of DistributedDataParallel and torch.compile are taken off the names.
    - A first convolution for another number of input channels is averaged over its channels and
      repeated (Mutual Modality Learning, section 2.1).
    - A last layer for another number of classes, or none, leaves the network's own, and says so.

    Everything else must fit name by name and shape by shape. Nothing in the file is executed.

    Raises:
        UserError: missing, damaged or foreign file, or another architecture.
    """
    state = files.load(path)
    if isinstance(state, dict):
        state = state.get("net", state)
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise UserError(f"{path} holds no network: a model.pt or a saved state_dict is right")
    state = {_plain(key): value for key, value in state.items()}

    own = net.state_dict()
    first, last = net.FIRST, {"fc.weight", "fc.bias"}
    c_in = own[first].shape[1]
    if first in state and state[first].dim() == 5 and state[first].shape[1] != c_in:
        state[first] = state[first].float().mean(1, keepdim=True).expand(-1, c_in, -1, -1, -1)

    shapes = {key: tuple(value.shape) for key, value in state.items()}
    wanted = {key: tuple(value.shape) for key, value in own.items()}
    wrong = [key for key in wanted | shapes if shapes.get(key) != wanted.get(key)]
    if not last.issuperset(wrong):
        keys = "; ".join(f"{k} is {shapes.get(k)}, not {wanted.get(k)}" for k in wrong[:5])
        raise UserError(f"{path} fits another network, {len(wrong)} tensors differ: {keys}")
    if wrong:
        state |= {key: own[key] for key in last}
        if os.environ.get("RANK", "0") == "0":
            print(f"{path}: the last layer is not for these classes and starts afresh")
    net.load_state_dict(state)


def _plain(key):
    return str(key).replace("module.", "").replace("_orig_mod.", "")
