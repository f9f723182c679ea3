import signal

import pytest
import torch
from helpers import lively_codec
from PIL import Image

from lic.codec.bitstream import ImageCoder
from lic.codec.tables import build_tables
from lic.images import dead_leaves

# under nohup, or in the background of a script, they are ignored, and a child inherits that
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def same_random_numbers():
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def model():
    return lively_codec()


@pytest.fixture(scope="session")
def image_coder(model):
    return ImageCoder(model, build_tables(model), fingerprint="00112233445566778899")


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of four synthetic 64x64 PNG images, one of them in a subfolder."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "sub").mkdir()
    for seed in range(4):
        Image.fromarray(dead_leaves(seed, 64)).save(
            folder / ("sub" if seed == 3 else ".") / f"{seed}.png"
        )
    return folder
