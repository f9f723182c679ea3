"""The loss.

    J = bpp + lmbda * 255^2 * MSE            (MSE on [0, 1]; a larger lmbda: a larger file)

Each image of a batch draws a rate level; the training loss is the level-weighted mean of J.
"""

import torch


def rate_distortion(out, x, lmbda):
    """J, bpp of y, bpp of z, MSE of each image, all (B,). out: model.Output; lmbda: (B,)."""
    pixels = x.shape[2] * x.shape[3]
    mse = (out.x_hat - x).square().mean((1, 2, 3))
    y_bpp, z_bpp = out.y_bits.sum(1) / pixels, out.z_bits.sum(1) / pixels
    return y_bpp + z_bpp + lmbda * 255**2 * mse, y_bpp, z_bpp, mse


def level_weights(lambdas):
    """Weight of each level's J in the training loss, mean 1: (levels,).

    J grows about as lmbda^0.5; without the weights the high rates would own the gradient.
    """
    weights = torch.tensor(lambdas) ** -0.5
    return weights / weights.mean()


@torch.no_grad()
def image_losses(model, x, amp=False):
    """J of every level and image with real rounding; x (B, 3, H, W) -> (levels, B) float64.

    Leaves the model in eval mode.
    """
    model.eval()
    losses = []
    for level, lmbda in enumerate(model.lambdas):
        J = []
        for batch in x.split(4):
            levels = torch.full((len(batch),), float(level), device=x.device)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
                out = model(batch, levels)
            J.append(rate_distortion(out, batch, lmbda)[0])
        losses.append(torch.cat(J).double().cpu())
    return torch.stack(losses)


def mean_loss(model, x, amp=False):
    """J of every level with real rounding, mean over the images x (B, 3, H, W): (levels,) float64.

    Leaves the model in eval mode.
    """
    return image_losses(model, x, amp).mean(1)
