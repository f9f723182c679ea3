"""Photographs, decoded once into a file that all runs map: there may be more than memory holds.

    photographs-HASH.raw     the pixels (H, W, 3) uint8 of one photograph behind the other's
    photographs-HASH.json    which photograph is where; HASH is that of the folder's path

The raw file only grows, and the index takes its name when the pixels are on the disk. So a run
that has mapped the file keeps its pixels whatever another run adds, and what a killed one has left
behind the last photograph of the index is written over. A photograph that is gone or has changed
leaves the index; its old pixels stay until both files are removed.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from lic.files import (
    UNREADABLE,
    LicError,
    check_writable,
    hold,
    read_bytes,
    release,
    write_bytes,
)
from lic.images import (
    HELD_OUT,
    Images,
    dead_leaves,
    digest,
    fault_of_size,
    find_images,
    in_words,
    pillow_limits,
    read_image,
    read_images,
    split,
)

FORMAT, VERSION = "lic photographs", 1
FEW = 64  # photographs, which one process has decoded before others have started
LARGEST = 2**28  # pixels of a photograph: only crops of it pass through a codec
READERS = 8  # processes, at most: what they decode passes through this one


class Entry(NamedTuple):
    """A photograph's line in the index."""

    size: int  # of its file, bytes
    modified: int  # nanoseconds
    height: int
    width: int
    offset: int  # of its pixels in the raw file
    digest: str  # images.digest in hexadecimal

    @property
    def stamp(self):
        return self.size, self.modified

    @property
    def end(self):
        return self.offset + 3 * self.height * self.width


def load_images(data, crop, validation=None, cache=None, skip_bad=False):
    """Training and validation images: two Images.

    data: a folder, or None for 24 synthetic images, two of them for validation. validation: a
    folder, inside data or elsewhere, held out in the place of one image in sixteen. Every image
    must hold a crop x crop square. cache, skip_bad: see `open_photographs`; without a cache the
    photographs are decoded into memory.
    """
    if data is None:
        images = [dead_leaves(seed) for seed in range(24)]
        if crop > images[0].shape[0]:
            raise LicError(f"--crop {crop}: the synthetic images have 256 pixels a side")
        train = [image for i, image in enumerate(images) if i % HELD_OUT]
        return Images(train), Images(images[::HELD_OUT])

    def read(folder):
        if cache is None:
            return read_images(find_images(folder), crop)
        return open_photographs(folder, cache, crop, skip_bad)

    if validation is None:
        return split(read(data))
    return train_on_the_others(read(data), read(validation))


def train_on_the_others(train, validation):
    """Both, the training images without those that are held out, too, by their pixels.

    A folder to hold out may lie in the folder to train on. If all are held out all are both.
    """
    held_out = set(validation.digests)
    others = train.where([d not in held_out for d in train.digests])
    if not others:
        print("warning: all training images are held out, too: J will be of trained images")
        return train, validation
    if len(others) < len(train):
        print(f"{len(train) - len(others)} images are held out, too, and not trained on")
    return others, validation


def open_photographs(folder, cache, crop=0, skip_bad=False):
    """The images below `folder`, views of a file in the folder `cache` that is made or added to.

    Raises LicError that names those that cannot be read or hold no crop; with skip_bad they are
    left out, and a printed line names them.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in find_images(folder)}
    raw = raw_path(folder, cache)
    index, faults = read_index(raw, folder), {}
    if unread(index, paths):
        check_writable(raw)
        hold(raw, wait=True)
        try:
            index = read_index(raw, folder)  # again: another run may have added them
            index, faults = add(index, raw, folder, paths)
        finally:
            release(raw)

    for name, path in paths.items():
        if name not in faults:
            fault = fault_of_size(path, index[name].height, index[name].width, crop)
            if fault:
                faults[name] = fault
    if faults:
        sentences = in_words([faults[name] for name in paths if name in faults])
        if not skip_bad:
            raise LicError(f"{sentences}: leave such images out, for instance by --skip-bad")
        print(f"left out {len(faults)} of {len(paths)} images: {sentences}")
    entries = [index[name] for name in paths if name not in faults]
    if not entries:
        raise LicError(f"no image below {folder} can be used")
    pixels = np.asarray(np.memmap(raw, np.uint8, "r"))
    return Images(
        [pixels[e.offset : e.end].reshape(e.height, e.width, 3) for e in entries],
        [bytes.fromhex(e.digest) for e in entries],
    )


def raw_path(folder, cache):
    """The raw file of `folder`; the index is beside it."""
    path = os.fsencode(os.path.realpath(folder))
    return Path(cache, f"photographs-{hashlib.sha256(path).hexdigest()[:8]}.raw")


def stamp(path):
    """Size and modification time of a file, by which a change is noticed; None if it is gone."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def unread(index, paths):
    """Those of paths, {name: path}, that the index does not have as they are now."""
    return {
        name: path
        for name, path in paths.items()
        if name not in index or index[name].stamp != stamp(path)
    }


def read_index(raw, folder):
    """{name: Entry} of the file `raw`; empty if there is none.

    Raises LicError for an index that is damaged, of another version or of another folder, or that
    is not of this raw file.
    """
    path = raw.with_suffix(".json")
    if not path.exists():
        return {}
    remedy = f"remove it and {raw.name}, and the photographs are decoded anew"
    try:
        content = json.loads(read_bytes(path))
        if content["format"] != FORMAT:
            raise ValueError("another format")
        if content["version"] != VERSION:
            raise LicError(f"{path} is of another version of this program; {remedy}")
        if content["folder"] != os.path.realpath(folder):
            raise LicError(f"{path} is of {content['folder']}; {remedy}")
        index = {name: Entry(*fields) for name, fields in content["photographs"].items()}
        last = max(index.values(), key=lambda entry: entry.end)
        end, shape = last.end, (last.height, last.width, 3)
    except UNREADABLE as error:
        raise LicError(f"{path} is damaged; {remedy}") from error
    if not raw.exists() or raw.stat().st_size < end:
        raise LicError(f"{path} is of a longer file than {raw.name}; {remedy}")
    pixels = np.memmap(raw, np.uint8, "r", last.offset, shape)
    if digest(pixels).hex() != last.digest:
        raise LicError(f"{path} is of another file than {raw.name}; {remedy}")
    return index


def add(index, raw, folder, paths):
    """Decode what of `paths`, {name: path}, the index lacks, and write both files.

    Returns the index of all that could be read, and {name: why it could not}. After an error the
    files are as before.
    """
    new = unread(index, paths)
    if not new:
        return index, {}
    end = max((entry.end for entry in index.values()), default=0)
    check_space(list(new.values()), raw.parent)
    if not index:  # what is there is a leftover, which an older run may have mapped
        raw.unlink(missing_ok=True)
    kept = {name: entry for name, entry in index.items() if name in paths and name not in new}
    print(f"decoding {len(new)} images into {raw}", flush=True)
    try:
        added, faults = append(raw, end, new)
        if added:  # else the end of the file could move back, below what another run has mapped
            write_index(raw, folder, kept | added)
    except BaseException:
        cut_off(raw, end)
        raise
    if not added:
        cut_off(raw, end)
    return kept | added, faults


def append(raw, end, paths):
    """Decode images and write their pixels from `end` on.

    Returns {name: Entry} and {name: why it could not be read} of `paths`, {name: path}.
    """
    added, faults, printed = {}, {}, time.monotonic()
    try:
        with open(raw, "ab") as file:
            file.truncate(end)
            for name, (image, entry, fault) in zip(paths, decoded(paths.values())):
                if fault:
                    faults[name] = fault
                    continue
                file.write(image)
                added[name] = entry._replace(offset=end)
                end = added[name].end
                if time.monotonic() - printed > 10:
                    printed = time.monotonic()
                    print(f"decoded {len(added)} of {len(paths)} images", flush=True)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise LicError(
            f"cannot write {raw}: {error.strerror}; choose another folder with --cache"
        ) from error
    except BrokenProcessPool as error:
        raise LicError(
            "a process that decodes images has ended, perhaps for lack of memory"
        ) from error
    return added, faults


def cut_off(raw, end):
    """Take back what was written behind `end`."""
    if end:
        os.truncate(raw, end)
    else:
        raw.unlink(missing_ok=True)


def write_index(raw, folder, index):
    content = {"format": FORMAT, "version": VERSION, "folder": os.path.realpath(folder)}
    content["photographs"] = index
    write_bytes(raw.with_suffix(".json"), json.dumps(content).encode())


def check_space(paths, folder):
    """Raise LicError unless there is room in `folder` for the pixels of the images `paths`.

    Their sizes are those that some of them, at most a hundred, give in their headers.
    """
    sample = paths[:: len(paths) // 100 + 1]
    pixels = 0
    for path in sample:
        try:
            with pillow_limits(), Image.open(path) as file:
                pixels += file.size[0] * file.size[1]
        except Exception:  # read_image will say it
            pass
    needed = 3 * pixels * len(paths) // len(sample)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise LicError(
            f"the photographs take about {needed / 1e9:.1f} GB when they are decoded, and {folder} "
            f"has {free / 1e9:.1f} GB free; choose another folder with --cache"
        )


def decoded(paths):
    """`decode` of each path, in order; of many, by a process for each core, at most READERS."""
    workers = min(os.cpu_count() or 1, READERS)
    if len(paths) <= FEW or workers == 1:
        yield from map(decode, paths)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    # Ctrl-C is told by this process
    default = (signal.SIGINT, signal.SIG_DFL)
    with ProcessPoolExecutor(workers, spawn, signal.signal, default) as pool:
        under_way = deque()
        for path in paths:
            under_way.append(pool.submit(decode, path))
            if len(under_way) > 2 * workers:  # all at once would fill the memory
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def decode(path):
    """The image, its Entry at offset 0, and None; or None twice and the sentence that says why."""
    before = stamp(path)
    try:
        image = read_image(path, LARGEST)
        if stamp(path) != before:
            raise LicError(f"{path} has changed while it was read")
    except LicError as error:
        return None, None, str(error)
    height, width, _ = image.shape
    return image, Entry(*before, height, width, 0, digest(image).hex()), None
