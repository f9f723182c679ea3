"""The header of a compressed file: what can be read and checked without the model. No torch.

docs/bitstream.md is the format, byte by byte. All integers are little-endian.
"""

import struct
import zlib
from typing import NamedTuple

from lic.files import BadStream

MAGIC, VERSION = b"LIC\x89", 2
# magic, version, quality, height, width, fingerprint, words of z and y, escapes of z and y
FIELDS = struct.Struct("<4sBHII8s4I")
CHECKSUMS = struct.Struct("<II")  # of FIELDS and the symbols; of the file but for this last number
SIZE = FIELDS.size + CHECKSUMS.size  # 47 bytes
MAX_SYMBOL = 2**30  # |z| and |y - mean| stay below
MAX_LEVELS = 256  # of a codec: quality, a level times 256, has 16 bits


class Header(NamedTuple):
    quality: int  # rate level times 256
    height: int  # pixels
    width: int
    fingerprint: bytes  # the first 8 of the model's
    lengths: tuple  # words of z, words of y, escapes of z, escapes of y; four bytes each

    def fields(self):
        """The first 39 bytes of the file."""
        size = self.height, self.width
        return FIELDS.pack(MAGIC, VERSION, self.quality, *size, self.fingerprint, *self.lengths)


def pack_file(header, symbols_crc, payload):
    """The whole file. symbols_crc: from `crc_of_symbols`; payload: bytes, of header.lengths."""
    start = header.fields() + struct.pack("<I", symbols_crc)  # the last checksum covers this, too
    return start + struct.pack("<I", zlib.crc32(payload, zlib.crc32(start))) + payload


def crc_of_symbols(header, z_symbols, y_symbols):
    """CRC-32 of the header's fields and of all symbols, two int32 arrays."""
    crc = zlib.crc32(header.fields())
    for symbols in (z_symbols, y_symbols):
        crc = zlib.crc32(symbols.astype("<i4").tobytes(), crc)
    return crc


def read_header(data):
    """(Header, CRC-32 of the symbols) of a file.

    Raises BadStream for all that is wrong with it and can be told without the model.
    """
    if data[:4] != MAGIC:
        raise BadStream("this is not a lic file: it does not begin with its magic number")
    if len(data) > 4 and data[4] != VERSION:
        raise BadStream(
            f"the file has format version {data[4]}; this program reads version {VERSION}"
        )
    if len(data) < SIZE:
        raise BadStream("the file is truncated: its header is not complete")
    _, _, quality, height, width, fingerprint, *lengths = FIELDS.unpack_from(data)
    symbols_crc, file_crc = CHECKSUMS.unpack_from(data, FIELDS.size)
    declared = SIZE + 4 * sum(lengths)
    if len(data) != declared:
        raise BadStream(f"the file has {len(data)} bytes where its header declares {declared}")
    if zlib.crc32(data[SIZE:], zlib.crc32(data[: SIZE - 4])) != file_crc:
        raise BadStream("the file is damaged: its checksum does not match")
    if height == 0 or width == 0:
        raise BadStream(f"the file declares an image of {width}x{height} pixels")
    return Header(quality, height, width, fingerprint, tuple(lengths)), symbols_crc
