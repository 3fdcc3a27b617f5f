"""The files model.pt, and trained networks by a specification, which is one of

MODEL.PT                   a model.pt of these scripts
FOLDER                     the file FOLDER/DATA/model.pt, for each data set
NET:WORD                   torchvision's weights, such as swin3d_b:kinetics (weights.PUBLISHED)
NET:FILE:SEGMENTS          weights of another toolbox, such as MMAction2's tsm50; the network sees
                           one view of a video, with a frame from each of SEGMENTS equal segments
NET:FILE:FRAMESxSTRIDE     the same weights; the network sees ten clips of FRAMES frames, STRIDE apart
"""

import hashlib
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import nn

from common import backbones
from common.errors import UserError
from common.io import files
from common.io.weights import PUBLISHED, fetch, published_input
from common.modality import MODALITIES, Recipe


@dataclass(frozen=True, eq=False)
class Model:
    """net: in eval mode, on the CPU; build: arguments of backbones.build; recipe: how it sees a video.

    path: the file, or the word for torchvision's weights. labelled_list: the text of labelled.txt beside a
    model.pt, which lists the labelled videos of the training; None if there is none.
    """

    path: str
    net: nn.Module
    build: dict
    recipe: Recipe
    labelled_list: str | None = None


def parse(spec, data):
    """(backbone, file or word, Recipe) of `spec`; for a model.pt backbone and Recipe are None.

    data: the name of a data set, for a FOLDER. Raises UserError if weights of another toolbox come without
    what the network sees.
    """
    name, _, rest = spec.partition(":")
    if name not in backbones.NAMES:
        if os.path.isdir(spec) or not spec.endswith(".pt"):
            spec = os.path.join(spec, os.path.basename(data).replace(":", "-"), "model.pt")
        return None, spec, None
    weights, _, clip = rest.partition(":")
    if weights in PUBLISHED and not clip:
        return name, weights, Recipe(**published_input(name, weights))
    match = re.fullmatch("([1-9][0-9]*)(?:x([1-9][0-9]*))?", clip)
    if not match:
        raise UserError(f"{name}:{weights} must say what the network sees: :8 for 8 segments of a video, "
                        f":8x4 for clips of 8 frames with a stride of 4, not {clip!r}")  # fmt: skip
    frames, stride = match.groups()
    views = dict(clips=10) if stride else dict(clips=0, uniform=1)
    rgb = MODALITIES["rgb"]
    return name, weights, Recipe(int(frames), int(stride or 1), **views, mean=rgb.mean, std=rgb.std)


def load(spec, data, run):
    """The Model of `spec`; UserError if it does not know the classes of `data`."""
    name, path, recipe = parse(spec, data.name)
    if name is None:
        beside = Path(path).with_name("labelled.txt")
        text = beside.read_text("utf-8", "surrogateescape") if beside.exists() else None
        net, build, _, recipe = load_model(path, data)
        return Model(path, net, build, recipe, text)
    if path in PUBLISHED:
        run.on_main(fetch, name, path)  # one process downloads
    build = dict(name=name, classes=len(data.classes))
    net = backbones.build(**build, weights=path, names=data.classes).eval()
    if net.new_fc:
        raise UserError(f"{spec} does not know the classes of {data.name}")
    return Model(path, net, build, recipe)


# -------------------------------------------------------------------------------- model files


def save_model(path, net, build, classes, recipe, **more):
    """Write model.pt: weights, the arguments of `backbones.build`, class names, input recipe, and `more`."""
    files.save({"net": net.state_dict(), "build": dict(build), "classes": list(classes),
                "input": asdict(recipe), **more}, path)  # fmt: skip


def digest_of_model(net):
    """sha256 (hex) of the weights of a network."""
    sha = hashlib.sha256()
    for name, value in net.state_dict().items():
        sha.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def load_model(path, data=None):
    """(net in eval mode on the CPU, build arguments, class names, Recipe) of a model.pt.

    Raises UserError for another file, and for a network that knows other classes than those of `data`.
    """
    model = files.load(path)
    try:
        net = backbones.build(**model["build"])
        # assign: in the memory format in which it was trained, whose kernels round alike.
        net.load_state_dict(model["net"], assign=True)
        model["input"].pop("keep_every", None)  # of older files, 1 in all of them
        build, classes, recipe = model["build"], tuple(model["classes"]), Recipe(**model["input"])
    except (KeyError, TypeError, RuntimeError):
        raise UserError(f"{path} is not a model.pt of these scripts, or has an input that only its script "
                        "makes") from None  # fmt: skip
    if data is not None and classes != data.classes:
        raise UserError(f"{path} knows {len(classes)} other classes, not those of {data.name}")
    return net.eval(), build, classes, recipe


def load_for(path, data, device, **changes):
    """(net on `device`, Recipe with `changes`) of a model.pt that knows the classes of `data`; UserError."""
    net, _, _, recipe = load_model(path, data)
    return net.to(device), replace(recipe, **changes)
