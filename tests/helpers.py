"""A small codec on which equality tests are not vacuous, and the stage scripts run in this
process."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

try:
    import constriction
except ImportError:  # no build for this machine
    constriction = None

from lic.codec.eight_bits import quantize_layers
from lic.codec.integer import freeze_h_s
from lic.codec.model import Codec
from lic.shrink.quantization import input_scales
from lic.shrink.rounding import patch_moments, round_weights

ROOT = Path(__file__).parent.parent
needs_constriction = pytest.mark.skipif(
    constriction is None,
    reason="constriction is not installed: it is compared with, or the NumPy decoder needs it",
)
# all different, so that a swapped axis cannot fit by chance
WIDTHS = {
    "g_a.1": 9,
    "g_a.2": 10,
    "g_a.3": 11,
    "y": 12,
    "g_s.1": 13,
    "g_s.2": 14,
    "g_s.3": 15,
    "h_a.1": 16,
    "h_a.2": 17,
    "z": 18,
    "h_s.1": 19,
    "h_s.2": 20,
}


def lively_codec(seed=0, widths=WIDTHS):
    """Random weights, scaled so that y and z span many integers: at the default initialisation both
    round to zero and nothing that is wrong with them would show."""
    torch.manual_seed(seed)
    model = Codec({"widths": dict(widths), "lambdas": [0.002, 0.006, 0.02, 0.05]}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "beta" in name or "gamma" in name or name.startswith("prior_z"):
                parameter.add_(0.1 * torch.rand_like(parameter))
            elif "gain" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
        x = photo_like()
        y = model.g_a(x - 0.5)
        model.g_a[-1].weight /= y.std() / 8
        y = model.g_a(x - 0.5)
        model.h_a[-1].weight /= model.h_a(y).std() / 4
        z_hat = model.h_a(y).round()
        model.h_s[-1].weight /= model.h_s(z_hat).std()
        model.h_s[-1].bias[widths["y"] :] += 2  # scales around 8, as wide as y
        model.g_s[-1].weight /= model.g_s(y).std() / 0.2
    return model


def quantized_codec(float_inputs=()):
    """`lively_codec` in 8 bits, calibrated on one image."""
    model, x = lively_codec(), photo_like()
    quantize_layers(model, input_scales(model, x), float_inputs=float_inputs)
    round_weights(model, patch_moments(model, x))
    freeze_h_s(model)
    return model


def photo_like(height=128, width=192):
    """(1, 3, height, width) in [0, 1]: smooth shapes with some texture."""
    rows, columns = torch.meshgrid(
        torch.arange(height) / 40, torch.arange(width) / 30, indexing="ij"
    )
    waves = torch.stack(
        [torch.sin(rows * columns), torch.cos(rows + 2 * columns), torch.sin(9 * rows)]
    )
    generator = torch.Generator().manual_seed(1)
    noise = 0.05 * torch.randn(3, height, width, generator=generator)
    return (0.5 + 0.3 * waves + noise).clamp(0, 1)[None]


def run_script(monkeypatch, name, *arguments):
    """Run a stage script in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    return 0
