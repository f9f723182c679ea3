"""Every picture of the docs, from the files that are shipped (three minutes, needs matplotlib).

    python tools/figures.py                  all of them, into docs/figures/
    python tools/figures.py bits widths      these

One photograph, docs/coffee.png, goes through the codec at the middle level; the numbers that
docs/tour.md quotes are printed. What is calibrated for 8 bits sees crops of the same photograph:
enough to draw, too little to quantize by.
"""

import json
import sys
from bisect import bisect_right
from pathlib import Path
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from ablation import (
    float_moments,
    with_8_bit_weights,
    with_nearest_weights,
    with_rounded_inputs,
)
from effort import STEPS, Search, straight_through

import lic
from lic.codec import structure
from lic.codec.ans import PRECISION
from lic.codec.bitstream import padded
from lic.codec.checkpoint import load_checkpoint
from lic.codec.eight_bits import WEIGHT, eight_bit_inputs, fake_quantize, input_ranges
from lic.codec.entropy import LOG_SCALE_MIN, LOG_SCALE_STEP
from lic.files import LicError, write_bytes
from lic.images import read_image
from lic.measure import best_within, bits_of_blocks, bits_of_symbols, coded_bits, points
from lic.metrics import psnr
from lic.options import make_parser
from lic.pictures import beside, enlarged, heat, png_bytes
from lic.plots import import_pyplot, name_ends, plot_rate_distortion, write_figure
from lic.program import run
from lic.shrink import search
from lic.shrink.pruning import most_important, residual
from lic.shrink.quantization import equalize, input_scales, largest_scale
from lic.shrink.rounding import PATCHES
from lic.shrink.statistics import best_prediction, layer_inputs, observe
from lic.train import effort
from lic.train.loss import mean_loss

FOLDER, CHECKPOINTS = ROOT / "docs/figures", ROOT / "checkpoints"
PHOTOGRAPH = ROOT / "docs/coffee.png"


class Walk:
    """What becomes of the photograph in the shipped codec, step by step.

    x (1, 3, H', W'), y and symbols (1, M, h, w), z (1, Z, h/4, w/4), mean and scale as y,
    image and decoded (H, W, 3).
    """

    def __init__(self):
        self.coder = lic.load(CHECKPOINTS / "quantized.pt")
        self.image = read_image(PHOTOGRAPH)
        self.level = float(self.coder.middle_level())
        self.x = padded(self.image)
        self.y, self.z = self.coder.latents(self.image, self.level)
        z_hat = self.z.round().to(torch.int32)
        self.mean, index = self.coder.entropy_parameters(z_hat[0].numpy())
        self.table = torch.from_numpy(index).long().view(self.y.shape)
        self.scale = torch.exp(LOG_SCALE_MIN + LOG_SCALE_STEP * self.table)
        self.symbols = (self.y - self.mean).round()
        self.data = self.coder.encode(self.image, self.level)
        self.decoded = self.coder.decode(self.data)
        self.loudest = self.y.var((0, 2, 3)).argsort(descending=True)


def crops_of(image, side=128):
    """All squares of an image that do not overlap: (B, 3, side, side) in [0, 1]."""
    x = padded(image)
    squares = x.unfold(2, side, side).unfold(3, side, side)  # (1, 3, rows, columns, side, side)
    return squares.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, side, side)


def save(figure, name, all_colours=False):
    write_figure(figure, FOLDER / f"{name}.png", all_colours)


def grey(axes, values, title, limit=None):
    """A channel as a grey picture: 0 in the middle, `limit`, by default the largest, white."""
    limit = float(limit or values.abs().max())
    axes.imshow(values, cmap="gray", vmin=-limit, vmax=limit)
    axes.set_title(title, fontsize=8)
    axes.set(xticks=[], yticks=[])


# the photograph's way through the codec


def architecture(walk, pyplot):
    """The layers and what each makes: the encoder above, the decoder below, from right to left."""
    full = load_checkpoint(CHECKPOINTS / "dense.pt")[0].config["widths"]
    width, where = walk.coder.model.config["widths"], structure.positions()
    above = ["image", "g_a.1", "g_a.2", "g_a.3", "y", "h_a.1", "h_a.2", "z"]
    below = ["x_hat", "g_s.3", "g_s.2", "g_s.1", "y_hat", "h_s.2", "h_s.1", "z_hat"]
    same_size = {"x_hat": "image", "y_hat": "y", "z_hat": "z"}
    figure, axes = pyplot.subplots(figsize=(11, 4.4), layout="constrained")
    for row, names in ((1.0, above), (-1.0, below)):
        for column, name in enumerate(names):
            group = same_size.get(name, name)
            height = 0.95 + 0.12 * np.log2(where[group]) / 2  # 0.12 less where sides are halved
            colour = "white" if group == "image" else "lightsteelblue"
            axes.add_patch(pyplot.Rectangle(
                (column - 0.17, row - height / 2), 0.34, height, facecolor=colour, edgecolor="black"
            ))  # fmt: skip
            channels = f"{width[group]} of {full[group]}" if group in width else "3"
            side = round(where[group] ** -0.5)
            axes.text(column, row + 0.62, name, ha="center", fontsize=9, weight="bold")
            axes.text(column, row - 0.62, channels, ha="center", va="top", fontsize=8)
            axes.text(column, row, f"1/{side}" if side > 1 else "1", ha="center", va="center",
                      fontsize=8)  # fmt: skip
    column_of = {name: column for row in (above, below) for column, name in enumerate(row)}
    for layer in structure.LAYERS:
        decoding = layer.network in ("g_s", "h_s")
        reads = f"{layer.reads}_hat" if decoding and layer.reads in ("y", "z") else layer.reads
        makes = {structure.IMAGE: "x_hat", structure.MEAN_AND_SCALE: "y_hat"}.get(
            layer.makes, layer.makes
        )
        start, end, row = column_of[reads], column_of[makes], -1.0 if decoding else 1.0
        step = 0.2 if end > start else -0.2
        axes.annotate("", (end - step, row), (start + step, row), arrowprops={"arrowstyle": "->"})
        middle, text = (start + end) / 2, f"{layer.module}\n{layer.kernel}x{layer.kernel}"
        axes.text(middle, row + 0.05, text, ha="center", fontsize=7)
        axes.text(middle, row - 0.08, layer.then or "", ha="center", va="top", fontsize=7)
    for column, text in ((4, "y - mean, rounded"), (7, "rounded")):
        axes.annotate("", (column, -0.3), (column, 0.3), arrowprops={"arrowstyle": "->"})
        axes.text(column + 0.08, 0, f"{text}:\nto the file", va="center", fontsize=8)
    axes.text(4.5, -1.08, "mean,\nscale", ha="center", va="top", fontsize=7)
    axes.set(xlim=(-0.4, 7.9), ylim=(-1.9, 1.8))
    axes.axis("off")
    save(figure, "architecture")


def latents(walk, pyplot):
    """The photograph and the channels of y that vary most."""
    figure = pyplot.figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.15))
    axes = left.subplots()
    axes.imshow(walk.image)
    axes.set_title("x", fontsize=8)
    axes.set(xticks=[], yticks=[])
    for axes, channel in zip(right.subplots(4, 4).flatten(), walk.loudest):
        values = walk.y[0, channel]
        grey(axes, values, f"{channel}: up to {values.abs().max():.0f}")
    save(figure, "latents")
    print(f"y: {tuple(walk.y.shape[1:])}, largest {walk.y.abs().max():.1f}")
    zero = (walk.symbols == 0).float().mean()
    print(f"rounded around the mean {zero:.1%} of {walk.symbols.numel():,} latents are 0")


def steps(walk, pyplot):
    """1 / gain: what a latent of a channel is rounded to multiples of."""
    model = walk.coder.model
    step = torch.exp(-model.log_gain.detach())  # (levels, M)
    order = step[walk.coder.middle_level()].argsort()
    figure, axes = pyplot.subplots(figsize=(8, 3.5), layout="constrained")
    for level, row in enumerate(step[:, order]):
        (line,) = axes.semilogy(row, linewidth=1)
        axes.annotate(f"level {level}", (75, 1.1 * row[75]), color=line.get_color(), fontsize=8)
    axes.set(xlabel="channel of y, sorted by its step at level 2", ylabel="step, in g_a's units")
    axes.grid(alpha=0.3)
    save(figure, "steps")
    middle = step.log().mean(1).exp()
    print("step a level, geometric mean:", *(f"{v:.2f}" for v in middle))


def hyperprior(walk, pyplot):
    """One channel of y, what z says of it, and what it then costs."""
    channel = walk.loudest[0]
    y, mean, scale = walk.y[0, channel], walk.mean[0, channel], walk.scale[0, channel]
    y_bits, _ = coded_bits(walk.coder, walk.y, walk.z)
    figure, panels = pyplot.subplots(2, 3, figsize=(11, 5.2), layout="constrained")
    panels = panels.flatten()
    panels[0].imshow(walk.x[0].permute(1, 2, 0))
    panels[0].set_title("x, padded", fontsize=8)
    panels[0].set(xticks=[], yticks=[])
    limit = y.abs().max()
    grey(panels[1], y, f"y, channel {channel}: up to {limit:.0f}", limit)
    grey(panels[2], mean, "mean, drawn alike", limit)
    grey(panels[4], (y - mean) / scale, "(y - mean) / scale, black -3, white 3", 3)
    white = np.quantile(y_bits[channel], 0.99)
    for panel, values, limit, title in (
        (panels[3], scale, scale.max(), f"scale: {scale.min():.2f} to {scale.max():.1f}"),
        (panels[5], y_bits[channel], white, f"bits, white: {white:.0f} and more"),
    ):
        panel.imshow(values, cmap="gray", vmin=0, vmax=limit)
        panel.set_title(title, fontsize=8)
        panel.set(xticks=[], yticks=[])
    save(figure, "hyperprior")
    for name, values in (("y", walk.y), ("y - mean", walk.y - walk.mean)):
        print(f"{name}: standard deviation of all latents {values.std():.2f}")
    used = walk.table.unique()
    print(f"{len(used)} of 64 tables are used")


def bits(walk, pyplot):
    """Where in the picture the bits are, and in which channels."""
    blocks, side = bits_of_blocks(walk.coder, walk.y, walk.z)
    y_bits, z_bits = coded_bits(walk.coder, walk.y, walk.z)
    height, width = walk.image.shape[:2]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    left.imshow(heat(enlarged(blocks, side)[:height, :width], blocks.max()))
    left.set_title(f"bits a block: black 0, white {blocks.max():.0f}", fontsize=8)
    left.set(xticks=[], yticks=[])
    of_channels = np.sort(y_bits.sum((1, 2)))[::-1] / 8
    right.bar(range(len(of_channels)), of_channels, width=1)
    right.set(xlabel="channel of y, sorted by its bytes", ylabel="bytes")
    save(figure, "bits")
    shares = np.cumsum(of_channels) / of_channels.sum()
    print(f"bytes: file {len(walk.data)}, y {y_bits.sum() / 8:.0f}, z {z_bits.sum() / 8:.0f}")
    print(f"half of y's bytes are in {np.argmax(shares >= 0.5) + 1} channels, nine tenths in "
          f"{np.argmax(shares >= 0.9) + 1} of {len(shares)}")  # fmt: skip
    print(f"a block of {side}x{side}: {blocks.min():.0f} to {blocks.max():.0f} bits")


def table(walk, pyplot):
    """The symbols of the table that codes most bits, and what it expects."""
    tables = walk.coder.tables["y"]
    y_bits, _ = coded_bits(walk.coder, walk.y, walk.z)
    t = np.bincount(walk.table.flatten(), weights=y_bits.flatten()).argmax()
    coded = walk.symbols[walk.table == t].numpy().astype(np.int32)
    values, counts = np.unique(coded, return_counts=True)
    start = tables.sizes[:t].sum()
    expected = tables.counts[start : start + tables.sizes[t] - 1] / 2**PRECISION
    support = tables.offsets[t] + np.arange(len(expected))
    figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    axes.bar(values, counts / len(coded), label="symbols of this picture")
    axes.plot(support, expected, "k.", label="the table")
    reach = np.abs(values).max() + 1
    axes.set(xlim=(-reach, reach), xlabel="y - mean, rounded", ylabel="share")
    axes.legend()
    save(figure, "table")
    paid = bits_of_symbols(coded, np.full(len(coded), t), tables).mean()
    share = counts / len(coded)
    entropy = -(share * np.log2(share)).sum()
    scale = np.exp(LOG_SCALE_MIN + LOG_SCALE_STEP * t)
    print(f"table {t}, scale {scale:.2f}: {len(coded):,} symbols, {paid:.3f} bits each, "
          f"their entropy {entropy:.3f}")  # fmt: skip


@torch.inference_mode()
def units(walk, pyplot, count=8, side=3):
    """What one latent of each of the loudest channels paints; below, the likest DCT pattern."""
    model = walk.coder.model
    _, inverse_gain = model.gains(torch.tensor([walk.level]))
    nothing = torch.zeros(1, walk.y.shape[1], 2 * side + 1, 2 * side + 1)
    background = model.g_s(nothing)
    u = np.arange(16) + 0.5
    waves = {
        (a, b): np.outer(np.cos(np.pi * a * u / 16), np.cos(np.pi * b * u / 16))
        for a in range(4)
        for b in range(4)
    }

    def likeness(wave, pixels):  # of colours, too: each counts
        return np.square(np.tensordot(wave / np.linalg.norm(wave), pixels, 2)).sum()

    figure, rows = pyplot.subplots(2, count, figsize=(11, 3), layout="constrained")
    for (above, below), channel in zip(rows.T, walk.loudest):
        one = nothing.clone()
        one[0, channel, side, side] = walk.symbols[0, channel].abs().max()
        painted = (model.g_s(one * inverse_gain) - background)[0].permute(1, 2, 0)
        painted = painted[16 * side - 24 : 16 * side + 40, 16 * side - 24 : 16 * side + 40]
        above.imshow((0.5 + 0.5 * painted / painted.abs().max()).clamp(0, 1))
        above.add_patch(pyplot.Rectangle((23.5, 23.5), 16, 16, fill=False, linewidth=0.5))
        above.set_title(f"channel {channel}", fontsize=8)
        own_pixels = painted[24:40, 24:40].numpy()
        a, b = max(waves, key=lambda frequency: likeness(waves[frequency], own_pixels))
        below.imshow(np.pad(waves[a, b], 24), cmap="gray", vmin=-1, vmax=1)
        below.set_title(f"DCT {a}, {b}", fontsize=8)
    for axes in rows.flatten():
        axes.set(xticks=[], yticks=[])
    save(figure, "units")


def error(walk, pyplot):
    """What comes back, and what is lost."""
    figure, panels = pyplot.subplots(1, 3, figsize=(13, 3.2), layout="constrained")
    difference = walk.decoded.astype(int) - walk.image
    shown = (walk.image, walk.decoded, np.clip(128 + 4 * difference, 0, 255))
    titles = "x", f"x_hat: {psnr(walk.image, walk.decoded):.2f} dB", "four times the error"
    for axes, picture, title in zip(panels, shown, titles):
        axes.imshow(picture)
        axes.set_title(title, fontsize=8)
        axes.set(xticks=[], yticks=[])
    save(figure, "error")
    print(f"x_hat: {psnr(walk.image, walk.decoded):.2f} dB, {len(walk.data)} bytes")


# the stages


def sensitivity(walk, pyplot):
    """zeta of each group of dense.pt, and the widths that alpha chooses: docs/plan.json."""
    plan = json.loads((ROOT / "docs/plan.json").read_text())
    dense = load_checkpoint(CHECKPOINTS / "dense.pt")[0].config["widths"]
    figure, panels = pyplot.subplots(
        2, 2, figsize=(11, 6.5), layout="constrained", sharex=True, sharey=True
    )
    alpha, ticks = 100 * plan["alpha"], [0, 1, 10, 100]
    panels[0, 0].set_yscale("symlog", linthresh=1)
    panels[0, 0].set(xlim=(102, 8), ylim=(-0.2, 500), yticks=ticks, yticklabels=ticks)
    for network, axes in zip(("g_a", "g_s", "h_a", "h_s"), panels.flatten()):
        ends = {}
        made = [group for group, how in structure.groups().items() if how.made_by[:3] == network]
        for k, group in enumerate(made):
            row = {int(width): 100 * zeta for width, zeta in plan["sensitivity"][group].items()}
            kept = {width: 100 * width / dense[group] for width in row}
            axes.plot(kept.values(), row.values(), ".-", color=f"C{k}", linewidth=1)
            chosen = plan["widths"][group]
            axes.plot(
                kept[chosen], row[chosen], "o", color=f"C{k}", markersize=10, fillstyle="none"
            )
            last = min(row)
            ends[group] = (kept[last], row[last], f"C{k}")
        axes.axhline(alpha, color="black", linewidth=1)
        axes.text(66, alpha, f"alpha = {alpha:.1f} %", va="bottom", fontsize=8)
        axes.set_title(network, fontsize=10)
        axes.grid(alpha=0.3)
        name_ends(axes, ends)
    figure.supxlabel("channels of the group kept, %: fewer to the right", fontsize=10)
    figure.supylabel("rise of J, %, logarithmic above 1 %", fontsize=10)
    save(figure, "sensitivity")
    print(f"alpha {plan['alpha']:.4f} removes {plan['sparsity']['both']:.1%}: "
          + ", ".join(f"{group} {width}" for group, width in plan["widths"].items()))  # fmt: skip


def widths(walk, pyplot):
    """Channels of each group before the cut and after it."""
    dense, pruned = (
        load_checkpoint(CHECKPOINTS / f"{name}.pt")[0].config for name in ("dense", "pruned")
    )
    figure, axes = pyplot.subplots(figsize=(8, 3), layout="constrained")
    for config, label, style in (
        (dense, "dense.pt", {"color": "lightgrey"}),
        (pruned, "pruned.pt", {"width": 0.5}),
    ):
        axes.bar(list(config["widths"]), list(config["widths"].values()), label=label, **style)
    axes.set(ylabel="channels")
    axes.legend()
    save(figure, "widths")
    removed = search.sparsity(dense, pruned["widths"])
    print(f"removed: {removed['params']:.1%} of the parameters, {removed['macs']:.1%} of the MACs")


def fold(walk, pyplot, group="g_a.1"):
    """The channels of a group that go, and how much of each the others can predict."""
    model, _ = load_checkpoint(CHECKPOINTS / "dense.pt")
    kept_width = load_checkpoint(CHECKPOINTS / "pruned.pt")[0].config["widths"][group]
    statistics = observe(model, crops_of(walk.image))
    scores = residual(model, statistics)[group]
    keep = most_important(scores, kept_width)
    gone = [c for c in range(len(scores)) if c not in set(keep.tolist())]
    reader = structure.groups()[group].used_by[0]
    moments = statistics.inputs[reader]
    B, c = best_prediction(moments, keep, gone)
    covariance = moments.covariance()
    left = covariance[gone][:, gone] - B @ covariance[keep][:, gone]  # what B leaves unexplained
    explained = 1 - left.diagonal() / covariance.diagonal()[gone]
    v = layer_inputs(model, walk.x, [reader], lambda v: v[0])[reader][0]  # (C, H'/2, W'/2)
    v = v[:, : walk.image.shape[0] // 2, : walk.image.shape[1] // 2]  # without the padding
    example = int((explained - explained.median()).abs().argmin())
    truth = v[gone[example]]
    predicted = torch.einsum("k,khw->hw", B[example].float(), v[keep]) + c[example].float()
    figure, panels = pyplot.subplots(1, 3, figsize=(13, 3), layout="constrained")
    panels[0].bar(range(len(gone)), 100 * explained.sort(descending=True).values, width=1)
    panels[0].set(
        xlabel=f"channel of {group} that goes, sorted",
        ylabel="predicted, % of variance",
        ylim=(80, 100),
    )
    limit = (truth - truth.mean()).abs().max()
    grey(panels[1], truth - truth.mean(), f"channel {gone[example]}, which goes", limit)
    title = f"what the {len(keep)} that stay predict: {explained[example]:.1%}"
    grey(panels[2], predicted - truth.mean(), title, limit)
    save(figure, "fold")
    print(f"{group}: {len(gone)} of {len(scores)} go; the others predict {explained.min():.1%} "
          f"to {explained.max():.1%}, median {explained.median():.1%}")  # fmt: skip


def rounding(walk, pyplot, name="g_a.conv2"):
    """Weights of one kernel by both roundings; the error of its output, and of each layer's."""
    model, _ = load_checkpoint(CHECKPOINTS / "pruned.pt")
    x = crops_of(walk.image)
    equalize(model, x)
    moments = float_moments(model, x)
    codec, better = with_8_bit_weights(model, moments)
    layer = model.get_submodule(name)
    weight = structure.weight_rows(layer)[0]
    scale = largest_scale(weight[None], *WEIGHT)[0]
    nearest = fake_quantize(weight, scale, *WEIGHT)
    chosen = structure.weight_rows(codec.get_submodule(name))[0]
    changed = (nearest / scale).round() != (chosen / scale).round()
    kernel = changed.view(-1, 25).sum(1).argmax()  # the input channel where most weights differ
    v = layer_inputs(model, walk.x, [name], lambda v: v)[name][0]  # the same at each level

    figure, panels = pyplot.subplots(2, 2, figsize=(11, 6.5), layout="constrained")
    panels = panels.flatten()
    taps, errors = np.arange(25), {}
    for values, label, shift in (
        (nearest, "nearest integers", -0.2),
        (chosen, "errors cancel", 0.2),
    ):
        rounding_error = values - weight
        bars = (rounding_error / scale).view(-1, 25)[kernel]
        panels[0].bar(taps + shift, bars, 0.4, label=label)
        filters = rounding_error.view(1, *layer.weight.shape[1:])
        error = torch.nn.functional.conv2d(v, filters, stride=layer.stride, padding=layer.padding)
        errors[label] = error[0, 0, : walk.image.shape[0] // 4, : walk.image.shape[1] // 4]
    panels[0].set(xlabel=f"tap of a kernel of {name}", ylabel="integer - weight, in steps")
    panels[0].grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    limit = 2 * errors["nearest integers"].std()
    for panel, (label, error) in zip(panels[2:], errors.items()):
        grey(panel, error, f"error of the output, {label}", limit)
    gains = {layer: 10 * np.log10(factor) for layer, factor in better.items()}
    pixels, most = x[:, 0].numel(), PATCHES * len(x) / 4
    sizes = structure.layer_sizes(model.config["widths"])
    patches = {layer: min(positions * pixels, most) for layer, *_, positions in sizes}
    # fewer patches than weights in a row: the rounding fits this picture and no other
    colours = ["lightgrey" if patches[layer] < len(moments[layer]) else "C0" for layer in gains]
    panels[1].barh(list(gains), list(gains.values()), color=colours)
    panels[1].invert_yaxis()
    panels[1].tick_params("y", labelsize=8)
    panels[1].set(xlabel="by how much the error of the output falls, dB")
    grey_bar = pyplot.Rectangle((0, 0), 1, 1, color="lightgrey", label="too few patches to tell")
    panels[1].legend(handles=[grey_bar], fontsize=8)
    save(figure, "rounding")
    power = {label: (error**2).mean() for label, error in errors.items()}
    of_first = 10 * torch.log10(power["nearest integers"] / power["errors cancel"])
    print(f"{name}: {changed.float().mean():.1%} of the first row's weights are not the nearest "
          f"integer; the output's error falls by {gains[name]:.1f} dB, that of the first channel "
          f"by {of_first:.1f}")  # fmt: skip


def eight_bits(walk, pyplot):
    """Rise of J when one layer alone gets 8 bits, not trained."""
    model, _ = load_checkpoint(CHECKPOINTS / "pruned.pt")
    x = crops_of(walk.image)
    equalize(model, x)
    J, scales = mean_loss(model, x), input_scales(model, x)

    def rise(codec):
        return 100 * (mean_loss(codec, x) / J - 1).mean().item()

    layers = list(input_ranges())
    of_weights = [rise(with_nearest_weights(model, [name])) for name in layers]
    of_inputs = [
        rise(with_rounded_inputs(model, scales, [name])) if name in eight_bit_inputs() else 0
        for name in layers
    ]
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    rows = np.arange(len(layers))
    axes.barh(rows - 0.2, of_weights, 0.4, label="its weights, nearest integers")
    axes.barh(rows + 0.2, of_inputs, 0.4, label="its input")
    axes.set(yticks=rows, yticklabels=layers, xlabel="rise of J, %")
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    axes.legend()
    save(figure, "eight_bits")
    worst = layers[int(np.argmax(of_inputs))]
    print(f"dearest input: {worst}, J {max(of_inputs):+.2f} %; all others together "
          f"{sum(of_inputs) - max(of_inputs):+.2f} %")  # fmt: skip


def crops(walk, pyplot, top=190, left=230, side=200):
    """The same crop by JPEG and by the three codecs, in as many bytes."""
    size = len(lic.load(CHECKPOINTS / "quantized.pt").encode(walk.image, 1))
    _, data, decoded = best_within(walk.image, "JPEG", size)
    coded = [("JPEG", data, decoded)]
    for name in ("dense.pt", "pruned.pt", "quantized.pt"):
        coder = lic.load(CHECKPOINTS / name)
        qualities = [step / 64 for step in range(0, 2 * 64 + 1)]
        too_many = bisect_right(qualities, size, key=lambda q: len(coder.encode(walk.image, q)))
        data = coder.encode(walk.image, qualities[too_many - 1])  # the best of no more bytes
        coded.append((name, data, coder.decode(data)))
    box = np.s_[top : top + side, left : left + side]
    pictures, captions = [walk.image[box]], ["original"]
    for name, data, decoded in coded:
        pictures.append(decoded[box])
        captions.append(f"{name}\n{len(data):,} bytes, {psnr(walk.image, decoded):.2f} dB")
        print(captions[-1].replace("\n", ": "))
    write_bytes(FOLDER / "crops.png", png_bytes(beside(pictures, captions)))


# results


def results(walk, pyplot):
    """The curves of docs/results.json and of docs/effort.json, which evaluate.py measured."""
    measured = json.loads((ROOT / "docs/results.json").read_text())
    searched = json.loads((ROOT / "docs/effort.json").read_text())
    published = json.loads((ROOT / "docs/kodak_published.json").read_text())["curves"]
    ours = {Path(c["path"]).stem: points(c["levels"]) for c in measured["checkpoints"]}
    for codec in searched["checkpoints"]:
        if Path(codec["path"]).stem == "quantized" and codec["effort"]:
            ours[f"--effort {codec['effort']}"] = points(codec["levels"])
    mean_scale = published["compressai mbt2018-mean"]
    others = {name.upper(): points(rows) for name, rows in measured["classical"].items()}
    others["CompressAI mbt2018-mean"] = list(zip(mean_scale["bpp"], mean_scale["psnr"]))
    plot_rate_distortion(FOLDER / "rate_distortion.png", ours, others)


def plans(walk, pyplot):
    """What was removed, and what is left to do, against what it cost: docs/plans.json."""
    tuned = json.loads((ROOT / "docs/plans.json").read_text())["plans"]
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 3.8), layout="constrained", sharey=True)
    for axes, key, label in (
        (panels[0], "parameters", "parameters, millions"),
        (panels[1], "decode_seconds", "milliseconds to decode 768x512"),
    ):
        methods = ["control", "threshold", "evolved", "uniform"]
        for plan in tuned:
            value = plan[key] / 1e6 if key == "parameters" else plan[key] * 1e3
            (method,) = (k for k, name in enumerate(methods) if plan["name"].startswith(name))
            axes.plot(value, plan["bd_rate_percent"], "o", color=f"C{method}")
            axes.annotate(plan["name"], (value, plan["bd_rate_percent"]), (5, 5),
                          textcoords="offset points", fontsize=8)  # fmt: skip
        axes.axhline(0, color="grey", linewidth=0.5)
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
        axes.margins(x=0.2, y=0.15)
    panels[0].set(ylabel="BD-rate against the control, %")
    save(figure, "plans")


# the encoder's search


def effort_curves(walk, pyplot):
    """J by step, by annealing and by rounding straight through; where the bits went."""
    walk.coder.model.requires_grad_(False)
    searches = {
        name: Search(walk.coder, walk.image, walk.level)
        for name in ("annealing", "straight through")
    }
    before = searches["annealing"].y_bits.sum(0)
    searches["annealing"].run(trace=True)
    with mock.patch.object(effort, "annealed", straight_through):
        searches["straight through"].run(trace=True)
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for name, found in searches.items():
        start = found.losses[0]
        axes.plot([100 * (J / start - 1) for J in found.losses], label=name)
        print(f"{name:16}  J {start:.4f} -> {found.losses[-1]:.4f}, {STEPS} steps")
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.set(xlabel="step", ylabel="J of the rounded latents, % above the start")
    axes.legend()
    axes.grid(alpha=0.3)
    save(figure, "effort_curves")

    found = searches["annealing"]
    old, new = found.v.round(), found.found.round()
    print(f"annealing changed {(old != new).sum():,} of {old.numel():,} latents, by at most "
          f"{(old - new).abs().max():g}; not 0 were {(old != 0).sum():,}, "
          f"are {(new != 0).sum():,}")  # fmt: skip
    after = found.y_bits.sum(0)
    figure, panels = pyplot.subplots(1, 3, figsize=(13, 3), layout="constrained")
    limit, largest = (after - before).abs().max(), max(before.max(), after.max())
    for axes, values, title in ((panels[0], before, "before"), (panels[1], after, "after")):
        axes.imshow(heat(values.numpy(), largest.item()))
        axes.set_title(f"bits of y {title}: {values.sum() / 8:,.0f} bytes", fontsize=8)
    drawn = panels[2].imshow(after - before, cmap="coolwarm", vmin=-limit, vmax=limit)
    panels[2].set_title("the change, bits a block", fontsize=8)
    figure.colorbar(drawn, ax=panels[2])
    for axes in panels:
        axes.set(xticks=[], yticks=[])
    save(figure, "effort_bits", all_colours=True)


FIGURES = (architecture, latents, steps, hyperprior, bits, table, units, error, sensitivity, widths,
           fold, rounding, eight_bits, crops, results, plans, effort_curves)  # fmt: skip


def parse_args():
    parser = make_parser(__doc__)
    names = [function.__name__ for function in FIGURES]
    parser.add_argument("names", nargs="*", help=f"which (default: all): {' '.join(names)}")
    args = parser.parse_args()
    unknown = set(args.names) - set(names)
    if unknown:
        raise LicError(f"no figure is called {' '.join(sorted(unknown))}")
    return args


def main():
    args = parse_args()
    pyplot = import_pyplot()
    walk = Walk()
    for function in FIGURES:
        if not args.names or function.__name__ in args.names:
            print(f"\n{function.__name__}")
            function(walk, pyplot)
            pyplot.close("all")


if __name__ == "__main__":
    run(main)
