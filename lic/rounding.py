"""Round the weights of a layer to 8 bits so that their errors cancel where they meet.

The nearest integers make the error of each weight small. What matters is the error of a layer's output,

    E |(w - q) u|^2 = (w - q) H (w - q)^T        w, q: a row of weights, before and after; H = E[u u^T]

with u the patch of the input under the kernel. What lies side by side in u is alike, so that one weight can make good
what another loses: the row is rounded weight by weight, and the error of each is spread over those that are still to
come, as the least squares of u say. (In one dimension this is the error diffusion that turns a photograph into black
and white dots.) What is left of the error's energy is, in place of the power of u, the part of it that cannot be
predicted from the rest of the patch: 2 or 3 dB less for y, which was coded because it is unpredictable, 9 to 20 dB in
most layers.

Frantar et al., "GPTQ: Accurate post-training quantization for generative pre-trained transformers", arXiv:2210.17323.
Here for convolutions, transposed ones too.
"""

import torch
from torch import nn
from torch.nn import functional as F

from lic.pruning import rows
from lic.quantization import INPUTS, WEIGHT, along, fake_quantize, largest_scale

RIDGE = 1e-3  # of the mean power, added to each: what is seen of u is a sample
PATCHES = 512  # at most, of each layer's input, for four images


@torch.no_grad()
def round_weights(model, moments):
    """Put the weights of a quantized codec's layers on their 8-bit grids, in place. The scale of a row is that of its
    largest weight. moments: from `patch_moments`.

    Returns {layer: factor by which the squared error of its output is smaller than with the nearest integers}.
    """
    gains = {}
    for name, H in moments.items():
        layer = model.get_submodule(name)
        W = rows(layer)
        scale = largest_scale(W, *WEIGHT)
        Q = fake_quantize(W, scale[:, None], *WEIGHT)
        before = after = 0
        for taps, met in tap_groups(layer):
            H_met = H[met][:, met]
            before += output_error(W[:, taps] - Q[:, taps], H_met)
            Q[:, taps] = scale[:, None] * round_rows(W[:, taps] / scale[:, None], H_met)
            after += output_error(W[:, taps] - Q[:, taps], H_met)
        gains[name] = (before.clamp(min=1e-30) / after.clamp(min=1e-30)).item()
        layer.weight.copy_(Q.view(layer.weight.transpose(0, layer.out_axis).shape).transpose(0, layer.out_axis))
        layer.weight_scale.copy_(along(layer.out_axis, scale))
    return gains


def output_error(error, H):
    """Mean squared error of the output, summed over the rows of `error` (out, K); H (K, K)."""
    return ((error @ H) * error).sum()


@torch.no_grad()
def patch_moments(model, x, names=INPUTS):
    """E[u u^T] of the inputs of a quantized codec's layers over the images x (B, 3, H, W), each at another level in turn:
    {layer: (K, K)}. K is in * k * k, with k = 3 for a transposed convolution; there should be several times as many
    patches."""
    sums, counts = dict.fromkeys(names, 0), dict.fromkeys(names, 0)

    def add(name, layer, v):
        u = patches(layer, layer.quantized_input(v))
        u = u[:: -(-len(u) // PATCHES) | 1]  # odd, or it would see some columns only
        sums[name] += u.T @ u
        counts[name] += len(u)

    hooks = [model.get_submodule(name).register_forward_pre_hook(lambda layer, inputs, name=name: add(name, layer, inputs[0]))
             for name in names]  # fmt: skip
    level = torch.arange(len(x)) % len(model.lambdas)
    for batch, levels in zip(x.split(4), level.float().split(4)):
        model(batch, levels)
    for hook in hooks:
        hook.remove()
    return {name: sums[name] / counts[name] for name in names}


def patches(layer, x):
    """What a kernel meets of x (B, in, h, w) at each of its positions: (positions, in * k * k)."""
    if isinstance(layer, nn.ConvTranspose2d):
        return F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)
    return F.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride).transpose(1, 2).flatten(0, 1)


def tap_groups(layer):
    """Weights that meet in one output pixel: (columns of `rows(layer)`, entries of the patch) of each group.

    In a convolution all meet. In a transposed one with stride 2 an output pixel meets every second tap in both
    directions, and which ones depends on whether its row and its column are even: four groups. Output 2a + r takes
    input a + d - 1 through tap r + 4 - 2d, d = 0, 1, 2.
    """
    channels = layer.in_channels
    if not isinstance(layer, nn.ConvTranspose2d):
        everything = torch.arange(layer.weight[0].numel())
        return [(everything, everything)]
    taps = torch.arange(channels * 25).view(channels, 5, 5)
    patch = torch.arange(channels * 9).view(channels, 3, 3).flip(1, 2)  # a rising tap meets a falling d
    return [(taps[:, r::2, s::2].flatten(), patch[:, : 3 - r, : 3 - s].flatten()) for r in (0, 1) for s in (0, 1)]


def round_rows(W, H):
    """W (out, K), in units of a row's scale, to integers in [-127, 127]: the error of each column is made good by the
    columns after it. H (K, K): E[u u^T]."""
    W, H = W.double(), H.double()
    order = H.diagonal().argsort(descending=True, stable=True)  # the loudest first, while many can make it good
    W, H = W[:, order], H[order][:, order]
    H = H + RIDGE * H.diagonal().mean().clamp(min=1e-30) * torch.eye(len(H), dtype=H.dtype)  # an input may be always 0
    # row k of this factor: how column k's error is predicted best from the columns after it
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    Q = torch.empty_like(W)
    for k in range(len(H)):
        Q[:, k] = W[:, k].round().clamp(*WEIGHT)
        W[:, k:] -= ((W[:, k] - Q[:, k]) / U[k, k])[:, None] * U[k, k:]
    return Q[:, order.argsort()].float()
