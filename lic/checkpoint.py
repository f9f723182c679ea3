"""The hand-over file between the stages: a plain dict that alone rebuilds its codec; and the plan between two.

    {"format", "version", "stage", "config", "state_dict", "tables", "quantization",
     "lineage": [{"stage", "arguments", "steps", "data", "parent"}, ...], "metrics", "fingerprint"}

It is loaded with weights_only=True, so no code in a file is ever run. The fingerprint is a
SHA-256 over all that decoding depends on: config, tensors, tables. torch.load does not notice
a flipped bit in a tensor; the fingerprint does. Compressed files carry its first 8 bytes.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from lic.coder import Tables
from lic.files import UNREADABLE, LicError, read_bytes, read_tensors, write_tensors
from lic.models import Codec
from lic.pruning import GROUPS
from lic.quantization import pack, quantize_layers, unpack

PLAN_KEYS = {"method", "importance", "target", "of", "alpha", "ratio", "lambdas", "sparsity", "sensitivity"}  # and those looked into below
FORMAT, VERSION = "lic checkpoint", 2  # version 1 had ReLUs in the hyper networks


def fingerprint(config, quantization, state_dict, tables):
    """SHA-256 in hexadecimal over names, types, shapes and little-endian bytes, in sorted order."""
    digest = hashlib.sha256(json.dumps([config, quantization], sort_keys=True).encode())
    tensors = dict(state_dict)
    for kind, table in tables.items():
        tensors.update({f"tables.{kind}.{field}": value for field, value in table.items()})
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def save(path, model, tables, stage, arguments, steps, parent=None, metrics=None):
    """Write the checkpoint and return its fingerprint.

    tables: from bitstream.build_tables. arguments: a plain dict, recorded in the lineage;
    of "data", a folder, only the name, and None stands for the synthetic images.
    parent: the meta of the checkpoint that this one was made from. metrics: plain numbers.
    """
    state_dict = {name: t.detach().cpu().contiguous().clone() for name, t in model.state_dict().items()}
    if model.quantization:
        state_dict = pack(state_dict)
    tables = {kind: {f: torch.from_numpy(v) for f, v in table._asdict().items()} for kind, table in tables.items()}
    entry = {"stage": stage, "arguments": {k: v for k, v in arguments.items() if k != "data"}, "steps": steps,
             "data": Path(arguments["data"] or "dead leaves").name if "data" in arguments else None,
             "parent": parent["fingerprint"] if parent else None}  # fmt: skip
    checkpoint = {
        "format": FORMAT, "version": VERSION, "stage": stage, "config": model.config, "state_dict": state_dict,
        "tables": tables, "quantization": model.quantization,
        "lineage": (parent["lineage"] if parent else []) + [entry], "metrics": metrics or {},
        "fingerprint": fingerprint(model.config, model.quantization, state_dict, tables),
    }  # fmt: skip
    write_tensors(path, checkpoint)
    return checkpoint["fingerprint"]


def load(path, stages=None):
    """Model (eval mode, channels_last, float32) and meta: the dict above without state_dict, tables as
    coder.Tables, and "bytes", the file's size.

    stages: the stages that the caller can use; another is refused. Raises LicError for what cannot be read or used.
    """
    checkpoint = read_tensors(path, otherwise=f"{path} is not a lic checkpoint, or it is truncated")
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise LicError(f"{path} is not a lic checkpoint; give a file that train.py, prune.py or quantize.py wrote")
    if checkpoint.get("version") != VERSION:
        raise LicError(f"{path} has checkpoint version {checkpoint.get('version')}; this program reads {VERSION}: train again")
    if stages and checkpoint.get("stage") not in stages:
        raise LicError(f"{path} is a checkpoint of stage {checkpoint.get('stage')!r}; this needs one of {', '.join(stages)}")
    try:
        state_dict, tables = checkpoint.pop("state_dict"), checkpoint.pop("tables")
        config, quantization = checkpoint["config"], checkpoint["quantization"]
        float_inputs = list(quantization.get("float_inputs", [])) if quantization else []
        intact = fingerprint(config, quantization, state_dict, tables) == checkpoint["fingerprint"]
    except UNREADABLE:
        intact = False
    if not intact:
        raise LicError(f"{path} is damaged: its contents do not match its fingerprint")
    model = Codec(config)
    if quantization:
        quantize_layers(model, float_inputs=float_inputs)
        if quantization != model.quantization:
            raise LicError(f"{path} is quantized as {quantization}; this program knows {model.quantization}; quantize again with quantize.py")
        state_dict = unpack(state_dict)
    model.load_state_dict(state_dict)
    checkpoint["tables"] = {kind: Tables(*(np.ascontiguousarray(t[f].numpy()) for f in Tables._fields)) for kind, t in tables.items()}
    checkpoint["bytes"] = Path(path).stat().st_size
    return model.to(memory_format=torch.channels_last).eval(), checkpoint


def load_plan(path, baseline=None):
    """What search.py wrote, a dict; baseline: fingerprint of the checkpoint that it must have been made for.
    Raises LicError for anything else."""
    try:
        plan = json.loads(read_bytes(path))
        complete = plan["format"] == "lic plan" and all(len(plan["keep"][g]) == plan["widths"][g] > 0 for g in GROUPS)
        complete = complete and isinstance(plan["baseline"], str) and PLAN_KEYS <= plan.keys()
    except (ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise LicError(f"{path} is not a plan that search.py wrote")
    if baseline and plan["baseline"] != baseline:
        raise LicError(f"{path} was made for checkpoint {plan['baseline'][:16]}, this one is {baseline[:16]}; run search.py on it")
    return plan
