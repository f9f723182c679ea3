"""Functions that training gives another gradient than their own.

lower_bound, upper_bound   a value beyond the bound may come back
round_ste                  rounding, as if it were not there ("straight-through")
scale_gradient             nothing but the gradient is changed
"""

import torch


class _LowerBound(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bound):
        ctx.save_for_backward(x)
        ctx.bound = bound
        return x.clamp(min=bound)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        passes = (x >= ctx.bound) | (grad < 0)  # a step against grad < 0 raises x
        return grad * passes, None


def lower_bound(x, bound):
    """max(x, bound); the gradient passes where x >= bound or where it would raise x.

    x: tensor of any shape; bound: float. A plain maximum has no gradient below the bound, so that
    whatever falls under it would never return (Ballé, Laparra, Simoncelli, arXiv:1611.01704).
    """
    return _LowerBound.apply(x, bound)


def upper_bound(x, bound):
    """min(x, bound); the gradient passes where x <= bound or where it would lower x."""
    return -lower_bound(-x, -bound)


def round_ste(y):
    """Round half to even; the gradient passes as if nothing had happened."""
    return y + (torch.round(y) - y).detach()


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, factor):
        ctx.factor = factor
        return v.view_as(v)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def scale_gradient(v, factor):
    """v unchanged; its gradient times `factor`, a float."""
    return _ScaleGradient.apply(v, factor)
