"""What a linear context, added to a trained codec, would save of the bits of y.

    python docs/exercises/linear_context.py checkpoints/dense.pt photos/

Colour the positions of y like a chessboard. The black ones are coded as they are. What the mean of
a white one leaves, v = y - mean, is predicted from the v of the four black ones around it, which a
decoder knows by then: one weight a neighbour, channel and level, by least squares over every second
photograph, where v counts in units of its scale. The other photographs tell what the bits become.
"""

import sys
from pathlib import Path

import torch
from torch.nn.functional import pad

sys.path.insert(0, str(Path(__file__).parents[2]))

from lic.codec.checkpoint import load_checkpoint
from lic.images import find_images, fixed_crops, read_images


def latents(model, x, level):
    """y, its mean and its log scale, each (B, M, h, w), and the bits of z, of pictures x."""
    gain, _ = model.gains(torch.tensor([float(level)]))
    y = model.g_a(x - 0.5) * gain
    z_hat = model.h_a(y).round()
    mean, log_scale = model.h_s(z_hat).chunk(2, 1)
    return y, mean, log_scale, model.prior_z.bits(z_hat).sum()


def neighbours(v):
    """Left, right, upper and lower neighbour of each value, 0 beyond the border: (4, *v.shape)."""
    padded = pad(v, (1, 1, 1, 1))
    left, right = padded[..., 1:-1, :-2], padded[..., 1:-1, 2:]
    upper, lower = padded[..., :-2, 1:-1], padded[..., 2:, 1:-1]
    return torch.stack([left, right, upper, lower])


def white(values):
    """The values at white positions, by channel: (..., B, M, h, w) -> (..., M, n)."""
    h, w = values.shape[-2:]
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return values[..., (rows + columns) % 2 == 1].transpose(-3, -2).flatten(-2)


@torch.no_grad()
def main():
    model, _ = load_checkpoint(sys.argv[1])
    images = read_images(find_images(sys.argv[2]))
    x = fixed_crops(images, len(images), 256)
    print("lambda   bits of the file saved by the context")
    for level, lmbda in enumerate(model.lambdas):
        y, mean, log_scale, _ = latents(model, x[::2], level)
        scale = log_scale.exp()
        a = white(neighbours((y - mean).round()) / scale)  # (4, M, n)
        b = white((y - mean) / scale)  # (M, n)
        normal = torch.einsum("imn,jmn->mij", a, a) + 1e-3 * torch.eye(4)
        weights = torch.linalg.solve(normal, torch.einsum("imn,mn->mi", a, b))  # (M, 4)

        y, mean, log_scale, z_bits = latents(model, x[1::2], level)
        predicted = torch.einsum("mi,ibmhw->bmhw", weights, neighbours((y - mean).round()))

        def bits(mean):
            return model.prior_y.bits((y - mean).round() + mean, mean, log_scale)

        saved = white(bits(mean) - bits(mean + predicted)).sum() / (bits(mean).sum() + z_bits)
        print(f"{lmbda:<7} {saved:+.2%}")


if __name__ == "__main__":
    main()
