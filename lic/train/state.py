"""OUT.state: what a run that was stopped needs to go on, exactly.

No random state is saved: each step draws from a generator seeded with (seed, step), and the
learning rate is a function of the step and the number of steps.
"""

import hashlib
import io
import os
import sys
from pathlib import Path

import torch

from lic.files import UNREADABLE, LicError, claim_output, read_tensors, write_tensors
from lic.train.processes import check_batch, meet, rank
from lic.train.schedule import milestones

FORMAT = "lic state"


def save_state(path, model, optimizer, step, settings, arguments):
    """Write what --resume needs, with a checksum, since torch.load notices no flipped bit.

    settings: plain values that must not change in between; arguments: the command's own.
    """
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "settings": settings,
        "command": Path(sys.argv[0]).name,
        "arguments": arguments,
        "threads": torch.get_num_threads(),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    checksum = hashlib.sha256(buffer.getvalue()).hexdigest()
    payload = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    write_tensors(path, {"format": FORMAT, "sha256": checksum, "payload": payload})


def read_state(path, otherwise):
    """What `save_state` wrote; raises LicError(otherwise) if it is something else or damaged."""
    file = read_tensors(path, otherwise)
    try:
        payload = file["payload"].numpy().tobytes()
        intact = file["format"] == FORMAT
        intact = intact and hashlib.sha256(payload).hexdigest() == file["sha256"]
    except UNREADABLE:
        intact = False
    if not intact:
        raise LicError(otherwise)
    return torch.load(io.BytesIO(payload), weights_only=True, map_location="cpu")


def parse_training_args(parser):
    """The arguments of a stage that trains; with --resume what is not given is as it was.

    Raises LicError for options that cannot go together.
    """
    args = parser.parse_args()
    if rank() > 0:  # what is wrong from here on the first process says
        meet()
    if args.finish and not args.resume:
        raise LicError("--finish ends a run that was stopped: give --resume, too")
    if args.validation and not args.data:
        raise LicError("--validation needs --data, the photographs to train on")
    if not args.resume:
        return args
    path = state_path(args.out)
    if not Path(path).exists():
        raise LicError(f"there is no {path} to go on from; start without --resume")
    state = read_state(path, f"{path} holds no training state; start without --resume")
    saved, command = state["arguments"], Path(sys.argv[0]).name
    if state["command"] != command:
        raise LicError(f"{path} is a run of {state['command']}, not of {command}")
    for key in ("preset", "plan", "checkpoint", "lambdas", "control", "synthetic"):
        given = vars(args).get(key)
        if given != parser.get_default(key) and given != saved.get(key):
            raise LicError(f"--resume: {key} was {saved.get(key)!r}, is {given!r}")
    of_this_call = ("resume", "finish", "overwrite", "out")
    parser.set_defaults(**{k: v for k, v in saved.items() if k not in of_this_call})
    print(f"going on from {path}, step {state['step']} of {state['settings']['steps']}")
    return parser.parse_args()


def state_path(out):
    """OUT.state, beside what OUT names if it is a link."""
    return os.path.realpath(out) + ".state"


def check_out(args):
    """Before a stage reads anything: may it write args.out, and train anew?

    Raises LicError if not: files.claim_output, or a run that was stopped or whose checkpoint could
    not be written would be lost. Of several processes the first asks for all.
    """
    if rank() > 0:
        return
    check_batch(args.batch)
    overwrite = args.overwrite or args.resume
    inputs = [name for name in (args.checkpoint, getattr(args, "plan", None)) if name]
    claim_output(args.out, ".pt", overwrite, inputs)
    path = state_path(args.out)
    if Path(path).is_dir():
        raise LicError(f"{path} is a folder, where the state of this run is to be; remove it")
    if overwrite or not args.steps or not Path(path).exists():
        return
    state = read_state(path, f"{path} is in the way and no training state; remove it")
    done, steps = state["step"], state["settings"]["steps"]
    if done < steps:
        what = f"{path} holds a run that was stopped at step {done} of {steps}"
    elif not Path(args.out).exists() or not Path(args.out).stat().st_size:
        what = f"{path} holds a finished run whose checkpoint was not written"
    else:
        return
    raise LicError(f"{what}; go on with --resume, or begin anew with --overwrite")


def load_state(path, model, optimizer, settings):
    """Restore model and optimizer in place; returns the number of steps already done.

    Raises LicError if a setting is another than it was: but the rate may be smaller, and the number
    of steps may change while the rate does not depend on it.
    """
    state = read_state(path, f"{path} holds no training state; start without --resume")
    done, made_with = state["step"], state["settings"]
    changed = [key for key in settings if settings[key] != made_with.get(key)]
    if "steps" in changed:
        warmup, decline = milestones(made_with["steps"])
        new_warmup, new_decline = milestones(settings["steps"])
        if done > min(decline, new_decline) or warmup != new_warmup:
            raise LicError(
                f"{path} is at step {done} of {made_with['steps']}; --steps can change only in the "
                "first third of the old and the new number, and only if they have the same "
                "warm-up, as any two from 14,000 up have"
            )
        changed.remove("steps")
    if "lr" in changed and settings["lr"] < made_with["lr"]:
        changed.remove("lr")
    if changed:
        differences = [f"{key} was {made_with.get(key)!r}, is {settings[key]!r}" for key in changed]
        raise LicError(
            f"{path} was made with other settings; resume with the same: {'; '.join(differences)}"
        )
    if state["threads"] != torch.get_num_threads() and rank() == 0:
        print(
            f"warning: {path} was made with {state['threads']} threads, this process has "
            f"{torch.get_num_threads()}: last bits will differ from a run that was never stopped",
            file=sys.stderr,
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return done
