"""Files: whole or not there at all, and nothing is replaced that was not asked for.

torch is imported where it is used: what needs none of it answers at once.
"""

import io
import os
import pickle
import warnings
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where two runs are not told apart
    fcntl = None

MAX_PIXELS = 2**25  # of an image, unless told otherwise
# what the use of a file's contents raises when it is cut, damaged or something else
UNREADABLE = (
    pickle.UnpicklingError,
    EOFError,
    ArithmeticError,
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


def claim_output(path, suffix, overwrite=False, inputs=()):
    """Raise LicError unless this command may write the file `path`; other runs then may not.

    The rule for every output of every command: the name ends in the suffix of its kind; what is
    there is replaced only with --overwrite (an empty file is nothing), and never if it is one of
    the inputs, or in a folder that is one, or no ordinary file. A link stands for what it names.
    Call it before hours of work.
    """
    if Path(path).suffix.lower() != suffix:
        raise LicError(f"{path}: this command writes {suffix[1:]} files; end the name in {suffix}")
    target = Path(os.path.realpath(path))
    for name in map(os.path.realpath, inputs):
        both = os.path.exists(target) and os.path.exists(name)
        same = os.path.samefile(target, name) if both else str(target) == name  # Photo.png on a Mac
        if same or (os.path.isdir(name) and Path(name) in target.parents):
            raise LicError(f"{path} is another file of this command; choose another output")
    try:
        if target.exists():
            if not target.is_file():
                raise LicError(f"{path} is a folder or a device; give the name of a file to write")
            if target.stat().st_size and not overwrite:
                raise LicError(
                    f"{path} exists; choose another output, or replace it by --overwrite"
                )
        check_writable(target)
        hold(target)
    except OSError as error:
        raise LicError(f"cannot write {path}: {error.strerror}; choose another output") from error


def free_name(path):
    """The first of `path`, path2, path3 ... that is the name of no file yet."""
    name, number = path, 1
    while os.path.lexists(name):
        number += 1
        name = f"{path}{number}"
    return name


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


HELD = {}  # {path of a lock file: the open file}


def lock_of(path):
    return path.parent / f".{path.name}.lock"


def hold(path, wait=False):
    """Lock `path` against other runs until it is released, or the end of this process.

    If another run holds it: wait for that one, or raise LicError.
    """
    lock = lock_of(path)
    if fcntl is None or lock in HELD:
        return
    while True:
        file = open(lock, "ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if not wait:
                file.close()
                raise LicError(
                    f"another run is writing {path}; wait for it, or choose another output"
                ) from error
            print(f"waiting for another run, which is writing {path}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            file.close()
            lock.unlink(missing_ok=True)
            return
        if lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat()):
            break  # or else the other run has just removed it
        file.close()
    HELD[lock] = file


def release(path):
    """Let other runs hold `path`."""
    file = HELD.pop(lock_of(path), None)
    if file:
        lock_of(path).unlink(missing_ok=True)
        file.close()


def release_outputs():
    while HELD:
        lock, file = HELD.popitem()
        lock.unlink(missing_ok=True)
        file.close()


def read_bytes(path):
    """The bytes of an ordinary file; raises LicError for anything else."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise LicError(f"cannot read {path}: it is no ordinary file")
        return Path(path).read_bytes()
    except OSError as error:
        raise LicError(f"cannot read {path}: {error.strerror}") from error


def read_tensors(path, otherwise):
    """What torch.save wrote, on the CPU; no code in the file is run.

    Raises LicError(otherwise) if it is something else.
    """
    import torch

    data = io.BytesIO(read_bytes(path))
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(data, weights_only=True, map_location="cpu")
    except MemoryError:
        raise
    except Exception as error:  # whatever torch raises, the file is to blame
        raise LicError(otherwise) from error


def write_bytes(path, data):
    """Write to a temporary name, then rename: a reader sees the old file or the new one.

    If `path` is a link, what it names is written.
    """
    path = Path(os.path.realpath(path))
    check_writable(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise LicError(
            f"cannot write {path}: {error.strerror}; what was there before is kept. When that is "
            "mended run the command again, a stage that has trained with --resume"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path, value):
    """torch.save to a file that is whole or not there at all."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_bytes(path, buffer.getvalue())
