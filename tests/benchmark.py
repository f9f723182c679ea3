"""Times and memory of the parts, printed, not asserted: python tests/benchmark.py

Widths are those of preset `base` (N=128, M=192) where an image is coded, of `small` and `base`
where a step is trained; weights are random, latents are drawn so that every table is used.
"""

import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from lic import coder, int8  # noqa: E402
from lic.__main__ import SHIPPED  # noqa: E402
from lic.bitstream import ImageCoder, build_tables  # noqa: E402
from lic.checkpoint import load  # noqa: E402
from lic.entropy import LOG_SCALE_MIN, LOG_SCALE_STEP  # noqa: E402
from lic.files import keep_freed_memory  # noqa: E402
from lic.gdn import GDN  # noqa: E402
from lic.images import dead_leaves, random_crops  # noqa: E402
from lic.integer import IntegerHyperSynthesis  # noqa: E402
from lic.metrics import kmac_per_pixel  # noqa: E402
from lic.models import Codec, preset_config  # noqa: E402
from lic.optimizer import Optimizer, orthogonal  # noqa: E402
from lic.pruning import watch  # noqa: E402
from lic.quantization import INPUTS  # noqa: E402
from lic.training import rate_distortion  # noqa: E402


PRECISIONS = {"float32": False, "bf16": True}  # name: autocast?
if torch.backends.cpu.get_cpu_capability() == "AVX2":
    del PRECISIONS["bf16"]  # emulated there: minutes a row


def median_ms(function, runs):
    function()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - start))
    return np.median(times)


def entropy_coding(tables):
    rng = np.random.default_rng(0)
    count = 192 * 32 * 48  # y of a 768x512 image
    index = rng.normal(8, 12, count).clip(0, 63).astype(np.uint8)
    symbols = np.rint(rng.normal(size=count) * np.exp(LOG_SCALE_MIN + LOG_SCALE_STEP * index)).astype(np.int32)
    words, escapes = coder.encode(symbols, index, tables)
    encode = median_ms(lambda: coder.encode(symbols, index, tables), 50)
    decode = median_ms(lambda: coder.decode(words, escapes, index, tables), 50)
    print(f"entropy coding of {count} symbols, {32 * len(words) / count:.2f} bits each: "
          f"encode {encode:.1f} ms, decode {decode:.1f} ms")  # fmt: skip


def where_the_time_goes(image_coder, image, data, runs=5):
    """Milliseconds of the networks, h_s and the entropy coder in one compress and one decompress."""
    spent = {}

    def timed(name, function):
        def call(*arguments):
            start = time.perf_counter()
            result = function(*arguments)
            spent[name] = spent.get(name, 0) + 1000 * (time.perf_counter() - start) / runs
            return result

        return call

    for name in ("g_a", "h_a", "g_s"):
        network = getattr(image_coder, name)
        network.forward = timed(name, network.forward)
    image_coder.h_s.forward = timed("h_s", image_coder.h_s.forward)
    coder.encode, coder.decode = timed("entropy coding", coder.encode), timed("entropy coding", coder.decode)
    for verb, function in (("compress", lambda: image_coder.compress(image, 2)), ("decompress", lambda: image_coder.decompress(data))):
        spent.clear()
        for _ in range(runs):
            timed("all", function)()
        print(f"{verb}: " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in spent.items()))


@torch.no_grad()
def kept_memory():
    """A GDN of float32 at half the resolution of 768x512, before and after files.keep_freed_memory."""
    gdn = GDN(64)
    x = torch.randn(1, 64, 256, 384).to(memory_format=torch.channels_last)
    times = [median_ms(lambda: gdn(x), 20)]
    assert keep_freed_memory()
    print(f"GDN, 64 channels, 384x256, float32: {times[0]:.1f} ms; freed memory kept: {median_ms(lambda: gdn(x), 20):.1f} ms")


@torch.no_grad()
def convolutions():
    """The 8-bit layers of the shipped quantized codec on a 768x512 image, as simulated and on int8 kernels, input quantized within."""
    model, _ = load(SHIPPED)
    x = torch.rand(1, 3, 512, 768)
    inputs = watch(model, x, [n for n in INPUTS if n[:3] in ("g_a", "g_s") and model.get_submodule(n).input_range], lambda v: v)
    print("milliseconds of a layer, median of 20  " + "".join(f"{name:>12}" for name in inputs))
    kernels = int8.available()
    for name, amp in PRECISIONS.items():
        for kind in ("simulated", "int8 kernel") if kernels else ("simulated",):
            row = f"{kind + ', ' + name:39}"
            for layer_name, (x, *_) in inputs.items():
                layer = model.get_submodule(layer_name)
                layer = layer if kind == "simulated" else int8.Int8Convolution(layer)
                x = x.bfloat16() if amp else x
                with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                    row += f"{median_ms(lambda: layer(x), 20):12.1f}"
            print(row)
    last = model.g_s.conv4
    x = torch.rand(1, last.in_channels, 256, 384).to(memory_format=torch.channels_last)
    for name, amp in PRECISIONS.items():
        x = x.bfloat16() if amp else x
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            times = [median_ms(lambda: layer(x), 20) for layer in (last, int8.LastConvolution(last))]
        print(f"g_s.conv4, {name}: transposed {times[0]:.1f} ms, as an ordinary convolution {times[1]:.1f} ms")
    z_hat = torch.randint(-5, 6, (1, model.config["widths"]["z"], 8, 12)).double().to(memory_format=torch.channels_last)
    forms = {"float64": IntegerHyperSynthesis(model.h_s)} | ({"int8 kernels": int8.Int8HyperSynthesis(model.h_s)} if kernels else {})
    print("h_s in integers: " + ", ".join(f"{name} {median_ms(lambda: form(z_hat), 20):.1f} ms" for name, form in forms.items()))


def multiples_of_16(image):
    """Are the pruned codec's widths, multiples of 8, slower than the multiples of 16 above them?"""
    config = load(SHIPPED)[0].config
    for step in (8, 16):
        widths = {group: -(-width // step) * step for group, width in config["widths"].items()}
        model = Codec(config | {"widths": widths}).to(memory_format=torch.channels_last)
        kmac = kmac_per_pixel(model.config)
        times = []
        for name, amp in PRECISIONS.items():
            image_coder = ImageCoder(model, build_tables(model), "0" * 16, amp)
            data = image_coder.compress(image, 2)
            times.append(f"{name} {median_ms(lambda: image_coder.compress(image, 2), 15):.0f} and "
                         f"{median_ms(lambda: image_coder.decompress(data), 15):.0f} ms")  # fmt: skip
        print(f"widths in multiples of {step}, {kmac['encoder']:.2f} and {kmac['decoder']:.2f} kMAC/pixel: " + ", ".join(times))


def training_step(preset):
    model = Codec(preset_config(preset)).to(memory_format=torch.channels_last)
    optimizer = Optimizer(model)
    images = [torch.from_numpy(dead_leaves(seed)) for seed in range(4)]
    rng = np.random.default_rng(0)
    spent = []  # by the optimizer

    def step():
        x = random_crops(images, 8, 128, rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            out = model(x, torch.zeros(8))
        rate_distortion(out, x, 0.01)[0].mean().backward()
        start = time.perf_counter()
        optimizer.step(1e-4)
        spent.append(1000 * (time.perf_counter() - start))

    for name, amp in PRECISIONS.items():
        spent.clear()
        print(f"training step of {preset}, 8 crops of 128x128, {name}: {median_ms(step, 10):.0f} ms, "
              f"the optimizer {np.median(spent):.0f} ms of it")  # fmt: skip
    print(f"the crops of such a step: {median_ms(lambda: random_crops(images, 8, 128, rng), 20):.1f} ms")
    matrices = [torch.nn.Parameter(optimizer.matrix(kernel).clone()) for kernel in optimizer.kernels]
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw")
    print(f"all kernels' steps: by orthogonal {median_ms(lambda: [orthogonal(m.grad) for m in matrices], 5):.0f} ms, "
          f"by torch.optim.Muon {median_ms(muon.step, 5):.0f} ms")  # fmt: skip


def main():
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    torch.manual_seed(0)
    kept_memory()
    convolutions()
    model = Codec(preset_config("base")).to(memory_format=torch.channels_last)
    tables = build_tables(model)
    entropy_coding(tables["y"])
    image_coder = ImageCoder(model, tables, "0" * 16)
    image = np.random.default_rng(0).integers(0, 256, (512, 768, 3), dtype=np.uint8)
    data = image_coder.compress(image, 2)
    print(f"768x512, base widths, everything: compress {median_ms(lambda: image_coder.compress(image, 2), 5):.0f} ms, "
          f"decompress {median_ms(lambda: image_coder.decompress(data), 5):.0f} ms")  # fmt: skip
    where_the_time_goes(image_coder, image, data)
    multiples_of_16(image)
    for preset in ("small", "base"):
        training_step(preset)
    large = np.random.default_rng(0).integers(0, 256, (1600, 2560, 3), dtype=np.uint8)
    image_coder.decompress(image_coder.compress(large, 2))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"2560x1600, base widths, compress and decompress: peak memory of the process {peak:.2f} GiB")


if __name__ == "__main__":
    main()
