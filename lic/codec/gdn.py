"""GDN: divide each channel by a learned mix of all channels' energies.

    y_i = x_i / sqrt(beta_i + sum_j gamma[i, j] x_j^2)        (IGDN: multiply)

Ballé, Laparra, Simoncelli, "Density modeling of images using a generalized
normalization transformation", arXiv:1511.06281; as codec nonlinearity in
arXiv:1611.01704. gamma is (out i, in j), the order of a 1x1 convolution; a port
that multiplies from the right needs gamma.T. Left out: trainable exponents.

beta and gamma must stay positive or the square root is NaN. They are stored as
square roots, so that Adam's fixed step size shrinks towards zero, and bounded
from below by a maximum whose gradient still lets a parameter climb back.
"""

import torch
from torch import nn
from torch.nn import functional as F

from lic.codec.gradients import lower_bound

PEDESTAL = 2.0**-36  # a square's derivative is 0 at 0: gamma's zeros could never grow without it
BETA_MIN = 1e-6


class GDN(nn.Module):
    """Generalized divisive normalization over the channel axis of (B, C, H, W).

    At initialisation beta = 1 and gamma = 0.1 I: y = x / sqrt(1 + 0.1 x^2).
    """

    def __init__(self, channels):
        super().__init__()
        self.beta = nn.Parameter(self.stored(torch.ones(channels)))
        self.gamma = nn.Parameter(self.stored(0.1 * torch.eye(channels)))

    def coefficients(self):
        """beta (C,) and gamma (C out, C in) as the formula means them, from what is stored."""
        beta = lower_bound(self.beta, (BETA_MIN + PEDESTAL) ** 0.5) ** 2 - PEDESTAL
        gamma = lower_bound(self.gamma, PEDESTAL**0.5) ** 2 - PEDESTAL
        return beta, gamma

    @staticmethod
    def stored(coefficient):
        """What is stored of a beta or a gamma: the inverse of `coefficients`."""
        return torch.sqrt(coefficient + PEDESTAL)

    def energy(self, x):
        """beta_i + sum_j gamma[i, j] x_j^2, shape (B, C, H, W)."""
        beta, gamma = self.coefficients()
        return F.conv2d(x * x, gamma[:, :, None, None], beta)

    def forward(self, x):
        return x * torch.rsqrt(self.energy(x))


class IGDN(GDN):
    """The decoder's counterpart: y_i = x_i * sqrt(beta_i + sum_j gamma[i, j] x_j^2)."""

    def forward(self, x):
        return x * torch.sqrt(self.energy(x))
