"""Round the weights of a layer to 8 bits so that their errors cancel where they meet.

The nearest integers make the error of each weight small. What matters is the error of a layer's
output,

    E |(w - q) u|^2 = (w - q) H (w - q)^T        w, q: a row of weights, before and after
                                                 H = E[u u^T], u: the patch under the kernel

What lies side by side in u is alike, so that one weight can make good what another loses: the row
is rounded weight by weight, and the error of each is spread over those that are still to come, as
the least squares of u say. (In one dimension this is the error diffusion that turns a photograph
into black and white dots.) What is left of the error's energy is, in place of the power of u, the
part of it that cannot be predicted from the rest of the patch: 2 or 3 dB less for y, which was
coded because it is unpredictable, 9 to 20 dB in most layers.

Frantar et al., "GPTQ: Accurate post-training quantization for generative pre-trained transformers",
arXiv:2210.17323. Here for convolutions, transposed ones too; H of every layer comes from the float
weights, not from those of earlier layers already rounded.
"""

import math

import torch
from torch.nn import functional as F

from lic.codec import structure
from lic.codec.eight_bits import WEIGHT, fake_quantize
from lic.shrink.quantization import largest_scale
from lic.shrink.statistics import listening

PATCH_RIDGE = 1e-3  # of the mean power, added to each: H is estimated from few patches
PATCHES = 512  # at most, of each layer's input, for four images


@torch.no_grad()
def round_weights(model, moments):
    """Put the weights of a quantized codec's layers on their 8-bit grids, in place.

    The scale of a row is that of its largest weight. moments: from `patch_moments`.
    Returns {layer: factor by which the squared error of its output is smaller than with the
    nearest integers}.
    """
    improvements = {}
    for name, H in moments.items():
        layer = model.get_submodule(name)
        W = structure.weight_rows(layer)  # (out, in * k * k)
        scale = largest_scale(W, *WEIGHT)
        Q = fake_quantize(W, scale[:, None], *WEIGHT)
        nearest = cancelling = 0  # squared errors
        for taps, entries in tap_groups(layer):
            H_met = H[entries][:, entries]
            nearest += output_error(W[:, taps] - Q[:, taps], H_met)
            Q[:, taps] = scale[:, None] * round_rows(W[:, taps] / scale[:, None], H_met)
            cancelling += output_error(W[:, taps] - Q[:, taps], H_met)
        improvements[name] = (nearest.clamp(min=1e-30) / cancelling.clamp(min=1e-30)).item()
        out_axis, _ = structure.channel_axes(layer)
        rows = layer.weight.transpose(0, out_axis)  # (out, in, k, k)
        rows.copy_(Q.view(rows.shape))
        layer.weight_scale.copy_(structure.broadcast(scale, out_axis))
    return improvements


def output_error(error, H):
    """Mean squared error of the output, summed over the rows of `error` (out, K); H (K, K)."""
    return ((error @ H) * error).sum()


@torch.no_grad()
def patch_moments(model, x, names=None):
    """E[u u^T] of the inputs of a quantized codec's layers over images: {layer: (K, K)}.

    x: (B, 3, H, W), each image at another level in turn. names: by default all convolutions. K is
    in * k * k, with k = 3 for a transposed convolution. More patches than K are better, and where
    there are fewer PATCH_RIDGE keeps the rounding sane.
    """
    names = [layer.name for layer in structure.LAYERS] if names is None else names
    sums, counts = dict.fromkeys(names, 0), dict.fromkeys(names, 0)

    def receive(name, layer, v):
        u = patches(layer, layer.quantized_input(v))
        stride = math.ceil(len(u) / PATCHES) | 1  # odd: an even one would see some columns only
        u = u[::stride]
        sums[name] += u.T @ u
        counts[name] += len(u)

    level = (torch.arange(len(x)) % len(model.lambdas)).float()
    with listening(model, names, receive):
        for batch, levels in zip(x.split(4), level.split(4)):
            model(batch, levels)
    return {name: sums[name] / counts[name] for name in names}


def patches(layer, x):
    """What a kernel meets of x (B, in, h, w) at each position: (positions, in * k * k).

    Of a transposed convolution, the 3x3 inputs around each one, see structure.PHASES.
    """
    if layer.transposed:
        columns = F.unfold(x, 3, padding=1)
    else:
        columns = F.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride)
    return columns.transpose(1, 2).flatten(0, 1)


def tap_groups(layer):
    """Weights that meet in one output pixel: a list of (columns of `weight_rows`, entries of u).

    In a convolution all meet. In a transposed one only those of one phase, and a phase for the rows
    and one for the columns make four groups.
    """
    if not layer.transposed:
        everything = torch.arange(layer.weight[0].numel())
        return [(everything, everything)]
    columns = torch.arange(layer.in_channels * 25).view(-1, 1, 5, 5)
    entries = torch.arange(layer.in_channels * 9).view(-1, 3, 3)
    groups = []
    for row, column, met in structure.phase_kernels(columns):
        met_entries = entries[:, row:, column:]  # an odd phase begins an input later
        groups.append((met.flatten(), met_entries.flatten()))
    return groups


def round_rows(W, H):
    """W (out, K), in units of a row's scale, to integers in [-127, 127].

    H (K, K): E[u u^T]. Column after column is rounded, and the columns after it make its error e
    good: they move by the least squares e H^-1[k, k:] / H^-1[k, k], with H of the columns from k
    on. Row k of the upper Cholesky factor U of the whole H^-1 is this H^-1[k, k:], but for a
    factor that cancels in the quotient.
    """
    W, H = W.double(), H.double()
    # the loudest first, while many can make it good
    order = H.diagonal().argsort(descending=True, stable=True)
    W, H = W[:, order], H[order][:, order]
    ridge = PATCH_RIDGE * H.diagonal().mean().clamp(min=1e-30)  # an input may be always 0
    H = H + ridge * torch.eye(len(H), dtype=H.dtype)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    Q = torch.empty_like(W)
    for k in range(len(H)):
        Q[:, k] = W[:, k].round().clamp(*WEIGHT)
        error = (W[:, k] - Q[:, k]) / U[k, k]
        W[:, k:] -= error[:, None] * U[k, k:]
    return Q[:, order.argsort()].float()
