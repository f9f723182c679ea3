"""What the command lines have in common: errors of one sentence, types that say what they take."""

import argparse

from lic.files import LicError


class Parser(argparse.ArgumentParser):
    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message):
        raise LicError(f"{message}; --help lists the options")


def make_parser(doc, **settings):
    """A parser that shows a module's docstring as it is written."""
    form = argparse.RawDescriptionHelpFormatter
    return Parser(description=doc, formatter_class=form, **settings)


def parsed(kind, accepted, description):
    """An argparse type: int or float, if accepted; else argparse prints what it should be."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepted(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {description}")
        return value

    return parse


def multiple_of(step):
    """A type for the side of a crop, which the codec's strides must divide."""
    return parsed(int, lambda value: value > 0 and value % step == 0, f"a multiple of {step}")


positive_whole_number = parsed(
    int, lambda value: 1 <= value < 2**31, "a whole number from 1 to 2^31 - 1"
)
whole_number = parsed(int, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2^63 - 1")
positive_number = parsed(float, lambda value: 0 < value < float("inf"), "a positive finite number")
fraction = parsed(float, lambda value: 0 < value < 1, "a share, between 0 and 1")
