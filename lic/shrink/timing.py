"""How long a plan codes on this machine: what `search.py --of time` counts.

Multiply-accumulates do not tell: a layer with few of them at a high resolution waits for memory,
and 8 bits make some layers faster than others. So each layer is timed at a few widths, and

    milliseconds = a * million multiply-accumulates + b * million numbers read and written + c

is fitted to it, with a, b, c >= 0. The layers run as in a coder of the quantized codec: in 8 bits
where the machine has the kernels, GDN in float32. Only convolutions and GDN are counted: neither
leaky ReLUs nor the rounding between the layers of h_s, nor entropy coding.
"""

import itertools
import time

import numpy as np
import torch

from lic.codec import fast, structure
from lic.codec.bitstream import ImageCoder
from lic.codec.eight_bits import WEIGHT, QuantizedConvolution, pixel_layers, quantize_layers
from lic.codec.integer import IntegerHyperSynthesis, freeze_h_s
from lic.codec.model import Codec
from lic.program import processor
from lic.shrink.search import round_width

HEIGHT, WIDTH = 512, 768  # of the picture that is timed, pixels
TIMED_RATIOS = [1.0, 0.8, 0.6, 0.4, 0.2]  # of the codec's widths
ROUNDS, WARM_UP = 12, 3  # how often; the first are not counted


def time_layers(config, decodings=1):
    """Times each layer of a codec, which takes some seconds -> the "timing" of a plan, a dict:

    "processor", "threads", "int8": what it was measured on, and whether 8-bit kernels ran;
    "decodings": how often a picture is decoded for each time that it is encoded;
    "coefficients": {layer: [a, b, c]}, ms for one picture of 768x512.
    """
    coders, rows, taken = [], [], []
    for ratio in TIMED_RATIOS:
        widths = {group: round_width(ratio * full) for group, full in config["widths"].items()}
        coders.append(random_coder(config | {"widths": widths}))
        rows.append(layer_work(widths))
    for _ in range(ROUNDS):  # one after another, so that a slow moment meets all widths alike
        taken.append([time_of_each_layer(coder) for coder in coders])
    coefficients = {}
    for name in rows[0]:
        ms = []  # a round a row, a coder a column
        for of_round in taken[WARM_UP:]:
            ms.append([times[name] for times in of_round])
        work = np.array([[*row[name], 1.0] for row in rows])
        coefficients[name] = nonnegative_fit(work, np.median(ms, axis=0)).tolist()
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "int8": fast.available(),
        "decodings": decodings,
        "coefficients": coefficients,
    }


def milliseconds(timing, widths):
    """Those of a plan: one encoding and the timing's number of decodings, without entropy coding.

    Encoding runs g_a, h_a and h_s, decoding h_s and g_s.
    """
    decodings = timing["decodings"]
    runs = {"g_a": 1, "h_a": 1, "h_s": 1 + decodings, "g_s": decodings}
    total = 0.0
    for name, work in layer_work(widths).items():
        network = name.split(".")[0]
        total += runs[network] * np.dot(timing["coefficients"][name], [*work, 1.0])
    return total


def layer_work(widths):
    """{layer: (million multiply-accumulates, million numbers read and written)} of the picture."""
    width, where = structure.channels(widths), structure.positions()
    millions = HEIGHT * WIDTH / 1e6
    macs = {}
    for name, c_in, c_out, kernel, evaluated in structure.layer_sizes(widths):
        macs[name] = millions * kernel**2 * c_in * c_out * evaluated
    work = {}
    for layer in structure.LAYERS:
        read = millions * width[layer.reads] * where[layer.reads]
        made = millions * width[layer.makes] * where[layer.makes]
        work[layer.name] = macs[layer.name], read + made
        if layer.then_name in macs:  # a GDN
            work[layer.then_name] = macs[layer.then_name], 2 * made
    return work


def nonnegative_fit(work, ms):
    """x >= 0 with the least squares of work @ x - ms. work (n, k), ms (n,) -> (k,).

    The best of the fits by some of the columns alone in which nothing is negative: k is small.
    """
    best, least = np.zeros(work.shape[1]), np.square(ms).sum()
    for count in range(1, work.shape[1] + 1):
        for columns in itertools.combinations(range(work.shape[1]), count):
            x = np.zeros(work.shape[1])
            x[list(columns)] = np.linalg.lstsq(work[:, columns], ms, rcond=None)[0]
            error = np.square(work @ x - ms).sum()
            if (x >= 0).all() and error < least:
                best, least = x, error
    return best


@torch.no_grad()
def random_coder(config):
    """An ImageCoder with random weights, in 8 bits; as in trained ones most are small."""
    model = Codec(config).to(memory_format=torch.channels_last)
    quantize_layers(model, float_inputs=pixel_layers())
    for layer in model.modules():
        if isinstance(layer, QuantizedConvolution):
            layer.weight_scale.fill_(1)
            layer.weight.copy_(torch.round(20 * torch.randn_like(layer.weight)).clamp(*WEIGHT))
    freeze_h_s(model)
    return ImageCoder(model, {}, "0" * 16)


@torch.inference_mode()
def time_of_each_layer(coder):
    """{layer: ms} of one pass through the four networks."""
    taken = {}

    def run(network, x):
        for name, layer in network:
            start = time.perf_counter()
            x = layer(x)
            taken[name] = 1000 * (time.perf_counter() - start)
        return x

    def named(name):
        network = getattr(coder, name)
        if isinstance(network, IntegerHyperSynthesis):
            return zip([layer.name for layer in structure.layers_of("h_s")], network.layers)
        return [(f"{name}.{child}", module) for child, module in network.named_children()]

    x = torch.zeros(1, 3, HEIGHT, WIDTH).to(memory_format=torch.channels_last)
    y = run(named("g_a"), x)
    z = run(named("h_a"), y)
    run(named("h_s"), torch.zeros_like(z, dtype=torch.float64))
    run(named("g_s"), y)
    return taken
