"""Networks for clips, with one contract.

    net = build("resnet3d50", classes=400)
    net(x)            (B, K) logits, x a float clip (B, C, T, H, W)
    net.features(x)   list of the outputs of the four stages, each (B, C', T', H', W')
    net.embed(x)      (B, D) the average of the last stage over time and space
    net.classify(f)   (B, K) logits of the last stage's output f: net(x) is net.classify(net.features(x)[-1])
    net.head(z)       (B, K) logits of the embedding z
    net.freeze(2)     the first two stages, the stem with the first, learn nothing from here on

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

r2plus1d_{10,18,34} is R(2+1)D of the same paper and again of torchvision's parts: each kernel of R3D is a
spatial one, batch norm, ReLU and a temporal one, in the blocks with as many parameters in all. It has
-pool, too.

i3d{10,18,34,50,101} is the inflated ResNet of Carreira and Zisserman, Quo Vadis, CVPR 2017, as
PySlowFast has it (its config I3D_8x8_R50): resnet3d with the temporal kernels 5 in the stem, 3 in res2,
3 and 1 by turns in res3 and res4, 1 and 3 in res5, and half of the frames after res2.

tsm{10,18,34,50,101} is torchvision's 2D ResNet, tensor by tensor, on every frame, with the temporal
shift of Lin, Gan and Han, TSM: Temporal Shift Module, ICCV 2019; tsn{10,18,34,50,101} is the same without
the shift, Wang et al., Temporal Segment Networks, ECCV 2016. Both average the logits of the frames. Every
block is shifted, but in ResNet-101 every second one, the first of a stage included, as in TSM's code.

i3d, tsm and tsn have -small as well.

s3dg is S3D-G of Xie et al., Rethinking Spatiotemporal Feature Learning, ECCV 2018 (section 4.5): the S3D of
torchvision with a gate where the authors' code (tensorflow/models, slim/nets/s3dg.py) has one, after conv_2c
and at the end of every branch of the inception blocks. A gate is 2 sigmoid(W mean(x) + b) x, and W and b
are 0 at the start: then it changes nothing, and torchvision's weights of S3D mean here what they mean
there. The paper has no 2; it is a factor on the weights of the next layer. The clips must have 5 frames
and 17 x 17 pixels at least.

swin3d_{t,s,b} is the Video Swin Transformer of Liu et al., CVPR 2022, of torchvision's parts: tokens of 2
frames and 4 x 4 pixels, and attention in windows of 8 x 7 x 7 tokens, every second time shifted by half of
one. A stage is its blocks and, before them, the patch merging that halves height and width; the output of
the last has gone through the final layer norm. Stochastic depth rises to 0.1 in all three, as torchvision's.

Any of them can have an adapter (Houlsby et al., Parameter-Efficient Transfer Learning for NLP, ICML 2019)
between the embedding and the last layer, see `Adapter`.

What rebuilds a network is plain values: build(name, classes, in_channels, width, dropout, bn_eps, adapter).
"""

import re
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet
from torchvision.models.video.resnet import (
    BasicBlock,
    Conv2Plus1D,
    Conv3DSimple,
)
from torchvision.models.video.s3d import SepInceptionBlock3D, TemporalSeparableConv
from torchvision.models.video.swin_transformer import (
    PatchEmbed3d,
    SwinTransformer3d,
)
from torchvision.ops import Conv3dNormActivation

from common.errors import UserError
from common.io.weights import load_weights

BLOCKS = {
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
}
RESNETS = ("resnet3d", "i3d", "tsm", "tsn")
NAMES = tuple(f"{net}{depth}{suffix}" for net in RESNETS for suffix in ("", "-small") for depth in BLOCKS)
NAMES += tuple(
    f"{net}_{depth}{suffix}"
    for net in ("r3d", "r2plus1d")
    for suffix in ("", "-pool")
    for depth in (10, 18, 34)
)
NAMES += ("s3dg", "swin3d_t", "swin3d_s", "swin3d_b")


def build(
    name: str,
    classes: int,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.0,
    weights: str | None = None,
    bn_eps: float | None = None,
    adapter: int = 0,
    names: Sequence[str] | None = None,
) -> nn.Module:
    """A network by its name (one of NAMES), initialised from torch's default generator.

    Args:
        classes: number of logits K.
        in_channels: C of the clips: 3 for RGB, 10 for a stack of five flows, ...
        width: factor on the channels of every layer, the stem included (1/4 has about 1/16 of the
            parameters). It must leave swin3d whole heads, of which t and s have 3 in the first stage and b 4.
        dropout: probability before the last layer, in training only (SlowFast trains with 0.5).
        weights: what to start from, a file or a word of weights.PUBLISHED, see `weights.load_weights`.
        bn_eps: epsilon of every batch norm (the code of Learning from Temporal Gradient has 1e-3); None is
            the network's own, 1e-3 for s3dg and 1e-5 for all others. swin3d has no batch norm.
        adapter: hidden units of an `Adapter` between the embedding and the last layer; 0 for none.
        names: of the classes, in their order, to know published ones by, see `weights.load_weights`.

    The network's `new_fc` says whether its last layer is not from `weights`.

    Raises:
        UserError: unknown name, impossible width, dropout, epsilon or adapter, unfit weights.
    """
    if name not in NAMES:
        raise UserError(f"there is no backbone {name!r}: choose one of {', '.join(NAMES)}")
    if not 1 / 64 <= width <= 16:  # also catches NaN
        raise UserError(f"a backbone width of {width} is not between 1/64 and 16")
    if not 0 <= dropout < 1:
        raise UserError(f"a dropout of {dropout} is not in [0, 1)")
    if bn_eps is not None and not 0 < bn_eps < 1:
        raise UserError(f"a batch-norm epsilon of {bn_eps} is not between 0 and 1")
    if adapter < 0:
        raise UserError(f"an adapter cannot have {adapter} units")
    family, depth, suffix = re.fullmatch(r"(.*?)(\d*)-?(small|pool)?", name).groups()
    family, more = FAMILIES[family], {}
    if depth:
        more["depth"] = int(depth)
        more["pool"] = suffix == "pool" if issubclass(family, R3D) else suffix != "small"
    net = family(classes=classes, in_channels=in_channels, width=width, dropout=dropout, **more)
    net.name = name
    if adapter:  # drawn last: for one seed the rest starts as without it
        net.adapter = Adapter(net.fc.in_features, adapter)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eps = family.BN_EPS if bn_eps is None else bn_eps
        avoid_onednn_faults(module)
    net.new_fc = weights is None or not load_weights(net, weights, names)
    return net


# oneDNN 3.12, the library of torch 2.14.1 for the CPU, reads and writes past the ends of tensors when it
# makes the weights' gradients of two kinds of convolutions. They are wrong, or the process dies sooner or
# later. The command `python tests/bench/onednn.py --plain` shows it. Said in other words, both kinds are
# computed rightly.


class Subsampled(nn.Conv2d):
    """A convolution of 1 x 1 whose stride is taken before it."""

    def forward(self, x):
        return F.conv2d(x[..., :: self.stride[0], :: self.stride[1]], self.weight, self.bias)


class Padded(nn.Conv3d):
    """A convolution whose clip is padded in time before it, unless it has more frames than the kernel."""

    def forward(self, x):
        t, *padding = self.padding
        if x.shape[2] >= self.kernel_size[0] + self.stride[0] - 1:
            return super().forward(x)
        return F.conv3d(F.pad(x, (0, 0, 0, 0, t, t)), self.weight, self.bias, self.stride, (0, *padding))


def avoid_onednn_faults(module: nn.Module) -> None:
    """Make a convolution of a kind that oneDNN gets wrong one of the above; other modules stay."""
    if type(module) is nn.Conv2d:  # in channels_last, uxlfoundation/oneDNN issue 6035
        if module.kernel_size == (1, 1) and max(module.stride) > 1 and module.in_channels < 16:
            module.__class__ = Subsampled
    elif type(module) is nn.Conv3d:  # seen with a kernel of 7, a stride of 2 and clips of 5 to 7 frames
        if module.padding[0] > module.stride[0] > 1:
            module.__class__ = Padded


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


class Adapter(nn.Module):
    """Residual bottleneck z + drop(up(SiLU(down(z)))) of an embedding z (B, D), with `hidden` units.

    The weight and bias of `up` start at 0, and then it gives z back.
    """

    def __init__(self, width, hidden, dropout=0.0):
        super().__init__()
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def change(self, z: torch.Tensor) -> torch.Tensor:
        """(B, D), what `forward` adds to z before dropout."""
        return self.up(F.silu(self.down(z)))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z + self.drop(self.change(z))


class Backbone(nn.Module):
    """What the families share; each has its `features`, `dropout` and `fc`."""

    FIRST: str  # name of the first convolution's weight
    STAGES = ("stem", "layer1"), ("layer2",), ("layer3",), ("layer4",)  # children that make up each
    BN_EPS = 1e-5  # where `build` is given none
    frozen = 0  # stages at rest

    def __init__(self):
        super().__init__()
        self.adapter = nn.Identity()  # for `build` to replace

    def _initialise(self, fc_std=0.01):
        """He normal by fan out, last layer normal; SlowFast's blocks have their last batch norm 0."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Block):
                # Modules come parents first, and batch norms already hold ones and zeros.
                nn.init.zeros_((module.conv3 or module.conv2).bn.weight)
        nn.init.normal_(self.fc.weight, std=fc_std)
        nn.init.zeros_(self.fc.bias)

    def freeze(self, stages: int) -> "Backbone":
        """Put the first `stages` of the four at rest and let the others learn; returns the network.

        At rest, parameters have no gradient, and batch norms and stochastic depth are in eval mode, whatever
        `train` is told. To be called before DistributedDataParallel and the optimizer look at the parameters.

        Raises:
            UserError: not a number from 0 to 4.
        """
        if stages not in range(5):
            raise UserError(f"{stages} stages cannot be frozen: 0 to 4 can")
        self.frozen = stages
        for i, names in enumerate(self.STAGES):
            for name in names:
                getattr(self, name).requires_grad_(i >= stages)
        return self.train(self.training)

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        for names in self.STAGES[: self.frozen]:
            for name in names:
                getattr(self, name).eval()
        return self

    def _layers(self, x):
        """The outputs of layer1 to layer4, each from the one before."""
        stages = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            stages.append(x)
        return stages

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """(B, D) float32 average of the last stage over time and space; D is `net.fc.in_features`."""
        return self.features(x)[-1].float().mean((2, 3, 4))  # bfloat16 has 8 bits, too few for distances

    def head(self, z: torch.Tensor) -> torch.Tensor:
        """(B, K) logits from the embedding z (B, D): adapter, dropout, last layer."""
        return self.fc(self.dropout(self.adapter(z)))

    def classify(self, f: torch.Tensor) -> torch.Tensor:
        """(B, K) logits from the last stage's output f (B, D, T', H', W')."""
        return self.head(f.mean((2, 3, 4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classify(self.features(x)[-1])


def max_pool():
    return nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))


class ResNet3D(Backbone):
    """The slow-only 3D-ResNet; see the top of this file and `build`."""

    FIRST = "stem.conv.weight"
    STAGES = ("stem", "res2"), ("res3",), ("res4",), ("res5",)
    STEM_T = 1  # temporal kernel of the stem
    KERNELS_T = (1,), (1,), (3,), (3,)  # of the blocks of res2 to res5, by turns
    POOL_T = 1  # frames of which the maximum goes from res2 to res3

    def __init__(self, depth, classes, in_channels=3, width=1.0, dropout=0.0, pool=True):
        super().__init__()
        bottleneck = depth >= 50
        c_in = round(64 * width)
        self.stem = ConvBN(in_channels, c_in, (self.STEM_T, 7, 7), stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.pool = max_pool() if pool else nn.Identity()
        # With ceil_mode the last of an odd number of frames goes on alone, and so does a single one.
        self.pool_t = nn.MaxPool3d((self.POOL_T, 1, 1), ceil_mode=True) if self.POOL_T > 1 else nn.Identity()
        for i, (blocks, kernels) in enumerate(zip(BLOCKS[depth], self.KERNELS_T, strict=True)):
            c_mid = round(64 * 2**i * width)
            c_out = 4 * c_mid if bottleneck else c_mid
            stage = nn.Sequential()
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                kernel_t = kernels[j % len(kernels)]
                stage.append(Block(c_in, c_mid, c_out, kernel_t, stride, bottleneck))
                c_in = c_out
            self.add_module(f"res{i + 2}", stage)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(c_in, classes)
        self._initialise()

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Outputs of res2 to res5, each (B, C', T', H', W'); T' is the clip's T, in I3D T/2 from res3 on."""
        stages = [self.res2(self.pool(self.relu(self.stem(x))))]
        x = self.pool_t(stages[0])
        for stage in (self.res3, self.res4, self.res5):
            x = stage(x)
            stages.append(x)
        return stages


class I3D(ResNet3D):
    """The inflated ResNet; see the top of this file."""

    STEM_T = 5
    KERNELS_T = (3,), (3, 1), (3, 1), (1, 3)
    POOL_T = 2


class R3D(Backbone):
    """R3D with the names, and for one seed the weights, of torchvision's; see the top of this file."""

    FIRST = "stem.0.weight"
    CONV = Conv3DSimple  # of the blocks

    def __init__(self, depth, classes, in_channels=3, width=1.0, dropout=0.0, pool=False):
        super().__init__()
        c_in = round(64 * width)
        self.stem = self._stem(in_channels, c_in)
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
                stage.append(BasicBlock(c_in, c_out, self.CONV, stride, project))
                c_in = c_out
            self.add_module(f"layer{i + 1}", stage)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(c_in, classes)
        self._initialise()

    @staticmethod
    def _stem(c_in, c_out):
        return Conv3dNormActivation(c_in, c_out, (3, 7, 7), (1, 2, 2))

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Outputs of layer1 to layer4, each (B, C', T', H', W'); T' is T, T/2, T/4, T/8, rounded up."""
        return self._layers(self.pool(self.stem(x)))


class R2Plus1D(R3D):
    """R3D with each kernel in two, again as torchvision's, name by name; see the top of this file."""

    CONV = Conv2Plus1D

    @staticmethod
    def _stem(c_in, c_out):
        c_mid = round(c_out * 45 / 64)
        return nn.Sequential(
            *Conv3dNormActivation(c_in, c_mid, (1, 7, 7), (1, 2, 2)),
            *Conv3dNormActivation(c_mid, c_out, (3, 1, 1)),
        )


class Shift(torch.autograd.Function):
    """Temporal shift of frames (B, T, C, H, W), in any memory format: Shift.apply(x, True).

    The first eighth of the channels (rounded down) comes from the next frame, the second from the one
    before, and zeros come in at the ends; with False the other way round. Each is the other's gradient:
    one pass over memory, where autograd's own way back through the slices would make several.
    """

    @staticmethod
    def forward(ctx, x, first_from_next):
        ctx.first_from_next = first_from_next
        n = x.shape[2] // 8
        ahead, behind = slice(n), slice(n, 2 * n)  # channels that come from the next frame, from the last
        if not first_from_next:
            ahead, behind = behind, ahead
        y = torch.empty_like(x)
        y[:, :-1, ahead], y[:, -1, ahead] = x[:, 1:, ahead], 0
        y[:, 1:, behind], y[:, 0, behind] = x[:, :-1, behind], 0
        y[:, :, 2 * n :] = x[:, :, 2 * n :]
        return y

    @staticmethod
    def backward(ctx, grad):
        return Shift.apply(grad, not ctx.first_from_next), None


class ShiftBlock:
    """What makes torchvision's 2D residual block one of TSM: the input of its first convolution is shifted.

    The shortcut is not, so that a frame keeps all it knows of itself (the paper's residual shift).
    """

    def forward(self, x, frames):
        """x (B T, C, H, W), T = `frames`, or 0 for no shift."""
        y = Shift.apply(x.unflatten(0, (-1, frames)), True).flatten(0, 1) if frames else x
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(y)))))
        if hasattr(self, "conv3"):
            y = self.bn3(self.conv3(self.relu(y)))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ShiftBasicBlock(ShiftBlock, resnet.BasicBlock):
    pass


class ShiftBottleneck(ShiftBlock, resnet.Bottleneck):
    pass


class TSN(Backbone):
    """A 2D ResNet with the names, and for one seed the convolutions, of torchvision's; see the top.

    The last layer starts as in the code of TSM, with a deviation of 0.001.
    """

    FIRST = "conv1.weight"
    STAGES = ("conv1", "bn1", "layer1"), ("layer2",), ("layer3",), ("layer4",)
    SHIFT = False

    def __init__(self, depth, classes, in_channels=3, width=1.0, dropout=0.0, pool=True):
        super().__init__()
        block = ShiftBottleneck if depth >= 50 else ShiftBasicBlock
        c_in = round(64 * width)
        self.conv1 = nn.Conv2d(in_channels, c_in, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(c_in)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if pool else nn.Identity()
        for i, blocks in enumerate(BLOCKS[depth]):
            c_mid = round(64 * 2**i * width)
            c_out = c_mid * block.expansion
            stage = nn.ModuleList()
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                project = None
                if c_in != c_out or stride > 1:
                    conv = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
                    project = nn.Sequential(conv, nn.BatchNorm2d(c_out))
                stage.append(block(c_in, c_mid, stride, project))
                c_in = c_out
            self.add_module(f"layer{i + 1}", stage)
        self.shifted = range(0, max(BLOCKS[depth]), 2 if depth == 101 else 1) if self.SHIFT else ()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(c_in, classes)
        self._initialise(fc_std=0.001)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Outputs of layer1 to layer4, each (B, C', T, H', W') with the T of the clip."""
        B, _, T, _, _ = x.shape
        x = x.transpose(1, 2).flatten(0, 1)  # (B T, C, H, W)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        stages = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for number, block in enumerate(stage):
                x = block(x, T if number in self.shifted else 0)
            stages.append(x.unflatten(0, (B, T)).transpose(1, 2))  # (B, C', T, H', W')
        return stages

    def classify(self, f: torch.Tensor) -> torch.Tensor:
        """(B, K), the mean of the frames' logits (segment consensus); each frame has its own dropout.

        An adapter sees the mean of the frames, as in all networks.
        """
        if isinstance(self.adapter, Adapter):
            return super().classify(f)
        z = f.mean((3, 4)).transpose(1, 2)  # (B, T, D)
        return self.fc(self.dropout(z)).mean(1)


class TSM(TSN):
    """TSN whose frames see their neighbours; see the top of this file."""

    SHIFT = True


class Gate(nn.Linear):
    """Self-gating y = 2 sigmoid(W mean(x) + b) x of x (B, C, T, H, W), the mean over time and space.

    W and b start at 0, and then y is x.
    """

    def __init__(self, channels):
        super().__init__(channels, channels)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        gate = 2 * super().forward(x.mean((2, 3, 4))).sigmoid()  # (B, C)
        return x * gate[:, :, None, None, None]


class S3DG(Backbone):
    """S3D-G; layer1 to layer4 hold torchvision's S3D under its numbers: features.5 is layer2.5.

    Every batch norm has torch's momentum of 0.1; torchvision's 0.001 needs thousands of steps to arrive.
    """

    FIRST = "layer1.0.0.0.weight"
    STAGES = ("layer1",), ("layer2",), ("layer3",), ("layer4",)
    BN_EPS = 1e-3
    # Channels in 3b to 5c of the branches 1x1x1; 1x1x1 and 3x3x3; 1x1x1 and 3x3x3; 1x1x1 after a pool.
    INCEPTION = (
        (64, 96, 128, 16, 32, 32),
        (128, 128, 192, 32, 96, 64),
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
        (256, 160, 320, 32, 128, 128),
        (384, 192, 384, 48, 128, 128),
    )

    def __init__(self, classes, in_channels=3, width=1.0, dropout=0.0):
        super().__init__()

        def scaled(*channels):
            return [max(1, round(c * width)) for c in channels]

        c, c_in = scaled(64, 192)
        norm = nn.BatchNorm3d
        conv_2c = TemporalSeparableConv(c, c_in, 3, 1, 1, norm)
        conv_2c.add_module("gate", Gate(c_in))
        blocks = []
        for channels in self.INCEPTION:
            b0, _, b1, _, b2, b3 = channels = scaled(*channels)
            block = SepInceptionBlock3D(c_in, *channels, norm)
            for branch, c_out in zip(block.children(), (b0, b1, b2, b3), strict=True):
                branch.add_module("gate", Gate(c_out))
            blocks.append(block)
            c_in = b0 + b1 + b2 + b3
        layers = nn.Sequential(
            TemporalSeparableConv(in_channels, c, 7, 2, 3, norm),
            max_pool(),
            Conv3dNormActivation(c, c, 1),
            conv_2c,
            max_pool(),
            *blocks[:2],
            nn.MaxPool3d(3, 2, 1),
            *blocks[2:7],
            nn.MaxPool3d(2),
            *blocks[7:],
        )
        # A slice of a Sequential keeps the numbers.
        self.layer1, self.layer2 = layers[:4], layers[4:7]
        self.layer3, self.layer4 = layers[7:13], layers[13:]
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(c_in, classes)
        self._initialise()

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Outputs of conv_2c, 3c, 4f and 5c, each (B, C', T', H', W').

        T' is T/2, T/2, T/4, rounded up, and half of that, rounded down; H' is H/4, H/8, H/16 and half of
        that, and so is W'.

        Raises:
            UserError: a clip of which nothing would be left.
        """
        T, H, W = x.shape[2:]
        if T < 5 or min(H, W) < 17:  # the last pool needs 2 x 2 x 2
            raise UserError(f"s3dg needs clips of 5 frames and 17 x 17 pixels at least, not {T} of {H} x {W}")
        return self._layers(x)


class Swin3D(Backbone):
    """Video Swin, for one seed torchvision's; layer1 to layer4 hold its features under their numbers."""

    FIRST = "patch_embed.proj.weight"
    STAGES = ("patch_embed", "layer1"), ("layer2",), ("layer3",), ("layer4", "norm")
    BLOCKS3 = 6  # in the third stage; the others have 2
    HEADS = 3  # in the first stage, each of 32 channels; every stage has twice the heads of the last

    def __init__(self, classes, in_channels=3, width=1.0, dropout=0.0):
        super().__init__()
        heads = round(self.HEADS * width, 2)  # 0.333 is a third
        if heads < 1 or heads % 1:
            raise UserError(
                f"a width of {width} leaves swin3d {heads:g} heads for {self.HEADS}: a whole number is needed"
            )
        heads = int(heads)
        whole = SwinTransformer3d(
            patch_size=[2, 4, 4],
            embed_dim=32 * heads,
            depths=[2, 2, self.BLOCKS3, 2],
            num_heads=[heads, 2 * heads, 4 * heads, 8 * heads],
            window_size=[8, 7, 7],
            num_classes=classes,
            patch_embed=partial(PatchEmbed3d, in_channels=in_channels),
        )
        self.patch_embed = whole.patch_embed
        # A slice of a Sequential keeps the numbers; the odd ones are the patch mergings.
        self.layer1, self.layer2 = whole.features[:1], whole.features[1:3]
        self.layer3, self.layer4 = whole.features[3:5], whole.features[5:]
        self.norm = whole.norm
        self.dropout = nn.Dropout(dropout)
        self.fc = whole.head

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Outputs of layer1 to layer4, the last one normalised, each (B, C', T', H', W').

        T' is T/2; H' is H/4, H/8, H/16 and H/32, and so is W'; all rounded up.
        """
        stages = self._layers(self.patch_embed(x))  # each (B, T', H', W', C')
        stages[-1] = self.norm(stages[-1])
        return [x.permute(0, 4, 1, 2, 3) for x in stages]


class Swin3DS(Swin3D):
    """Video Swin small; see the top of this file."""

    BLOCKS3 = 18


class Swin3DB(Swin3DS):
    """Video Swin base; see the top of this file."""

    HEADS = 4


FAMILIES = {
    "resnet3d": ResNet3D,
    "r3d_": R3D,
    "r2plus1d_": R2Plus1D,
    "i3d": I3D,
    "tsm": TSM,
    "tsn": TSN,
    "s3dg": S3DG,
    "swin3d_t": Swin3D,
    "swin3d_s": Swin3DS,
    "swin3d_b": Swin3DB,
}
