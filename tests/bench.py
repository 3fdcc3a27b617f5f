"""Measurements, each a subcommand:  python tests/bench.py decode

The variants run interleaved in random order in one process, and what counts are ratios of their CPU
times: other work on the machine shifts all of them alike.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from fractions import Fraction
from functools import partial
from types import SimpleNamespace

from common.clips import Order, dense
from common.io.decode import read_frames
from common.tools import shrink
from common.tvl1 import SCHEME, _gray, tvl1

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import av
import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

LENGTH, STRIDE, SIDE = 8, 8, 256  # the clip that is asked for: frames, stride, short side


# ---- decode --------------------------------------------------------------------------------------


def scene(width, height, frames, seed=0):
    """Yield uint8 (H, W, 3) pictures: a panning texture, textured discs, noise, one cut."""
    rng = np.random.default_rng(seed)

    def texture(h, w):
        spectrum = np.fft.rfft2(rng.standard_normal((3, h, w)))
        fy, fx = np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)
        t = np.fft.irfft2(spectrum / np.maximum(np.hypot(fy, fx), 1 / w) ** 1.25, (h, w))
        t = (t - t.min()) / (t.max() - t.min()) * 255
        return t.transpose(1, 2, 0).astype(np.float32)

    backs = [texture(height, width + frames) for _ in range(2)]
    radius = height // 8
    disc = np.hypot(*np.mgrid[-radius:radius, -radius:radius])[..., None] < radius
    skins = [texture(2 * radius, 2 * radius) for _ in range(4)]
    phases, speeds = rng.uniform(0, 6.3, (4, 2)), rng.uniform(0.01, 0.05, (4, 2))
    noise = rng.normal(0, 2, (8, height, width, 3)).astype(np.float32)
    for t in range(frames):
        picture = backs[2 * t // frames][:, t : t + width].copy()
        for skin, phase, speed in zip(skins, phases, speeds, strict=True):
            room = np.array([height, width]) - 2 * radius
            y, x = ((np.sin(phase + speed * t) + 1) / 2 * room).astype(int)
            part = picture[y : y + 2 * radius, x : x + 2 * radius]
            np.copyto(part, skin, where=disc)
        yield np.clip(picture + np.roll(noise[t % 8], 7 * t, 1), 0, 255).astype(np.uint8)


def encode(path, pictures, codec, gop, width, height):
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # One slice per frame, as in files from the web: sliced threads would flatter decoders.
        stream.thread_type, stream.codec_context.thread_count = "FRAME", 1
        stream.codec_context.gop_size = gop
        if codec == "libx264":
            stream.options = {"crf": "23", "preset": "medium", "bf": "3"}
        else:
            stream.bit_rate = 400_000
        stream.time_base = Fraction(1, 30)
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def resize(rgb):
    """uint8 (T, H, W, C) array -> (T, C, H, W) tensor of short side SIDE."""
    x = torch.from_numpy(rgb).permute(0, 3, 1, 2)
    size = [round(side * SIDE / min(x.shape[2:])) for side in x.shape[2:]]
    return x if list(x.shape[2:]) == size else TF.resize(x, size, antialias=True)


def size_of(path):
    with av.open(path) as container:
        context = container.streams.video[0].codec_context
        sides = context.width, context.height
        return [round(side * SIDE / min(sides)) for side in sides]


def ours(path, indices):
    return read_frames(path, indices, SIDE)


def naive(path, indices):
    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_count = 1
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return resize(np.stack([pictures[i] for i in indices]))


def with_decord(path, indices):
    from decord import VideoReader, cpu

    width, height = size_of(path)
    reader = VideoReader(path, ctx=cpu(0), width=width, height=height, num_threads=1)
    return torch.from_numpy(reader.get_batch(list(indices)).asnumpy()).permute(0, 3, 1, 2)


def with_torchcodec(path, indices, mode="exact"):
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, num_ffmpeg_threads=1, seek_mode=mode, dimension_order="NHWC")
    return resize(decoder.get_frames_at(list(indices)).data.numpy())


def with_torchcodec_approximate(path, indices):
    return with_torchcodec(path, indices, "approximate")


def with_opencv(path, indices):
    import cv2

    cv2.setNumThreads(1)
    capture, pictures = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1]), []
    capture.set(cv2.CAP_PROP_POS_FRAMES, indices[0])
    for i in range(indices[0], indices[-1] + 1):
        capture.grab()
        if i in indices:
            pictures.append(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
    capture.release()
    return resize(np.stack(pictures))


class DecodeOnly:
    """What libavcodec alone needs: the packets already in memory, nothing converted."""

    def __init__(self, path):
        self.container = av.open(path)
        self.stream = self.container.streams.video[0]
        self.stream.codec_context.thread_count = 1
        self.packets = [packet for packet in self.container.demux(self.stream) if packet.size]
        self.pts = sorted(packet.pts for packet in self.packets)

    def __call__(self, path, indices):
        """Seconds of CPU time."""
        context, needed = self.stream.codec_context, {self.pts[i] for i in indices}
        first, ahead = min(needed), set(needed)
        start = max(n for n, p in enumerate(self.packets) if p.is_keyframe and p.pts <= first)
        begin = time.process_time()
        context.flush_buffers()
        for packet in self.packets[start:]:
            context.skip_frame = "DEFAULT" if packet.pts in needed else "NONREF"
            context.decode(packet)
            ahead.discard(packet.pts)
            if not ahead:
                context.decode(None)
                break
        return time.process_time() - begin


def verdict(clip, indices, truth):
    """How a clip compares with the frames of a full decode."""
    if torch.equal(clip, truth[indices]):
        return "bit-exact"
    wrong = 0
    for picture, i in zip(clip.float(), indices, strict=True):
        near = range(max(i - 3, 0), min(i + 4, len(truth)))
        wrong += near[int(np.argmin([(picture - truth[j]).abs().mean() for j in near]))] != i
    return f"{wrong}/{len(indices)} WRONG" if wrong else "right frames"


def measure(path, readers, args):
    """Returns ({reader: median seconds of CPU time}, {reader: set of verdicts}) for one file."""
    rng = random.Random(0)
    last = args.frames - LENGTH * STRIDE
    starts = [rng.randint(0, last) for _ in range(args.windows)]
    jobs = [(name, range(s, s + LENGTH * STRIDE, STRIDE)) for name in readers for s in starts]
    rng.shuffle(jobs)
    with av.open(path) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        truth = torch.cat([resize(picture[None]) for picture in pictures])
    seconds, verdicts = {name: [] for name in readers}, {name: set() for name in readers}
    for name, window in jobs:
        begin = time.process_time()
        clip = readers[name](path, list(window))
        spent = time.process_time() - begin
        if isinstance(clip, torch.Tensor):
            verdicts[name].add(verdict(clip, list(window), truth))
        else:
            spent = clip
        seconds[name].append(spent)
    return {name: float(np.median(times)) for name, times in seconds.items()}, verdicts


KINDS = [  # name, codec, key frame interval, width, height, suffix
    ("h264 340x256 gop 250", "libx264", 250, 340, 256, "mp4"),
    ("h264 340x256 gop 12", "libx264", 12, 340, 256, "mp4"),
    ("h264 1280x720 gop 250", "libx264", 250, 1280, 720, "mp4"),
    ("h264 1280x720 gop 12", "libx264", 12, 1280, 720, "mp4"),
    ("mpeg4 320x240 gop 12", "mpeg4", 12, 320, 240, "avi"),
]


def decode(args):
    """Clips/s of common.io.decode.read_frames against other readers and against libavcodec alone."""
    torch.set_num_threads(1)
    readers = {"common.io.decode": ours, "naive PyAV": naive, "decord": with_decord}
    readers |= {"torchcodec exact": with_torchcodec, "OpenCV": with_opencv}
    readers["torchcodec approximate"] = with_torchcodec_approximate
    trial = os.path.join(args.folder, "trial.mp4")
    encode(trial, scene(64, 64, 12), "libx264", 12, 64, 64)
    for name in list(readers):
        try:
            readers[name](trial, [0, 8])
        except (ImportError, RuntimeError, OSError) as error:
            print(f"{name}: not installed ({str(error).partition(chr(10))[0][:60]})")
            del readers[name]
    print(f"{LENGTH} frames, stride {STRIDE}, short side {SIDE}; one thread; medians of CPU time")
    for kind, codec, gop, width, height, suffix in KINDS:
        if args.only not in kind:
            continue
        path = os.path.join(args.folder, f"{width}_{gop}_{args.frames}.{suffix}")
        if not os.path.exists(path):
            encode(path, scene(width, height, args.frames), codec, gop, width, height)
        rate = os.path.getsize(path) * 8 * 30 / args.frames / 1000
        everything = dict(readers, **{"decode only": DecodeOnly(path)})
        medians, verdicts = measure(path, everything, args)
        us, worst = medians["common.io.decode"], medians["naive PyAV"]
        print(f"\n{kind}, {args.frames} frames, {rate:.0f} kb/s")
        print(f"{'':24}{'ms/clip':>9}{'clips/s':>9}{'x naive':>9}{'x ours':>9}  frames")
        for name, t in sorted(medians.items(), key=lambda item: item[1]):
            numbers = f"{1e3 * t:9.1f}{1 / t:9.1f}{worst / t:9.1f}{us / t:9.2f}"
            print(f"{name:24}{numbers}  {', '.join(sorted(verdicts[name]))}", flush=True)


def shrunken(args):
    """Clips/s of decode.read_frames from 720p with a key frame every 250, before and after shrinking."""
    torch.set_num_threads(1)
    before, after = os.path.join(args.folder, "before"), os.path.join(args.folder, "after")
    os.makedirs(before, exist_ok=True)
    for part in ("train", "test"):
        encode(f"{before}/{part}.mp4", scene(1280, 720, args.frames), "libx264", 250, 1280, 720)
        with open(f"{before}/{part}.txt", "w") as file:
            file.write(f"{part}.mp4 0\n")
    assert shrink.main([before, "--out", after, "--workers", "0"]) == 0
    rng, times = np.random.default_rng(0), {before: [], after: []}
    for _ in range(args.windows):
        indices = dense(args.frames, LENGTH, STRIDE, rng)
        for folder in rng.permutation([before, after]):
            start = time.process_time()
            read_frames(f"{folder}/train.mp4", indices, SIDE)
            times[str(folder)].append(time.process_time() - start)
    old, new = (1e3 * np.median(times[folder]) for folder in (before, after))
    rate = os.path.getsize(f"{before}/train.mp4") * 8 * 30 / args.frames / 1000
    print(f"{rate:.0f} kb/s: {old:.1f} ms a clip before, {new:.1f} ms after, {old / new:.1f}x")


# ---- flow ----------------------------------------------------------------------------------------

HEIGHT, WIDTH, MARGIN = 256, 340, 16  # of the pictures of a pair; what known motion is compared without


def photos():
    """Gray float32 (H, W) pictures, larger than a pair's: two photographs of scikit-learn, or a texture."""
    try:
        from sklearn.datasets import load_sample_images

        pictures = [np.asarray(picture) for picture in load_sample_images().images]
    except ImportError:
        print("scikit-learn and its photographs are not there: on a texture")
        pictures = [next(scene(640, 427, 1))]
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return _gray(TF.resize(x, [320, 480], antialias=True))


# name: degrees, zoom, and shift to the right and down in pixels, about the centre
MOVES = {"1.5 px": (0, 1, 1.2, -0.9), "7.2 px": (0, 1, -6, 4), "turn": (3, 1, 0, 0), "zoom": (0, 1.04, 0, 0),
         "all": (1.5, 1.02, 2, 1.5)}  # fmt: skip


def moved(picture):
    """Yield uint8 (2, HEIGHT, WIDTH), with noise, and the motion (2, HEIGHT, WIDTH) from 0 to 1."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH] - np.array([HEIGHT - 1, WIDTH - 1])[:, None, None] / 2
    here, half = x + 1j * y, np.array(picture.shape)[::-1] / 2
    for degrees, zoom, u, v in MOVES.values():
        turn, by, frames = zoom * np.exp(1j * np.radians(degrees)), u + 1j * v, []
        for place in (here, (here - by) / turn):  # where in the picture it was
            grid = torch.from_numpy(np.stack([place.real, place.imag], -1) / half).float()
            frame = F.grid_sample(picture[None, None], grid[None], "bicubic", "reflection", False)
            frames.append(frame[0, 0] + torch.from_numpy(rng.normal(0, 1, (HEIGHT, WIDTH))))
        motion = here * (turn - 1) + by
        yield torch.stack(frames).round().clamp(0, 255).byte(), np.stack([motion.real, motion.imag])


def opencv_flow(**settings):
    """pair -> (2, H, W) by OpenCV's DualTVL1. Raises ImportError without OpenCV or its contrib modules."""
    import cv2

    cv2.setNumThreads(1)
    if not hasattr(cv2, "optflow"):
        raise ImportError("OpenCV without its contrib modules")
    algorithm = cv2.optflow.createOptFlow_DualTVL1()
    for name, value in settings.items():
        getattr(algorithm, f"set{name}")(value)
    return lambda pair: algorithm.calc(*pair.numpy(), None).transpose(2, 0, 1)


def flow(args):
    """TV-L1 of common.tvl1 on pairs of known motion: CPU ms a pair, and errors beside those of OpenCV."""
    torch.set_num_threads(1)
    same = dict(OuterIterations=1, MedianFiltering=1, Epsilon=0)
    variants = {
        "ours": lambda pair: tvl1(pair[None])[0, 0].numpy(),
        "ours, flow videos": lambda pair: tvl1(pair[None], **SCHEME)[0, 0].numpy(),
        "ours, zfactor 0.5": lambda pair: tvl1(pair[None], zfactor=0.5)[0, 0].numpy(),
    }
    try:
        variants["OpenCV, same iterations"] = opencv_flow(**same)
        variants["OpenCV, default"] = opencv_flow()
        variants["OpenCV, same, 8 levels"] = opencv_flow(**same, ScalesNumber=SCHEME["nscales"])
        variants["OpenCV, 8 levels"] = opencv_flow(ScalesNumber=SCHEME["nscales"])
    except ImportError as error:
        print(f"without OpenCV ({error})")
    pairs = [pair for photo in photos() for pair in moved(photo)]
    jobs = [(variant, i) for variant in variants for i in range(len(pairs))]
    random.Random(0).shuffle(jobs)
    found, seconds = {}, {}
    variants["ours"](pairs[0][0])  # the first call is slower
    for variant, i in jobs:
        begin = time.process_time()
        found[variant, i] = variants[variant](pairs[i][0])
        seconds[variant, i] = time.process_time() - begin

    def errors(variant, truth, margin=0):
        inside = slice(margin, -margin or None)
        every = [np.linalg.norm(found[variant, i] - truth[i], axis=0) for i in range(len(pairs))]
        every = [error[inside, inside] for error in every]
        return f"{np.mean(every):9.4f} {np.median(every):9.5f} {max(np.mean(e) for e in every):9.4f}"

    print(f"{len(pairs)} pairs of {WIDTH} x {HEIGHT}, one thread; errors in px: mean, median, worst pair")
    print(f"{'':25}{'ms':>6}  {'to the known motion':^29}  {'to OpenCV, same iterations':^29}")
    for variant in variants:
        ms = 1e3 * np.mean([seconds[variant, i] for i in range(len(pairs))])
        line = f"{variant:25}{ms:6.0f}  {errors(variant, [motion for _, motion in pairs], MARGIN)}"
        if "OpenCV, same iterations" in variants:
            theirs = [found["OpenCV, same iterations", i] for i in range(len(pairs))]
            line += "  " + errors(variant, theirs)
        print(line)
    if torch.cuda.is_available():
        batch = torch.stack([pair for pair, _ in pairs]).cuda().repeat(16, 1, 1, 1)
        tvl1(batch)  # compiles
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        on_gpu = tvl1(batch)
        end.record()
        torch.cuda.synchronize()
        apart = on_gpu[: len(pairs), 0].cpu().numpy() - [found["ours", i] for i in range(len(pairs))]
        print(f"{torch.cuda.get_device_name()}: {begin.elapsed_time(end) / len(batch):.2f} ms a pair, of "
              f"{len(batch)}; {np.linalg.norm(apart, axis=1).mean():.5f} px from the CPU")  # fmt: skip


# ---- jedi ----------------------------------------------------------------------------------------


class PerSample(torch.utils.data.Dataset):
    """Embeddings (N, D_j) of each expert, label and data set, one video at a time."""

    def __init__(self, embeddings, y, of_source):
        self.embeddings, self.y, self.of_source = embeddings, y, of_source

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return [torch.from_numpy(z[i]) for z in self.embeddings], self.y[i], self.of_source[i]


class Plain(torch.nn.Module):
    """The networks of jedi.py as one would write them first: module after module, all on all videos."""

    def __init__(self, widths, classes, p):
        super().__init__()
        from common.backbones import Adapter

        pairs = list(zip(widths, classes, strict=True))
        self.adapters = torch.nn.ModuleList(Adapter(D, 256, 0.75) for D in widths)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(D, K) for D, K in pairs)
        self.teachers = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Dropout(rate), torch.nn.Linear(sum(widths), K))
            for rate, K in zip(p, classes, strict=True)
        )

    def forward(self, embeddings):
        a = [adapter(z) for adapter, z in zip(self.adapters, embeddings, strict=True)]
        x = torch.cat(a, 1)
        return [head(z) for head, z in zip(self.heads, a, strict=True)], [e(x) for e in self.teachers]


def jedi(args):
    """Training of jedi.py on cached embeddings against a DataLoader of single videos: epochs a second."""
    import jedi as script

    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    settings = [((2048, 2048, 1024, 2048), (200, 51, 400, 101), (300, 128, 8078, 341))]  # a 28th of Table 1
    settings += [((512,) * 4, (50,) * 4, (2000,) * 4), ((128,) * 3, (8, 6, 7), (480, 540, 280))]
    print(f"{device.type}, batch {args.batch}, median of {args.repeats} epochs")
    for widths, classes, sizes in settings:
        N, n, rng = sum(sizes), len(widths), np.random.default_rng(0)
        maps = [rng.standard_normal((N, D), np.float32) for D in widths]
        of_source = torch.arange(n).repeat_interleave(torch.tensor(sizes))
        y = torch.cat([torch.arange(size) % K for size, K in zip(sizes, classes, strict=True)])
        w = script.distillation_weights(sizes)
        flags = SimpleNamespace(alpha=1, beta=1, teacher_loss="hinge", temperature=1, distill="all",
                                hidden=256, adjust_dropout=0.75, teacher_input="adjusted",
                                neurons=10)  # fmt: skip
        experts = [SimpleNamespace(net=SimpleNamespace(fc=torch.nn.Linear(D, K)), build={})
                   for D, K in zip(widths, classes, strict=True)]  # fmt: skip

        joint = script.Joint(experts, flags).to(device)
        z = torch.cat([torch.from_numpy(x) for x in maps], 1).to(device)
        on = [x.to(device) for x in (y, of_source, w)]

        def our_batches(epoch, N=N, n=n, z=z, of_source=of_source):
            order, steps = Order(N, 0), -(-N // args.batch)
            for step in range(epoch * steps, (epoch + 1) * steps):
                at = torch.from_numpy(np.sort(order.take(args.batch * step, args.batch)))
                own = [(of_source[at] == i).nonzero()[:, 0].to(device) for i in range(n)]
                yield z[at.to(device)], own, at.to(device)

        def our_step(optimizer, batch, joint=joint, on=on, flags=flags):
            z, own, at = batch
            y, of_source, w = on
            loss, _ = script.train_step(joint, z, own, y[at], w[of_source[at]], 0.4, flags)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        plain = Plain(widths, classes, joint.p).to(device)
        dataset = PerSample(maps, y, of_source)

        def loader_batches(epoch, dataset=dataset):
            return torch.utils.data.DataLoader(dataset, args.batch, shuffle=True)

        def loader_step(optimizer, batch, plain=plain, w=on[2], n=n):
            embeddings, y, of_source = batch
            y, of_source = y.to(device), of_source.to(device)
            m, e = plain([z.to(device) for z in embeddings])
            loss = 0
            for i in range(n):
                mine = of_source == i
                loss += F.cross_entropy(m[i][mine], y[mine], reduction="sum")
                loss += F.multi_margin_loss(e[i][mine], y[mine], reduction="sum")
                kd = F.cross_entropy(m[i], e[i].detach().softmax(1), reduction="none")
                loss += 0.4 * (w[of_source, i] * kd).sum()
            optimizer.zero_grad()
            (loss / len(y)).backward()
            optimizer.step()

        variants = {"ours": (our_batches, our_step, joint), "loader": (loader_batches, loader_step, plain)}
        seconds = {name: [] for name in variants} | {f"batches of {name}": [] for name in variants}
        adamw = partial(torch.optim.AdamW, lr=1e-5, weight_decay=3e-3)
        optimizers = {name: adamw(net.parameters(), fused=name == "ours")
                      for name, (_, _, net) in variants.items()}  # fmt: skip
        for epoch in range(args.repeats + 1):
            for name, (batches, step, _) in variants.items():
                begin = clock()
                for _ in batches(epoch):
                    pass
                seconds[f"batches of {name}"].append(clock() - begin)
                begin = clock()
                for batch in batches(epoch):
                    step(optimizers[name], batch)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(clock() - begin)
        rate = {name: 1 / np.median(times[1:]) for name, times in seconds.items()}
        # The products that nothing can spare: students and their adjustments on all videos, forward and back
        # (but not to the embeddings), labels of all teachers, and teachers on their own videos.
        D, K = sum(widths), sum(classes)
        flops = 2 * N * sum(d * (5 * 256 + 3 * k) for d, k in zip(widths, classes, strict=True))
        flops += 2 * N * D * K
        flops += 6 * D * sum(size * k for size, k in zip(sizes, classes, strict=True))
        a, b = (torch.randn(2048, 2048, device=device) for _ in range(2))
        products = []
        for _ in range(6):
            begin = clock()
            a @ b
            if device.type == "cuda":
                torch.cuda.synchronize()
            products.append(clock() - begin)
        floor = flops / (2 * 2048**3 / min(products))
        data = rate["batches of ours"] / rate["batches of loader"]
        print(f"{N} videos, {D} wide, {K} classes: {rate['ours']:.2f} epochs/s, with a DataLoader "
              f"{rate['loader']:.2f}, {rate['ours'] / rate['loader']:.2f} times, batches alone {data:.1f}; "
              f"{1 / rate['ours'] / floor:.2f} of the time of the matrix products alone")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for run in (decode, shrink, flow, jedi):
        command = commands.add_parser(run.__name__, help=run.__doc__)
        command.set_defaults(run=run, folder=None)
        if run is flow:
            continue
        if run is jedi:
            command.add_argument("--batch", type=int, default=512)
            command.add_argument("--repeats", type=int, default=5, help="epochs of each variant")
            continue
        command.add_argument("--windows", type=int, default=16, help="random clips per file")
        command.add_argument("--frames", type=int, default=300, help="frames per file")
        command.add_argument("--folder", help="keep the files here (default: a temporary folder)")
        if run is decode:
            command.add_argument("--only", default="", help="only kinds of file whose name has this in it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        args.folder = args.folder or folder
        args.run(args)


if __name__ == "__main__":
    main()
