"""How a script runs: errors are one sentence, a log that cannot be written costs no result.

And what it asks of the machine: its name, its GPU, and to keep freed memory.
"""

import ctypes
import functools
import io
import os
import platform
import shlex
import signal
import subprocess
import sys
from contextlib import contextmanager

from lic.files import LicError, release_outputs

# beside Ctrl-C; Windows has the first alone
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


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


def quoted(path):
    """A path as the shell takes it into which the next command is pasted."""
    if os.name == "nt":
        return subprocess.list2cmdline([path])
    return shlex.quote(path)


def processor():
    """The name of this machine's CPU, as well as Python can find it."""
    try:
        with open("/proc/cpuinfo") as info:
            lines = [line for line in info if line.startswith("model name")]
        return lines[0].split(":")[1].strip()
    except (OSError, IndexError):  # not Linux, or it does not tell
        return platform.processor() or platform.machine()


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


def choose_gpu():
    """Let "cuda" be this process's own GPU, by torchrun's LOCAL_RANK; LicError if there is none."""
    import torch

    number, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if gpus == 0:
        raise LicError("--device cuda: this torch sees no GPU; give --device cpu")
    if number >= gpus:
        raise LicError(
            f"--device cuda: there are {gpus} GPUs; start as many processes on a machine"
        )
    torch.cuda.set_device(number)


def run(main):
    """Call main(); a LicError is printed as a sentence, and its status is the exit status."""
    keep_freed_memory()
    before = {}
    for number in STOP_SIGNALS:
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores the second
            before[number] = signal.signal(number, lambda signum, frame: sys.exit(128 + signum))
    stdout, stderr = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = PatientLog(stdout), PatientLog(stderr)
    try:
        with enough_memory("this work"):
            main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except LicError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
    finally:
        release_outputs()
        sys.stdout.flush()
        sys.stdout, sys.stderr = stdout, stderr
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def enough_memory(what):
    """Within it a lack of memory, Python's or torch's, is a LicError that names `what`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        lacking = any(
            words in str(error)
            for words in ("allocate memory", "out of memory", "not enough memory")
        )
        if isinstance(error, RuntimeError) and not lacking:
            raise
        raise LicError(
            f"not enough memory for {what}; make it smaller, or close something"
        ) from error


class PatientLog(io.TextIOBase):
    """A stream that ends its own output, and nothing else, when it cannot be written to.

    A closed pipe or a full disk behind the log must not cost the work. Characters that the
    terminal's encoding lacks are written as escapes.
    """

    def __init__(self, stream):
        self.stream, self.broken = stream, stream is None  # None: it was closed before we began
        if isinstance(stream, io.TextIOWrapper):
            # a line at a time also into a file, where hours of work are watched
            stream.reconfigure(errors="backslashreplace", line_buffering=True)

    def write(self, text):
        self._attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self):
        self._attempt(lambda: self.stream.flush())

    def _attempt(self, action):
        if self.broken:
            return
        try:
            action()
        except (OSError, ValueError):
            self.broken = True
            try:
                number = self.stream.fileno()
            except (OSError, ValueError):  # closed, or of no file
                return
            # what is still buffered would fail again when Python ends
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)

    def isatty(self):
        return not self.broken and self.stream.isatty()

    def fileno(self):
        if self.stream is None:
            raise OSError("closed")
        return self.stream.fileno()
