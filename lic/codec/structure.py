"""The architecture, described once: which layers there are and which channels join them.

Four networks: g_a makes y of the image, h_a makes z of y, h_s a mean and a scale for each y of z,
g_s the image of y (model.py has the diagram). LAYERS is the whole mean-scale hyperprior (Minnen,
Ballé, Toderici, arXiv:1809.02736, without its context model). All that must know the layers asks
here: the model that is built, the parameters and multiply-accumulates that are counted, the
channels that a cut removes, the range of each 8-bit input, the loop over the integer h_s. Another
architecture is another LAYERS, within what `check_layers` allows. (The number of bits of each input
follows in eight_bits.py; the widths of the presets are in model.py.)

A layer reads one group of channels and makes another. Twelve groups may be narrowed; with them
go (the output of `python -m lic.codec.structure`):

    group   made by     normalised by   used by                 also cut in
    g_a.1   g_a.conv1   g_a.gdn1        g_a.conv2
    g_a.2   g_a.conv2   g_a.gdn2        g_a.conv3
    g_a.3   g_a.conv3   g_a.gdn3        g_a.conv4
    y       g_a.conv4                   g_s.conv1, h_a.conv1    h_s.conv3: mean, scale; the gains
    g_s.1   g_s.conv1   g_s.gdn1        g_s.conv2
    g_s.2   g_s.conv2   g_s.gdn2        g_s.conv3
    g_s.3   g_s.conv3   g_s.gdn3        g_s.conv4
    h_a.1   h_a.conv1                   h_a.conv2
    h_a.2   h_a.conv2                   h_a.conv3
    z       h_a.conv3                   h_s.conv1               prior_z
    h_s.1   h_s.conv1                   h_s.conv2
    h_s.2   h_s.conv2                   h_s.conv3

What is irregular is in `axes_of_group`: h_s makes two numbers for each channel of y, its mean and
its scale; y has gains; z has a prior. y alone has two readers. The image is never cut.
"""

import re
from typing import NamedTuple

IMAGE = "image"  # three channels, read by g_a and made by g_s
MEAN_AND_SCALE = "mean and scale"  # made by h_s: the means of y's channels, then their scales


class Layer(NamedTuple):
    name: str  # "NETWORK.convN", as in a state_dict
    kind: str  # "conv", or "deconv": a transposed convolution, which multiplies height and width
    kernel: int  # side, pixels
    stride: int
    reads: str  # IMAGE or a group of channels
    makes: str  # IMAGE, a group or MEAN_AND_SCALE
    then: str | None = None  # what its output passes through: "gdn", "igdn", "lrelu" or nothing

    @property
    def network(self):
        return self.name.split(".")[0]

    @property
    def module(self):
        """Its name within its network: conv1."""
        return self.name.split(".")[1]

    @property
    def then_name(self):
        """Name of the module that its output passes through: g_a.gdn1 after g_a.conv1.

        None if there is none. An IGDN is called gdn, too.
        """
        return self.name.replace("conv", self.then.removeprefix("i")) if self.then else None


# fmt: off
LAYERS = [
    #      name         kind     kernel stride  reads    makes           then
    Layer("g_a.conv1", "conv",   5, 2,          IMAGE,   "g_a.1",        "gdn"),
    Layer("g_a.conv2", "conv",   5, 2,          "g_a.1", "g_a.2",        "gdn"),
    Layer("g_a.conv3", "conv",   5, 2,          "g_a.2", "g_a.3",        "gdn"),
    Layer("g_a.conv4", "conv",   5, 2,          "g_a.3", "y"),
    Layer("g_s.conv1", "deconv", 5, 2,          "y",     "g_s.1",        "igdn"),
    Layer("g_s.conv2", "deconv", 5, 2,          "g_s.1", "g_s.2",        "igdn"),
    Layer("g_s.conv3", "deconv", 5, 2,          "g_s.2", "g_s.3",        "igdn"),
    Layer("g_s.conv4", "deconv", 5, 2,          "g_s.3", IMAGE),
    Layer("h_a.conv1", "conv",   3, 1,          "y",     "h_a.1",        "lrelu"),
    Layer("h_a.conv2", "conv",   5, 2,          "h_a.1", "h_a.2",        "lrelu"),
    Layer("h_a.conv3", "conv",   5, 2,          "h_a.2", "z"),
    Layer("h_s.conv1", "deconv", 5, 2,          "z",     "h_s.1",        "lrelu"),
    Layer("h_s.conv2", "deconv", 5, 2,          "h_s.1", "h_s.2",        "lrelu"),
    Layer("h_s.conv3", "conv",   3, 1,          "h_s.2", MEAN_AND_SCALE),
]
# fmt: on

PRIOR_PARAMETERS = 43  # a channel of z: 24 + 10 + 9 in entropy.EntropyBottleneck's H, b and a


class Group(NamedTuple):
    made_by: str  # name of a layer
    gdn: str | None  # the GDN that normalises it
    used_by: list  # names of the layers that read it: of y g_s.conv1, where its errors show, first


def layers_of(network):
    """The layers of "g_a", "g_s", "h_a" or "h_s", in order."""
    return [layer for layer in LAYERS if layer.network == network]


def groups():
    """{group: Group} of all channels that may be narrowed, in the order of LAYERS."""
    table = {}
    for layer in LAYERS:
        if layer.makes in (IMAGE, MEAN_AND_SCALE):
            continue
        gdn = layer.then_name if layer.then in ("gdn", "igdn") else None
        used_by = [reader.name for reader in LAYERS if reader.reads == layer.makes]
        used_by.sort(key=lambda name: not name.startswith("g_s"))
        table[layer.makes] = Group(layer.name, gdn, used_by)
    return table


def check_layers():
    """Raise ValueError if LAYERS holds what the rest of the code does not know."""
    follows = {"g_a": "gdn", "g_s": "igdn", "h_a": "lrelu", "h_s": "lrelu"}
    made = [layer.makes for layer in LAYERS]
    readers = [layer.reads for layer in LAYERS]
    names = [layer.name for layer in LAYERS]
    for layer in LAYERS:
        if not re.fullmatch(r"(g_a|g_s|h_a|h_s)\.conv\d+", layer.name):
            raise ValueError(f"{layer.name}: a layer is called NETWORK.convN")
        if layer.kernel % 2 == 0 or names.count(layer.name) > 1:
            raise ValueError(f"{layer.name}: an odd kernel, and one layer of a name")
        if layer.kind not in ("conv", "deconv"):
            raise ValueError(f"{layer.name}: {layer.kind} is neither conv nor deconv")
        if layer.kind == "deconv" and (layer.kernel, layer.stride) != (5, 2):
            raise ValueError(
                f"{layer.name}: a transposed convolution is 5x5 with stride 2 (PHASES)"
            )
        if layer.makes in (IMAGE, MEAN_AND_SCALE, "y", "z"):
            if layer.then:
                raise ValueError(f"{layer.name}: nothing follows what makes {layer.makes}")
        elif layer.then != follows[layer.network]:
            raise ValueError(
                f"{layer.name}: within {layer.network} a layer is followed by "
                f"{follows[layer.network]}"
            )
        if layer.reads != IMAGE and layer.reads not in made:
            raise ValueError(f"{layer.name} reads {layer.reads}, which no layer makes")
    for group in groups():
        if readers.count(group) != (2 if group == "y" else 1):
            raise ValueError(f"{group}: one layer must read it, two of y: one in g_s, one in h_a")
    sizes = positions()
    if sizes[IMAGE] != 1 or sizes[MEAN_AND_SCALE] != sizes["y"]:
        raise ValueError("g_s must give the image its size back, and h_s give y's")


def axes_of_group(model, group):
    """Every (tensor name, axis, copies) along which the channels of a group lie.

    copies: how often all channels of the group follow one another along that axis; 1, but for
    the means and scales of y.
    """
    made_by, gdn, used_by = groups()[group]
    yield f"{made_by}.weight", channel_axes(model.get_submodule(made_by))[0], 1
    yield f"{made_by}.bias", 0, 1
    if gdn:
        yield f"{gdn}.beta", 0, 1
        yield f"{gdn}.gamma", 0, 1
        yield f"{gdn}.gamma", 1, 1
    for reader in used_by:
        yield f"{reader}.weight", channel_axes(model.get_submodule(reader))[1], 1
    if group == "y":
        (last,) = (layer.name for layer in LAYERS if layer.makes == MEAN_AND_SCALE)
        yield f"{last}.weight", channel_axes(model.get_submodule(last))[0], 2
        yield f"{last}.bias", 0, 2
        yield "log_gain", 1, 1
        yield "log_inverse_gain", 1, 1
    if group == "z":  # every tensor of the prior is channel first
        for name, _ in model.prior_z.named_parameters():
            yield f"prior_z.{name}", 0, 1


def channels(widths):
    """Number of channels of all that a layer can read or make; widths: {group: channels}."""
    return {**widths, IMAGE: 3, MEAN_AND_SCALE: 2 * widths["y"]}


def positions():
    """Positions a pixel of the image: {"image": 1, "g_a.1": 1/4, ... "y": 1/16^2, "z": 1/64^2}."""
    table = {IMAGE: 1.0}
    for layer in LAYERS:
        if layer.reads not in table:
            raise ValueError(f"{layer.name} must stand below the layer that makes {layer.reads}")
        area = layer.stride**2
        here = table[layer.reads]
        table[layer.makes] = here / area if layer.kind == "conv" else here * area
    return table


def total_stride():
    """Pixels of the image on the side of one position of z: both its sides must be multiples."""
    return round(positions()["z"] ** -0.5)


def layer_sizes(widths):
    """(name, channels in, channels out, kernel side, positions a pixel) of each layer with weights.

    positions: where it is evaluated, at the outputs of a convolution, at the inputs of a transposed
    one. GDN counts as the 1x1 convolution by gamma that it is.
    """
    width, where, rows = channels(widths), positions(), []
    for layer in LAYERS:
        evaluated = where[layer.makes] if layer.kind == "conv" else where[layer.reads]
        rows.append((layer.name, width[layer.reads], width[layer.makes], layer.kernel, evaluated))
        if layer.then in ("gdn", "igdn"):
            C = width[layer.makes]
            rows.append((layer.then_name, C, C, 1, where[layer.makes]))
    return rows


def kmac_of_layers(widths):
    """{name: thousand multiply-accumulates a pixel of the image} of each layer with weights."""
    return {
        name: kernel**2 * c_in * c_out * evaluated / 1000
        for name, c_in, c_out, kernel, evaluated in layer_sizes(widths)
    }


def parameters(config):
    """Trained numbers of a codec: weights and biases, the density of z, the gains."""
    widths, levels = config["widths"], len(config["lambdas"])
    weights = sum(k * k * c_in * c_out + c_out for _, c_in, c_out, k, _ in layer_sizes(widths))
    return weights + PRIOR_PARAMETERS * widths["z"] + 2 * levels * widths["y"]


def kmac_per_pixel(config):
    """Thousand multiply-accumulates a pixel of the image: {"encoder", "decoder", "total"}.

    The encoder runs g_a, h_a and h_s, the decoder h_s and g_s; total counts h_s once.
    """
    spent = {"g_a": 0.0, "g_s": 0.0, "h_a": 0.0, "h_s": 0.0}
    for name, kmac in kmac_of_layers(config["widths"]).items():
        network = name.split(".")[0]
        spent[network] += kmac
    return {
        "encoder": spent["g_a"] + spent["h_a"] + spent["h_s"],
        "decoder": spent["h_s"] + spent["g_s"],
        "total": sum(spent.values()),
    }


def channel_axes(layer):
    """(out axis, in axis) of a module's weight.

    Conv2d is (out, in, kh, kw), ConvTranspose2d (in, out, kh, kw).
    """
    return (1, 0) if layer.transposed else (0, 1)


def weight_rows(layer):
    """The weight of a module, detached, a row an output channel: (out, in * k * k)."""
    return layer.weight.detach().transpose(0, channel_axes(layer)[0]).flatten(1)


def broadcast(v, axis):
    """A vector (C,) as a 4-d tensor that broadcasts along `axis` of a kernel."""
    shape = [1, 1, 1, 1]
    shape[axis] = -1
    return v.view(shape)


# A transposed convolution 5x5 with stride 2, padding 2 and output padding 1 doubles the size. Along
# one direction an output pixel meets every second tap of the kernel, and which depends on whether
# it is even or odd (its phase):
#
#     output pixel    2a           2a+1
#     taps of 5       4   2   0    3   1
#     input pixel     a-1 a   a+1  a   a+1
#
PHASES = [[4, 2, 0], [3, 1]]  # the taps of even and of odd output pixels, in the order of inputs


def phase_kernels(weight):
    """A doubling transposed convolution as four ordinary ones: (row, column, kernel) of each phase.

    weight (in, out, 5, 5); kernel (out, in, 3 or 2, 3 or 2): 3 taps for an even row or column of
    the output, which begin at input a-1, 2 for an odd one, which begin at a.
    """
    for row, rows in enumerate(PHASES):
        for column, columns in enumerate(PHASES):
            yield row, column, weight[:, :, rows][:, :, :, columns].transpose(0, 1)


def subpixel(weight):
    """The four as one ordinary convolution: (in, out, 5, 5) -> (4 out, in, 3, 3).

    It has stride 1 and padding 1 and makes four channels of each, one for each position in a 2x2
    block of the output; `pixel_shuffle` with 2 puts them there.
    """
    c_in, c_out = weight.shape[:2]
    kernels = weight.new_zeros(c_out, 2, 2, c_in, 3, 3)
    for row, column, kernel in phase_kernels(weight):
        kernels[:, row, column, :, row:, column:] = kernel
    return kernels.view(4 * c_out, c_in, 3, 3)


def table_of_groups(widths=None):
    """The table above, as text; with widths, {group: channels}, in a first column."""
    (last,) = (layer.name for layer in LAYERS if layer.makes == MEAN_AND_SCALE)
    extra = {"y": f"{last}: mean, scale; the gains", "z": "prior_z"}
    lines = ["group   made by     normalised by   used by                 also cut in"]
    numbers = ["channels  "]
    for name, (made_by, gdn, used_by) in groups().items():
        line = f"{name:7} {made_by:11} {gdn or '':15} {', '.join(used_by):23} {extra.get(name, '')}"
        lines.append(line.rstrip())
        numbers.append(f"{widths[name]:8}  " if widths else "")
    if widths:
        lines = [number + line for number, line in zip(numbers, lines)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table_of_groups())
