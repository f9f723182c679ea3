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

from lic.files import UNREADABLE, LicError, read_tensors, write_tensors
from lic.train.processes import rank
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


def state_path(out):
    """OUT.state, beside what OUT names if it is a link."""
    return os.path.realpath(out) + ".state"


def load_state(path, model, optimizer, settings, any_images=False):
    """Restore model and optimizer in place; returns the number of steps already done.

    Raises LicError if a setting is another than it was, except:
    - the rate may be smaller;
    - the number of steps may change while the rate does not depend on it (schedule.milestones);
    - a folder of the same photographs may have another name; with any_images they may be others.
    """
    state = read_state(path, f"{path} holds no training state; start without --resume")
    done, made_with = state["step"], state["settings"]
    changed = [key for key in settings if settings[key] != made_with.get(key)]
    if any_images or "images" not in changed:
        changed = [key for key in changed if key not in ("images", "data")]
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
        remedy = "resume with the same"
        if "images" in changed:
            remedy += " photographs (train.py and prune.py write what there is by --finish)"
        raise LicError(f"{path} was made with other settings; {remedy}: {'; '.join(differences)}")
    if state["threads"] != torch.get_num_threads() and rank() == 0:
        print(
            f"warning: {path} was made with {state['threads']} threads, this process has "
            f"{torch.get_num_threads()}: last bits will differ from a run that was never stopped",
            file=sys.stderr,
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return done
