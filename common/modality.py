"""Input modalities other than RGB: the temporal gradient, stacks of frame differences, or optical flow.

    with Streams(videos, 0, ("rgb", "flow")) as source:
        source.lengths                                # {"rgb": 120, "flow": 115}: input frames there are
        x_rgb, x_flow = source.clips([i, j])          # uint8 (T, 3, H, W), (5 T, 2, H, W)
    x = stacked(x_flow[None], "flow")                 # (1, T, 10, H, W)

A clip has T input frames. One is made of one frame (rgb), of two frames, which become their difference (tg;
Xiao et al., Learning from Temporal Gradient), of six frames, which become five differences (diff), of five
fields of flow, from six frames as well (flow; Komkov et al., Mutual Modality Learning, section 3.1), or of a
field of flow, as 3D networks see it (field). Clips stay as read, uint8, until `stacked` on the device.
"""

import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from common import augment
from common.clips import dense_parts, dense_test, open_video, uniform_test
from common.data import default_root
from common.errors import UserError, VideoError
from common.io.decode import read_windows
from common.run import agree


class Modality(NamedTuple):
    """channels: C of the network's input. pictures: how many pictures of `source` an input frame is made of.

    They are successive, but for the two of tg, which are Recipe.interval apart. mean, std: of the input.
    """

    channels: int
    pictures: int
    mean: tuple
    std: tuple
    source: str = "frames"  # or "flow"


# Pixels of optical flow: the largest motion that a byte can hold, and the short side of the pictures.
BOUND, FLOW_SIDE = 20.0, 256
MODALITIES = {
    "rgb": Modality(3, 1, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "tg": Modality(3, 2, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "diff": Modality(15, 6, (0.0,), (1.0,)),
    "flow": Modality(10, 5, (0.5,), (0.226,), "flow"),
    "field": Modality(2, 1, (0.5,), (0.226,), "flow"),
}
SLACK = 2  # fields that flow may have too few or too many; with more, it would be that of other moments


class Streams:
    """The frames and the flow of video `index` of a list, for clips of `modalities`; a context manager.

    Flow is read from the folder `videos.flow`, or computed if that is None, with the same values as
    `common.tools.flow` writes for this bound and short side. lengths: {modality: number of input frames}; a
    video with too few pictures for one repeats the last. Raises VideoError on entering and reading.
    """

    def __init__(self, videos, index, modalities, bound=BOUND, flow_side=FLOW_SIDE, interval=1):
        self.videos, self.index, self.modalities = videos, index, modalities
        self.bound, self.flow_side, self.interval = bound, flow_side, interval

    def __enter__(self):
        self._sources = {}
        with ExitStack() as stack:
            needed = {MODALITIES[m].source for m in self.modalities}
            if "frames" in needed:
                self._sources["frames"] = stack.enter_context(open_video(self.videos, self.index))
            if "flow" in needed:
                self._sources["flow"] = stack.enter_context(self._flow())
            counts = [len(source) for source in self._sources.values()]
            if len(counts) == 2 and abs(counts[0] - 1 - counts[1]) > SLACK:
                raise VideoError(f"its flow has {counts[1]} fields, for {counts[0]} frames")
            self._stack = stack.pop_all()
        last = {m: int(_offsets(m, self.interval)[-1]) for m in self.modalities}
        self.lengths = {m: max(1, len(self._source(m)) - offset) for m, offset in last.items()}
        return self

    def __exit__(self, *_):
        self._stack.close()

    def __len__(self):
        return min(self.lengths.values())

    def _flow(self):
        from common.io import flow  # as in with_flow

        path, span = self.videos.path(self.index), self.videos.span(self.index)
        if self.videos.flow is None:
            return flow.Computed(path, span, self.bound, self.flow_side)
        extracted = flow.find_flow(self.videos.flow, self.videos.name(self.index))
        if extracted is None:
            raise VideoError(f"no extracted flow of it in {self.videos.flow}")
        return flow.Flow(extracted, span)

    def _source(self, modality):
        return self._sources[MODALITIES[modality].source]

    def clips(self, windows, short_side=None):
        """[uint8 (T pictures, C, H, W)] of windows of input frames, decoded together.

        The windows are of the modalities in turn.
        """
        kinds = [self.modalities[k % len(self.modalities)] for k in range(len(windows))]
        clips = [None] * len(windows)
        for source in self._sources.values():
            numbers = [k for k, kind in enumerate(kinds) if self._source(kind) is source]
            if numbers:
                pictures = [pictures_of(windows[k], kinds[k], len(source), self.interval) for k in numbers]
                for k, clip in zip(numbers, read_windows(source, pictures, short_side), strict=True):
                    clips[k] = clip
        return clips


def with_flow(data, name, root, folder, run, modalities, models):
    """(`data` with the folder of its flow or None, (bound, short side) of the flow).

    name, root: as of load_data. folder: of extracted flow; by default <root>_flow, where flow of toy data is
    made first. Without a folder flow is computed clip by clip. models: {path: Recipe}; flow that is computed
    has the scale of those that need flow. Nothing is done if none of `modalities` is made of flow.
    Raises UserError for a folder that is not there, and for models that need flow of another scale.
    """
    scale = BOUND, FLOW_SIDE
    if not any(MODALITIES[m].source == "flow" for m in modalities):
        return data, scale
    from common.io import flow  # only where flow is asked for: it brings TV-L1

    out = folder or f"{(root or default_root(name)).rstrip('/')}_flow"
    command = f"python -m common.tools.flow {name} --out {out}"
    if folder is None and name.split(":")[0] == "toy":
        flow.extract_flow(list(data.parts().values()), out, scale, run.device, (run.rank, run.world))
        dist.barrier()
    elif not os.path.isdir(out) and folder:
        raise UserError(f"the folder of flow {folder} is not there: {command}")
    elif not os.path.isdir(out):
        run.say(f"no extracted optical flow in {out}: computing it for every clip, about 0.3 seconds of a "
                f"CPU core for each field of 340 x 256 pixels; {command} does it once for all")  # fmt: skip
        out = None
    needed = {path: (recipe.bound, recipe.flow_side) for path, recipe in models.items()
              if MODALITIES[recipe.modality].source == "flow"}  # fmt: skip
    scale = flow.scale_of(out, scale) if out else next(iter(needed.values()), scale)
    agree({"optical flow": [f"{'extracted' if out else 'computed'}, bound and short side {scale}"]})
    for path, scale_of_model in needed.items():
        if scale_of_model != scale:
            raise UserError(f"{path} wants flow of bound and short side {scale_of_model}, not of {scale}")
    return data.with_flow(out), scale


def pictures_of(window, modality, n, interval=1):
    """Indices (T pictures,), below n, of the pictures of the input frames `window` (T,), frame by frame.

    interval: from the first to the second picture of tg.
    """
    indices = np.asarray(window)[:, None] + _offsets(modality, interval)  # (T, pictures)
    return np.minimum(indices.ravel(), n - 1)


def _offsets(modality, interval):
    return np.arange(MODALITIES[modality].pictures) * (interval if modality == "tg" else 1)


def temporal_gradient(x, x_next):
    """TG = (x - x_next + 255) / 2, rounded down: 127 where nothing moves (Xiao et al. 2022, Suppl. A).

    x, x_next: uint8 of one shape, frames t and t + n. Returns uint8.
    """
    return ((x.to(torch.int16) - x_next + 255) >> 1).to(torch.uint8)


def stacked(x, modality):
    """uint8 (B, T pictures, c, H, W) to (B, T, C, H, W): uint8, or for diff int16 in -255..255.

    Frames and single fields stay as they are, two frames become their TG. The channels of flow are u and v of
    the first field, then of the second, and so on; those of diff are red, green and blue of the second frame
    minus the first, and so on.
    """
    pictures = MODALITIES[modality].pictures
    if pictures == 1:
        return x
    x = x.unflatten(1, (-1, pictures))  # (B, T, pictures, c, H, W)
    if modality == "tg":
        return temporal_gradient(x[:, :, 0], x[:, :, 1])
    if modality == "diff":
        x = x[:, :, 1:].to(torch.int16) - x[:, :, :-1]
    return x.flatten(2, 3)


def flip(clip, modality):
    """A clip as `Streams` gives it, mirrored left and right; then u of flow has the other sign."""
    clip = clip.flip(-1)
    if MODALITIES[modality].source == "flow":
        clip[:, 0] = (256 - clip[:, 0].to(torch.int16)).clamp(max=255)  # 128 is no motion
    return clip


@dataclass(frozen=True)
class Recipe:
    """How a network wants to see a video: what a test does, and what model.pt remembers.

    A view is a clip of `frames` frames, `stride` apart, cut to `size` pixels after the short side became
    `short_side`. There are `clips` clips, evenly spread, and `crops` crops of each: 1 in the centre, or 3
    along the long side.
    uniform: further clips of a frame from each of `frames` equal segments, as 2D networks see a video.
    spread: clips from the "first" to the last frame, or at equal "parts" (clips.dense_parts).
    stretch: (height, width) of the pictures, whatever their shape, instead of short_side; 3 crops are then
    along the width.
    modality: what an input frame is, see the top of this file. interval: frames from the first to the second
    of a tg. bound, flow_side: pixels of the largest motion and of the short side of optical flow.
    average: what the mean over the views is taken of, "softmax", "logits" or "embeddings".
    mean, std: of the channels, or one number for all, as of values from 0 to 1.
    """

    frames: int
    stride: int
    clips: int = 10
    crops: int = 3
    short_side: int = 256
    size: int = 256
    uniform: int = 0
    spread: str = "first"
    stretch: tuple = ()
    modality: str = "rgb"
    interval: int = 1
    bound: float = BOUND
    flow_side: int = FLOW_SIDE
    multilabel: bool = False
    average: str = "softmax"
    mean: tuple = (0.45,)
    std: tuple = (0.225,)

    @property
    def views(self):
        return (self.clips + self.uniform) * self.crops

    @property
    def pictures(self):
        """Number of pictures that an input frame is made of."""
        return MODALITIES[self.modality].pictures

    def open(self, videos, index):
        """The context manager that gives the clips of a video."""
        if self.modality == "rgb":
            return open_video(videos, index)
        return Streams(videos, index, (self.modality,), self.bound, self.flow_side, self.interval)

    def sample(self, source):
        """Indices of the input frames of the clips of an open video: a list of (frames,) arrays."""
        dense = dense_test if self.spread == "first" else dense_parts
        clips = dense(len(source), self.frames, self.stride, self.clips)
        return [*clips, *uniform_test(len(source), self.frames, self.uniform)]

    def view(self, clips):
        """uint8 clips (T, C, H, W) to views (V, T, C, size, size)."""
        if self.stretch:
            places = (0.5,) if self.crops == 1 else (0, 0.5, 1)
            crops = [augment.stretched_crop([clip], self.size, self.stretch, at)[0]
                     for clip in clips for at in places]  # fmt: skip
        elif self.crops == 1:
            crops = [augment.resize_crop(clip, self.size, self.short_side) for clip in clips]
        else:
            crops = [crop for clip in clips for crop in augment.three_crops(clip, self.size)]
        return torch.stack(crops)

    def to_input(self, x, device):
        """uint8 (B, frames, C, H, W) of a loader to the float (B, C, T, H, W) of the network, on `device`."""
        x = stacked(x.to(device, non_blocking=True), self.modality)
        return augment.normalise(x, self.mean, self.std)
