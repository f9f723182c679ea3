"""The two entropy models: differentiable densities, of which tables.py makes the coder's tables.

EntropyBottleneck   p(z) = prod_c p_c(z_c), each p_c a learned monotone cumulative
                    (Ballé, Minnen, Singh, Hwang, Johnston, arXiv:1802.01436, app. 6.1)
GaussianConditional p(y | mean, scale), a Gaussian convolved with a unit uniform
                    (the same paper, section 3; with means: arXiv:1809.02736)

Both give the bits of the integer bin around a value: -log2 P(v - 1/2 < V < v + 1/2).
Training replaces rounding by uniform noise in the rate (`add_noise`).
Left out: the median and its auxiliary loss. z is rounded around 0 and the density
learns where its mass is; tables.py finds the support of a table by bisection.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from lic.codec.gradients import lower_bound, upper_bound

MAX_BITS = 24.0  # of a symbol in the coder's table: its least probability is 2^-24
SCALE_MIN, SCALE_MAX, SCALE_LEVELS = 0.11, 256.0, 64
HIDDEN = (3, 3, 3)  # units of the network that is a density of z
SPREAD = 10.0  # width of such a density at the start
FARTHEST = 1000.0  # scales from the mean: see `GaussianConditional.bits`
LOG_SCALE_MIN = math.log(SCALE_MIN)
LOG_SCALE_STEP = (math.log(SCALE_MAX) - LOG_SCALE_MIN) / (SCALE_LEVELS - 1)


def add_noise(y, part=(0, 1)):
    """y + u, u ~ U(-1/2, 1/2): the differentiable stand-in for rounding in the rate.

    part (k, n): y is the k-th part of a batch n times as large; u is that part of its noise.
    """
    k, n = part
    whole = torch.cat([y.detach()] * n)  # for its shape and its layout
    return y + torch.rand_like(whole)[k * len(y) : (k + 1) * len(y)] - 0.5


def soft_limit(bits):
    """bits up to MAX_BITS, then MAX_BITS (1 + ln(bits / MAX_BITS)): smooth, any shape.

    Within its table a symbol never costs more than MAX_BITS (outside, the escape's 51). A flat
    limit would leave an outlier without a gradient; without a limit it would own the gradient.
    """
    beyond = MAX_BITS * (1 + torch.log(bits.clamp(min=MAX_BITS) / MAX_BITS))
    return torch.where(bits > MAX_BITS, beyond, bits)


class EntropyBottleneck(nn.Module):
    """Factorized prior: one cumulative distribution function a channel.

    logits = f_K(... f_1(v)), cdf = sigmoid(logits), with
    f_k(v) = u + tanh(a_k) * tanh(u),  u = softplus(H_k) v + b_k      (no tanh in f_K)
    which rises in v because softplus > 0 and |tanh(a_k)| < 1.
    Every tensor's axis 0 is the channel. K = 4: HIDDEN units between.
    A channel has structure.PRIOR_PARAMETERS numbers.
    """

    def __init__(self, channels):
        super().__init__()
        sizes = (1, *HIDDEN, 1)
        gain = SPREAD ** (-1 / (len(sizes) - 1))
        self.H, self.b, self.a = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:]):
            start = math.log(math.expm1(gain / fan_out))  # softplus(start) = gain / fan_out
            self.H.append(nn.Parameter(torch.full((channels, fan_out, fan_in), start)))
            self.b.append(nn.Parameter(torch.empty(channels, fan_out, 1).uniform_(-0.5, 0.5)))
        for size in HIDDEN:
            self.a.append(nn.Parameter(torch.zeros(channels, size, 1)))

    def logits(self, v):
        """Logit of the cumulative at v: (C, 1, N) -> (C, 1, N)."""
        for k, (H, b) in enumerate(zip(self.H, self.b)):
            v = F.softplus(H) @ v + b  # (C, fan_out, N)
            if k < len(self.a):
                v = v + torch.tanh(self.a[k]) * torch.tanh(v)
        return v

    def likelihood(self, z):
        """P(z - 1/2 < Z < z + 1/2), (B, C, H, W) -> (B, C, H, W), in float32 or better."""
        B, C, H, W = z.shape
        with torch.autocast(z.device.type, enabled=False):  # bf16 cannot tell close values apart
            v = z.permute(1, 0, 2, 3).reshape(C, 1, -1)  # (C, 1, B*H*W)
            lower, upper = self.logits(v - 0.5), self.logits(v + 0.5)
            # sigmoid saturates at 1: take the difference where both values are small
            sign = torch.where(lower + upper > 0, -1.0, 1.0)
            p = (torch.sigmoid(sign * upper) - torch.sigmoid(sign * lower)).abs()
        return p.reshape(C, B, H, W).permute(1, 0, 2, 3)

    def bits(self, z):
        """-log2 P, at most MAX_BITS, of each element: (B, C, H, W) -> (B, C, H, W)."""
        return -torch.log2(lower_bound(self.likelihood(z), 2**-MAX_BITS))


class GaussianConditional(nn.Module):
    """Gaussian with a mean and a scale an element; the scale comes as its logarithm.

    The coder knows SCALE_LEVELS scales, log-spaced from SCALE_MIN to SCALE_MAX; `scale_index`
    snaps to them. Training keeps the scale continuous.
    """

    @staticmethod
    def bits(y, mean, log_scale):
        """-log2 P(y - 1/2 < Y < y + 1/2) of each element, all of shape (B, M, h, w).

        Beyond FARTHEST scales from the mean it is what it is there, some 720,000 bits.

        In the logarithm: a difference of two cdf values is exactly 0 in float32 some ten scales
        from the mean, and so is its gradient.
        """
        log_scale = lower_bound(log_scale, LOG_SCALE_MIN)
        scale = torch.exp(upper_bound(log_scale, math.log(SCALE_MAX)))
        # the gradient of log_ndtr is no number in float32 some 10^4 scales out; that of
        # upper_bound lets y come back from there
        distance = upper_bound((y - mean).abs() / scale, FARTHEST)
        # the density is symmetric: mirrored, so that the bin lies at or below the mean
        upper = torch.special.log_ndtr(0.5 / scale - distance)
        lower = torch.special.log_ndtr(-0.5 / scale - distance)
        log_mass = upper + torch.log(-torch.expm1(lower - upper))
        return log_mass * (-1 / math.log(2))

    @staticmethod
    def scale_index(log_scale):
        """Index of the table scale nearest in the logarithm: (...) -> (...) int64 in [0, 63]."""
        index = torch.round((log_scale - LOG_SCALE_MIN) / LOG_SCALE_STEP)
        return index.clamp(0, SCALE_LEVELS - 1).long()
