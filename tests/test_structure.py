"""The architecture stands once; the rooms of the library depend on one another in one direction."""

import ast
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, lively_codec, photo_like

import lic
from lic.codec import structure
from lic.codec.bitstream import ImageCoder, padded_pixels
from lic.codec.checkpoint import load_checkpoint, save_checkpoint
from lic.codec.eight_bits import WIDE, eight_bit_inputs, input_ranges, quantize_layers
from lic.codec.integer import freeze_h_s
from lic.codec.model import Codec
from lic.codec.structure import IMAGE, MEAN_AND_SCALE, Layer
from lic.codec.tables import build_tables
from lic.files import LicError
from lic.images import dead_leaves
from lic.shrink.pruning import importance, most_important, narrow
from lic.shrink.quantization import equalize, input_scales
from lic.shrink.rounding import patch_moments, round_weights
from lic.shrink.search import sparsity, uniform_widths
from lic.shrink.statistics import observe

GOLDEN = ROOT / "tests" / "golden"
OTHER_LAYERS = [  # one convolution more in g_s, with stride 1; one less in h_a and h_s
    Layer("g_a.conv1", "conv", 5, 2, IMAGE, "g_a.1", "gdn"),
    Layer("g_a.conv2", "conv", 5, 2, "g_a.1", "g_a.2", "gdn"),
    Layer("g_a.conv3", "conv", 5, 2, "g_a.2", "g_a.3", "gdn"),
    Layer("g_a.conv4", "conv", 5, 2, "g_a.3", "y"),
    Layer("g_s.conv1", "deconv", 5, 2, "y", "g_s.1", "igdn"),
    Layer("g_s.conv2", "deconv", 5, 2, "g_s.1", "g_s.2", "igdn"),
    Layer("g_s.conv3", "conv", 3, 1, "g_s.2", "g_s.3", "igdn"),
    Layer("g_s.conv4", "deconv", 5, 2, "g_s.3", "g_s.4", "igdn"),
    Layer("g_s.conv5", "deconv", 5, 2, "g_s.4", IMAGE),
    Layer("h_a.conv1", "conv", 3, 1, "y", "h_a.1", "lrelu"),
    Layer("h_a.conv2", "conv", 5, 2, "h_a.1", "z"),
    Layer("h_s.conv1", "deconv", 5, 2, "z", "h_s.1", "lrelu"),
    Layer("h_s.conv2", "conv", 3, 1, "h_s.1", MEAN_AND_SCALE),
]
OTHER_WIDTHS = {
    "g_a.1": 16,
    "g_a.2": 24,
    "g_a.3": 18,
    "y": 20,
    "g_s.1": 26,
    "g_s.2": 22,
    "g_s.3": 21,
    "g_s.4": 23,
    "h_a.1": 27,
    "z": 19,
    "h_s.1": 28,
}


def test_another_architecture_is_another_table(monkeypatch, tmp_path):
    """Described here alone it is built, counted, narrowed, quantized, saved, loaded and coded
    with."""
    monkeypatch.setattr(structure, "LAYERS", OTHER_LAYERS)
    assert structure.total_stride() == 32 and padded_pixels(33, 1) == 2 * 32**2
    x = photo_like()
    dense = lively_codec(widths=OTHER_WIDTHS)
    assert structure.parameters(dense.config) == sum(p.numel() for p in dense.parameters())
    statistics = observe(dense, x)
    _, widths, S = uniform_widths(
        dense.config["widths"], lambda widths: sparsity(dense.config, widths)["params"], 0.3
    )
    assert S == sparsity(dense.config, widths)["params"] > 0.1
    scores = importance(dense, statistics)
    keep = {group: most_important(scores[group], width) for group, width in widths.items()}
    model = narrow(dense, keep, statistics).eval()
    assert structure.parameters(model.config) == sum(p.numel() for p in model.parameters())

    with torch.no_grad():
        before = model(x, torch.tensor([2.0]))
    equalize(model, x)
    quantize_layers(model, input_scales(model, x), float_inputs=["g_s.conv5"])
    gains = round_weights(model, patch_moments(model, x.repeat(4, 1, 1, 1)))
    assert list(gains) == [layer.name for layer in OTHER_LAYERS]
    freeze_h_s(model)
    assert input_ranges()["h_s.conv2"] == WIDE and "g_s.conv3" in eight_bit_inputs()

    fingerprint = save_checkpoint(
        tmp_path / "other.pt", model, build_tables(model), "quantize", {}, 0
    )
    loaded, meta = load_checkpoint(tmp_path / "other.pt")
    image = (x[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()[:100, :150]
    data = ImageCoder(model, build_tables(model), fingerprint).encode(image, 2)
    decoded = ImageCoder(loaded, meta["tables"], meta["fingerprint"]).decode(data)
    assert decoded.shape == image.shape
    expected = (before.x_hat.clamp(0, 1) * 255)[0].permute(1, 2, 0)[:80, :128].numpy()
    error = decoded[:80, :128] - expected  # away from the borders, where the image was cut
    assert np.sqrt((error**2).mean()) < 0.3 * expected.std()


def test_the_order_of_the_layers_changes_nothing(monkeypatch):
    """Equalization must find the reader of y whose inverse gain it divides, wherever it stands."""
    ordered = sorted(
        structure.LAYERS, key=lambda layer: ("g_a", "h_a", "h_s", "g_s").index(layer.network)
    )
    monkeypatch.setattr(structure, "LAYERS", ordered)
    assert structure.groups()["y"].used_by == ["g_s.conv1", "h_a.conv1"]
    model, x, level = lively_codec(), photo_like(), torch.tensor([2.0])
    with torch.no_grad():
        before = model(x, level)
        equalize(model, x)
        after = model(x, level)
    torch.testing.assert_close(after.x_hat, before.x_hat, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(after.y_bits.sum(), before.y_bits.sum(), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "layer, why",
    [
        (Layer("h_s.conv2", "deconv", 5, 2, "h_s.1", "h_s.2"), "followed by lrelu"),
        (Layer("g_s.conv2", "deconv", 3, 2, "g_s.1", "g_s.2", "igdn"), "5x5 with stride 2"),
        (Layer("g_s.conv3", "deconv", 5, 2, "g_s.1", "g_s.3", "igdn"), "one layer must read it"),
        (Layer("g_a.conv4", "conv", 5, 2, "g_a.3", "y", "gdn"), "nothing follows"),
        (Layer("g_a.conv2", "conv", 5, 2, "g_a.1", "g_a.2", "igdn"), "followed by gdn"),
        (Layer("h_a.conv1", "cnov", 3, 1, "y", "h_a.1", "lrelu"), "neither conv nor deconv"),
        (Layer("h_a.conv3", "conv", 5, 2, "y", "z"), "two of y: one in g_s, one in h_a"),
        (Layer("g_a.conv2", "conv", 5, 2, "g_a.7", "g_a.2", "gdn"), "no layer makes"),
        (Layer("g_a.conv2", "conv", 4, 2, "g_a.1", "g_a.2", "gdn"), "an odd kernel"),
        (Layer("g_s.conv3", "conv", 5, 2, "g_s.2", "g_s.3", "igdn"), "its size back"),
        (Layer("h_s.conv3", "deconv", 5, 2, "h_s.2", MEAN_AND_SCALE), "give y's"),
    ],
    ids=lambda v: v if isinstance(v, str) else v.name,
)
def test_layers_that_the_code_does_not_know_are_refused(layer, why, monkeypatch):
    layers = [layer if old.name == layer.name else old for old in structure.LAYERS]
    config = lively_codec().config
    monkeypatch.setattr(structure, "LAYERS", layers)
    with pytest.raises(ValueError, match=why):
        Codec(config)


def test_a_layer_of_another_name_is_refused(monkeypatch):
    layers = [layer._replace(name=layer.name.replace("conv1", "up1")) for layer in structure.LAYERS]
    monkeypatch.setattr(structure, "LAYERS", layers)
    with pytest.raises(ValueError, match="g_a.up1: a layer is called NETWORK.convN"):
        structure.check_layers()


def test_a_checkpoint_of_other_layers_is_a_sentence(monkeypatch):
    monkeypatch.setattr(structure, "LAYERS", OTHER_LAYERS)
    with pytest.raises(LicError, match="does not have the layers of this program"):
        load_checkpoint(GOLDEN / "codec.pt")


def test_the_table_of_groups_in_the_docstring_is_the_one_that_the_layers_make():
    printed = subprocess.run(
        [sys.executable, "-m", "lic.codec.structure"], cwd=ROOT, capture_output=True, text=True
    )
    shown = [
        line.strip()
        for line in structure.__doc__.splitlines()
        if re.match(r"    (group|g_|h_|y|z)", line)
    ]
    assert [line.strip() for line in printed.stdout.splitlines()] == shown and len(shown) == 13


def test_channels_are_cut_along_every_axis_that_has_them():
    """The table's axes and nothing else: a channel more in one group changes exactly those
    sizes."""
    model = lively_codec()
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for group, width in model.config["widths"].items():
        wider = lively_codec(widths=model.config["widths"] | {group: width + 1})
        expected = {name: list(shape) for name, shape in shapes.items()}
        for name, axis, copies in structure.axes_of_group(model, group):
            expected[name][axis] += copies
        assert {
            name: list(tensor.shape) for name, tensor in wider.state_dict().items()
        } == expected, group


ROOMS = {"lic.codec": 1, "lic.train": 2, "lic.shrink": 3}  # the others of lic are below or above


def floor_of(module):
    """0: files, options, images, metrics; then the rooms; 4: the command line; 5: a stage
    script."""
    for room, floor in ROOMS.items():
        if module.startswith(room):
            return floor
    if module in ("lic", "lic.__main__", "lic.measure"):
        return 4
    return 0 if module.startswith("lic.") else 5


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module in ("lic", *ROOMS):
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_no_import_runs_back_up_and_there_is_no_circle():
    graph = {}
    for path in [*ROOT.glob("*.py"), *(ROOT / "lic").rglob("*.py")]:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        names = [name for name in imports_of(path) if name.split(".")[0] == "lic"]
        graph[module] = {"lic" if name in ("lic.load", "lic.SHIPPED") else name for name in names}
    assert len(graph) > 25
    for module, names in graph.items():
        for name in names:
            assert floor_of(name) <= floor_of(module), f"{module} imports {name}"
            both = module + " " + name
            assert not ("lic.train" in both and "lic.shrink" in both), f"{module} imports {name}"
    order = []
    while graph:  # peel off the modules that import nothing that is left
        free = [module for module, names in graph.items() if not names & graph.keys() - {module}]
        assert free, f"a circle among {sorted(graph)}"
        order += free
        for module in free:
            del graph[module]


def modules_after(program, *arguments):
    """Names of the modules that a program has loaded when it ends, and what it printed."""
    code = (
        f"import sys\ntry:\n    {program}\nexcept SystemExit:\n    pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()[-1].split(), done.stdout


COMMAND = "import runpy; runpy.run_module('lic', run_name='__main__', alter_sys=True)"


def test_a_decoder_loads_nothing_of_training_and_pruning(tmp_path):
    arguments = [
        "decompress",
        GOLDEN / "quantized_leaves_2.lic",
        tmp_path / "a.png",
        "--checkpoint",
        GOLDEN / "quantized.pt",
    ]
    modules, _ = modules_after(COMMAND, *arguments)
    assert (tmp_path / "a.png").exists() and "lic.codec.bitstream" in modules
    assert not [name for name in modules if name.startswith(("lic.train", "lic.shrink"))]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["compress", "--help"], ["info", GOLDEN / "codec_leaves_0.lic"]]
)
def test_help_and_the_info_of_a_file_answer_without_torch(arguments):
    modules, text = modules_after(COMMAND, *arguments)
    assert ("usage" in text or "70x90 pixels" in text) and "torch" not in modules


def test_info_of_a_checkpoint_says_what_it_is():
    command = [sys.executable, "-m", "lic", "info", "checkpoints/quantized.pt"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    model, meta = load_checkpoint(ROOT / "checkpoints" / "quantized.pt")
    for group, width in model.config["widths"].items():
        assert re.search(rf"^ *{width}  {group} ", text, re.M), group
    assert (
        "stage quantize" in text
        and meta["fingerprint"] in text
        and f"{meta['bytes']:,} bytes" in text
    )
    assert text.count(" steps, data ") == len(meta["lineage"]) and "held_out_J" in text

    rows = re.findall(r"^([gh]_[as]\.\w+) .* (\d+\.\d\d) +[\d.]+%   (.*)$", text, re.M)
    assert [name for name, _, _ in rows] == [
        name for name, *_ in structure.layer_sizes(model.config["widths"])
    ]
    kmac = {name: float(value) for name, value, _ in rows}
    total = structure.kmac_per_pixel(model.config)["total"]
    assert sum(kmac.values()) == pytest.approx(total, abs=0.005 * len(rows))
    in_8_bits = [name for name, _, bits in rows if bits == "8 bits"]
    stays_float = model.quantization["float_inputs"]
    assert sorted(in_8_bits + stays_float) == sorted(eight_bit_inputs())
    share = sum(kmac[name] for name in in_8_bits) / total
    assert f"\n{share:.0%} of the multiply-accumulates" in text


def test_the_lines_of_the_readme_work_from_another_folder(tmp_path, monkeypatch):
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S
    )
    (lines,) = [block for block in blocks if "import lic" in block]
    monkeypatch.chdir(tmp_path)
    from PIL import Image

    Image.fromarray(dead_leaves(0, 96)).save("photo.png")
    found = {}
    exec(lines, found)
    assert found["image"].shape == (96, 96, 3) and isinstance(found["data"], bytes)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8, 3), bool),
        np.zeros((8, 8, 3), np.uint16),
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        [[[0, 0, 0]]],
        torch.zeros(8, 8, 3, dtype=torch.uint8),
    ],
    ids=lambda image: (
        f"{type(image).__name__} {getattr(image, 'shape', '')} {getattr(image, 'dtype', '')}"
    ),
)
def test_arrays_of_another_kind_are_refused(image):
    with pytest.raises(TypeError, match=r"\(H, W, 3\) of uint8.*this is"):
        lic.load(GOLDEN / "codec.pt").encode(image)


def python_files():
    for folder in ("lic", "tests", "tools", "ports"):
        yield from (ROOT / folder).rglob("*.py")
    yield from ROOT.glob("*.py")


def test_lines_have_at_most_100_columns():
    long = []
    for path in python_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if len(line) > 100:
                long.append(f"{path.relative_to(ROOT)}:{number}")
    assert not long
