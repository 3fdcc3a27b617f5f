"""Which convolutions of the networks does oneDNN, torch's library for the CPU, compute wrongly?

    python tests/bench/onednn.py              all backbones at the sizes of the recipes, hours of one core
    python tests/bench/onednn.py s3dg tsm     the networks whose names begin so
    python tests/bench/onednn.py --plain      without what `avoid_onednn_faults` does about it
    ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=2 python tests/bench/onednn.py     other kernels

Each convolution of each network makes forward and backward passes in both memory formats, in a child process
that compares the results with those of torch's own kernels. The child runs under glibc's checking allocator,
where that is installed, and so ends at a write past the end of a tensor. Prints a line for each shape that is
wrong or fatal, with the networks that have it; the status is 1 if there are any.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from functools import partial

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import torch
from torch import nn

from common import backbones
from common.errors import UserError
from common.io.onednn import avoid_onednn_faults

REPEATS = 1  # with oneDNN; a write past the end shows at once under the checking allocator
TOLERANCE = 1e-4  # of the largest value: float32 sums of up to a million products
CHECKS = {"LD_PRELOAD": "libc_malloc_debug.so.0", "GLIBC_TUNABLES": "glibc.malloc.check=3"}  # glibc 2.34 on
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
# Widths of a network, then channels, frames and sides of the pictures of its clips, and how many: the recipes
# of toy and Weizmann, narrower networks and one of odd channels; other inputs (a temporal gradient, one flow,
# five); clips of any length; the papers' recipes. What a network refuses is left out.
SETTINGS = [
    ((1 / 16, 1 / 8, 1 / 4, 1 / 3), (3,), (8, 16), (40, 48, 64), 8),
    ((1 / 4, 1 / 3), (1, 2, 10), (8,), (40,), 8),
    ((1 / 4, 1 / 3), (3,), range(1, 18), (40,), 4),
    ((1 / 4, 1), (3,), (8, 16), (112, 224), 1),
]
# Shapes that torch 2.14.1 is known to get wrong, tested for any names: class, channels in and out, kernel,
# stride, padding, shape of the input.
KNOWN = [
    ("Conv3d", 16, 16, (7, 1, 1), (2, 1, 1), (3, 0, 0), (4, 16, 5, 16, 16)),  # fatal
    ("Conv3d", 16, 16, (7, 1, 1), (2, 1, 1), (3, 0, 0), (4, 16, 7, 16, 16)),  # wrong
    ("Conv2d", 4, 8, (1, 1), (2, 2), (0, 0), (32, 4, 64, 64)),
]


def shapes_of(names):
    """{shape as in KNOWN: the networks that have it}, found on the meta device, where nothing is computed."""
    shapes = {shape: {"known"} for shape in KNOWN}

    def look(name, conv, inputs):
        kind = "Conv2d" if inputs[0].dim() == 4 else "Conv3d"
        shape = kind, conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding
        shapes.setdefault((*shape, tuple(inputs[0].shape)), set()).add(name)

    for name, (widths, channels, lengths, sides, clips) in itertools.product(names, SETTINGS):
        if name.startswith(("s3dg", "swin3d")):
            widths = (1,)
        for width, C in itertools.product(widths, channels):
            with torch.device("meta"), suppress(UserError):
                net = backbones.build(name, 2, C, width)
                for module in net.modules():
                    if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                        module.register_forward_pre_hook(partial(look, name))
                for T, side in itertools.product(lengths, sides):
                    with suppress(UserError):
                        net(torch.empty(clips, C, T, side, side))
    return shapes


def difference(kind, c_in, c_out, kernel, stride, padding, size, last, plain):
    """Largest relative difference, of output and gradients, between oneDNN and torch's own kernels."""
    torch.manual_seed(0)
    conv = getattr(nn, kind)(c_in, c_out, kernel, stride, padding, bias=False)
    if not plain:
        avoid_onednn_faults(conv)
    x = torch.randn(size)
    if last:
        conv, x = conv.to(memory_format=FORMATS[x.dim()]), x.contiguous(memory_format=FORMATS[x.dim()])
    results = []
    for i in range(1 + REPEATS):
        with torch.backends.mkldnn.flags(enabled=i > 0):
            leaf, conv.weight.grad = x.clone().requires_grad_(), None
            y = conv(leaf)
            if i == 0:
                grad = torch.randn_like(y)
            y.backward(grad)
        results.append([y.detach(), leaf.grad, conv.weight.grad])
    own, *others = results
    pairs = [pair for other in others for pair in zip(other, own, strict=True)]
    return torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max().item()  # NaN stays


def child():
    """Arguments of `difference` come on standard input, a line of JSON each; the values go out."""
    for line in sys.stdin:
        print(difference(*json.loads(line)), flush=True)


def sweep(jobs):
    """Yield (job, what is wrong with it, or None), a job the arguments of `difference`."""
    process = None
    for job in jobs:
        if process is None:
            command = [sys.executable, __file__, "--child"]
            process = subprocess.Popen(command, env=os.environ | CHECKS, text=True, stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        if answer := process.stdout.readline():
            yield job, None if float(answer) < TOLERANCE else f"differs by {float(answer):.2g}"
        else:
            yield job, f"ends the process, status {process.wait()}"
            process = None
    if process:
        process.communicate()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks whose names begin so")
    parser.add_argument("--plain", action="store_true", help="convolutions as torch has them")
    args = parser.parse_args()
    # The other depths have the same blocks, and so have the larger transformers.
    names = [name for name in backbones.NAMES if not re.search("18|34|101|_[sb]$", name)]
    shapes = shapes_of(name for name in names if name.startswith(tuple(args.names) or ""))
    jobs = [(*shape, last, args.plain) for shape in shapes for last in (False, True)]
    print(f"{len(jobs)} tests of torch {torch.__version__}", flush=True)
    bad = 0
    for i, (job, wrong) in enumerate(sweep(jobs)):
        if wrong:
            bad += 1
            kind, c_in, c_out, kernel, stride, padding, size, last, _ = job
            conv = f"{kind}({c_in}, {c_out}, {kernel}, {stride}, {padding})"
            where = f"{size}{' channels last' * last}"
            print(f"{conv} of {where}: {wrong}; {', '.join(sorted(shapes[job[:-2]]))}", flush=True)
        if i % 500 == 499:
            print(f"{i + 1} done", file=sys.stderr)
    print(f"{bad} of {len(jobs)} are wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(child() if sys.argv[1:] == ["--child"] else main())
