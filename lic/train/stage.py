"""What the stages that see images have in common: options, what they may write, the images.

search.py takes of this the options of images; train.py, prune.py and quantize.py take all.
"""

import argparse
import sys
from pathlib import Path

from lic.codec import structure
from lic.files import LicError, claim_output
from lic.options import multiple_of, positive_number, positive_whole_number, whole_number
from lic.photographs import load_images
from lic.program import quoted
from lic.train.processes import check_batch, join_group, rank
from lic.train.state import read_state, state_path

HELD_OUT_CROPS = 16  # of other images, on which J is reported


def add_training_arguments(parser, steps, lr, out):
    """The options of a stage that trains; steps, lr and out are that stage's defaults."""
    # fmt: off
    add, stride = parser.add_argument, structure.total_stride()
    add_image_arguments(parser)
    add("--steps", type=whole_number, default=steps, help=f"training steps (default: {steps})")
    add("--batch", type=positive_whole_number, default=8, help="crops a step (default: 8)")
    add("--crop", type=multiple_of(stride), default=128,
        help=f"side of a crop, pixels, a multiple of {stride} (default: 128)")
    add("--lr", type=positive_number, default=lr, help=f"peak learning rate (default: {lr})")
    add("--amp", action="store_true",
        help="bf16 autocast: faster on a GPU and on most CPUs with AVX-512 bf16")
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="fuse the kernels of a step: after half a minute much faster on a GPU (default: no)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (default: cpu)")
    add("--seed", type=whole_number, default=0, help="of weights, crops and noise (default: 0)")
    add("--save-every", type=positive_whole_number, default=1000,
        help="steps between saves (default: 1000)")
    add("--out", default=out, help=f"checkpoint to write (default: {out})")
    add("--resume", action="store_true",
        help="go on from OUT.state, with as many threads exactly as if never stopped; options that "
        "are not given are as they were; the rate may be smaller, and of a run of 14,000 steps or "
        "more, before its rate declines, the number of steps another, 14,000 or more")
    add("--finish", action="store_true",
        help="once resumed, take no more steps: write the checkpoint")
    add("--overwrite", action="store_true", help="replace OUT, and a stopped run's OUT.state")
    # fmt: on


def add_image_arguments(parser):
    """The options of a stage that looks at images, for `images_for`."""
    # fmt: off
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data",
        help="folder of images, searched recursively (default: synthetic images)")
    source.add_argument("--synthetic", action="store_true",
        help="synthetic images, even for a codec of photographs")
    parser.add_argument("--validation",
        help="folder of images to hold out (default: one in sixteen of those to train on, by its "
        "content)")
    parser.add_argument("--cache",
        help="folder of the file into which photographs are decoded, once for all runs (default: "
        "that of OUT)")
    parser.add_argument("--skip-bad", action="store_true",
        help="leave out images that cannot be read or are smaller than a crop (default: refuse)")
    # fmt: on


def parse_training_args(parser):
    """The arguments of a stage that trains; with --resume what is not given is as it was.

    Raises LicError for options that cannot go together.
    """
    args = parser.parse_args()
    if rank() > 0:  # what is wrong from here on the first process says
        join_group()
    if args.finish and not args.resume:
        raise LicError("--finish ends a run that was stopped: give --resume, too")
    if args.resume:
        parser.set_defaults(**stopped_run(parser, args))
        args = parser.parse_args()  # again: what is given now wins over what was
    if rank() == 0:
        check_image_arguments(args)
        check_batch(args.batch)
    return args


def check_image_arguments(args):
    """Raise LicError for options of `add_image_arguments` that cannot go together."""
    if args.validation and not args.data:
        raise LicError("--validation needs --data, the photographs to train on")


def stopped_run(parser, args):
    """{option: value} of the run that --resume goes on from, but for what each call says anew.

    Raises LicError if there is none, or if it is the run of another command or of another codec.
    """
    path = state_path(args.out)
    if not Path(path).exists():
        raise LicError(f"there is no {path} to go on from; start without --resume")
    state = read_state(path, f"{path} holds no training state; start without --resume")
    saved, command = state["arguments"], Path(sys.argv[0]).name
    if state["command"] != command:
        raise LicError(f"{path} is a run of {state['command']}, not of {command}")
    # those that the state's settings, which load_state compares, do not hold
    for key in ("preset", "plan", "checkpoint", "lambdas", "control", "synthetic"):
        given = vars(args).get(key)
        if given != parser.get_default(key) and given != saved.get(key):
            raise LicError(f"--resume: {key} was {saved.get(key)!r}, is {given!r}")
    print(f"going on from {path}, step {state['step']} of {state['settings']['steps']}")
    of_this_call = ("resume", "finish", "overwrite", "out")
    return {key: value for key, value in saved.items() if key not in of_this_call}


def check_out(args):
    """Before a stage reads anything: may it write args.out, and train anew?

    Raises LicError if not: files.claim_output, or a run that was stopped or whose checkpoint could
    not be written would be lost. Of several processes the first asks for all.
    """
    if rank() > 0:
        return
    overwrite = args.overwrite or args.resume
    inputs = (args.checkpoint, getattr(args, "plan", None), args.data, args.validation)
    claim_output(args.out, ".pt", overwrite, filter(None, inputs))
    path = state_path(args.out)
    if Path(path).is_dir():
        raise LicError(f"{path} is a folder, where the state of this run is to be; remove it")
    if overwrite or not Path(path).exists():
        return
    state = read_state(path, f"{path} is in the way and no training state; remove it")
    done, steps = state["step"], state["settings"]["steps"]
    if done < steps:
        what = f"{path} holds a run that was stopped at step {done} of {steps}; go on"
    else:
        what = f"{path} holds a finished run, and {args.out} is not there; write it"
    raise LicError(f"{what} with --resume, or begin anew with --overwrite")


def images_for(args, parent=None):
    """Training and validation images, two Images; prints what they are.

    parent: meta of the checkpoint that the stage goes on from. Raises LicError if that one was
    trained on photographs and none are given: to forget --data would spoil it. Of several processes
    the others begin when the first has come so far.
    """
    lineage = parent["lineage"] if parent else []
    photographs = {entry["data"] for entry in lineage} - {None, "dead leaves"}
    if args.data is None and photographs and not args.synthetic:
        raise LicError(
            f"{args.checkpoint} was trained on photographs ({', '.join(sorted(photographs))}); "
            "give such with --data, or ask for --synthetic"
        )
    cache = args.cache or Path(args.out).parent
    train, validation = load_images(args.data, args.crop, args.validation, cache, args.skip_bad)
    source = args.data or "made here, synthetic"
    print(f"images: {len(train)} to train, {len(validation)} to validate ({source})")
    join_group()
    return train, validation


def data_option(args):
    """How the next stage's command goes on after its checkpoint, to see the same images."""
    if not args.data:
        return " --synthetic" if args.synthetic else ""
    option = f" --data {quoted(args.data)}"
    if args.validation:
        option += f" --validation {quoted(args.validation)}"
    if args.cache:
        option += f" --cache {quoted(args.cache)}"
    return option + (" --skip-bad" if args.skip_bad else "")


def held_out_option(args):
    """How evaluate.py's command goes on, to measure on what this stage held out."""
    if args.data and args.validation:
        return f" --data {quoted(args.validation)}"
    return f" --data {quoted(args.data)} --held-out" if args.data else ""
