"""plan.json: what search.py found and prune.py cuts by. A dict of plain values:

"baseline"      fingerprint of the codec that it was made for
"keep"          {group: [rising indices]}, "widths" {group: how many these are}
"sensitivity"   {group: {width: zeta}}, or null; "alpha", or null; "ratio", or null
"method", "importance", "target", "of": what was asked for; "sparsity": what came of it
"lambdas", and J a level of the dense codec, of the cut with and without fold
"""

import json

from lic.codec import structure
from lic.files import LicError, read_bytes, write_bytes

FORMAT = "lic plan"
KEYS = ["method", "importance", "target", "of", "alpha", "ratio", "lambdas"]
KEYS += ["sparsity", "sensitivity"]  # and those that load_plan looks into


def save_plan(path, plan):
    write_bytes(path, json.dumps({"format": FORMAT} | plan, indent=1).encode())


def load_plan(path, baseline=None):
    """What `save_plan` wrote.

    baseline: fingerprint of the checkpoint that it must have been made for. Raises LicError for
    anything else.
    """
    try:
        plan = json.loads(read_bytes(path))
        complete = plan["format"] == FORMAT and isinstance(plan["baseline"], str)
        complete = complete and plan.keys() >= set(KEYS)
        for group in structure.groups():
            complete = complete and len(plan["keep"][group]) == plan["widths"][group] > 0
    except (ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise LicError(f"{path} is not a plan that search.py wrote")
    if baseline and plan["baseline"] != baseline:
        raise LicError(
            f"{path} was made for checkpoint {plan['baseline'][:16]}, this one is {baseline[:16]}; "
            "run search.py on it"
        )
    return plan
