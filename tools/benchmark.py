"""Times and memory of the parts, printed, not asserted (a few minutes).

    python tools/benchmark.py                              all of them
    python tools/benchmark.py codecs training search       some of them, by name

An image is coded by the codecs in checkpoints/. Where a step is trained or searched weights are
random and widths those of the presets `small` and `base`.
"""

import argparse
import functools
import io
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, features

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from lic import SHIPPED, load
from lic.codec import ans, fast
from lic.codec.bitstream import ImageCoder
from lic.codec.eight_bits import eight_bit_inputs
from lic.codec.entropy import LOG_SCALE_MIN, LOG_SCALE_STEP, SCALE_LEVELS
from lic.codec.gdn import GDN
from lic.codec.integer import IntegerHyperSynthesis
from lic.codec.model import Codec, preset_config
from lic.codec.tables import build_tables
from lic.images import dead_leaves, fixed_crops, random_crops, to_tensor
from lic.measure import best_within
from lic.program import keep_freed_memory
from lic.shrink.pruning import narrow
from lic.shrink.statistics import layer_inputs, observe
from lic.shrink.timing import time_of_each_layer
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
    if not keep_freed_memory():
        print("memory: left out, this C library always gives it back")
        return
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
    """The entropy coder's part of a 768x512 image: y, with every table in use."""
    tables = build_tables(Codec(preset_config("tiny")))["y"]  # the same for every codec
    rng = np.random.default_rng(0)
    count = 192 * 32 * 48
    index = rng.normal(8, 12, count).clip(0, SCALE_LEVELS - 1).astype(np.uint8)
    scale = np.exp(LOG_SCALE_MIN + LOG_SCALE_STEP * index)
    symbols = np.rint(rng.normal(size=count) * scale).astype(np.int32)
    words, escapes = ans.encode(symbols, index, tables)
    bits = 32 * len(words) / count
    encode = median_ms(50, ans.encode, symbols, index, tables)
    decode = median_ms(50, ans.decode, words, escapes, index, tables)
    print(f"entropy coding of {count} symbols, {bits:.2f} bits each: "
          f"encode {encode:.1f} ms, decode {decode:.1f} ms")  # fmt: skip


def photograph():
    """docs/coffee.png at Kodak's size, (512, 768, 3) uint8."""
    return np.asarray(Image.open(ROOT / "docs/coffee.png").convert("RGB").resize((768, 512)))


def codecs():
    """The shipped codecs beside others, files of about equal size, on one thread and on all."""
    image, every = photograph(), torch.get_num_threads()
    size = len(load(SHIPPED).encode(image))
    print(
        f"a photograph of 768x512; milliseconds to encode and decode, on {every} threads and on 1"
    )
    for name, encode, decode in coders(image, size):
        row = f"{name:34}{len(encode()):8} bytes"
        for threads in (every, 1):
            torch.set_num_threads(threads)
            row += f"{median_ms(9, encode):8.0f}{median_ms(9, decode):6.0f}"
        torch.set_num_threads(every)
        print(row, flush=True)


def coders(image, size):
    """(name, a function that encodes the image to bytes, one that decodes these) of each codec."""
    for path in sorted(SHIPPED.parent.glob("*.pt"), key=lambda path: -path.stat().st_size):
        for precision, amp in PRECISIONS.items():
            image_coder = load(path, amp)
            data = image_coder.encode(image)
            yield (f"{path.name}, {precision}", functools.partial(image_coder.encode, image),
                   functools.partial(image_coder.decode, data))  # fmt: skip
    for form in ("JPEG", "WEBP", "AVIF"):
        if not features.check({"JPEG": "jpg"}.get(form, form.lower())):
            print(f"{form}: this Pillow was built without it, left out")
            continue
        quality, data, _ = best_within(image, form, size)

        def encode(form=form, quality=quality):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, form, quality=quality)
            return buffer.getvalue()

        def decode(data=data):
            return np.asarray(Image.open(io.BytesIO(data)))

        yield f"Pillow's {form}, its own threads", encode, decode
    try:
        from compressai.models import MeanScaleHyperprior
    except ImportError:
        print("CompressAI is not installed, left out")
        return
    model = MeanScaleHyperprior(
        128, 192
    ).eval()  # mbt2018-mean; untrained, so that bytes mean nothing
    model.update(force=True)
    x = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        made = model.compress(x)

    @torch.inference_mode()
    def compress():
        return b"".join(string for strings in model.compress(x)["strings"] for string in strings)

    @torch.inference_mode()
    def decompress():
        return model.decompress(made["strings"], made["shape"])

    yield "CompressAI's mbt2018-mean, untrained", compress, decompress


def layers():
    """Where the time of the shipped codecs goes: each layer on a 768x512 picture."""
    rows = {}
    for path in sorted(SHIPPED.parent.glob("*.pt"), key=lambda path: -path.stat().st_size):
        image_coder = load(path)
        passes = [time_of_each_layer(image_coder) for _ in range(12)]
        for name in passes[0]:
            row = rows.setdefault(name, {})
            row[path.stem] = np.median([taken[name] for taken in passes[3:]])
    print(f"{'milliseconds of a layer':24}" + "".join(f"{stem:>11}" for stem in row))
    for name, row in rows.items():
        print(f"{name:24}" + "".join(f"{ms:11.1f}" for ms in row.values()))
    image_coder, image = load(SHIPPED), photograph()
    data = image_coder.encode(image)
    for what, function, argument in (("encoding", image_coder.encode, image),
                                     ("decoding", image_coder.decode, data)):  # fmt: skip
        median_ms(3, function, argument)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            function(argument)
        table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=8)
        print(f"{what} with {SHIPPED.name}, by operator\n{table}")


def training():
    """A step of each preset, what of it is the optimizer's, and torch's Muon beside it."""
    for preset in ("small", "base"):
        training_step(preset)


def training_step(preset):
    model = Codec(preset_config(preset)).to(memory_format=torch.channels_last)
    optimizer = Optimizer(model)
    images = [dead_leaves(seed) for seed in range(4)]
    rng = np.random.default_rng(0)

    def step(amp, spent):
        x = to_tensor(random_crops(images, 8, 128, rng))
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
    crops = median_ms(20, lambda: to_tensor(random_crops(images, 8, 128, rng)))
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
PARTS = [memory, convolutions, entropy, codecs, layers, training, search, peak]


def parse_args():
    names = [part.__name__ for part in PARTS]
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("parts", nargs="*", default=names, metavar="PART",
                        help=f"{', '.join(names)} (default: all)")  # fmt: skip
    args = parser.parse_args()
    unknown = set(args.parts) - set(names)
    if unknown:
        parser.error(f"{' '.join(sorted(unknown))}: choose of {', '.join(names)}")
    return args


def main():
    chosen = parse_args().parts
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for part in PARTS:
        if part.__name__ in chosen:
            torch.manual_seed(0)
            part()
        keep_freed_memory()  # as all scripts do; what it is worth the first part has shown


if __name__ == "__main__":
    main()  # not program.run, which has freed memory kept from the start
