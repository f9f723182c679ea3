"""Muon for the kernels of the convolutions, Adam for all else; of scales, Adam for the logarithm.

Adam scales each weight by itself. Muon replaces the momentum matrix of a layer by the nearest
orthogonal one, so that every direction of the layer moves equally far, also those in which the
gradient is small:

    M = 0.95 M + 0.05 G
    W = W - lr 0.2 sqrt(max(rows, columns)) orthogonal(0.05 G + 0.95 M)

Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); the scale, which
gives a step the usual size of Adam's, is that of Liu et al., "Muon is scalable for LLM training",
arXiv:2502.16982. What it gains is in docs/notebook/training.md, as is why torch.optim.Muon, which
computes in bf16, is not used.

The scale of an 8-bit input is a number like 0.005, and a step of Adam is as large as the rate: some
percent of it at once, or all. A step of its logarithm is a share of it, and it stays positive.
"""

import torch

CLIP_NORM = 1.0  # of what Adam trains; Muon's step does not depend on the size of the gradient
MOMENTUM = 0.95
SCALE_RATE = 25  # times the rate of all else, for the logarithms of scales (docs/notebook/)
# Jordan's polynomial a x + b x^3 + c x^5: five times it takes singular values to about 1
NEWTON_SCHULZ, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


def orthogonal(G):
    """The factor U V^T of G = U S V^T: (r, c) -> (r, c).

    Its singular values are 0.7 to 1.2 in the place of 1; those below 0.2 % of the norm of G come
    out smaller. Newton-Schulz, with A = X X^T:

        X <- P X,    P = a I + b A + c A^2,    so that A <- P A P

    All iterations are made on A, which is small, and X is multiplied once, by the product of the P.
    """
    if len(G) > G.shape[1]:
        return orthogonal(G.T).T
    a, b, c = NEWTON_SCHULZ

    def polynomial(A):
        P = torch.addmm(A, A, A, beta=b, alpha=c)  # b A + c A^2
        P.diagonal().add_(a)
        return P

    X = G / G.norm().clamp(min=1e-7)
    A = X @ X.T
    P = product = polynomial(A)
    for _ in range(ITERATIONS - 1):
        A = P @ A @ P
        P = polynomial(A)
        product = P @ product
    return product @ X


class Optimizer:
    """Trains all parameters of `model`, whose 4-d ones must be channels_last."""

    def __init__(self, model):
        self.kernels, self.scales, self.others = [], [], []
        for name, parameter in model.named_parameters():
            if parameter.ndim == 4:
                self.kernels.append(parameter)
            elif name.endswith("input_scale"):
                self.scales.append(parameter)
            else:
                self.others.append(parameter)
        self.momentum = [torch.zeros_like(self.matrix(kernel)) for kernel in self.kernels]
        self.logs = [scale.detach().log() for scale in self.scales]
        groups = [{"params": self.others, "factor": 1}]
        if self.logs:  # their gradients are small: with Adam's usual eps some would never move
            groups.append({"params": self.logs, "factor": SCALE_RATE, "eps": 1e-15})
        self.adam = torch.optim.Adam(groups)

    @staticmethod
    def matrix(kernel):
        """(c, c', kh, kw), channels_last -> (c, kh kw c'), the same memory."""
        return kernel.detach().permute(0, 2, 3, 1).view(len(kernel), -1)

    @torch.no_grad()
    def step(self, lr):
        """One step along the gradients, which are then cleared.

        Returns their norm, a tensor ().
        """
        parameters = self.kernels + self.scales + self.others
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        for kernel, momentum in zip(self.kernels, self.momentum):
            gradient = self.matrix(kernel.grad.contiguous(memory_format=torch.channels_last))
            momentum.lerp_(gradient, 1 - MOMENTUM)
            direction = orthogonal(gradient.lerp(momentum, MOMENTUM))
            size = 0.2 * max(direction.shape) ** 0.5
            self.matrix(kernel).sub_(direction, alpha=lr * size)
        for log, scale in zip(self.logs, self.scales):
            log.grad = scale.grad * scale  # dJ / d log s = s dJ / ds
        torch.nn.utils.clip_grad_norm_(self.others + self.logs, CLIP_NORM)
        for group in self.adam.param_groups:
            group["lr"] = lr * group["factor"]
        self.adam.step()
        for log, scale in zip(self.logs, self.scales):
            scale.copy_(log.exp())
        for parameter in parameters:
            parameter.grad = None
        return norm

    def state_dict(self):
        return {"momentum": self.momentum, "logs": self.logs, "adam": self.adam.state_dict()}

    def load_state_dict(self, state):
        for momentum, saved in zip(self.momentum, state["momentum"], strict=True):
            momentum.copy_(saved)
        for log, saved in zip(self.logs, state["logs"], strict=True):
            log.copy_(saved)
        self.adam.load_state_dict(state["adam"])
