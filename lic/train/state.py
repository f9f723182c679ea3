"""OUT.state: what a run that was stopped needs to go on, exactly.

No random state is saved: each step draws from a generator seeded with (seed, step), and the
learning rate is a function of the step and the number of steps.
"""

import sys
from pathlib import Path

import torch

from lic.files import UNREADABLE, LicError, check_writable, read_tensors, write_tensors
from lic.train.schedule import milestones


def save_state(path, model, optimizer, step, settings):
    """Write what --resume needs; settings: plain values that must not change in between."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "settings": settings,
        "threads": torch.get_num_threads(),
    }
    write_tensors(path, state)


def read_state(path, otherwise):
    """What `save_state` wrote; raises LicError(otherwise) if it is something else."""
    state = read_tensors(path, otherwise)
    try:
        state["step"], state["settings"]["steps"]
    except UNREADABLE as error:
        raise LicError(otherwise) from error
    return state


def check_out(args):
    """Before a stage reads anything: may it write args.out?

    Raises LicError if it cannot be written, or if a new run would write over the state of one that
    was stopped.
    """
    check_writable(args.out)
    path = args.out + ".state"
    if args.resume or not args.steps or not Path(path).exists():
        return
    state = read_state(path, f"{path} is in the way and no training state; remove it")
    done, steps = state["step"], state["settings"]["steps"]
    if done < steps:
        raise LicError(
            f"{path} holds a run that was stopped at step {done} of {steps}; "
            "go on with --resume, or remove the file"
        )


def load_state(path, model, optimizer, settings):
    """Restore model and optimizer in place; returns the number of steps already done."""
    state = read_state(path, f"{path} holds no training state; start without --resume")
    done, made_with = state["step"], state["settings"]
    changed = sorted(key for key in settings if settings[key] != made_with.get(key))
    if changed == ["steps"]:
        warmup, decline = milestones(made_with["steps"])
        new_warmup, new_decline = milestones(settings["steps"])
        if done > min(decline, new_decline) or warmup != new_warmup:
            raise LicError(
                f"{path} is at step {done} of {made_with['steps']}; --steps can change only in the "
                "first third of the old and the new number, and only if they have the same "
                "warm-up, as any two from 14,000 up have"
            )
    elif changed:
        raise LicError(
            f"{path} was made with another {', '.join(changed)}; resume with the same settings"
        )
    if state.get("threads") != torch.get_num_threads():
        print(
            f"warning: {path} was made with {state.get('threads')} threads, this process has "
            f"{torch.get_num_threads()}: last bits will differ from a run that was never stopped",
            file=sys.stderr,
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return done
