"""Muon for the kernels of the convolutions, Adam for all else.

Adam scales each weight by itself. Muon replaces the momentum matrix of a layer by the nearest orthogonal
one, so that every direction of the layer moves equally far, also those in which the gradient is small:

    B = 0.95 B + G        step = orthogonalized(G + 0.95 B), scaled to Adam's usual size

Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); the scale is that of
Liu et al., "Muon is scalable for LLM training", arXiv:2502.16982. What it gains is in docs/training.md.
"""

import torch
from torch import nn

CLIP_NORM = 1.0  # of what Adam trains; Muon's step does not depend on the size of the gradient


class Optimizer:
    """Trains all parameters of `model`, whose 4-d ones must be channels_last; `step` takes the learning rate."""

    def __init__(self, model):
        self.kernels = [p for p in model.parameters() if p.ndim == 4]
        self.others = [p for p in model.parameters() if p.ndim != 4]
        self.matrices = [nn.Parameter(self.matrix(p.detach())) for p in self.kernels]  # torch's Muon takes no other shape
        self.muon = torch.optim.Muon(self.matrices, weight_decay=0, adjust_lr_fn="match_rms_adamw")
        self.adam = torch.optim.Adam(self.others)

    @staticmethod
    def matrix(kernel):
        """(c, c', kh, kw), channels_last -> (c, kh kw c'), the same memory."""
        return kernel.permute(0, 2, 3, 1).view(len(kernel), -1)

    def step(self, lr):
        """One step along the gradients, which are then cleared; returns their norm, a tensor: to look at it waits for a GPU."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.kernels + self.others])
        torch.nn.utils.clip_grad_norm_(self.others, CLIP_NORM)
        for kernel, matrix in zip(self.kernels, self.matrices):
            matrix.grad = self.matrix(kernel.grad.contiguous(memory_format=torch.channels_last))
        for optimizer in (self.muon, self.adam):
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        for parameter in self.kernels + self.others + self.matrices:
            parameter.grad = None
        return norm

    def state_dict(self):
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state):
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
