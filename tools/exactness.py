"""Does a file decode to the same symbols however the decoder computes?

    python tools/exactness.py --data kodak/
    python tools/exactness.py --data kodak/ --checkpoint checkpoints/dense.pt

Every image is encoded at every level in the plain setting: 2 threads, channels_last, oneDNN on, one
image at a time. Prints three tables:

    in which settings of the process the whole file decodes to the same symbols and pixels
    in which layouts h_s gives the same table indices, which alone decide the symbols
    how many symbols another setting encodes otherwise, and what that does to PSNR: an encoder that
    rounds a y the other way writes another valid file

The exit status is 1 if a symbol or an index differs.
"""

import copy
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from golden.make import Recorder

from lic import SHIPPED, load
from lic.codec.entropy import LOG_SCALE_MIN, LOG_SCALE_STEP, SCALE_LEVELS
from lic.codec.integer import IntegerHyperSynthesis
from lic.codec.structure import total_stride
from lic.files import BadStream
from lic.images import find_images, read_image
from lic.metrics import psnr
from lic.options import make_parser
from lic.program import run

PLAIN_THREADS = 2
SETTINGS = {  # name: arguments of `setting`
    "plain, again": {},
    "1 thread": {"threads": 1},
    "oneDNN off": {"onednn": False},
    "1 thread, oneDNN off": {"threads": 1, "onednn": False},
}
NOT_USED = "float32 (for comparison; not used)"


@dataclass
class Decoding:
    """What came of the plain setting's files in another one."""

    files: int = 0
    refused: int = 0  # for other symbols
    other_values: int = 0  # of pixels
    largest: int = 0  # difference of such a value


@dataclass
class Encoding:
    """What came of the same images, encoded in another setting."""

    symbols: int = 0
    changed: int = 0
    psnr_change: float = 0.0  # the largest, dB


@dataclass
class Indexing:
    """What came of the same z in another layout."""

    symbols: int = 0
    changed: int = 0
    distance: float = 0.0  # the largest, in steps of the index


@contextmanager
def setting(threads=PLAIN_THREADS, onednn=True):
    torch.set_num_threads(threads)
    try:
        with torch.backends.mkldnn.flags(enabled=onednn):
            yield
    finally:
        torch.set_num_threads(PLAIN_THREADS)


def decoded(coder, data):
    """The image in a file and the symbols on the way: pixels, [z, y]."""
    with Recorder() as symbols:
        pixels = coder.decode(data)
    return pixels, symbols


def code_everywhere(coder, image, level, decoding, encoding):
    """Encode and decode in each of SETTINGS, and count in `decoding` and `encoding`.

    What another setting encodes is decoded in the plain one. Returns the symbols of z, flat.
    """
    with setting():
        data = coder.encode(image, level)
        pixels, symbols = decoded(coder, data)
    for name, arguments in SETTINGS.items():
        decoding[name].files += 1
        try:
            with setting(**arguments):
                rewritten_data = coder.encode(image, level)
                again = coder.decode(data)
        except BadStream:
            decoding[name].refused += 1
            continue
        off = np.abs(again.astype(int) - pixels)
        decoding[name].other_values += (off > 0).sum()
        decoding[name].largest = max(decoding[name].largest, off.max())

        with setting():
            rewritten_pixels, rewritten = decoded(coder, rewritten_data)
        for before, after in zip(symbols, rewritten):
            encoding[name].symbols += len(before)
            encoding[name].changed += (before != after).sum()
        change = abs(psnr(rewritten_pixels, image) - psnr(pixels, image))
        encoding[name].psnr_change = max(encoding[name].psnr_change, change)
    return symbols[0]


@torch.inference_mode()
def index_positions(h_s, z):
    """Position of each scale on the grid of tables: z (B, Z, h, w) -> (B, M, 4h, 4w).

    In float codecs before rounding.
    """
    if isinstance(h_s, IntegerHyperSynthesis):
        _, index = h_s(z)
        return index
    _, log_scale = h_s(z).chunk(2, 1)
    return (log_scale - LOG_SCALE_MIN) / LOG_SCALE_STEP


def one_by_one(h_s, z):
    return torch.cat([index_positions(h_s, one) for one in z.split(1)])


def positions_in_layouts(coder, z):
    """Other ways to compute h_s on the same z (B, Z, h, w): {name: positions}."""
    h_s = coder.h_s
    integer = isinstance(h_s, IntegerHyperSynthesis)
    if integer:
        h_s = IntegerHyperSynthesis(coder.model.h_s)  # no int8 kernels here
    contiguous = copy.deepcopy(h_s).to(memory_format=torch.contiguous_format)
    positions = {
        "NCHW": one_by_one(contiguous, z.contiguous()),
        f"batch of {len(z)}": index_positions(h_s, z),
    }
    if not integer:
        positions[NOT_USED] = one_by_one(copy.deepcopy(h_s).float(), z.float())
    return positions


def compare_indices(coder, z, indexing):
    """Count in `indexing` where another layout gives another index; z (B, Z, h, w), float64.

    Returns how near a position in the plain layout came to a rounding border.
    """
    z = z.contiguous(memory_format=torch.channels_last)
    expected = one_by_one(coder.h_s, z)
    for name, positions in positions_in_layouts(coder, z).items():
        count = indexing.setdefault(name, Indexing())
        count.symbols += positions.numel()
        count.changed += (to_index(positions) != to_index(expected)).sum().item()
        count.distance = max(count.distance, (positions - expected).abs().max().item())
    # beyond these the clamp decides
    inside = expected[(expected > 0) & (expected < SCALE_LEVELS - 1)]
    from_borders = (inside - inside.floor() - 0.5).abs()
    return min(from_borders.tolist(), default=1.0)


def to_index(positions):
    return positions.round().clamp(0, SCALE_LEVELS - 1)


def show_decoding(decoding):
    print(f"{'decoded under':36} {'files':>8} {'other symbols':>14} {'other pixel values':>19} "
          f"{'by at most':>11}")  # fmt: skip
    for name, count in decoding.items():
        print(f"{name:36} {count.files:8} {count.refused:14} {count.other_values:19} "
              f"{count.largest:11}")  # fmt: skip


def show_indexing(indexing):
    print(f"\n{'table indices computed with':36} {'symbols':>12} {'other index':>12} "
          f"{'largest difference, in steps of the index':>42}")  # fmt: skip
    for name, count in indexing.items():
        print(f"{name:36} {count.symbols:12} {count.changed:12} {count.distance:42.1e}")


def show_encoding(encoding):
    print(f"\n{'encoded again under':36} {'symbols':>12} {'changed':>12} "
          f"{'largest change of PSNR, dB':>28}")  # fmt: skip
    for name, count in encoding.items():
        print(f"{name:36} {count.symbols:12} {count.changed:12} {count.psnr_change:28.6f}")


def parse_args():
    # fmt: off
    parser = make_parser(__doc__)
    parser.add_argument("--data", required=True, help="folder of images")
    parser.add_argument("--checkpoint", default=SHIPPED,
                        help="the codec (default: the one shipped)")
    # fmt: on
    return parser.parse_args()


def main():
    args = parse_args()
    warnings.filterwarnings("ignore", "TF32")  # said whenever oneDNN's flags are set
    coder = load(args.checkpoint)
    decoding = {name: Decoding() for name in SETTINGS}
    encoding = {name: Encoding() for name in SETTINGS}
    indexing = {}
    nearest = 1.0

    for path in find_images(args.data):
        image = read_image(path)
        stride = total_stride()
        h, w = (-(-side // stride) for side in image.shape[:2])  # rounded up
        latents = []
        for level in range(len(coder.model.lambdas)):
            z = code_everywhere(coder, image, level, decoding, encoding)
            latents.append(torch.from_numpy(z).double().view(-1, h, w))
        nearest = min(nearest, compare_indices(coder, torch.stack(latents), indexing))
        print(f"{path.name} done", file=sys.stderr, flush=True)

    show_decoding(decoding)
    show_indexing(indexing)
    if not isinstance(coder.h_s, IntegerHyperSynthesis):  # which has no borders
        print(f"nearest that any index came to a rounding border: {nearest:.1e}")
    show_encoding(encoding)
    wrong = sum(count.refused for count in decoding.values())
    wrong += sum(count.changed for name, count in indexing.items() if name != NOT_USED)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    run(main)
