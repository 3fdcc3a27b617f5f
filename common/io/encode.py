"""Writing video files: H.264 in mp4, for videos made smaller and for optical flow."""

import os
from fractions import Fraction
from itertools import chain

import av
import numpy as np

from common.errors import VideoError, reason_of

CLOCK = 90000  # ticks a second
MAX_TICKS = 2 * 10**9  # from one frame of an mp4 file to the next; the file allows 2^31, B-frames included


def encode(path, pictures, fps, times=None, options=None):
    """Write pictures, uint8 (H, W, 3) or grey (H, W), to an mp4 file.

    times: (N,) seconds of the pictures, kept to 1/90000 s; by default they are 1 / fps apart. Equal times
    become a tick apart, and ticks are longer where hours lie between two pictures. options: dict of str for
    x264. Returns the times as written. Raises VideoError for pictures that cannot be encoded; an OSError is
    always one of the disk.
    """
    longest_step = 1 / fps if times is None else np.diff(times).max(initial=0)
    clock = min(CLOCK, int(MAX_TICKS // longest_step)) if longest_step else CLOCK
    stamps = []
    # By name: of errors in a file object's methods, such as a full disk, av does not tell the reason.
    with av.open(os.path.abspath(path), "w", "mp4", {"video_track_timescale": str(clock)}) as container:
        stream = container.add_stream("libx264", Fraction(fps).limit_denominator(1001), options)
        stream.codec_context.thread_count, stream.codec_context.time_base = 1, Fraction(1, clock)
        for i, picture in enumerate(chain(pictures, [None])):
            if picture is not None:
                stamp = round(clock * (i / fps if times is None else float(times[i])))
                stamps.append(max(stamp, stamps[-1] + 1) if stamps else stamp)
            try:
                packets = stream.encode(_frame(stream.codec_context, picture, stamps))
            except Exception as error:
                size = f"{stream.codec_context.width} x {stream.codec_context.height}"
                raise VideoError(
                    f"pictures of {size} pixels cannot be encoded: {reason_of(error)}"
                ) from error
            container.mux(packets)
    return np.array(stamps) / clock


def _frame(context, picture, stamps):
    """The av.VideoFrame of a picture at the last of the stamps; None, which ends the stream, for None."""
    if picture is None:
        return None
    is_grey = picture.ndim == 2
    if len(stamps) == 1:
        context.height, context.width = picture.shape[:2]
        context.pix_fmt = "gray" if is_grey else "yuv420p"
        if is_grey:
            context.color_range = av.video.reformatter.ColorRange.JPEG
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "gray" if is_grey else "rgb24")
    frame.pts, frame.time_base = stamps[-1], context.time_base
    return frame
