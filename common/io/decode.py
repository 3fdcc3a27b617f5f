"""Exact frames out of video files, clip sampling, and batches that are a pure function of the step.

    with Video("a.mp4") as video:
        clip = video.get(dense(len(video), 8, 8, rng), short_side=256)    # uint8 (8, 3, 256, W)

Frames are numbered by their place in presentation order, as a full decode counts them: header
counts lie, and rates mean nothing where the frame rate varies. `Clips` and `Views` are the training
and the test set over such files; `train_loader` and `eval_loader` make batches of them that no
number of workers, restart or number of ranks changes.
"""

import os
import re
from bisect import bisect_right
from collections import deque
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from functools import cached_property
from itertools import chain

import av
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torchvision.transforms.v2 import functional as TF

from common.errors import OutOfRange, VideoError, reason_of, reasons

MAX_PIXELS = 2**26  # a picture of 8192 x 8192; a larger one is damage, or an attack on the memory
MAX_TICKS = 2 * 10**9  # from one frame of an mp4 file to the next; the file allows 2^31, B-frames included
JUMP = 2  # a seek costs about as much as decoding this many packets
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FLOW = re.compile(r"(?i)flow_?([xy]_?)?\d")  # pictures of optical flow, beside those of a video
FPS = 25.0  # pictures of a folder in a second, unless something else is said
PLAYLISTS = {"concat", "dash", "hls", "imf"}  # formats that open other files
TEXTS = {"tty", "bin", "xbin", "adf", "idf"}  # formats that draw a text
STILLS = {"gif", "apng", "mjpeg", "avif", "heic", "heix", "mif1"}  # formats of pictures, if of one frame
HOUR = 3600  # seconds; longer steps of a clock are left out of the frame rate
# HMDB-51 has tags that are not UTF-8; av 19 neither needs nor takes the argument.
TAGS = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


# ---- one video -----------------------------------------------------------------------------------


class Video:
    """The frames of a video file, or of a folder of numbered pictures; a context manager.

    span: (start, end) in seconds from the first frame; only the frames in it count, at least one.
    min_share: a damaged file, or one cut short, is used if this share of its frames is good. For a frame that
    does not decode the last good one before it stands in, else the first good one after it.
    stand_ins: the set of such frames among all that were given so far. fps: the rate of a folder of pictures.
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

    @property
    def rotation(self):
        """Degrees counter-clockwise that the upper edge is turned for display: 0, 90, 180 or 270."""
        if self._matrix is None:
            self.get([0])
        (a, b), _ = self._matrix
        return round(-np.degrees(np.arctan2(b, a))) % 360

    @property
    def height(self):
        return self._source.size[self.rotation // 90 % 2]

    @property
    def width(self):
        return self._source.size[1 - self.rotation // 90 % 2]

    def clips(self, windows, short_side=None):
        """See `together`."""
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
            ways, size = (self._source.pick, self._source.from_start), self._size(short_side)
            for i, picture in self._pictures(np.unique(indices).tolist(), size, ways):
                if clip is None:
                    clip = np.empty((len(indices), *picture.shape), np.uint8)
                clip[indices == i] = picture
        return torch.from_numpy(clip).permute(0, 3, 1, 2)

    def one_pass(self, short_side=None):
        """Yield (index, uint8 (H, W, C)) of every frame, by decoding from the start and without a seek."""
        positions = range(self._first, self._first + len(self))
        with reasons():
            ways, size = (self._source.from_start,), self._size(short_side)
            for i, picture in self._pictures(positions, size, ways):
                yield i - self._first, picture

    def _size(self, short_side):
        """(H, W) of the pictures before they are turned. Raises VideoError if they are too large."""
        size = self._source.size
        if short_side:
            size = tuple(round(side * short_side / min(size)) for side in size)
        check_size(*size)
        return size

    def _pictures(self, wanted, size, ways):
        """Yield (position, uint8 (H, W, C)) for the positions `wanted`, by the first way that has them."""
        missing = set(wanted)
        for way in ways:
            try:
                for i, frame in way(sorted(missing)):
                    yield i, self._picture(frame, size)
                    missing.remove(i)
            except Exception:
                pass  # what is wrong is found out by the next one
            if not missing:
                return
        yield from self._salvage(sorted(missing), size)

    def _salvage(self, wanted, size):
        """Yield (position, uint8 (H, W, C)) for the sorted positions `wanted` of a damaged file.

        Others stand in for those that do not decode. Raises VideoError if too few frames are good.
        """
        source, given = self._source, {}
        good = {i: n for n, i in enumerate(source.places) if i is not None}
        if len(good) < max(self.min_share * source.expected, 1):
            reason = reason_of(source.fault) if source.fault else "the file ends early"
            raise VideoError(f"only {len(good)} of {source.expected} frames decode: {reason}")
        positions = sorted(good)
        for i in wanted:
            nearest = positions[max(bisect_right(positions, i) - 1, 0)]
            given.setdefault(good[nearest], []).append(i)
            if nearest != i:
                self.stand_ins.add(i - self._first)
        for n, frame in source.numbered(sorted(given)):
            picture = self._picture(frame, size)
            yield from ((i, picture) for i in given[n])

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


def _display_matrix(frame):
    """((a, b), (c, d)) of -1, 0 and 1: pixel (x, y) is shown at (a x + c y, b x + d y), up to a shift.

    So it is one of the eight symmetries of a square. Damaged headers have any matrix; others are ignored.
    """
    try:
        data = getattr(frame, "side_data", {}).get("DISPLAYMATRIX")
        if data is None:
            return (1, 0), (0, 1)
        matrix = np.frombuffer(data, np.int32)[[0, 1, 3, 4]].reshape(2, 2).astype(float)
    except ValueError:  # av does not know the type of other side data; the angle it still tells
        cos, sin = np.cos(np.radians(frame.rotation)), np.sin(np.radians(frame.rotation))
        matrix = np.array([[cos, -sin], [sin, cos]])
    matrix = matrix / np.maximum(np.hypot(*matrix), 1e-9)
    unit = np.rint(matrix).astype(int)
    known = np.abs(matrix - unit).max() < 0.01 and np.array_equal(unit @ unit.T, np.eye(2))
    return unit.tolist() if known else ((1, 0), (0, 1))


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
        if PLAYLISTS & set(name.split(",")):
            raise VideoError("a list of other files")
        if name in TEXTS:
            raise VideoError("a text, not a video")
        if name in ("image2", "ico") or name.endswith("_pipe"):
            raise VideoError("a picture, not a video")
        streams = [stream for stream in container.streams.video if not stream.disposition & cover]
        if not streams:
            raise VideoError("no video stream")
        readable = [stream for stream in streams if stream.codec_context]
        if not readable:
            raise VideoError(f"no decoder for codec {_codec_of(container, streams[0])}")
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


def _codec_of(container, stream):
    """What FFmpeg calls the codec of a stream that it cannot decode: evc (evc1 / 0x31637665)."""
    level = av.logging.get_level()
    av.logging.set_level(av.logging.INFO)  # without it the description is empty
    description = container.dumps_format()
    av.logging.set_level(level)
    return re.search(rf"Stream #0:{stream.index}\b.*Video: (.*?),", description)[1]


def check_size(height, width):
    """Raises VideoError for a picture of more than MAX_PIXELS."""
    if height * width > MAX_PIXELS:
        raise VideoError(f"pictures of {width} x {height} pixels are refused")


class _File:
    """The frames of an open container by position; what there is, its packets tell."""

    def __init__(self, path, container, stream):
        self.path, self.container, self.stream, self.fault = path, container, stream, None
        context, avi, header = stream.codec_context, container.format.name == "avi", stream.frames
        self.by_dts = avi and not context.has_b_frames  # libavformat guesses the pts of an AVI
        self.size, self.codec = (context.height, context.width), context.name
        check_size(*self.size)
        if "mp4" in container.format.name and getattr(stream, "index_entries", None):
            header = len(stream.index_entries)  # knows what an edit list cuts off, the count not
        fields = _FieldPairs(context.extradata or b"") if self.codec == "h264" else None
        # shown: how many pictures each packet shows; seconds: stamp of a second field -> that of the first
        pts, dts, first = [], [], None
        self.keys, self.order, self.shown, self.seconds = [], {}, [], {}
        for packet in self._packets(container, stream):
            self.order[packet.pts] = len(dts)
            dts.append(packet.dts)
            if fields and fields.is_second(packet):
                self.seconds[packet.pts] = first
                self.shown.append(0)
                continue
            first = packet.pts
            if packet.is_keyframe:
                self.keys.append(packet.pts)
            self.shown.append(0 if packet.is_discard else _pictures_in(packet, self.codec))
            pts += [packet.pts] * self.shown[-1]
        if len(pts) == 1 and STILLS & {container.format.name, container.metadata.get("major_brand")}:
            raise VideoError("a picture, not a video")
        reordered = context.has_b_frames and (avi or self.codec in ("h264", "hevc"))
        total, stamps, packed = len(dts), list(self.order), max(self.shown, default=0) > 1
        # Where time stamps are absent (raw streams), repeated (broken files) or in decoding order
        # (packed pictures; AVI has none, and libavformat guesses), frames can only be counted. Videos with a
        # palette are counted, too: it comes with the first packet, which a seek leaves out.
        self.counted = (
            None in stamps
            or len(stamps) < total
            or not self.keys
            or packed
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
            self.place |= {t: self.place[first] for t, first in self.seconds.items() if first in self.place}
        # The header of an AVI counts ticks of its clock, also those of frames that were dropped when it was
        # made, and all for which the last frame is shown.
        slots = max(total, 1)
        if avi and dts and None not in dts:
            slots = dts[-1] + int(np.diff(dts).max(initial=1))
        self.expected = round(len(clock) * max(header / slots, 1))
        jumps = np.diff(self.times)
        jumps = jumps[jumps > HOUR]
        seconds = float(self.times[-1] - jumps.sum()) if pts else 0
        self.fps = (len(clock) - 1 - len(jumps)) / seconds if seconds > 0 else rate

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

    def pick(self, wanted):
        """Yield (position, frame) for those of the sorted positions `wanted` that appear.

        Seek to the key frame before, decode forward, and let the decoder skip the frames that are
        neither wanted nor referred to. The seek names the key frame's own time stamp: AVI seeks by
        decoding time, and a later stamp can land behind the frame.
        """
        if self.counted:
            yield from self.from_start(wanted)
            return
        context = self.stream.codec_context
        for key, needed in self._runs([self.pts[i] for i in wanted]):
            self.container.seek(key, stream=self.stream)
            ahead = needed | {t for t, first in self.seconds.items() if first in needed}
            start, key_came = self.order[key], key not in self.place  # an edit list can leave it out
            for packet in self._packets(self.container, self.stream):
                if self.order.get(packet.pts, 0) > start:
                    return  # the seek missed the key frame, as in transport streams
                start = len(self.order)
                context.skip_frame = "DEFAULT" if packet.pts in ahead else "NONREF"
                frames = context.decode(packet)
                ahead.discard(packet.pts)
                if not ahead:
                    frames += context.decode(None)  # what the decoder still holds
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
        runs, end = [], None
        for t in stamps:
            key = self.keys[max(bisect_right(self.keys, t) - 1, 0)]
            if not runs or self.order[key] - end > JUMP:
                runs.append((key, set()))
                end = 0
            runs[-1][1].add(t)
            end = max(end, self.order[t])
        return runs

    def from_start(self, wanted):
        """Yield (position, frame) for the sorted positions `wanted` from the start, until damage shows."""
        chosen = set(wanted)
        for n, frame in enumerate(self._frames(strict=True)):
            if not self.by_count and self.place.get(frame.pts) != n:
                return
            if n in chosen:
                yield n, frame
            if n == wanted[-1]:
                return

    @cached_property
    def places(self):
        """The position of each frame that decodes, or None, in the order in which the decoder gives them."""
        stamps = [frame.pts for frame in self._frames()]
        if not self.by_count:
            return [self.place.get(stamp) for stamp in stamps]
        # Stamps are numbers of packets. Those without a frame come before the frames of later packets.
        last, order, newest = {k: n for n, k in enumerate(stamps)}, [], -1
        lost = deque(k for k, shown in enumerate(self.shown) if shown and k not in last)
        for k in sorted(last, key=last.get):
            newest = max(newest, k)
            while lost and lost[0] < newest:
                order.append(lost.popleft())
            order.append(k)
        place = {k: i for i, k in enumerate(chain(order, lost))}
        return [place[k] for k in stamps]

    def numbered(self, numbers):
        """Yield (number, frame) for the sorted `numbers` of those that decode, see `places`."""
        chosen = set(numbers)
        for n, frame in enumerate(self._frames()):
            if n in chosen:
                yield n, frame
            if n == numbers[-1]:
                return

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


def _pictures_in(packet, codec):
    """How many pictures a packet shows: 1, but for two codecs."""
    if codec == "vp8":  # a picture may be there only to be referred to (RFC 6386, 9.1: show_frame)
        return memoryview(packet)[0] >> 4 & 1
    if codec == "mpeg4":  # DivX and XviD (UCF-101) pack a B-frame to the frame before, and then
        return max(bytes(packet).count(b"\0\0\1\xb6"), 1) if packet.size > 7 else 0  # send an empty one
    return 1


class _FieldPairs:
    """Tells which packets of an H.264 stream hold the second field of an interlaced frame.

    The decoder gives one frame for both fields. ISO/IEC 14496-10, 7.3.2.1.1 and 7.3.3.
    """

    def __init__(self, extradata):
        self.waiting, self.parity = None, 0  # a first field: (frame number, parity); its usual parity
        if extradata[:1] == b"\1":  # as in mp4: NAL units have their length before them
            self.length, sps = (extradata[4] & 3) + 1, extradata[8:]
        else:  # start codes
            self.length, sps = 0, (re.split(b"\0\0\1(?=[\x07\x27\x47\x67])", extradata) + [b""])[1]
        try:
            self.number_bits = _frame_number_bits(_Bits(sps))
        except ValueError:  # it ends early
            self.number_bits = 0

    def is_second(self, packet):
        if not self.number_bits:
            return False
        first, self.waiting = self.waiting, None
        try:
            number, parity = self._field(bytes(packet))
        except (StopIteration, ValueError):  # damaged: it is taken for the missing field, or for a first one
            self.waiting = None if first else (None, self.parity)
            return bool(first)
        if parity is None:
            return False
        if first and first[0] in (None, number) and first[1] != parity:
            return True
        self.waiting, self.parity = (number, parity), parity
        return False

    def _field(self, data):
        """(frame number, parity) of the first slice; parity None if it is of a whole frame."""
        bits = _Bits(next(nal for nal in self._nals(data) if nal and nal[0] & 31 in (1, 5))[:32])
        bits.golomb(), bits.golomb(), bits.golomb()  # first macroblock, type, picture parameters
        number = bits.read(self.number_bits)
        return number, bits.read(1) if bits.read(1) else None

    def _nals(self, data):
        if not self.length:
            return re.split(b"\0\0\1", data)
        nals = []
        while data:
            size = int.from_bytes(data[: self.length], "big")
            nals.append(data[self.length : self.length + size])
            data = data[self.length + size :]
        return nals


class _Bits:
    """The bits of a NAL unit after its first byte, read from the front. ValueError where they end."""

    def __init__(self, nal):
        data = nal[1:].replace(b"\0\0\3", b"\0\0")
        self.bits, self.at = f"{int.from_bytes(data, 'big'):0{8 * len(data)}b}", 0

    def read(self, n):
        self.at += n
        return int(self.bits[self.at - n : self.at], 2)

    def golomb(self):
        zeros = self.bits.index("1", self.at) - self.at
        self.at += zeros
        return self.read(zeros + 1) - 1


def _frame_number_bits(sps):
    """Of a sequence parameter set: how many bits frame_num has in a slice, 0 if no picture is a field."""
    profile = sps.read(8)
    sps.read(16), sps.golomb()
    if profile not in (66, 77, 88):  # Baseline, Main, Extended
        lists = 12 if sps.golomb() == 3 and not sps.read(1) else 8  # 4:4:4 in one plane
        sps.golomb(), sps.golomb(), sps.read(1)
        for i in range(lists if sps.read(1) else 0):  # scaling matrices
            if sps.read(1):
                last = scale = 8
                for _ in range(16 if i < 6 else 64):
                    if scale:
                        code = sps.golomb()
                        scale = (last + (code + 1) // 2 * (1 if code % 2 else -1)) % 256
                    last = scale or last
    number_bits, order = sps.golomb() + 4, sps.golomb()
    if order == 0:
        sps.golomb()
    elif order == 1:
        sps.read(1), sps.golomb(), sps.golomb()
        for _ in range(sps.golomb()):
            sps.golomb()
    sps.golomb(), sps.read(1), sps.golomb(), sps.golomb()
    return 0 if sps.read(1) else number_bits


class _Folder:
    """Numbered pictures in a folder, by number; hidden files and optical flow are left out."""

    codec = "pictures"

    def __init__(self, path, fps):
        names = [name for name in os.listdir(path) if name.lower().endswith(PICTURES)]
        names = [name for name in names if not name.startswith(".") and not FLOW.match(name)]
        if not names:
            raise VideoError("a folder without pictures")
        self.paths = [os.path.join(path, name) for name in _by_number(names)]
        self.fps, self.expected, self.times = fps, len(names), np.arange(len(names)) / fps
        self.fault = self.size = None
        for path in self.paths:
            with suppress(Exception), _picture(path) as (image, orientation):
                self.size = image.size if orientation in (5, 6, 7, 8) else image.size[::-1]
                return
        _read_picture(self.paths[0])  # raises what is wrong

    def pick(self, wanted):
        return ((i, _read_picture(self.paths[i])) for i in wanted)

    from_start = pick

    @cached_property
    def places(self):
        good = []
        for i, path in enumerate(self.paths):
            try:
                _read_picture(path)
                good.append(i)
            except Exception as fault:
                self.fault = fault
        return good

    def numbered(self, numbers):
        return ((n, _read_picture(self.paths[self.places[n]])) for n in numbers)


@contextmanager
def _picture(path):
    """Open a picture. Yields (image, its EXIF orientation)."""
    with Image.open(path) as image:
        check_size(image.height, image.width)
        orientation = 1
        with suppress(Exception):  # the EXIF data can be damaged where the picture is not
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        yield image, orientation


def _read_picture(path):
    """uint8 (H, W, 3), turned as the EXIF orientation says."""
    with _picture(path) as (image, orientation):
        if orientation != 1:
            with suppress(Exception):  # once the picture is turned, Pillow writes its EXIF data anew
                ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16 bits of grey, of which Pillow would take the lower ones
            return (np.array(image)[..., None].repeat(3, 2) // 256).astype(np.uint8)
        return np.array(image.convert("RGB"))


def _by_number(names):
    """The names of pictures in the order of the number that changes and counts, as in img_00012_640x480.png.

    Of the numbers at one place of the names it is the one that is different in all of them, and of several
    the one of the smallest range: a time in them goes up, too, but in larger steps. Without such a number
    the first that differs decides.
    """
    numbers = [[int(digits) for digits in re.findall(r"\d+", name)] for name in names]
    fewest = min(map(len, numbers))
    columns = [[row[k] for row in numbers] for k in range(-fewest, fewest)]
    counting = [column for column in columns if len(set(column)) == len(names)]
    keys = min(counting, key=lambda column: max(column) - min(column), default=numbers)
    return [name for _, name in sorted(zip(keys, names, strict=True))]


def read_windows(source, windows, short_side=None):
    """[uint8 (T, C, H, W)] of the frames of each window, an array of indices, in one call of source.get."""
    windows = [np.asarray(window) for window in windows]
    frames = source.get(np.concatenate(windows), short_side)
    return list(frames.split([len(window) for window in windows]))


def probe(path):
    """dict(frames, width, height, fps, seconds, rotation, codec) of a video. Raises VideoError."""
    with Video(path) as video:
        seconds = float(video.times[-1]) + 1 / video.fps
        shape = dict(width=video.width, height=video.height, rotation=video.rotation)
        return dict(frames=len(video), fps=video.fps, seconds=seconds, codec=video.codec, **shape)


def read_frames(path, indices, short_side=None):
    """uint8 (T, C, H, W): the frames `indices` of a video; see Video.get. Raises VideoError."""
    with Video(path) as video:
        return video.get(indices, short_side)


# ---- writing ---------------------------------------------------------------------------------------


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
