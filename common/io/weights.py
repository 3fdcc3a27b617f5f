"""Weights that a network of `common.backbones` starts from: torchvision's, or a file.

"imagenet" is a ResNet of pictures, "kinetics" a network of clips trained on Kinetics-400, and
"kinetics_imagenet22k" the same after ImageNet-22K. Everything else is the path of a file.
"""

import http.client
import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import nn
from torchvision.models import get_weight

from common.errors import UserError
from common.io import files

# What torchvision publishes: {word: {network without its suffix: torchvision's entry}}.
VIDEO = {"r3d_18": "R3D_18", "r2plus1d_18": "R2Plus1D_18", "s3dg": "S3D"}
VIDEO |= {f"swin3d_{size}": f"Swin3D_{size.upper()}" for size in "tsb"}
PUBLISHED = {
    "imagenet": {
        f"{family}{depth}": get_weight(f"ResNet{depth}_Weights.IMAGENET1K_V1")
        for family in ("resnet3d", "i3d", "tsm", "tsn")
        for depth in (18, 34, 50, 101)
    },
    "kinetics": {name: get_weight(f"{model}_Weights.KINETICS400_V1") for name, model in VIDEO.items()},
    "kinetics_imagenet22k": {"swin3d_b": get_weight("Swin3D_B_Weights.KINETICS400_IMAGENET22K_V1")},
}
# Frames of a clip and clips of a video in torchvision's tests on Kinetics, by the family.
CLIPS = {"r3d": (16, 5), "r2plus1d": (16, 5), "s3dg": (128, 1), "swin3d": (32, 12)}


def _published(name, word):
    """torchvision's entry of the weights `word` for a network; UserError if there is none."""
    published, base = PUBLISHED[word], name.partition("-")[0]  # the suffix changes no tensor
    if base not in published:
        only = ", ".join(published)
        raise UserError(f"torchvision has no {word} weights for {name}, only for {only}: a file is needed")
    return published[base]


def fetch(name: str, source: str) -> Path:
    """The file that holds the weights `source` of the network `name`, downloaded if it is torchvision's.

    torchvision's files are in the cache of torch.hub. Several processes call this in one of them first, and
    in the others after it. A `source` that is no word of PUBLISHED is a path already.

    Raises:
        UserError: torchvision publishes nothing for this network, or the download fails.
    """
    if source not in PUBLISHED:
        return Path(source)
    entry = _published(name, source)
    path = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(entry.url).path).name)
    if not path.exists():
        try:
            entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise UserError(f"{entry.url} cannot be downloaded ({reason}): put the file at {path}, "
                            "or give the path of one") from None  # fmt: skip
    return path


def published_input(name: str, word: str = "kinetics") -> dict:
    """How torchvision tests published weights of clips: keyword arguments of `evaluate.Recipe`.

    The clips are those of its documented scores, at 15 frames a second, which is every second frame of 30.
    Resize, central crop and normalisation are those of the weights' own transforms.

    Raises:
        UserError: nothing is published for this network, or `word` is not one of weights of clips.
    """
    words = [known for known in PUBLISHED if known != "imagenet"]
    if word not in words:
        raise UserError(f"torchvision has no clips for {word} weights, only for {', '.join(words)}")
    view = _published(name, word).transforms()
    frames, clips = CLIPS[name.partition("_")[0]]
    stretch = tuple(view.resize_size) if len(view.resize_size) == 2 else ()
    return dict(frames=frames, stride=2, clips=clips, crops=1, short_side=view.resize_size[0],
                size=view.crop_size[0], stretch=stretch, mean=tuple(view.mean),
                std=tuple(view.std))  # fmt: skip


def load_weights(net: nn.Module, source: str, names: Sequence[str] | None = None) -> bool:
    """Fill a network of `backbones.build` with weights; returns whether the last layer is among them.

    source: a word of PUBLISHED, or a file: the model.pt of a run, a bare state_dict, or a checkpoint that
    has one as "state_dict". Nothing in the file is executed. names: of the network's classes, in order.

    - Prefixes of DistributedDataParallel and torch.compile are removed.
    - A 2D ResNet is inflated for resnet3d and i3d: every kernel is repeated along time and divided by its
      number of frames (Carreira and Zisserman 2017), so that a still clip gives what the picture gives.
    - torchvision's S3D fits s3dg, whose gates keep their start, and its Video Swin fits swin3d.
    - MMAction2's TSN fits tsn and its TSM fits tsm, but not each other: the names of TSM's shifted
      convolutions differ.
    - An adapter that the file lacks keeps its start.
    - A first convolution for another number of input channels is averaged over them and repeated (Mutual
      Modality Learning, section 2.1).
    - A last layer that is missing or for another number of classes keeps its start, and a line says so. The
      same holds for a word of PUBLISHED, whose classes differ even where their number does not, unless
      `names` are the same classes: then its rows are put into their order.

    Everything else must fit name by name and shape by shape.

    Raises:
        UserError: missing, damaged or foreign file, another architecture, or a failed download.
    """
    path = fetch(net.name, source)
    state = files.load(path)
    if isinstance(state, dict):
        state = state.get("net", state.get("state_dict", state))
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise UserError(f"{path} holds no network: a model.pt or a saved state_dict is right")
    own, first, last = net.state_dict(), net.FIRST, {"fc.weight", "fc.bias"}
    state = {str(key).replace("module.", "").replace("_orig_mod.", ""): value for key, value in state.items()}
    if any(key.startswith("features.") for key in state):
        state = _staged(state, own)
    if "backbone.conv1.conv.weight" in state:
        state = _mmaction(state, own, getattr(net, "shifted", ()))
    if "conv1.weight" in state and "stem.conv.weight" in own:
        state = _inflate(state, own)
    rows = None
    if source in PUBLISHED:
        rows = _rows(_published(net.name, source).meta["categories"], names or ())
        if rows is None:
            state = {key: value for key, value in state.items() if key not in last}
    c_in = own[first].shape[1]
    if first in state and state[first].dim() == own[first].dim() and state[first].shape[1] != c_in:
        state[first] = state[first].float().mean(1, keepdim=True).repeat_interleave(c_in, dim=1)
    # Files of old versions of torch lack the counts of batches, which no network reads.
    optional = [key for key in own if key.endswith("num_batches_tracked") or key.startswith("adapter.")]
    state = {key: own[key] for key in optional} | state

    given, expected = ({key: tuple(value.shape) for key, value in d.items()} for d in (state, own))
    differing = [key for key in expected | given if given.get(key) != expected.get(key)]
    if not last.issuperset(differing):
        keys = "; ".join(f"{key} is {given.get(key)}, not {expected.get(key)}" for key in differing[:5])
        raise UserError(f"{path} fits another network, {len(differing)} tensors differ: {keys}")
    if differing:
        state |= {key: own[key] for key in last}
        if os.environ.get("RANK", "0") == "0":
            print(f"{path}: the last layer is not for these classes and starts afresh")
    elif rows is not None:
        state |= {key: state[key][rows] for key in last}
    net.load_state_dict(state)
    return not differing


def _inflate(state, own):
    """A 2D ResNet's tensors by the names of ResNet3D's, `own`, and with the T of its kernels."""
    inflated = {}
    for key, value in state.items():  # layer1.0.bn1.bias becomes res2.0.conv1.bn.bias
        key = re.sub(r"^(conv|bn)1\.", r"stem.\1.", key)
        key = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", key)
        key = re.sub(r"\.(conv|bn)(\d)\.", r".conv\2.\1.", key)
        key = key.replace("downsample.0", "shortcut.conv").replace("downsample.1", "shortcut.bn")
        if value.dim() == 4 and key in own:
            T = own[key].shape[2]
            value = value.float().unsqueeze(2).repeat_interleave(T, dim=2) / T
        inflated[key] = value
    return inflated


def _staged(state, own):
    """torchvision's tensors of S3D or Video Swin by the names of `own`, with the gates of `own`."""
    names = {re.sub(r"^layer\d", "features", key): key for key in own}
    for kind in ("weight", "bias"):
        names |= {f"{last}.{kind}": f"fc.{kind}" for last in ("classifier.1", "head")}
    staged = {key: value for key, value in own.items() if ".gate." in key}
    for key, value in state.items():
        if key == "classifier.1.weight" and value.dim() == 5:  # (K, D, 1, 1, 1)
            value = value[..., 0, 0, 0]
        staged[names.get(key, key)] = value
    return staged


def _mmaction(state, own, shifted):
    """MMAction2's tensors of TSN, or of TSM with blocks number `shifted`, by the names of `own`."""
    names = {f"cls_head.fc_cls.{kind}": f"fc.{kind}" for kind in ("weight", "bias")}
    for key in own:  # layer1.0.bn2.bias is backbone.layer1.0.conv2.bn.bias there
        mm_key = re.sub(r"\b(conv|bn)(\d)\.", r"conv\2.\1.", key)
        mm_key = mm_key.replace("downsample.0", "downsample.conv").replace("downsample.1", "downsample.bn")
        block = re.match(r"layer\d\.(\d+)\.", key)
        if block and int(block[1]) in shifted:
            mm_key = mm_key.replace(".conv1.conv.", ".conv1.conv.net.")
        names[f"backbone.{mm_key}"] = key
    return {names.get(key, key): value for key, value in state.items()}


def _rows(categories, names):
    """For each of `names` its row among `categories`; None if these are not the same classes, one to one.

    Classes of Kinetics are spelt in many ways: only letters, in lower case, and digits count.
    """

    def plain(name):
        return re.sub("[^a-z0-9]", "", name.lower())

    row, spelt = {plain(name): i for i, name in enumerate(categories)}, [plain(name) for name in names]
    return [row[name] for name in spelt] if sorted(spelt) == sorted(row) else None
