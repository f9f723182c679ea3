"""The border to the operating system and the machine.

Errors are one sentence, files are whole or not there at all, freed memory is kept. torch is
imported where it is used: what needs none of it answers at once.
"""

import ctypes
import functools
import io
import os
import pickle
import sys
from pathlib import Path

# what torch.load and the use of what it gave raise when a file is cut, damaged or something else
UNREADABLE = (
    pickle.UnpicklingError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
)


class LicError(Exception):
    """What was wrong and what to do, in one sentence; `status` is the process's exit status."""

    status = 2


class BadStream(LicError):
    """A compressed file that cannot be decoded as it is: foreign, damaged, of another model."""

    status = 1


def keep_freed_memory():
    """Have glibc, where there is one, keep the memory of a freed tensor for the next one.

    Returns whether it did. By default large blocks go back to the system, which clears them page by
    page when they are asked for again: that can take longer than a layer of GDN. Blocks up to
    256 MiB are kept, or up to 32 where glibc allows no more; mallopt(3).
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return False
    kept = mallopt(M_MMAP_THRESHOLD, 2**28) or mallopt(M_MMAP_THRESHOLD, 2**25)
    return bool(kept and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


@functools.cache
def warn_of_slow_bf16():
    """Say, once, that this CPU has no fast bf16, if torch finds AVX2 on it and no more.

    docs/training.md has the figures.
    """
    import torch

    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        print(
            "warning: without AVX-512 this CPU computes bf16 several times slower than float32; "
            "leave out --amp",
            file=sys.stderr,
        )


def run(main):
    """Call main(); a LicError is printed as a sentence, and its status is the exit status."""
    keep_freed_memory()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except LicError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)


def check_writable(path):
    """Make the folder of `path` and try it, so that hours of work do not end in a refusal."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.parent / f".{path.name}.{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise LicError(
            f"cannot write to {path.parent}: {error.strerror}; choose another output"
        ) from error
    if path.is_dir():
        raise LicError(f"{path} is a folder; give the name of a file to write")


def read_bytes(path):
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise LicError(f"cannot read {path}: {error.strerror}") from error


def read_tensors(path, otherwise):
    """What torch.save wrote, on the CPU; no code in the file is run.

    Raises LicError(otherwise) if it is something else.
    """
    import torch

    try:
        data = io.BytesIO(read_bytes(path))
        return torch.load(data, weights_only=True, map_location="cpu")
    except UNREADABLE as error:
        raise LicError(otherwise) from error


def write_bytes(path, data):
    """Write to a temporary name, then rename: a reader sees the old file or the new one."""
    path = Path(path)
    check_writable(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise LicError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path, value):
    """torch.save to a file that is whole or not there at all."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_bytes(path, buffer.getvalue())
