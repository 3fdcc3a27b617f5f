"""Writing video files: H.264 in mp4, for videos made smaller and for optical flow."""

import os
from contextlib import contextmanager
from fractions import Fraction

import av
import numpy as np

from common.errors import VideoError, reason_of

MAX_TICKS = 2 * 10**9  # from one frame of an mp4 file to the next; the file allows 2^31, B-frames included


def encode(path, pictures, fps, times=None, options=None, pix_fmt="yuv420p", gop=12):
    """Write pictures as H.264 in mp4: uint8 (H, W, 3), or (H, W) if pix_fmt is "gray".

    times: (N,) seconds of the pictures, kept to 1/90000 s; else they are fps to a second. Equal times become
    a tick apart, and ticks are longer where hours lie between two pictures. Returns the times as written.
    Raises VideoError for pictures that cannot be encoded: an OSError is always one of the disk.
    """
    gap = 1 / fps if times is None else np.diff(times).max(initial=0)
    clock = min(90000, int(MAX_TICKS // gap)) if gap else 90000
    stamps = []
    # By name: of errors in a file object's methods, such as a full disk, av does not tell the reason.
    with av.open(os.path.abspath(path), "w", "mp4", {"video_track_timescale": str(clock)}) as container:
        stream = container.add_stream("libx264", Fraction(fps).limit_denominator(1001), options)
        context = stream.codec_context
        context.pix_fmt, context.gop_size, context.thread_count = pix_fmt, gop, 1
        context.time_base = Fraction(1, clock)
        if pix_fmt == "gray":
            context.color_range = av.video.reformatter.ColorRange.JPEG
        for i, picture in enumerate(pictures):
            if i == 0:
                context.height, context.width = picture.shape[:2]
            stamp = round(clock * (i / fps if times is None else float(times[i])))
            stamps.append(max(stamp, stamps[-1] + 1) if stamps else stamp)
            with _encoding(context):
                format = "gray" if pix_fmt == "gray" else "rgb24"
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format)
                frame.pts, frame.time_base = stamps[-1], context.time_base
                packets = stream.encode(frame)
            container.mux(packets)
        with _encoding(context):
            packets = stream.encode()
        container.mux(packets)
    return np.array(stamps) / clock


@contextmanager
def _encoding(context):
    try:
        yield
    except Exception as error:
        size = f"{context.width} x {context.height}"
        raise VideoError(f"pictures of {size} pixels cannot be encoded: {reason_of(error)}") from error
