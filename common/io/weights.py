"""Weights that a network of `common.backbones` starts from: a file, or what torchvision publishes."""

import http.client
import os
import re
from pathlib import Path
from urllib.parse import urlparse

import torch
from torchvision.models import get_weight

from common.errors import UserError
from common.io import files

RESNETS = {f"{net}{depth}": depth for net in ("resnet3d", "i3d", "tsm", "tsn") for depth in (18, 34, 50, 101)}
VIDEO = {"r3d_18": "R3D_18", "r2plus1d_18": "R2Plus1D_18", "s3dg": "S3D"}
VIDEO |= {f"swin3d_{size}": f"Swin3D_{size.upper()}" for size in "tsb"}
# {word: {network without its suffix, which changes no tensor: torchvision's entry}}. "kinetics" is trained on
# Kinetics-400, "kinetics_imagenet22k" the same after ImageNet-22K.
PUBLISHED = {
    "imagenet": {name: get_weight(f"ResNet{n}_Weights.IMAGENET1K_V1") for name, n in RESNETS.items()},
    "kinetics": {name: get_weight(f"{model}_Weights.KINETICS400_V1") for name, model in VIDEO.items()},
    "kinetics_imagenet22k": {"swin3d_b": get_weight("Swin3D_B_Weights.KINETICS400_IMAGENET22K_V1")},
}
# Frames of a clip and clips of a video in torchvision's tests on Kinetics, by the family.
CLIPS = {"r3d": (16, 5), "r2plus1d": (16, 5), "s3dg": (128, 1), "swin3d": (32, 12)}


def _published(name, word):
    """torchvision's entry of the weights `word` for a network; UserError if there is none."""
    published, base = PUBLISHED[word], name.partition("-")[0]
    if base not in published:
        only = ", ".join(published)
        raise UserError(f"torchvision has no {word} weights for {name}, only for {only}: a file is needed")
    return published[base]


def fetch(name: str, source: str) -> Path:
    """The file of the weights `source` of the network `name`, downloaded if it is torchvision's and missing.

    torchvision's files are kept in the cache of torch.hub. Of several processes, one must call this first.
    Raises UserError: nothing is published for this network, or the download fails.
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
            hint = f"put the file at {path}, or give the path of one"
            raise UserError(f"{entry.url} cannot be downloaded ({reason}): {hint}") from None
    return path


def published_input(name: str, word: str = "kinetics") -> dict:
    """How torchvision tests published weights of clips: keyword arguments of `modality.Recipe`.

    The clips are those of its documented scores, at 15 frames a second, which is every second frame of 30.
    Raises UserError: nothing is published for this network, or `word` is not one of weights of clips.
    """
    if word == "imagenet" or word not in PUBLISHED:
        raise UserError(
            f"torchvision has no clips for {word} weights, only for {', '.join([*PUBLISHED][1:])}"
        )
    view = _published(name, word).transforms()
    frames, clips = CLIPS[name.partition("_")[0]]
    colour = dict(mean=tuple(view.mean), std=tuple(view.std))
    sizes = dict(short_side=view.resize_size[0], size=view.crop_size[0])
    sizes["stretch"] = tuple(view.resize_size) if len(view.resize_size) == 2 else ()
    return dict(frames=frames, stride=2, clips=clips, crops=1, **sizes, **colour)


def load_weights(net: torch.nn.Module, source: str, names=None) -> bool:
    """Fill a network of `backbones.build` with weights; returns whether the last layer is among them.

    source: a word of PUBLISHED, or a file: the model.pt of a run, a bare state_dict, or a checkpoint that
    has one as "state_dict". Nothing in the file is executed. names: of the network's classes, in order.

    Everything must fit name by name and shape by shape, after these changes: prefixes of
    DistributedDataParallel and torch.compile are removed; other toolboxes' names are translated; an adapter
    that the file lacks keeps its start; a first convolution for another number of input channels is averaged
    over them and repeated (Mutual Modality Learning, section 2.1); a last layer that is missing or for other
    classes keeps its start, and a line says so. The classes of a word of PUBLISHED are the network's only if
    `names` say so; its rows are then put into their order.
    Raises UserError: missing, damaged or foreign file, another architecture, or a failed download.
    """
    path = fetch(net.name, source)
    state = files.load(path)
    if isinstance(state, dict):
        state = state.get("net", state.get("state_dict", state))
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise UserError(f"{path} holds no network: a model.pt or a saved state_dict is right")
    own, first, last = net.state_dict(), net.FIRST, {"fc.weight", "fc.bias"}
    state = {str(key).replace("module.", "").replace("_orig_mod.", ""): value for key, value in state.items()}
    state = _translate(state, own, getattr(net, "shifted", ()))
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


def _translate(state, own, shifted):
    """Tensors of other toolboxes by the network's names, those of its tensors `own`.

    - torchvision's S3D becomes s3dg, whose gates keep their start, and its Video Swin swin3d.
    - MMAction2's TSN becomes tsn, and its TSM tsm with the `shifted` blocks, whose names differ from TSN's.
    - torchvision's 2D ResNet becomes resnet3d or i3d: every kernel is repeated along time and divided by its
      number of frames (Carreira and Zisserman 2017), so that a still clip gives what its picture gives.
    """
    names = {}  # {name in state: name in own}
    if any(key.startswith("features.") for key in state):
        names = {re.sub(r"^layer\d", "features", key): key for key in own}
        for fc in ("classifier.1", "head"):
            names |= {f"{fc}.weight": "fc.weight", f"{fc}.bias": "fc.bias"}
        state = {key: value for key, value in own.items() if ".gate." in key} | state
    elif "backbone.conv1.conv.weight" in state:
        for key in own:  # layer1.0.bn2.bias is backbone.layer1.0.conv2.bn.bias there
            name = re.sub(r"\b(conv|bn)(\d)\.", r"conv\2.\1.", key).replace("fc.", "cls_head.fc_cls.")
            name = name.replace("downsample.0", "downsample.conv").replace("downsample.1", "downsample.bn")
            if key.startswith("layer") and int(key.split(".")[1]) in shifted:
                name = name.replace(".conv1.conv.", ".conv1.conv.net.")
            names[name if key.startswith("fc.") else f"backbone.{name}"] = key
    elif "conv1.weight" in state and "stem.conv.weight" in own:
        for key in own:  # res2.0.conv1.bn.bias is layer1.0.bn1.bias there
            name = re.sub(r"^res(\d)", lambda match: f"layer{int(match[1]) - 1}", key)
            name = re.sub(r"\bconv(\d)\.(conv|bn)\.", r"\2\1.", name.replace("stem.", "conv1."))
            name = name.replace("shortcut.conv", "downsample.0").replace("shortcut.bn", "downsample.1")
            names[name] = key
    translated = {}
    for key, value in state.items():
        key = names.get(key, key)
        if names and key in own and (value.dim(), own[key].dim()) == (4, 5):
            T = own[key].shape[2]
            value = torch.stack([value.float() / T] * T, 2)
        elif key == "fc.weight" and value.dim() == 5:  # S3D's last layer is a convolution of 1 x 1 x 1
            value = value.flatten(1)
        translated[key] = value
    return translated


def _rows(categories, names):
    """For each of `names` its row among `categories`; None if these are not the same classes, one to one.

    Classes of Kinetics are spelt in many ways: only letters, in lower case, and digits count.
    """
    categories, names = ([re.sub("[^a-z0-9]", "", name.lower()) for name in d] for d in (categories, names))
    return [categories.index(name) for name in names] if sorted(names) == sorted(categories) else None
