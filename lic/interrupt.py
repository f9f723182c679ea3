"""Imported first by each script: Ctrl-C while the other modules load is a word, not a traceback."""

import sys


def show(kind, error, trace):
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = show
