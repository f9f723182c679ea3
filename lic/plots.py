"""The plot of a comparison, for evaluate.py and the docs. matplotlib is asked for only here."""

import io

import numpy as np
from PIL import Image

from lic.files import LicError, write_bytes
from lic.metrics import bd_rate, rate_differences


def import_pyplot():
    """matplotlib.pyplot, drawing into files; raises LicError where it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise LicError(
            "a plot needs matplotlib, which is not installed: pip install matplotlib"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def write_figure(figure, path, all_colours=False):
    """A figure of matplotlib as a PNG; 256 colours are a third of the bytes, where they suffice."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, bbox_inches="tight")
    picture = Image.open(buffer).convert("RGB")
    if not all_colours:
        picture = picture.quantize(256)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    write_bytes(path, buffer.getvalue())


def plot_rate_distortion(path, ours, others):
    """Two panels: PSNR over rate, and what each of ours and of the others needs against the first.

    ours, others: {name: [(bpp, PSNR)]}. The names stand at the ends of the curves. The second panel
    tells curves apart that lie on one another in the first; it leaves out what needs a quarter more
    rate, and what cannot be compared.
    """
    pyplot = import_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    anchor_name, anchor = next(iter(ours.items()))
    largest = 1.1 * max(bpp for curve in ours.values() for bpp, _ in curve)
    ends, differences = {}, {}
    for k, (name, curve) in enumerate((ours | others).items()):
        style = {"marker": "o", "markersize": 4} if name in ours else {"linestyle": "--"}
        style["color"] = f"C{k}"
        curve = sorted(point for point in curve if point[0] <= largest)
        if not curve:
            continue
        left.plot(*zip(*curve), linewidth=1.2, **style)
        ends[name] = (*curve[-1], style["color"])
        percent, _ = bd_rate(anchor, curve)
        if percent is not None and percent < 25:
            quality, more = rate_differences(anchor, curve)
            right.plot(quality, more, linewidth=1.2, linestyle=style.get("linestyle"),
                       color=style["color"])  # fmt: skip
            differences[name] = (quality[-1], more[-1], style["color"])
    left.set(xlabel="bits per pixel (file)", ylabel="PSNR (dB)", title="higher is better")
    right.set(xlabel="PSNR (dB)", ylabel=f"rate against {anchor_name}, %",
              title="the same, as rate at equal PSNR: lower is better")  # fmt: skip
    left.grid(alpha=0.3)
    right.grid(alpha=0.3)
    name_ends(left, joined(left, ends))
    name_ends(right, differences)
    write_figure(figure, path)


def joined(axes, ends, near=0.03):
    """`ends`, as for `name_ends`, where curves that end at nearly one place have one name together.

    near: in either direction, as a share of the plot's.
    """
    axes.autoscale_view()
    in_axes = axes.transData - axes.transAxes
    together = []  # [(names, x, y, colour)]
    for name, (x, y, colour) in ends.items():
        for names, *first, _ in together:
            if np.abs(in_axes.transform((x, y)) - in_axes.transform(first)).max() < near:
                names.append(name)
                break
        else:
            together.append(([name], x, y, colour))
    return {", ".join(names): end for names, *end in together}


def name_ends(axes, ends, least=0.05):
    """Write names at the right of a plot, where their curves end, and apart from one another.

    ends: {name: (x, y, colour)}; least: between two names, as a share of the plot's height.
    """
    axes.autoscale_view()  # the limits are set now rather than when it is drawn
    in_axes = axes.transData - axes.transAxes
    height = float("inf")
    for name, (x, y, colour) in sorted(ends.items(), key=lambda item: -item[1][1]):
        height = min(in_axes.transform((x, y))[1], height - least)
        axes.annotate(
            name, (x, y), (1.02, height), textcoords="axes fraction", color=colour, va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.5},
        )  # fmt: skip
