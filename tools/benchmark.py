"""Times and memory of the parts, printed, not asserted (a few minutes).

    python tools/benchmark.py                              all of them
    python tools/benchmark.py coding training search       some of them, by name

Widths are those of preset `base` (N=128, M=192) where an image is coded, of `small` and `base`
where a step is trained, of `small` where a step is searched. Weights are random; latents are drawn
so that every table is used.
"""

import argparse
import resource
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from lic import SHIPPED, load
from lic.codec import checkpoint, coder, fast, structure
from lic.codec.bitstream import ImageCoder
from lic.codec.eight_bits import eight_bit_inputs
from lic.codec.entropy import LOG_SCALE_MIN, LOG_SCALE_STEP, SCALE_LEVELS
from lic.codec.gdn import GDN
from lic.codec.integer import IntegerHyperSynthesis
from lic.codec.model import Codec, preset_config
from lic.codec.tables import build_tables
from lic.images import dead_leaves, fixed_crops, random_crops
from lic.program import keep_freed_memory
from lic.shrink.pruning import narrow
from lic.shrink.statistics import layer_inputs, observe
from lic.train.loss import mean_loss, rate_distortion
from lic.train.optimizer import Optimizer, orthogonal

PRECISIONS = {"float32": False, "bf16": True}  # name: autocast?
if torch.backends.cpu.get_cpu_capability() == "AVX2":
    del PRECISIONS["bf16"]  # emulated there: minutes a row


def milliseconds(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return 1000 * (time.perf_counter() - start)


def median_ms(runs, function, *arguments):
    """Of so many calls, after one that is not counted."""
    function(*arguments)
    return np.median([milliseconds(function, *arguments) for _ in range(runs)])


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def random_coder(config, amp=False):
    model = Codec(config).to(memory_format=torch.channels_last)
    return ImageCoder(model, build_tables(model), fingerprint="0" * 16, amp=amp)


@torch.no_grad()
def memory():
    """A GDN of float32 at half the resolution of 768x512, before and after keep_freed_memory."""
    gdn = GDN(64)
    x = torch.randn(1, 64, 256, 384).to(memory_format=torch.channels_last)
    before = median_ms(20, gdn, x)
    assert keep_freed_memory()
    after = median_ms(20, gdn, x)
    print(f"GDN, 64 channels, 384x256, float32: {before:.1f} ms; freed memory kept: {after:.1f} ms")


@torch.no_grad()
def convolutions():
    """Layers of the shipped quantized codec on a 768x512 image, input quantized within."""
    image_coder = load(SHIPPED)
    model = image_coder.model
    eight_bit_convolutions(model)

    last = model.g_s.conv4
    x = torch.rand(1, last.in_channels, 256, 384).to(memory_format=torch.channels_last)
    for precision, amp in PRECISIONS.items():
        x = x.bfloat16() if amp else x.float()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            transposed = median_ms(20, last, x)
            ordinary = median_ms(20, fast.LastConvolution(last), x)
        print(f"g_s.conv4, {precision}: transposed {transposed:.1f} ms, "
              f"as an ordinary convolution {ordinary:.1f} ms")  # fmt: skip

    z_hat = torch.randint(-5, 6, (1, model.config["widths"]["z"], 8, 12)).double()
    z_hat = z_hat.to(memory_format=torch.channels_last)
    text = f"float64 {median_ms(20, IntegerHyperSynthesis(model.h_s), z_hat):.1f} ms"
    if fast.available():
        text += f", int8 kernels {median_ms(20, image_coder.h_s, z_hat):.1f} ms"
    print(f"h_s in integers: {text}")


def eight_bit_convolutions(model):
    """Those of g_a and g_s, as simulated and on int8 kernels."""
    names = []
    for name in eight_bit_inputs():
        network, _ = name.split(".")
        if network in ("g_a", "g_s") and model.get_submodule(name).input_range:
            names.append(name)
    inputs = layer_inputs(model, torch.rand(1, 3, 512, 768), names, lambda v: v)
    kinds = ["simulated"]
    if fast.available():
        kinds.append("int8 kernel")
    columns = "".join(f"{name:>12}" for name in names)
    print(f"{'milliseconds of a layer, median of 20':39}{columns}")
    for precision, amp in PRECISIONS.items():
        for kind in kinds:
            row = f"{f'{kind}, {precision}':39}"
            for name in names:
                layer = model.get_submodule(name)
                if kind == "int8 kernel":
                    layer = fast.int8_layer(layer)
                x = inputs[name][0]  # at the first level
                x = x.bfloat16() if amp else x
                with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                    row += f"{median_ms(20, layer, x):12.1f}"
            print(row, flush=True)


def entropy():
    """The coder's part of a 768x512 image: y, with every table in use."""
    tables = build_tables(Codec(preset_config("tiny")))["y"]  # the same for every codec
    rng = np.random.default_rng(0)
    count = 192 * 32 * 48
    index = rng.normal(8, 12, count).clip(0, SCALE_LEVELS - 1).astype(np.uint8)
    scale = np.exp(LOG_SCALE_MIN + LOG_SCALE_STEP * index)
    symbols = np.rint(rng.normal(size=count) * scale).astype(np.int32)
    words, escapes = coder.encode(symbols, index, tables)
    bits = 32 * len(words) / count
    encode = median_ms(50, coder.encode, symbols, index, tables)
    decode = median_ms(50, coder.decode, words, escapes, index, tables)
    print(f"entropy coding of {count} symbols, {bits:.2f} bits each: "
          f"encode {encode:.1f} ms, decode {decode:.1f} ms")  # fmt: skip


def coding():
    """A 768x512 image with base widths, and where the time goes."""
    image_coder, image = random_coder(preset_config("base")), noise(512, 768)
    data = image_coder.encode(image)
    compress = median_ms(5, image_coder.encode, image)
    decompress = median_ms(5, image_coder.decode, data)
    print(f"768x512, base widths, everything: compress {compress:.0f} ms, "
          f"decompress {decompress:.0f} ms")  # fmt: skip
    show_shares("compress", image_coder, image_coder.encode, image)
    show_shares("decompress", image_coder, image_coder.decode, data)


def show_shares(verb, image_coder, function, argument, runs=5):
    """Milliseconds of the networks and of the entropy coder in one call of function."""
    spent = {}

    def timed(name, function):
        def call(*arguments):
            start = time.perf_counter()
            result = function(*arguments)
            spent[name] = spent.get(name, 0) + 1000 * (time.perf_counter() - start)
            return result

        return call

    def patched(owner, attribute, name):
        return mock.patch.object(owner, attribute, timed(name, getattr(owner, attribute)))

    with (
        patched(image_coder.g_a, "forward", "g_a"),
        patched(image_coder.h_a, "forward", "h_a"),
        patched(image_coder.g_s, "forward", "g_s"),
        patched(image_coder.h_s, "forward", "h_s"),
        patched(coder, "encode", "entropy coding"),
        patched(coder, "decode", "entropy coding"),
    ):
        for _ in range(runs):
            timed("all", function)(argument)
    shares = ", ".join(f"{name} {total / runs:.0f} ms" for name, total in spent.items())
    print(f"{verb}: {shares}")


def multiples():
    """Are the pruned codec's widths, multiples of 8, slower than the next multiples of 16?"""
    image = noise(512, 768)
    _, meta = checkpoint.load_checkpoint(SHIPPED)
    for step in (8, 16):
        widths = {}
        for group, width in meta["config"]["widths"].items():
            widths[group] = -(-width // step) * step  # rounded up
        config = meta["config"] | {"widths": widths}
        macs = structure.kmac_per_pixel(config)
        times = []
        for precision, amp in PRECISIONS.items():
            image_coder = random_coder(config, amp)
            data = image_coder.encode(image)
            compress = median_ms(15, image_coder.encode, image)
            decompress = median_ms(15, image_coder.decode, data)
            times.append(f"{precision} {compress:.0f} and {decompress:.0f} ms")
        print(f"widths in multiples of {step}, {macs['encoder']:.2f} and {macs['decoder']:.2f} "
              f"kMAC/pixel: {', '.join(times)}")  # fmt: skip


def training():
    """A step of each preset, what of it is the optimizer's, and torch's Muon beside it."""
    for preset in ("small", "base"):
        training_step(preset)


def training_step(preset):
    model = Codec(preset_config(preset)).to(memory_format=torch.channels_last)
    optimizer = Optimizer(model)
    images = [torch.from_numpy(dead_leaves(seed)) for seed in range(4)]
    rng = np.random.default_rng(0)

    def step(amp, spent):
        x = random_crops(images, 8, 128, rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            out = model(x, torch.zeros(8))
        J, _, _, _ = rate_distortion(out, x, 0.01)
        J.mean().backward()
        spent.append(milliseconds(optimizer.step, 1e-4))

    for precision, amp in PRECISIONS.items():
        spent = []  # by the optimizer
        whole = median_ms(10, step, amp, spent)
        print(f"training step of {preset}, 8 crops of 128x128, {precision}: {whole:.0f} ms, "
              f"the optimizer {np.median(spent):.0f} ms of it", flush=True)  # fmt: skip
    crops = median_ms(20, random_crops, images, 8, 128, rng)
    print(f"the crops of such a step: {crops:.1f} ms")

    matrices = []
    for kernel in optimizer.kernels:
        matrix = torch.nn.Parameter(optimizer.matrix(kernel).clone())
        matrix.grad = torch.randn_like(matrix)
        matrices.append(matrix)

    def all_orthogonal():
        for matrix in matrices:
            orthogonal(matrix.grad)

    muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw")
    print(f"all kernels' steps: by orthogonal {median_ms(5, all_orthogonal):.0f} ms, "
          f"by torch.optim.Muon {median_ms(5, muon.step):.0f} ms")  # fmt: skip


def search():
    """A step of search.py: one plan cut from a codec, and J of what is left at every level."""
    model = Codec(preset_config("small")).to(memory_format=torch.channels_last).eval()
    x = fixed_crops([dead_leaves(seed) for seed in range(4)], 4, 256)
    statistics = observe(model, x)
    keep = {}
    for group, width in model.config["widths"].items():
        keep[group] = torch.arange(width // 2)

    def step(amp, spent):
        start = time.perf_counter()
        narrowed = narrow(model, keep, statistics)
        spent.append(1000 * (time.perf_counter() - start))
        mean_loss(narrowed, x, amp)

    for precision, amp in PRECISIONS.items():
        spent = []  # on the cut
        whole = median_ms(5, step, amp, spent)
        print(f"search step of small, half of each group, 4 crops of 256x256, {precision}: "
              f"{whole:.0f} ms, the cut {np.median(spent):.0f} ms of it")  # fmt: skip


def peak():
    """Of the whole process so far; the last part."""
    image_coder = random_coder(preset_config("base"))
    image_coder.decode(image_coder.encode(noise(1600, 2560)))
    gibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"2560x1600, base widths, compress and decompress: "
          f"peak memory of the process {gibibytes:.2f} GiB")  # fmt: skip


# in this order: memory changes the process, peak looks back on it
PARTS = [memory, convolutions, entropy, coding, multiples, training, search, peak]


def main():
    names = [part.__name__ for part in PARTS]
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("parts", nargs="*", metavar="PART",
                        help=f"{', '.join(names)} (default: all)")  # fmt: skip
    chosen = parser.parse_args().parts or names
    for name in chosen:
        if name not in names:
            parser.error(f"{name} is none of {', '.join(names)}")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for part in PARTS:
        if part.__name__ in chosen:
            torch.manual_seed(0)
            part()
        keep_freed_memory()  # as all scripts do; what it is worth the first part has shown


if __name__ == "__main__":
    main()  # not files.run, which has freed memory kept from the start
