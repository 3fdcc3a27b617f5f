"""TV-L1 optical flow in torch."""

import math
import warnings
from functools import cache

import torch
import torch.nn.functional as F

SMALLEST = 16  # pixels; no level of the pyramid has a shorter side, as in OpenCV
# Pixels of the pictures of one batch; on the CPU they fit its caches.
PIXELS_AT_ONCE = {"cpu": 2**16, "cuda": 2**24}


# ---- TV-L1 -----------------------------------------------------------------------------------------


def tvl1(frames, *, tau=0.25, lam=0.15, theta=0.3, nscales=5, zfactor=0.8, warps=5, iterations=30):
    """Optical flow between neighbouring frames: Zach, Pock and Bischof 2007, by Sanchez et al. (IPOL 2013).

    frames: (N, T, H, W) gray or (N, T, 3, H, W) RGB, uint8, or floats from 0 to 1. Returns float32
    (N, T - 1, 2, H, W): what is at (x, y) in frame t is at (x + u, y + v) in frame t + 1, in pixels.

    The names are those of the IPOL paper: tau, time step of the dual problem; lam (lambda), weight of the
    data; theta, coupling; nscales levels, each zfactor times the one below it; warps per level.
    This is OpenCV's DualTVL1 at outerIterations=1, innerIterations=iterations, medianFiltering=1 and
    epsilon=0. OpenCV's default has 10 outer iterations, with a median filter before each, and ends once the
    mean squared change is below epsilon squared; in a batch all pictures would wait for the slowest.
    Raises ValueError for less than two frames, for other values and types (lam is made for values up to 255;
    with it, pictures from 0 to 1 would hardly move), and for pictures of less than SMALLEST pixels.
    """
    if frames.ndim not in (4, 5) or frames.ndim == 5 and frames.shape[2] != 3:
        raise ValueError(f"frames are (N, T, H, W) or (N, T, 3, H, W), not {tuple(frames.shape)}")
    n, t = frames.shape[:2]
    if t < 2:
        raise ValueError(f"flow needs two frames, not {t}")
    if frames.is_floating_point():
        least, most = frames.aminmax()
        if not (least >= 0 and most <= 1):  # also NaN
            raise ValueError(f"frames that are floats go from 0 to 1, not from {least:g} to {most:g}")
        frames = 255 * frames.float()
    elif frames.dtype != torch.uint8:
        raise ValueError(f"frames are uint8, or floats from 0 to 1, not {frames.dtype}")
    first = torch.arange(n * t, device=frames.device).view(n, t)[:, :-1].flatten()
    scheme = dict(tau=tau, lam=lam, theta=theta, nscales=nscales, zfactor=zfactor, warps=warps)
    flow = flow_of_pairs(frames.flatten(0, 1), first, **scheme, iterations=iterations)
    return flow.unflatten(0, (n, t - 1))


# The settings of flow videos. With three levels more than OpenCV's default the flow follows motion of up to
# twice the speed, in a tenth more time.
SCHEME = {**tvl1.__kwdefaults__, "nscales": 8}


@torch.no_grad()
def flow_of_pairs(frames, first, tau, lam, theta, nscales, zfactor, warps, iterations):
    """float32 (P, 2, H, W): from frames[i] to frames[i + 1] for each i of `first`, int64 (P,)."""
    if min(frames.shape[-2:]) < SMALLEST:
        height, width = frames.shape[-2:]
        raise ValueError(f"pictures of {width} x {height} pixels are too small for flow")
    flow = None
    for level in reversed(_pyramid(_gray(frames), nscales, zfactor)):
        size = level.shape[-2:]
        if flow is None:
            flow = level.new_zeros(len(first), 2, *size)
        else:
            flow = F.interpolate(flow, size, mode="bilinear").div_(zfactor)
        n_pairs = max(PIXELS_AT_ONCE[level.device.type] // size.numel(), 1)
        for u, i in zip(flow.split(n_pairs), first.split(n_pairs), strict=True):
            _refine(u, level[i], level[i + 1], tau, lam, theta, warps, iterations)
    return flow


def _gray(frames):
    """float32 (T, H, W) of frames (T, H, W) or (T, 3, H, W), with the weights of OpenCV, unrounded."""
    if frames.ndim == 3:
        return frames.float()
    r, g, b = frames.unbind(1)
    return (0.299 * r + 0.587 * g + 0.114 * b).float()


def _pyramid(pictures, nscales, zfactor):
    """[(T, H, W), ...], the largest first: bilinear, without blur, sampled at exactly 1 / zfactor."""
    levels, margin = [pictures], math.ceil(1.5 / zfactor)
    while len(levels) < nscales:
        height, width = (round(side * zfactor) for side in levels[-1].shape[-2:])
        if min(height, width) < SMALLEST:
            break
        # interpolate rounds sizes down, and given a size it samples at the ratio of the sizes.
        x = F.pad(levels[-1][:, None], (0, margin, 0, margin), mode="replicate")
        x = F.interpolate(x, scale_factor=zfactor, mode="bilinear", recompute_scale_factor=False)
        levels.append(x[:, 0, :height, :width].contiguous())
    return levels


def _refine(flow, first, second, tau, lam, theta, warps, iterations):
    """Improve the flow (P, 2, H, W) between pictures (P, H, W) of one level, in place."""
    height, width = first.shape[-2:]
    edge = F.pad(second[:, None], (1, 1, 1, 1), mode="replicate")
    dx = (edge[..., 1:-1, 2:] - edge[..., 1:-1, :-2]) / 2
    dy = (edge[..., 2:, 1:-1] - edge[..., :-2, 1:-1]) / 2
    # Outside all is zero, as in OpenCV. With sides of a power of two plus one, grid_sample's coordinates are
    # exact for pixels at rest; otherwise an error of 1e-5 pixels at the border would grow from warp to warp.
    sides = [2 ** (side - 1).bit_length() for side in (width, height)]
    source = torch.cat([second[:, None], dx, dy], 1)  # (P, 3, H, W)
    source = F.pad(source, (0, sides[0] + 1 - width, 0, sides[1] + 1 - height))
    sides = torch.tensor(sides, device=flow.device)
    pixels = (torch.arange(side, device=flow.device) for side in (width, height))
    pixels = torch.stack(torch.meshgrid(*pixels, indexing="xy"))  # (2, H, W)

    u, px, py = flow.clone(), torch.zeros_like(flow), torch.zeros_like(flow)
    if flow.is_cuda:
        (primal, dual), memory_u, memory_p = _fused(), (), ()
    else:  # in memory that stays in the caches
        primal, dual, memory_u = _primal, _dual, (torch.empty_like(first), u)
        memory_p = [torch.zeros_like(flow) for _ in range(3)]
    for _ in range(warps):
        grid = (pixels + u).movedim(1, -1) * (2 / sides) - 1
        warped = F.grid_sample(source, grid, "bicubic", "zeros", align_corners=True)
        g = warped[:, 1:].contiguous()
        square = (g * g).sum(1)
        factor = torch.where(square > 1e-7, -1 / square, 0)
        a = (warped[:, 0] - first - (g * u).sum(1)) * factor
        b = g * factor[:, None]
        for _ in range(iterations):
            u = primal(u, px, py, a, b, g, lam * theta, *memory_u)
            dual(u, px, py, tau, theta, *memory_p)
    flow.copy_(u)


def _primal(u, px, py, a, b, g, most, s=None, out=None):
    """The flow u (P, 2, H, W) after a primal step. px, py: theta times the dual variables in x and y.

    v = u + g clamp(-rho / |g|^2, -most, most) is the thresholding, its three cases in one: rho = rho_c + g.u
    is the residual, a = -rho_c / |g|^2 (P, H, W), b = -g / |g|^2 (P, 2, H, W), and most = lam theta. Then
    u = v + theta div p, whose differences look back. s, out: memory for the factor of g and for the result.
    """
    s = torch.addcmul(a, b[:, 0], u[:, 0], out=s)
    s.addcmul_(b[:, 1], u[:, 1]).clamp_(-most, most)
    u = torch.addcmul(u, g, s[:, None], out=out).add_(px).add_(py)
    u[..., 1:].sub_(px[..., :-1])
    u[..., 1:, :].sub_(py[..., :-1, :])
    return u


def _dual(u, px, py, tau, theta, norm=None, dx=None, dy=None):
    """A dual step of px and py, in place: p = (p + tau/theta grad u) / (1 + tau/theta |grad u|).

    The differences look forward and are 0 in the last column or row, so that p is 0 there. norm, dx, dy:
    memory like u for what is between; the last column of dx and the last row of dy are zero.
    """
    if dx is None:
        dx, dy = F.pad(u.diff(dim=-1), (0, 1)), F.pad(u.diff(dim=-2), (0, 0, 0, 1))
    else:
        torch.sub(u[..., 1:], u[..., :-1], out=dx[..., :-1])
        torch.sub(u[..., 1:, :], u[..., :-1, :], out=dy[..., :-1, :])
    norm = torch.mul(dx, dx, out=norm)
    norm.addcmul_(dy, dy).sqrt_().mul_(tau / theta).add_(1)
    px.add_(dx, alpha=tau).div_(norm)
    py.add_(dy, alpha=tau).div_(norm)


@cache
def _fused():
    """(_primal, _dual) compiled to a kernel each, for CUDA; uncompiled, with a warning, if torch cannot."""
    primal, dual = torch.compile(_primal), torch.compile(_dual)
    try:
        for size in ((3, 2, 18, 17), (2, 2, 20, 24)):  # of the second it learns that sizes differ
            u, px, py, a, b, g = (torch.zeros(size, device="cuda") for _ in range(6))
            dual(primal(u, px, py, a[:, 0].clone(), b, g, 0.045), px, py, 0.25, 0.3)
    except Exception as error:  # no compiler, no Triton, an old GPU: errors of many types
        reason = str(error).strip().partition("\n")[0][:200]
        warnings.warn(f"flow takes several times as long: torch.compile fails ({reason})", stacklevel=2)
        return _primal, _dual
    return primal, dual
