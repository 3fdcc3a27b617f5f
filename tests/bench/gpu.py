"""Everything that waits for a GPU, in one call of under ten minutes and one table.

    python tests/bench/gpu.py            the papers' recipes at full size, on the GPU
    python tests/bench/gpu.py --tiny     the same at tiny sizes, on a CPU: that it runs, not how fast

A step is timed by the script itself, as `seconds_compute` of log.jsonl; the first row, with compilation and
the choice of kernels, is left out. The share of the peak compares three times the operations of the forward
pass with the products of two bf16 matrices of 8192 rows.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from decode import encode, scene  # noqa: E402

from common import backbones  # noqa: E402
from common.kmeans import kmeans  # noqa: E402
from common.tvl1 import tvl1  # noqa: E402

# Flags of each script beside the paper's own defaults, and the flags that make it tiny.
SMALL = "--net resnet3d10 --width 0.125 --size 32 --frames 4"
SCRIPTS = {
    "cmpl": ("--per_class 4", f"{SMALL} --jitter 32 40 --aux resnet3d10 --aux_frames 4 --batch 1 --mu 1"),
    "tg_distill": ("--per_class 4", f"{SMALL} --batch 1"),
    "mml": ("--nets rgb,diff --ratio 1", "--net tsm10-small --size 32 --frames 4 --batch 2"),
    "motionfit": (
        "finetune --init none --ratio 1",
        "--net r2plus1d_10-pool --width 0.125 --size 32 --frames 4",
    ),
}
STEPS, EVERY = 12, 4  # of a timed run, and between two rows of its log


def make_videos(folder):
    """A data set of two classes, 32 training videos and 2 test videos of 340 x 256 pixels."""
    encode(f"{folder}/one.mp4", scene(340, 256, 120), "libx264", 12, 340, 256)
    for part, count in (("train", 16), ("test", 1)):
        for name in ("a", "b"):
            os.makedirs(f"{folder}/{part}/{name}")
            for i in range(count):
                os.link(f"{folder}/one.mp4", f"{folder}/{part}/{name}/{i}.mp4")
    os.remove(f"{folder}/one.mp4")


def step_seconds(script, words, out, ranks=1):
    """Seconds of a step of a script that is run as a command; raises CalledProcessError."""
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    call = [sys.executable, *launch, f"{ROOT / script}.py", *words, "--out", out, "--log_every", str(EVERY)]
    subprocess.run(call, cwd=ROOT, check=True, capture_output=True)
    rows = map(json.loads, Path(out, "log.jsonl").read_text().splitlines())
    seconds = [row["seconds_compute"] for row in rows if "seconds_compute" in row]
    return sum(seconds[1:]) / len(seconds[1:])


def forward_operations(script, words, out):
    """Floating-point operations of the forward passes of one step."""
    module, counter = importlib.import_module(script), FlopCounterMode(display=False)
    train_step = module.train_step

    class Counted(Exception):
        pass

    def counted(*args, **named):
        with counter:
            train_step(*args, **named)
        raise Counted

    module.train_step, sys.argv = counted, [f"{script}.py", *words, "--out", out, "--workers", "0"]
    try:
        module.main()
    except (Counted, SystemExit):
        pass
    finally:
        module.train_step = train_step
        if dist.is_initialized():  # the run was broken off
            dist.destroy_process_group()
    return counter.get_total_flops()


def peak(device):
    """Operations a second of a product of two large matrices in bfloat16."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / seconds_of(lambda: a @ b, device)


def seconds_of(function, device, repeats=5):
    """Seconds of a call, the fastest of some, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def bf16_difference(device):
    """Largest difference of the probabilities of a network in bf16 on `device` and in float32 on the CPU."""
    torch.manual_seed(0)
    net, x = backbones.build(name="resnet3d10", classes=10, width=0.25).eval(), torch.randn(8, 3, 8, 64, 64)
    with torch.no_grad():
        on_cpu = net(x).softmax(1)
        with torch.autocast(device.type, torch.bfloat16):
            on_device = net.to(device)(x.to(device)).float().softmax(1).cpu()
    return (on_cpu - on_device).abs().max().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, and no --compile")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        parser.error("there is no GPU here: --tiny shows that everything runs")
    print(torch.cuda.get_device_name() if device.type == "cuda" else "CPU", torch.__version__)
    best, most = peak(device), torch.cuda.device_count()
    print("| what | seconds | share of the peak |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        make_videos(f"{folder}/videos") if os.makedirs(f"{folder}/videos") is None else None
        for script, (words, tiny) in SCRIPTS.items():
            words = [*words.split(), "--data", f"{folder}/videos", *(tiny.split() if args.tiny else ())]
            words += ["--workers", "2" if args.tiny else "8", "--eval_every", "0", "--clips", "1"]
            operations = 3 * forward_operations(script, [*words, "--epochs", "1"], f"{folder}/count_{script}")
            layouts = [["--no-channels_last"], ["--channels_last"]]
            layouts += [[*layout, "--compile"] for layout in layouts if not args.tiny]
            for ranks in (1, 2) if most > 1 else (1,):
                for layout in layouts:
                    out = f"{folder}/{script}{ranks}{''.join(layout)}"
                    try:
                        seconds = step_seconds(script, [*words, *layout, "--epochs", str(STEPS)], out, ranks)
                        share = operations / seconds / best
                        print(
                            f"| {script} {' '.join(layout)}, {ranks} GPU | {seconds:.4f} | {share:.1%} |",
                            flush=True,
                        )
                    except subprocess.CalledProcessError as error:
                        print(
                            f"| {script} {' '.join(layout)} | {error.stderr.decode()[-200:]!r} | |",
                            flush=True,
                        )
    height, width, pairs = (64, 80, 2) if args.tiny else (256, 340, 160)
    frames = torch.randint(0, 256, (pairs, 2, height, width), dtype=torch.uint8, device=device)
    print(
        f"| TV-L1, a pair of {width} x {height} | {seconds_of(lambda: tvl1(frames), device) / pairs:.5f} | |"
    )
    rows, clusters = (2000, 16) if args.tiny else (4_400_000, 1000)
    x = torch.randn(rows, 512, device=device, dtype=torch.float16 if device.type == "cuda" else torch.float32)
    seconds = seconds_of(lambda: kmeans(x, clusters, 20, seed=0), device, repeats=1)
    print(f"| K-means, {rows} x 512, K = {clusters}, 20 iterations | {seconds:.2f} | |")
    print(
        f"| largest difference of a probability, bf16 and the CPU | {bf16_difference(device):.4f} | |",
        flush=True,
    )
    for bench in ("jedi", "flow"):
        subprocess.run(
            [sys.executable, ROOT / f"tests/bench/{bench}.py"], check=True
        ) if not args.tiny else None


if __name__ == "__main__":
    main()
