"""Does a file decode to the same symbols however the decoder computes?

    python tests/exactness.py --data kodak/ [--checkpoint checkpoints/base.pt]

Every image is compressed at every level in the plain setting (2 threads, channels_last, oneDNN on, one image
at a time). Then the table indices, which alone decide the symbols, are computed in every other setting, and
the whole file is decoded in those that a process can be put in. Re-encoding is another matter: an encoder
that rounds a y the other way writes another valid file, so there the table counts symbols and PSNR.
"""

import argparse
import copy
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from golden.make import Recorder  # noqa: E402

from lic.__main__ import SHIPPED, image_coder  # noqa: E402
from lic.entropy import LOG_SCALE_MIN, LOG_SCALE_STEP  # noqa: E402
from lic.files import BadStream, run  # noqa: E402
from lic.images import find_images, read_image  # noqa: E402
from lic.integer import IntegerHyperSynthesis  # noqa: E402
from lic.metrics import psnr  # noqa: E402


class Setting:
    """Puts this process in a setting and back into the plain one."""

    def __init__(self, threads=2, onednn=True):
        self.threads, self.onednn = threads, onednn

    def __enter__(self):
        torch.set_num_threads(self.threads)
        self.flags = torch.backends.mkldnn.flags(enabled=self.onednn)
        self.flags.__enter__()

    def __exit__(self, *error):
        self.flags.__exit__(*error)
        torch.set_num_threads(2)


SETTINGS = {"plain, again": Setting(), "1 thread": Setting(threads=1), "oneDNN off": Setting(onednn=False),
            "1 thread, oneDNN off": Setting(threads=1, onednn=False)}  # fmt: skip


@torch.inference_mode()
def indices(h_s, z):
    """Position of each scale on the grid of tables, in float codecs before rounding: z (B, Z, h, w) -> (B, M, 4h, 4w)."""
    if isinstance(h_s, IntegerHyperSynthesis):
        return h_s(z)[1].cpu()
    return (h_s(z).chunk(2, 1)[1].cpu() - LOG_SCALE_MIN) / LOG_SCALE_STEP


def layouts(coder, z):
    """Other ways to compute h_s on the same latents z (B, Z, h, w): name -> positions."""
    plain = z.contiguous(memory_format=torch.channels_last)
    integer = isinstance(coder.h_s, IntegerHyperSynthesis)
    h_s = IntegerHyperSynthesis(coder.model.h_s) if integer else coder.h_s  # no int8 kernels here
    contiguous = copy.deepcopy(h_s).to(memory_format=torch.contiguous_format)
    positions = {
        "NCHW": torch.cat([indices(contiguous, one[None].contiguous()) for one in z]),
        f"batch of {len(z)}": indices(h_s, plain),
    }
    if not integer:
        single = copy.deepcopy(h_s).float()
        positions["float32 (for comparison; not used)"] = torch.cat([indices(single, one[None].float()) for one in plain])
    if torch.cuda.is_available():
        positions["float64 on the GPU"] = indices(copy.deepcopy(h_s).cuda(), plain.cuda())
    return positions


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of images")
    parser.add_argument("--checkpoint", default=SHIPPED, help="the codec (default: the one shipped)")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "TF32")  # said whenever oneDNN's flags are set
    coder = image_coder(args.checkpoint)
    levels = range(len(coder.model.lambdas))
    widths = coder.model.config["widths"]
    decoding = {name: np.zeros(3, np.int64) for name in SETTINGS}  # files, refused ones, pixel values that differ
    largest = dict.fromkeys(SETTINGS, 0)  # difference of a pixel value
    indexing = {}  # name -> [symbols, other indices, largest distance]
    encoding = {name: np.zeros(2, np.int64) for name in SETTINGS}  # symbols, changed ones
    psnr_change, nearest = {name: 0.0 for name in SETTINGS}, 1.0

    for path in find_images(args.data):
        image = read_image(path)
        h, w = (-(-side // 64) for side in image.shape[:2])
        latents = []
        for level in levels:
            with Setting():
                data = coder.compress(image, level)
                with Recorder() as symbols:
                    pixels = coder.decompress(data)
            latents.append(torch.from_numpy(symbols[0]).double().reshape(widths["z"], h, w))
            for name, setting in SETTINGS.items():
                with setting:
                    written = coder.compress(image, level)
                    try:
                        again = coder.decompress(data)
                    except BadStream:  # the symbols are not the encoder's
                        decoding[name] += [1, 1, 0]
                        continue
                with Recorder() as rewritten:
                    reconstructed = coder.decompress(written)
                off = np.abs(again.astype(int) - pixels)
                largest[name] = max(largest[name], off.max())
                decoding[name] += [1, 0, (off > 0).sum()]
                encoding[name] += [sum(map(len, symbols)), sum((a != b).sum() for a, b in zip(symbols, rewritten))]
                psnr_change[name] = max(psnr_change[name], abs(psnr(reconstructed, image) - psnr(pixels, image)))
        z = torch.stack(latents)  # (levels, Z, h, w)
        expected = torch.cat([indices(coder.h_s, one[None].contiguous(memory_format=torch.channels_last)) for one in z])
        inside = expected[(expected > 0) & (expected < 63)]  # beyond, the clamp decides
        nearest = min([nearest, *(inside - inside.floor() - 0.5).abs().tolist()])
        for name, positions in layouts(coder, z).items():
            row = indexing.setdefault(name, [0, 0, 0.0])
            row[0] += positions.numel()
            row[1] += (positions.round().clamp(0, 63) != expected.round().clamp(0, 63)).sum().item()
            row[2] = max(row[2], (positions - expected).abs().max().item())
        print(f"{path.name} done", file=sys.stderr, flush=True)

    print(f"{'decoded under':36} {'files':>8} {'other symbols':>14} {'other pixel values':>19} {'by at most':>11}")
    for name, (files, wrong, off) in decoding.items():
        print(f"{name:36} {files:8} {wrong:14} {off:19} {largest[name]:11}")
    print(f"\n{'table indices computed with':36} {'symbols':>12} {'other index':>12} {'largest difference, in steps of the index':>42}")
    for name, (count, wrong, distance) in indexing.items():
        print(f"{name:36} {count:12} {wrong:12} {distance:42.1e}")
    if not isinstance(coder.h_s, IntegerHyperSynthesis):  # which has no borders
        print(f"nearest that any index came to a rounding border: {nearest:.1e}")
    print(f"\n{'encoded again under':36} {'symbols':>12} {'changed':>12} {'largest change of PSNR, dB':>28}")
    for name, (count, changed) in encoding.items():
        print(f"{name:36} {count:12} {changed:12} {psnr_change[name]:28.6f}")
    if not torch.cuda.is_available():
        print("\nno GPU here: CPU against GPU was not tried")
    wrong = sum(row[1] for row in decoding.values()) + sum(row[1] for name, row in indexing.items() if "float32" not in name)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    run(main)
