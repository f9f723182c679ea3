"""plan.json: what search.py found and prune.py cuts by. A dict of plain values:

    "baseline"      fingerprint of the codec that it was made for
    "keep"          {group: [rising indices]}; "widths": {group: how many these are}
    "sensitivity"   {group: {width: zeta}}, or null; "alpha", or null; "ratio", or null
    "timing"        what a layer takes, as timing.time_layers gives it, or null
    "method", "importance", "target", "of", "untouched": what was asked for; "sparsity": what came
                    of it
    "crops", "crop" how many crops of which side it was measured on; prune.py takes as many
    "images"        a digest of these crops; "amp": whether in bf16
    "lambdas"; "J", "J_zeros", "J_folded": J a level, dense, cut, and cut and folded

Whoever reads one checks it first: `load_plan`.
"""

import hashlib
import json
import math

from lic.codec import structure
from lic.files import UNREADABLE, LicError, read_bytes, write_bytes

FORMAT = "lic plan"
# what a reader asks for, beside what is_plan looks into
KEYS = ["method", "importance", "target", "of", "alpha", "ratio", "sparsity", "amp", "images"]


def save_plan(path, plan):
    """plan: as above. Raises LicError if a figure in it is not finite."""
    try:
        text = json.dumps({"format": FORMAT} | plan, indent=1, allow_nan=False)
    except ValueError as error:
        raise LicError("a figure of the plan is not finite; are the weights usable?") from error
    write_bytes(path, text.encode())


def is_plan(plan):
    """Does it have what a plan has, and does that make sense? Raises UNREADABLE or says False."""
    if plan["format"] != FORMAT or not isinstance(plan["baseline"], str):
        return False
    lambdas = plan["lambdas"]
    if not lambdas or lambdas != sorted(set(lambdas)) or bool in map(type, lambdas):
        return False
    if not (0 < lambdas[0] and lambdas[-1] < math.inf):
        return False
    if not plan["keep"].keys() == plan["widths"].keys() == structure.groups().keys():
        return False
    for group, keep in plan["keep"].items():
        if {type(number) for number in [*keep, plan["widths"][group]]} != {int}:
            return False
        if keep != sorted(set(keep)) or keep[0] < 0 or len(keep) != plan["widths"][group]:
            return False
    crops, crop = plan["crops"], plan["crop"]
    if type(crops) is not int or type(crop) is not int or crops < 1 or crop < 1:
        return False
    return crop % structure.total_stride() == 0 and plan.keys() >= set(KEYS)


def sensitivity_of(plan):
    """{group: {width: zeta}}, widths as integers, or None. Raises UNREADABLE if it is no such."""
    if plan["sensitivity"] is None:
        return None
    table = {}
    for group in structure.groups():
        row = plan["sensitivity"][group]
        table[group] = {int(width): float(zeta) for width, zeta in row.items()}
        if not row or min(table[group]) < 1 or not all(map(math.isfinite, table[group].values())):
            raise ValueError(f"no sensitivities of {group}")
    return table


def cut_fingerprint(plan):
    """A short string that two plans share if, and only if, they keep the same channels."""
    return hashlib.sha256(json.dumps(plan["keep"], sort_keys=True).encode()).hexdigest()[:16]


def load_plan(path, baseline=None, widths=None):
    """What `save_plan` wrote.

    baseline, widths: fingerprint and {group: channels} of the codec that it must have been made
    for. Raises LicError for anything else.
    """
    try:
        plan = json.loads(read_bytes(path))
        complete = is_plan(plan)
        plan["sensitivity"] = sensitivity_of(plan)
    except UNREADABLE:
        complete = False
    if not complete:
        raise LicError(f"{path} is not a plan that search.py wrote")
    if baseline and plan["baseline"] != baseline:
        raise LicError(
            f"{path} was made for checkpoint {plan['baseline'][:16]}, this one is {baseline[:16]}; "
            "run search.py on it"
        )
    for group, width in (widths or {}).items():
        if plan["keep"][group][-1] >= width:
            raise LicError(f"{path} keeps channels of {group} that the checkpoint does not have")
    return plan
