"""Networks for clips, with one contract.

    net = build("resnet3d50", classes=400)
    net(x)            (B, K) logits, x a float clip (B, C, T, H, W)
    net.features(x)   list of the outputs of the four stages, each (B, C', T', H', W')
    net.embed(x)      (B, D) the average of the last stage over time and space
    net.classify(f)   (B, K) logits of the last stage's output f: net(x) is net.classify(net.features(x)[-1])
    net.head(z)       (B, K) logits of the embedding z
    net.freeze(2)     freezes the stem and the first two stages

resnet3d{10,18,34,50,101}  slow-only 3D-ResNet, the Slow pathway of SlowFast (Feichtenhofer et al., ICCV
    2019, Table 1): temporal kernels of 3 in the last two stages, no temporal stride.
i3d{10,18,34,50,101}  inflated ResNet (Carreira and Zisserman, Quo Vadis, CVPR 2017) of PySlowFast's config
    I3D_8x8_R50: temporal kernels of 5 in the stem, 3 in res2, 3 and 1 by turns in res3 and res4, 1 and 3 in
    res5, and a temporal max-pool of 2 after res2.
tsn{10,18,34,50,101}  torchvision's 2D ResNet on every frame, the frames' logits averaged (Wang et al.,
    Temporal Segment Networks, ECCV 2016).
tsm{10,18,34,50,101}  the same with a temporal shift in every block (Lin, Gan and Han, TSM, ICCV 2019); in
    ResNet-101 in every second block, the first of a stage included, as in TSM's code.
r3d_{10,18,34}  R3D (Tran et al., A Closer Look at Spatiotemporal Convolutions, CVPR 2018): temporal kernels
    of 3 everywhere, stride 2 in time and space in the last three stages.
r2plus1d_{10,18,34}  R(2+1)D of that paper: R3D with a spatial and a temporal kernel for each of its kernels.
s3dg  S3D-G (Xie et al., Rethinking Spatiotemporal Feature Learning, ECCV 2018, section 4.5): torchvision's
    S3D with gates. Clips need 5 frames and 17 x 17 pixels at least.
swin3d_{t,s,b}  torchvision's Video Swin Transformer (Liu et al., CVPR 2022).

resnet3d10-small and so on (i3d, tsm and tsn, too) have no max-pool, for pictures of 32 to 64 pixels: the last
stage has stride 16 instead of 32, at about three times the operations. r3d_18-pool and so on (r2plus1d, too)
have SlowFast's max-pool after the stem, as the network of Xiao et al., Learning from Temporal Gradient, CVPR
2022, Table 4. A suffix changes no tensor. The arguments of `build` and a state_dict rebuild a network.
"""

from collections import OrderedDict
from functools import partial
from itertools import chain

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet, video
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, Conv3DSimple
from torchvision.models.video.s3d import S3D, SepInceptionBlock3D
from torchvision.models.video.swin_transformer import PatchEmbed3d
from torchvision.ops import Conv3dNormActivation

from common.errors import UserError
from common.io.onednn import avoid_onednn_faults
from common.io.weights import load_weights

POOL = (1, 3, 3), (1, 2, 2), (0, 1, 1)  # kernel, stride and padding of the max-pool after a stem
BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def build(
    name, classes, in_channels=3, width=1.0, dropout=0.0, weights=None, bn_eps=None, adapter=0, names=None
):
    """A network by its name (one of NAMES), initialised from torch's default generator.

    classes: number of logits K. in_channels: C of the clips. width: channel multiplier of every layer, the
    stem included; s3dg and swin3d have width 1 only. dropout: probability before the last layer. weights: a
    file or a word of weights.PUBLISHED to start from, see `weights.load_weights`. bn_eps: epsilon of every
    batch norm; None is 1e-3 for s3dg, 1e-5 for all others; swin3d has none. adapter: hidden units of an
    `Adapter` between the embedding and the last layer, 0 for none. names: class names in the order of the
    logits, to recognise the classes of published weights.

    The network's `new_fc` is False if its last layer comes from `weights`. Raises UserError: unknown name,
    impossible width, dropout, epsilon or adapter, weights that do not fit.
    """
    if name not in NETWORKS:
        raise UserError(f"there is no backbone {name!r}: choose one of {', '.join(NAMES)}")
    if not 1 / 64 <= width <= 16:  # also catches NaN
        raise UserError(f"a backbone width of {width} is not between 1/64 and 16")
    if width != 1 and name.startswith(("s3dg", "swin3d")):
        raise UserError(f"{name} cannot have a width of {width}: its only width is 1")
    if not 0 <= dropout < 1:
        raise UserError(f"a dropout of {dropout} is not in [0, 1)")
    if bn_eps is not None and not 0 < bn_eps < 1:
        raise UserError(f"a batch-norm epsilon of {bn_eps} is not between 0 and 1")
    if adapter < 0:
        raise UserError(f"an adapter cannot have {adapter} units")
    net = NETWORKS[name](classes, in_channels, width)
    net.name, net.dropout.p = name, dropout
    if adapter:  # drawn last: for one seed the rest starts as without it
        net.adapter = Adapter(net.fc.in_features, adapter)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eps = net.BN_EPS if bn_eps is None else bn_eps
        avoid_onednn_faults(module)
    net.new_fc = weights is None or not load_weights(net, weights, names)
    return net


class Adapter(nn.Module):
    """Residual bottleneck z + dropout(up(SiLU(down(z)))) of an embedding z (B, D), with `hidden` units.

    Houlsby et al., Parameter-Efficient Transfer Learning for NLP, ICML 2019. `up` starts at 0: the adapter
    starts as the identity.
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
    """What all networks share. A subclass has `features` and the last layer `fc`."""

    FIRST: str  # name of the first convolution's weight
    STAGES = ("stem", "layer1"), ("layer2",), ("layer3",), ("layer4",)  # children of each stage
    BN_EPS = 1e-5  # epsilon of the batch norms where `build` is given none
    frozen = ()  # names of the frozen children

    def __init__(self):
        super().__init__()
        self.adapter, self.dropout = nn.Identity(), nn.Dropout()  # `build` sets both

    def _add_residual_stages(self, depth, width, expansion, block):
        """Add the four stages of a ResNet; returns the number of channels of the last one.

        block(c_in, c_mid, c_out, stride, i, j) makes block j of stage i; both count from 0.
        """
        c_in = round(64 * width)
        for i, blocks in enumerate(BLOCKS[depth]):
            c_mid = round(64 * 2**i * width)
            stage = nn.Sequential()
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(block(c_in, c_mid, expansion * c_mid, stride, i, j))
                c_in = expansion * c_mid
            self.add_module(self.STAGES[i][-1], stage)
        return c_in

    def _initialise(self, std=0.01):
        """He normal by fan out, last layer normal; the last batch norm of SlowFast's blocks starts at 0."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Block):
                # Modules come parents first, and batch norms already hold ones and zeros.
                nn.init.zeros_((module.conv3 or module.conv2).bn.weight)
        nn.init.normal_(self.fc.weight, std=std)
        nn.init.zeros_(self.fc.bias)

    def freeze(self, stages: int) -> "Backbone":
        """Freeze the first `stages` of the four stages and unfreeze the others; returns the network.

        Frozen parameters get no gradient, and frozen batch norms and stochastic depth stay in eval mode
        whatever `train` is told. Call this before DistributedDataParallel and the optimizer are made.
        Raises UserError if `stages` is not a number from 0 to 4.
        """
        if stages not in range(5):
            raise UserError(f"{stages} stages cannot be frozen: 0 to 4 can")
        self.frozen = sum(self.STAGES[:stages], ())
        for name in sum(self.STAGES, ()):
            getattr(self, name).requires_grad_(name not in self.frozen)
        return self.train(self.training)

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        for name in self.frozen:
            getattr(self, name).eval()
        return self

    def _layers(self, x):
        """The outputs of layer1 to layer4, each from the one before."""
        f1 = self.layer1(x)
        f2 = self.layer2(f1)
        f3 = self.layer3(f2)
        return [f1, f2, f3, self.layer4(f3)]

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


def conv_bn(c_in, c_out, kernel, stride=1):
    """Convolution without bias, batch norm. `kernel` is (time, height, width), `stride` spatial."""
    padding = tuple(k // 2 for k in kernel)
    conv = nn.Conv3d(c_in, c_out, kernel, (1, stride, stride), padding, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm3d(c_out)))


class Block(nn.Module):
    """y = ReLU(shortcut(x) + branch(x)), the residual block of SlowFast.

    The branch is Tx1x1, 1x3x3, 1x1x1 (bottleneck) or Tx3x3, 1x3x3 (basic), T = kernel_t; the stride
    is in its first convolution with a spatial kernel.
    """

    def __init__(self, c_in, c_mid, c_out, kernel_t, stride, bottleneck):
        super().__init__()
        if bottleneck:
            self.conv1 = conv_bn(c_in, c_mid, (kernel_t, 1, 1))
            self.conv2 = conv_bn(c_mid, c_mid, (1, 3, 3), stride)
            self.conv3 = conv_bn(c_mid, c_out, (1, 1, 1))
        else:
            self.conv1 = conv_bn(c_in, c_mid, (kernel_t, 3, 3), stride)
            self.conv2 = conv_bn(c_mid, c_out, (1, 3, 3))
            self.conv3 = None
        self.shortcut = conv_bn(c_in, c_out, (1, 1, 1), stride) if c_in != c_out or stride > 1 else None
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.conv2(self.relu(self.conv1(x)))
        if self.conv3 is not None:
            y = self.conv3(self.relu(y))
        return self.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet3D(Backbone):
    """The slow-only 3D-ResNet; `inflated` makes it I3D's."""

    FIRST = "stem.conv.weight"
    STAGES = ("stem", "res2"), ("res3",), ("res4",), ("res5",)

    def __init__(self, classes, in_channels, width, *, depth, pool, inflated=False):
        super().__init__()
        bottleneck = depth >= 50
        # Temporal kernels of the blocks of res2 to res5, by turns.
        kernels = ((3,), (3, 1), (3, 1), (1, 3)) if inflated else ((1,), (1,), (3,), (3,))
        self.stem = conv_bn(in_channels, round(64 * width), (5 if inflated else 1, 7, 7), stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool3d(*POOL) if pool else nn.Identity()
        # With ceil_mode the last of an odd number of frames is kept, and so is a single frame.
        self.pool_t = nn.MaxPool3d((2, 1, 1), ceil_mode=True) if inflated else nn.Identity()

        def block(c_in, c_mid, c_out, stride, i, j):
            return Block(c_in, c_mid, c_out, kernels[i][j % len(kernels[i])], stride, bottleneck)

        self.fc = nn.Linear(self._add_residual_stages(depth, width, 4 if bottleneck else 1, block), classes)
        self._initialise()

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Outputs of res2 to res5, each (B, C', T', H', W'); T' is the clip's T, in I3D T/2 from res3 on."""
        f2 = self.res2(self.pool(self.relu(self.stem(x))))
        f3 = self.res3(self.pool_t(f2))
        f4 = self.res4(f3)
        return [f2, f3, f4, self.res5(f4)]


class R3D(Backbone):
    """R3D or, with conv=Conv2Plus1D, R(2+1)D; for one seed depth 18 starts as torchvision's."""

    FIRST = "stem.0.weight"

    def __init__(self, classes, in_channels, width, *, depth, pool, conv=Conv3DSimple):
        super().__init__()
        c = round(64 * width)
        if conv is Conv2Plus1D:
            space = Conv3dNormActivation(in_channels, round(c * 45 / 64), (1, 7, 7), (1, 2, 2))
            self.stem = nn.Sequential(*space, *Conv3dNormActivation(round(c * 45 / 64), c, (3, 1, 1)))
        else:
            self.stem = Conv3dNormActivation(in_channels, c, (3, 7, 7), (1, 2, 2))
        self.pool = nn.MaxPool3d(*POOL) if pool else nn.Identity()

        def block(c_in, c_mid, c_out, stride, i, j):
            project = None
            if stride > 1:
                project = nn.Sequential(nn.Conv3d(c_in, c_out, 1, 2, bias=False), nn.BatchNorm3d(c_out))
            return BasicBlock(c_in, c_out, conv, stride, project)

        self.fc = nn.Linear(self._add_residual_stages(depth, width, 1, block), classes)
        self._initialise()

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Outputs of layer1 to layer4, each (B, C', T', H', W'); T' is T, T/2, T/4, T/8, rounded up."""
        return self._layers(self.pool(self.stem(x)))


class Shift(torch.autograd.Function):
    """Temporal shift of frames (B, T, C, H, W), in any memory format: Shift.apply(x, True).

    The first eighth of the channels (rounded down) comes from the next frame, the second from the previous,
    the ends get zeros; with False the other way round. Each direction is the other's gradient, in one pass
    over memory where autograd through the slices makes several.
    """

    @staticmethod
    def forward(ctx, x, first_from_next):
        ctx.first_from_next = first_from_next
        n = x.shape[2] // 8
        ahead, behind = slice(n), slice(n, 2 * n)  # channels from the next frame, from the frame before
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


def shifted_block(block: nn.Module, x: torch.Tensor, frames: int) -> torch.Tensor:
    """Output of torchvision's 2D residual block, the input of its first convolution shifted as in TSM.

    x is (B T, C, H, W), T = `frames`, or 0 for no shift. The shortcut is not shifted, so that no feature of a
    frame is lost (the paper's residual shift).
    """
    y = Shift.apply(x.unflatten(0, (-1, frames)), True).flatten(0, 1) if frames else x
    y = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(y)))))
    if isinstance(block, resnet.Bottleneck):
        y = block.bn3(block.conv3(block.relu(y)))
    return block.relu(y + (x if block.downsample is None else block.downsample(x)))


class TSN(Backbone):
    """torchvision's 2D ResNet on every frame; `shift` makes it TSM's.

    For one seed its convolutions start as torchvision's. The last layer starts as in the code of TSM, with a
    standard deviation of 0.001.
    """

    FIRST = "conv1.weight"
    STAGES = ("conv1", "bn1", "layer1"), ("layer2",), ("layer3",), ("layer4",)

    def __init__(self, classes, in_channels, width, *, depth, pool, shift=False):
        super().__init__()
        Block2D = resnet.Bottleneck if depth >= 50 else resnet.BasicBlock
        c = round(64 * width)
        self.conv1 = nn.Conv2d(in_channels, c, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if pool else nn.Identity()

        def block(c_in, c_mid, c_out, stride, i, j):
            project = None
            if c_in != c_out or stride > 1:
                project = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
            return Block2D(c_in, c_mid, stride, project)

        self.fc = nn.Linear(self._add_residual_stages(depth, width, Block2D.expansion, block), classes)
        self._initialise(std=0.001)
        self.shifted = range(0, max(BLOCKS[depth]), 2 if depth == 101 else 1) if shift else ()  # of a stage

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Outputs of layer1 to layer4, each (B, C', T, H', W') with the T of the clip."""
        B, _, T, _, _ = x.shape
        x = x.transpose(1, 2).flatten(0, 1)  # (B T, C, H, W)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        stages = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for j, block in enumerate(stage):
                x = shifted_block(block, x, T if j in self.shifted else 0)
            stages.append(x.unflatten(0, (B, T)).transpose(1, 2))  # (B, C', T, H', W')
        return stages

    def classify(self, f: torch.Tensor) -> torch.Tensor:
        """(B, K) mean of the frames' logits (segment consensus); an adapter gets the mean of the frames."""
        if isinstance(self.adapter, Adapter):
            return super().classify(f)
        z = f.mean((3, 4)).transpose(1, 2)  # (B, T, D)
        return self.fc(self.dropout(z)).mean(1)


class Gate(nn.Linear):
    """Self-gating y = 2 sigmoid(W mean(x) + b) x of x (B, C, T, H, W), the mean over time and space.

    W and b start at 0 and y as x, so that torchvision's weights of S3D keep their meaning. The paper has no
    factor 2; it is a factor on the weights of the next layer.
    """

    def __init__(self, channels):
        super().__init__(channels, channels)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        gate = 2 * super().forward(x.mean((2, 3, 4))).sigmoid()  # (B, C)
        return x * gate[:, :, None, None, None]


class S3DG(Backbone):
    """torchvision's S3D with a gate after conv_2c and at the end of every branch of its inception blocks.

    The gates are where the authors' code has them (tensorflow/models, slim/nets/s3dg.py). layer1 to layer4
    keep the numbers of torchvision's layers: features.5 is layer2.5. Batch norms have torch's momentum of
    0.1; torchvision's 0.001 needs thousands of steps to converge.
    """

    FIRST = "layer1.0.0.0.weight"
    STAGES = ("layer1",), ("layer2",), ("layer3",), ("layer4",)
    BN_EPS = 1e-3

    def __init__(self, classes, in_channels, width):
        super().__init__()
        layers = S3D(classes, norm_layer=nn.BatchNorm3d).features
        stem = layers[0][0][0]  # of 3 channels
        stem.in_channels, stem.weight = in_channels, nn.Parameter(torch.empty(64, in_channels, 1, 7, 7))
        inceptions = [layer for layer in layers if isinstance(layer, SepInceptionBlock3D)]
        for branch in (layers[3], *chain.from_iterable(block.children() for block in inceptions)):
            *_, norm = (m for m in branch.modules() if isinstance(m, nn.BatchNorm3d))
            branch.add_module("gate", Gate(norm.num_features))
        # A slice of a Sequential keeps the numbers.
        self.layer1, self.layer2 = layers[:4], layers[4:7]
        self.layer3, self.layer4 = layers[7:13], layers[13:]
        self.fc = nn.Linear(1024, classes, device="meta").to_empty(device=stem.weight.device)
        self._initialise()

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Outputs of conv_2c, 3c, 4f and 5c, each (B, C', T', H', W').

        T' is T/2, T/2, T/4, rounded up, and half of that, rounded down; H' is H/4, H/8, H/16 and half of
        that, and so is W'. Raises UserError if the clip is too small for the last stage.
        """
        T, H, W = x.shape[2:]
        if T < 5 or min(H, W) < 17:  # the last pool needs 2 x 2 x 2
            raise UserError(f"s3dg needs clips of 5 frames and 17 x 17 pixels at least, not {T} of {H} x {W}")
        return self._layers(x)


class Swin3D(Backbone):
    """torchvision's Video Swin: `model` makes it. layer1 to layer4 keep the numbers of its features.

    A stage is its blocks and, before them, the patch merging that halves height and width.
    """

    FIRST = "patch_embed.proj.weight"
    STAGES = ("patch_embed", "layer1"), ("layer2",), ("layer3",), ("layer4", "norm")

    def __init__(self, classes, in_channels, width, *, model):
        super().__init__()
        whole = model(num_classes=classes, patch_embed=partial(PatchEmbed3d, in_channels=in_channels))
        self.patch_embed, layers = whole.patch_embed, whole.features
        # As above; the odd numbers are the patch mergings.
        self.layer1, self.layer2 = layers[:1], layers[1:3]
        self.layer3, self.layer4 = layers[3:5], layers[5:]
        self.norm, self.fc = whole.norm, whole.head

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Outputs of layer1 to layer4, the last one normalised, each (B, C', T', H', W').

        T' is T/2; H' is H/4, H/8, H/16 and H/32, and so is W'; all rounded up.
        """
        stages = self._layers(self.patch_embed(x))  # each (B, T', H', W', C')
        stages[-1] = self.norm(stages[-1])
        return [x.permute(0, 4, 1, 2, 3) for x in stages]


RESNETS = {"resnet3d": ResNet3D, "i3d": partial(ResNet3D, inflated=True)}
RESNETS |= {"tsm": partial(TSN, shift=True), "tsn": TSN}
NETWORKS = {  # name: makes the network from (classes, in_channels, width)
    f"{family}{depth}{suffix}": partial(network, depth=depth, pool=pool)
    for family, network in RESNETS.items()
    for suffix, pool in {"": True, "-small": False}.items()
    for depth in BLOCKS
}
NETWORKS |= {
    f"{family}_{depth}{suffix}": partial(R3D, depth=depth, pool=pool, conv=conv)
    for family, conv in {"r3d": Conv3DSimple, "r2plus1d": Conv2Plus1D}.items()
    for suffix, pool in {"": False, "-pool": True}.items()
    for depth in (10, 18, 34)
}
NETWORKS |= {"s3dg": S3DG} | {
    f"swin3d_{size}": partial(Swin3D, model=getattr(video, f"swin3d_{size}")) for size in "tsb"
}
NAMES = tuple(NETWORKS)
