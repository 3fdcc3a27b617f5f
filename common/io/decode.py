"""Exact frames of video files and of folders of pictures.

    with Video("a.mp4") as video:
        clip = video.get([0, 8, 16], short_side=256)    # uint8 (3, 3, 256, W)

Frames are numbered in presentation order, as a full decode counts them: the counts in headers can be wrong,
and rates mean nothing where the frame rate varies.
"""

import os
import re
from bisect import bisect_right
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from itertools import chain, islice

import av
import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as TF

from common.errors import OutOfRange, VideoError, reason_of, reasons

MAX_PIXELS = 2**26  # a picture of 8192 x 8192; a larger one is damage, or an attack on the memory
SEEK_COST = 2  # a seek costs about as much as decoding this many packets
LONGEST_STEP = 3600  # seconds; longer steps from frame to frame are left out of the frame rate
FPS = 25.0  # rate of a folder of pictures, unless another is given
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FLOW = re.compile(r"(?i)flow_?([xy]_?)?\d")  # pictures of optical flow, beside those of a video
# FFmpeg's names of formats that hold no frames of their own, and the reasons why they are refused.
REFUSED = dict.fromkeys(("concat", "dash", "hls", "imf"), "a list of other files")
REFUSED |= dict.fromkeys(("tty", "bin", "xbin", "adf", "idf"), "a text, not a video")
REFUSED |= dict.fromkeys(("image2", "ico"), "a picture, not a video")
STILLS = {"gif", "apng", "mjpeg", "avif", "heic", "heix", "mif1"}  # with one frame they are pictures
# HMDB-51 has tags that are not UTF-8; av 19 neither needs nor takes the argument.
TAGS = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


class Video:
    """The frames of a video file, or of a folder of numbered pictures; a context manager.

    span: (start, end) in seconds from the first frame; only the frames in it count, at least one.
    min_share: a damaged file, or one cut short, is used if this share of its frames is good. A frame that
    does not decode is replaced by the last good frame before it, or else by the first good one after it.
    stand_ins: the set of the positions replaced so far. fps: the rate of a folder of pictures.
    Pictures are turned and mirrored as players show them; pixels are taken as square.
    Raises VideoError on entering and on reading.
    """

    def __init__(self, path, span=None, min_share=0.5, fps=FPS):
        self.path, self.span, self.min_share, self.fps = os.fspath(path), span, min_share, fps

    def __enter__(self):
        with ExitStack() as stack, reasons():
            if os.path.isdir(self.path):
                source = _Folder(self.path, self.fps)
            else:
                source = _File(self.path, *stack.enter_context(_open(self.path)))
            n = len(source.times)
            if n == 0:
                raise VideoError("no frames")
            if n < self.min_share * source.expected:
                raise VideoError(f"only {n} of {source.expected} frames are in the file")
            self._source, self._stack = source, stack.pop_all()
        self.stand_ins, self._matrix = set(), None  # the matrix is known once a frame is decoded
        self._first, last = 0, n
        if self.span is not None:
            self._first = min(int(np.searchsorted(source.times, self.span[0])), n - 1)
            last = max(int(np.searchsorted(source.times, self.span[1])), self._first + 1)
        self.times = source.times[self._first : last]  # (N,) seconds from the file's first frame
        self.fps, self.codec = source.fps, source.codec
        return self

    def __exit__(self, *_):
        self._stack.close()

    def __len__(self):
        return len(self.times)

    @cached_property
    def _shown_size(self):
        if self._matrix is None:
            self.get([0])
        return self._source.size if self._matrix[0][0] else self._source.size[::-1]

    @property
    def height(self):
        return self._shown_size[0]

    @property
    def width(self):
        return self._shown_size[1]

    def clips(self, windows, short_side=None):
        """See `read_windows`."""
        return read_windows(self, windows, short_side)

    def get(self, indices, short_side=None):
        """The frames `indices`, in any order and with repeats; each is decoded once.

        short_side: resize the pictures (antialias, uint8) so that their shorter side is this.
        Returns uint8 (T, C, H, W) whose memory is T, H, W, C. Raises VideoError if the file cannot
        give them, OutOfRange for an index outside the video.
        """
        indices = np.asarray(indices, dtype=np.int64).ravel()
        if indices.size == 0 or indices.min() < 0 or indices.max() >= len(self):
            raise OutOfRange(f"frames {indices.tolist()} of a video of {len(self)} frames")
        indices, clip = indices + self._first, None
        with reasons():
            for i, picture in self._pictures(np.unique(indices).tolist(), short_side, self._source.decoders):
                if clip is None:
                    clip = np.empty((len(indices), *picture.shape), np.uint8)
                clip[indices == i] = picture
        return torch.from_numpy(clip).permute(0, 3, 1, 2)

    def one_pass(self, short_side=None):
        """Yield (index, uint8 (H, W, C)) of every frame, by decoding from the start and without a seek."""
        positions = range(self._first, self._first + len(self))
        with reasons():
            for i, picture in self._pictures(positions, short_side, [self._source.from_start]):
                yield i - self._first, picture

    def _pictures(self, positions, short_side, decoders):
        """Yield (position, uint8 (H, W, C)) for the positions, from the first decoder that has them."""
        size = self._source.size  # before they are turned
        if short_side:
            size = tuple(round(side * short_side / min(size)) for side in size)
        check_size(*size)
        missing = set(positions)
        for decode in decoders:
            with suppress(Exception):  # the next decoder, or the salvage, tells what is wrong
                for i, frame in decode(sorted(missing)):
                    yield i, self._picture(frame, size)
                    missing.remove(i)
            if not missing:
                return
        yield from self._salvage(sorted(missing), size)

    def _salvage(self, positions, size):
        """Yield (position, uint8 (H, W, C)) for the sorted positions of a damaged file.

        Other frames stand in for those that do not decode. Raises VideoError if too few frames are good.
        """
        source = self._source
        numbers = source.decodable
        if len(numbers) < max(self.min_share * source.expected, 1):
            reason = reason_of(source.fault) if source.fault else "the file ends early"
            raise VideoError(f"only {len(numbers)} of {source.expected} frames decode: {reason}")
        good, shown_at = sorted(numbers), {}  # number of a frame -> the positions at which it is shown
        for i in positions:
            nearest = good[max(bisect_right(good, i) - 1, 0)]
            shown_at.setdefault(numbers[nearest], []).append(i)
            if nearest != i:
                self.stand_ins.add(i - self._first)
        for n, frame in source.from_start(sorted(shown_at), strict=False):
            picture = self._picture(frame, size)
            yield from ((i, picture) for i in shown_at[n])

    def _picture(self, frame, size):
        """uint8 (H, W, C) of a decoded frame, resized to `size` and turned for display."""
        if isinstance(frame, np.ndarray):
            rgb = frame
        else:
            check_size(frame.height, frame.width)
            rgb = frame.to_ndarray(format="rgb24", threads=1)
        if self._matrix is None:
            self._matrix = _display_matrix(frame)
        if rgb.shape[:2] != size:
            # One path for training and testing: swscale's own resize is brighter by a grey level.
            x = TF.resize(torch.from_numpy(rgb).permute(2, 0, 1)[None], list(size), antialias=True)
            rgb = x[0].permute(1, 2, 0).numpy()
        (a, b), (c, d) = self._matrix
        return (rgb if a else rgb.transpose(1, 0, 2))[:: b + d, :: a + c]


def read_windows(source, windows, short_side=None):
    """[uint8 (T, C, H, W)] of the frames of each window, an array of indices, in one call of source.get."""
    windows = [np.asarray(window) for window in windows]
    frames = source.get(np.concatenate(windows), short_side)
    return list(frames.split([len(window) for window in windows]))


def read_frames(path, indices, short_side=None):
    """uint8 (T, C, H, W): the frames `indices` of a video; see Video.get. Raises VideoError."""
    with Video(path) as video:
        return video.get(indices, short_side)


def check_size(height, width):
    """Raises VideoError for a picture of more than MAX_PIXELS."""
    if height * width > MAX_PIXELS:
        raise VideoError(f"pictures of {width} x {height} pixels are refused")


def _display_matrix(frame):
    """((a, b), (c, d)) of -1, 0 and 1: pixel (x, y) is shown at (a x + c y, b x + d y), up to a shift.

    So it is one of the eight symmetries of a square. Damaged headers have any matrix; others are ignored.
    """
    matrix = np.eye(2)
    try:
        data = getattr(frame, "side_data", {}).get("DISPLAYMATRIX")
        if data is not None:
            matrix = np.frombuffer(data, np.int32)[[0, 1, 3, 4]].reshape(2, 2).astype(float)
    except ValueError:  # av does not know the type of other side data; the angle is still there
        cos, sin = np.cos(np.radians(frame.rotation)), np.sin(np.radians(frame.rotation))
        matrix = np.array([[cos, -sin], [sin, cos]])
    matrix = matrix / np.maximum(np.hypot(*matrix), 1e-9)
    unit = np.rint(matrix).astype(int)
    is_symmetry = np.abs(matrix - unit).max() < 0.01 and np.array_equal(unit @ unit.T, np.eye(2))
    return unit.tolist() if is_symmetry else ((1, 0), (0, 1))


# ---- video files ---------------------------------------------------------------------------------


@contextmanager
def _open(path, strict=True):
    """Open a video file for one decoder thread. Yields (container, the best of its video streams).

    strict: the decoder raises an error where it would otherwise conceal damage.
    """
    if not os.path.isfile(path):  # av.open would also take URLs and lists of files
        raise VideoError("not a file" if os.path.exists(path) else "no such file")
    # An absolute path is never taken for a protocol, whatever colons the name has.
    only_files = {"protocol_whitelist": "file"}
    with av.open(os.path.abspath(path), options=only_files, **TAGS) as container:
        name, cover = container.format.name, av.stream.Disposition.attached_pic
        for part in name.split(","):
            if part in REFUSED or part.endswith("_pipe"):
                raise VideoError(REFUSED.get(part, "a picture, not a video"))
        streams = [stream for stream in container.streams.video if not stream.disposition & cover]
        if not streams:
            raise VideoError("no video stream")
        readable = [stream for stream in streams if stream.codec_context]
        if not readable:
            # FFmpeg describes a codec that it cannot decode in words: evc (evc1 / 0x31637665).
            with _ffmpeg_log():
                streams_text = container.dumps_format()
            codec = re.search(rf"Stream #0:{streams[0].index}\b.*Video: (.*?),", streams_text)[1]
            raise VideoError(f"no decoder for codec {codec}")
        readable = [stream for stream in readable if stream.frames != 1] or readable  # no single picture
        stream, best = readable[0], container.streams.best("video")
        # FFmpeg compares the disposition, then whether there are five frames, then the bit rate. Of streams
        # that differ in the bit rate alone the first is taken here.
        if best in readable and (stream.frames < 5 or stream.disposition != best.disposition):
            stream = best
        stream.codec_context.thread_count = 1  # the workers are parallel; more threads deadlock
        if strict:
            stream.codec_context.options = {"err_detect": "explode"}
        yield container, stream


@contextmanager
def _ffmpeg_log():
    """Let FFmpeg describe what it does. Yields the list that its lines go to: (level, name, line)."""
    level = av.logging.get_level()
    av.logging.set_level(av.logging.INFO)
    try:
        with av.logging.Capture() as lines:
            yield lines
    finally:
        av.logging.set_level(level)


def _may_have_fields(stream):
    """Whether packets of an H.264 stream may hold one field of an interlaced frame instead of a frame."""
    with _ffmpeg_log() as lines, suppress(av.FFmpegError):
        av.bitstream.BitStreamFilterContext("trace_headers", stream)
    flags = [line.split()[-1] for *_, line in lines if "frame_mbs_only_flag" in line]
    return not flags or "0" in flags


def _pictures_in(packet, codec):
    """How many pictures a packet shows: 1, but for two codecs."""
    if codec == "vp8":  # a picture may be there only to be referred to (RFC 6386, 9.1: show_frame)
        return memoryview(packet)[0] >> 4 & 1
    if codec == "mpeg4":  # DivX and XviD (UCF-101) pack a B-frame to the frame before, and then
        return max(bytes(packet).count(b"\0\0\1\xb6"), 1) if packet.size > 7 else 0  # send an empty one
    return 1


class _File:
    """The frames of an open container by position; its packets tell how many there are.

    size: (H, W) in pixels; times: (N,) seconds from the first frame; expected: how many frames there should
    be; fault: the last error; decoders: what yields (position, frame) for sorted positions, fastest first.
    """

    def __init__(self, path, container, stream):
        self.path, self.container, self.stream, self.fault = path, container, stream, None
        context, avi, header = stream.codec_context, container.format.name == "avi", stream.frames
        self.by_dts = avi and not context.has_b_frames  # libavformat guesses the pts of an AVI
        self.size, self.codec = (context.height, context.width), context.name
        check_size(*self.size)
        if "mp4" in container.format.name and getattr(stream, "index_entries", None):
            header = len(stream.index_entries)  # knows what an edit list cuts off, unlike the count
        stamps, dts = [], []
        self.keys, self.shown = [], []  # stamps of the key frames; how many pictures each packet shows
        for packet in self._packets(container, stream):
            stamps.append(packet.pts)
            dts.append(packet.dts)
            if packet.is_keyframe:
                self.keys.append(packet.pts)
            self.shown.append(0 if packet.is_discard else _pictures_in(packet, self.codec))
        self.order = {stamp: k for k, stamp in enumerate(stamps)}
        total, packed = len(dts), max(self.shown, default=0) > 1
        has_fields = False
        if self.codec == "h264" and _may_have_fields(stream):
            # The decoder makes one frame of the packets of two fields. Only decoding tells which packets.
            self.by_count = True
            first_fields = {frame.pts for frame in self._frames()}
            has_fields = len(first_fields) < total
            self.shown = [int(k in first_fields) for k in range(total)]
        pts = [t for t, shown in zip(stamps, self.shown, strict=True) for _ in range(shown)]
        if len(pts) == 1 and STILLS & {container.format.name, container.metadata.get("major_brand")}:
            raise VideoError("a picture, not a video")
        reordered = context.has_b_frames and (avi or self.codec in ("h264", "hevc"))
        # Where time stamps are absent (raw streams), repeated (broken files) or in decoding order
        # (packed pictures; AVI has none, and libavformat guesses), frames can only be counted. Videos with a
        # palette are counted, too: it comes with the first packet, which a seek leaves out.
        self.counted = (
            None in self.order
            or len(self.order) < total
            or not self.keys
            or packed
            or has_fields
            or (reordered and stamps == sorted(stamps))
            or getattr(context.format, "name", None) == "pal8"
        )
        self.by_count = self.counted or avi and context.has_b_frames  # how the frames of a damaged file go
        rates = [rate for rate in (context.framerate, stream.average_rate) if rate and rate <= 240]
        rate = float(rates[0]) if rates else 25.0
        clock = pts
        if self.counted:
            clock = [t for t, shown in zip(dts, self.shown, strict=True) if shown or packed][: len(pts)]
        if None in clock or len(set(clock)) == 1:
            self.times = np.arange(len(clock)) / rate
        else:
            clock.sort()
            self.times = (np.array(clock) - clock[:1]) * float(stream.time_base or 1)
        if not self.counted:
            self.keys.sort()
            self.pts, self.place = pts, {t: i for i, t in enumerate(pts)}
        self.decoders = [self.from_start] if self.counted else [self.by_seeking, self.from_start]
        # The header of an AVI counts ticks of its clock, also those of frames that were dropped when it was
        # made, and all for which the last frame is shown.
        slots = max(total, 1)
        if avi and dts and None not in dts:
            slots = dts[-1] + int(np.diff(dts).max(initial=1))
        self.expected = round(len(clock) * max(header / slots, 1))
        if has_fields and self.fault:
            self.expected += 1  # `shown` does not count the frame of a damaged field
        steps = np.diff(self.times)
        steps = steps[steps <= LONGEST_STEP]
        self.fps = len(steps) / steps.sum() if steps.sum() > 0 else rate

    def _packets(self, container, stream):
        """Yield the packets, up to where the file is so damaged that no more are found."""
        try:
            for packet in container.demux(stream):
                if packet.size:
                    if self.by_dts:
                        packet.pts = packet.dts
                    yield packet
        except Exception as fault:
            self.fault = fault

    def by_seeking(self, positions):
        """Yield (position, frame) for those of the sorted positions that appear.

        Seek to the key frame before, decode forward, and let the decoder skip the frames that are
        neither needed nor referred to. The seek names the key frame's own time stamp: AVI seeks by
        decoding time, and a later stamp can land behind the frame.
        """
        context = self.stream.codec_context
        for key, needed in self._runs([self.pts[i] for i in positions]):
            self.container.seek(key, stream=self.stream)
            ahead, key_came = set(needed), key not in self.place  # an edit list can leave out the key frame
            latest = self.order[key]
            for packet in self._packets(self.container, self.stream):
                if self.order.get(packet.pts, 0) > latest:
                    return  # the seek missed the key frame, as in transport streams
                latest = len(self.order)  # only the first packet is checked
                context.skip_frame = "DEFAULT" if packet.pts in needed else "NONREF"
                frames = context.decode(packet)
                ahead.discard(packet.pts)
                if not ahead:
                    frames += context.decode(None)  # those that the decoder still holds
                for frame in frames:
                    key_came = key_came or frame.pts == key and frame.key_frame
                    if frame.pts in needed:
                        if not key_came:
                            return  # it is damaged, or no key frame: what refers to it would be wrong
                        yield self.place[frame.pts], frame
                if not ahead:
                    break

    def _runs(self, stamps):
        """Cut sorted time stamps into [(key stamp, stamps decoded from it)], to jump over gaps."""
        runs, latest = [], 0  # number of the packet up to which a run decodes
        for stamp in stamps:
            key = self.keys[max(bisect_right(self.keys, stamp) - 1, 0)]
            if not runs or self.order[key] - latest > SEEK_COST:
                runs.append((key, set()))
                latest = 0
            runs[-1][1].add(stamp)
            latest = max(latest, self.order[stamp])
        return runs

    def from_start(self, numbers, strict=True):
        """Yield (number, frame) for the sorted numbers of frames, counted as they are decoded from the start.

        If strict, numbers are positions, and it ends where damage shows; else see `decodable`.
        """
        chosen = set(numbers)
        for n, frame in enumerate(islice(self._frames(strict), numbers[-1] + 1)):
            if strict and not self.by_count and self.place.get(frame.pts) != n:
                return
            if n in chosen:
                yield n, frame

    @cached_property
    def decodable(self):
        """dict position -> number of the frame among those that a decoder gives that goes on after errors."""
        stamps = [frame.pts for frame in self._frames()]
        if self.by_count:
            # Stamps are numbers of packets. Those without a frame come before the frames of later packets.
            lost = sorted({k for k, shown in enumerate(self.shown) if shown}.difference(stamps))
            before = np.searchsorted(lost, np.maximum.accumulate(stamps))
            return {i: n for n, i in enumerate((np.arange(len(stamps)) + before).tolist())}
        positions = [self.place.get(stamp) for stamp in stamps]
        return {i: n for n, i in enumerate(positions) if i is not None}

    def _frames(self, strict=False):
        """Yield what decodes from the start, by a fresh decoder.

        Unless strict, it goes on with the next packet after an error, as the ffmpeg command does. Where
        frames are counted, their pts are the numbers of their packets.
        """
        with _open(self.path, strict) as (container, stream):
            for k, packet in enumerate(chain(self._packets(container, stream), [None])):
                if packet and self.by_count:
                    packet.pts = k
                try:
                    frames = stream.codec_context.decode(packet)
                except Exception as fault:
                    if strict:
                        raise
                    self.fault = fault
                    continue
                yield from frames


# ---- folders of pictures -------------------------------------------------------------------------


class _Folder:
    """Numbered pictures in a folder, by number; hidden files and optical flow are left out. As _File."""

    codec, fault = "pictures", None

    def __init__(self, path, fps):
        names = [name for name in os.listdir(path) if name.lower().endswith(PICTURES)]
        names = [name for name in names if not name.startswith(".") and not FLOW.match(name)]
        if not names:
            raise VideoError("a folder without pictures")
        self.paths = [os.path.join(path, name) for name in _by_number(names)]
        self.fps, self.expected, self.times = fps, len(names), np.arange(len(names)) / fps
        self.decoders = [self.from_start]
        for path in self.paths:
            with suppress(Exception), _picture(path) as image:
                self.size = image.height, image.width
                return
        _read_picture(self.paths[0])  # raises what is wrong

    def from_start(self, positions, strict=True):
        return ((i, _read_picture(self.paths[i])) for i in positions)

    @cached_property
    def decodable(self):
        good = {}
        for i, path in enumerate(self.paths):
            try:
                _read_picture(path)
                good[i] = i
            except Exception as fault:
                self.fault = fault
        return good


@contextmanager
def _picture(path):
    """Open a picture, turned as its EXIF orientation tells."""
    with Image.open(path) as image:
        check_size(image.height, image.width)
        # The EXIF data can be damaged where the picture is not, and Pillow writes it anew after the turn.
        with suppress(Exception):
            ImageOps.exif_transpose(image, in_place=True)
        yield image


def _read_picture(path):
    """uint8 (H, W, 3)."""
    with _picture(path) as image:
        if image.mode.startswith("I"):  # 16 bits of grey, of which Pillow would take the lower ones
            return (np.array(image)[..., None].repeat(3, 2) // 256).astype(np.uint8)
        return np.array(image.convert("RGB"))


def _by_number(names):
    """The names of pictures in the order of the number that changes and counts, as in img_00012_640x480.png.

    Of the numbers at the same place of the names it is the one that differs in all of them; of several, the
    one of the smallest range: a time in the names goes up, too, but in larger steps. Without such a number
    the first that differs decides.
    """
    numbers = [[int(digits) for digits in re.findall(r"\d+", name)] for name in names]
    fewest = min(map(len, numbers))
    columns = [[row[k] for row in numbers] for k in range(-fewest, fewest)]
    counting = [column for column in columns if len(set(column)) == len(names)]
    keys = min(counting, key=lambda column: max(column) - min(column), default=numbers)
    return [name for _, name in sorted(zip(keys, names, strict=True))]
