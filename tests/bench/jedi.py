"""Time the training of jedi.py on cached embeddings beside a DataLoader of single videos.

python tests/bench/jedi.py
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import jedi as script  # noqa: E402
from common.backbones import Adapter  # noqa: E402
from common.clips import Order  # noqa: E402


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


def main():
    """Training of jedi.py on cached embeddings against a DataLoader of single videos: epochs a second."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5, help="epochs of each variant")
    args = parser.parse_args()
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


if __name__ == "__main__":
    main()
