"""K-means in torch: rows in memory or on disk, on a CPU or a GPU. One file to copy."""

import warnings

import numpy as np
import torch
import torch.nn.functional as F

BLOCK = 4096  # rows that are compared with the centres at once


@torch.no_grad()
def kmeans(rows, K, iterations=20, seed=0, device="cpu"):
    """Cluster `rows` by Euclidean distance: labels (N,) int64 and centres (K, D) float32, two numpy arrays.

    rows: (N, D) float32 or float16, finite, N >= K: an array or a memory map, read in blocks.

    The first centres are K random rows. Lloyd's iterations end when no row changes its cluster, or after
    `iterations` updates of the centres; a label is the nearest centre, of equally near ones the first. A
    cluster without rows starts again at the row farthest from its centre. The order of the blocks is fixed
    and no sum is atomic: the same rows, on the same device, give the same bits. Warns of fewer than 39 rows
    for each cluster, as faiss does.
    """
    if len(rows) < 39 * K:
        warnings.warn(f"{len(rows)} rows are few for {K} clusters: fewer than 39 for each", stacklevel=3)
    device, (N, D), kept = torch.device(device), rows.shape, None
    if device.type == "cuda" and 2 * rows.nbytes < torch.cuda.mem_get_info(device)[0]:
        kept = torch.from_numpy(np.array(rows)).to(device)
    blocks = [slice(start, min(start + BLOCK, N)) for start in range(0, N, BLOCK)]
    clusters, labels = torch.arange(K, device=device), torch.full((N,), -1, device=device)
    # Allocated once, which is faster. A last column of ones adds the bias below, and counts the rows.
    buffer, scores = torch.ones(BLOCK, D + 1, device=device), torch.empty(BLOCK, K, device=device)

    def read(block):
        x = buffer[: block.stop - block.start]
        if x.is_cuda:
            x[:, :D] = torch.from_numpy(np.array(rows[block])) if kept is None else kept[block]
        else:
            x.numpy()[:, :D] = rows[block]
        return x

    first = np.random.default_rng(seed).choice(N, K, replace=False)
    centres = torch.from_numpy(rows[first]).to(device).float()
    for iteration in range(iterations + 1):
        # |x - c|^2 is smallest where x.c - |c|^2 / 2 is largest.
        before, weight = labels.clone(), torch.cat([centres, centres.square().sum(1, keepdim=True) / -2], 1)
        sums = torch.zeros(K, D + 1, dtype=torch.float64, device=device)
        for block in blocks:
            x = read(block)
            s = torch.mm(x, weight.T, out=scores[: len(x)])
            # On a CPU numpy's argmax takes an eighth of the time of torch's.
            labels[block] = s.argmax(1) if s.is_cuda else torch.from_numpy(s.numpy().argmax(1))
            ordered, order = labels[block].sort(stable=True)
            sums += F.embedding_bag(order, x, torch.searchsorted(ordered, clusters), mode="sum")
        if iteration == iterations or torch.equal(labels, before):
            return labels.cpu().numpy(), centres.cpu().numpy()
        centres, empty = (sums[:, :D] / sums[:, D:]).float(), sums[:, D] == 0
        if empty.any():
            apart = [(read(block)[:, :D] - centres[labels[block]]).square().sum(1) for block in blocks]
            farthest = torch.cat(apart).argsort(descending=True, stable=True)[: int(empty.sum())]
            centres[empty] = torch.from_numpy(rows[farthest.cpu().numpy()]).to(device).float()


def purity(clusters, y):
    """{"purity": per cent of the rows that have the most frequent label of their cluster}, for a log.

    clusters (N,), y (N,) int64. Rows of label -1 do not count; {} if there are no others, or if y is (N, K).
    """
    if y.ndim > 1 or (y < 0).all():
        return {}
    table = np.zeros((clusters.max() + 1, y.max() + 1), np.int64)
    np.add.at(table, (clusters[y >= 0], y[y >= 0]), 1)
    return {"purity": 100 * float(table.max(1).sum() / table.sum())}
