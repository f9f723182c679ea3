"""The hand-over file between the stages: a plain dict that alone rebuilds its codec.

    {"format", "version", "stage", "config", "state_dict", "tables", "quantization",
     "lineage": [{"stage", "arguments", "steps", "data", "parent"}, ...], "metrics", "fingerprint"}

It is loaded with weights_only=True, so no code in a file is ever run. The fingerprint is a
SHA-256 over all in the file that decoding depends on: config, quantization, tensors, tables; not
stage, lineage and metrics, and not the program itself. torch.load does not notice a flipped bit in
a tensor; the fingerprint does. Compressed files carry its first 8 bytes.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from lic.codec.ans import PRECISION
from lic.codec.eight_bits import pack, quantize_layers, unpack
from lic.codec.model import Codec
from lic.codec.tables import Tables, numbers_of_tables
from lic.files import UNREADABLE, LicError, read_tensors, write_tensors

FORMAT, VERSION = "lic checkpoint", 2  # version 1 had ReLUs in the hyper networks
FLOAT_STAGES = ("train", "control", "prune")  # the others are quantized


def fingerprint(config, quantization, state_dict, tables):
    """SHA-256 in hexadecimal of all that decides how a file is read.

    Over config and quantization as JSON, then each tensor's and table's name, type, shape and
    little-endian bytes, sorted by name.
    """
    digest = hashlib.sha256(json.dumps([config, quantization], sort_keys=True).encode())
    tensors = dict(state_dict)
    for kind, table in tables.items():
        for field, value in table.items():
            tensors[f"tables.{kind}.{field}"] = value
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        array = tensor.numpy()
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def save_checkpoint(path, model, tables, stage, arguments, steps, parent=None, metrics=None):
    """Write the checkpoint and return its fingerprint.

    tables: from tables.build_tables. arguments, steps: see `lineage_entry`. parent: the meta of the
    checkpoint that this one was made from. metrics: plain values, as JSON has them. Raises LicError
    if a weight or a figure is not finite.
    """
    check_finite(model.state_dict(), metrics or {})
    state_dict = {}
    for name, tensor in model.state_dict().items():
        state_dict[name] = tensor.detach().cpu().contiguous().clone()
    if model.quantization:
        state_dict = pack(state_dict)
    tensors = {kind: tensors_of(table) for kind, table in tables.items()}
    entry = lineage_entry(stage, arguments, steps, parent)
    checkpoint = {
        "format": FORMAT,
        "version": VERSION,
        "stage": stage,
        "config": model.config,
        "state_dict": state_dict,
        "tables": tensors,
        "quantization": model.quantization,
        "lineage": [*(parent["lineage"] if parent else []), entry],
        "metrics": metrics or {},
        "fingerprint": fingerprint(model.config, model.quantization, state_dict, tensors),
    }
    write_tensors(path, checkpoint)
    return checkpoint["fingerprint"]


def lineage_entry(stage, arguments, steps, parent):
    """What a checkpoint tells of the run that wrote it; arguments: the command's, a plain dict.

    Of its folders only the names are kept; no "data" stands for the synthetic images.
    """
    data = None
    if "data" in arguments:
        data = folder_name(arguments["data"]) if arguments["data"] else "dead leaves"
    arguments = {k: v for k, v in arguments.items() if k not in ("data", "cache")}
    if arguments.get("validation"):
        arguments["validation"] = folder_name(arguments["validation"])
    return {
        "stage": stage,
        "arguments": arguments,
        "steps": steps,
        "data": data,
        "parent": parent["fingerprint"] if parent else None,
    }


def check_finite(state_dict, metrics):
    """Raise LicError for weights or figures that no later stage could use."""
    infinite = [name for name, tensor in state_dict.items() if not torch.isfinite(tensor).all()]
    for name, figures in metrics.items():
        try:
            json.dumps(figures, allow_nan=False)
        except ValueError:
            infinite.append(name)
    if infinite:
        raise LicError(f"{infinite[0]} is not finite: the training has failed; use a smaller --lr")


def folder_name(path):
    """The last part of a folder's path, without links."""
    return Path(path).resolve().name


def tensors_of(table):
    """A Tables as a dict of tensors, for the file."""
    return {field: torch.from_numpy(value) for field, value in table._asdict().items()}


def table_of(tensors, count):
    """The inverse of `tensors_of`, for `count` tables. Raises UNREADABLE if these are no such."""
    arrays = (tensors[field].numpy() for field in Tables._fields)
    table = Tables(*map(np.ascontiguousarray, arrays))
    ends = np.cumsum(table.sizes)
    sums = np.add.reduceat(table.counts, ends - table.sizes, dtype=np.int64)
    complete = len(table.sizes) == len(table.offsets) == count and len(table.counts) == ends[-1]
    positive = table.sizes.min() > 0 and table.counts.min() > 0
    if not (complete and positive and (sums == 2**PRECISION).all()):
        raise ValueError("no tables of the coder")
    return table


def has_history(checkpoint):
    """Are lineage, stage and metrics complete, which the fingerprint leaves out?

    Raises UNREADABLE or says False.
    """
    entries = [set(entry) for entry in checkpoint["lineage"]]
    complete = all(entry == {"stage", "arguments", "steps", "data", "parent"} for entry in entries)
    return complete and {"stage", "metrics"} <= checkpoint.keys()


def load_checkpoint(path, stages=None):
    """Model (eval mode, channels_last, float32) and meta.

    meta: the dict above without state_dict, with coder tables and "bytes", the file's size.
    stages: the stages that the caller can use; another is refused. Raises LicError for what cannot
    be read or used.
    """
    checkpoint = read_tensors(path, f"{path} is not a lic checkpoint, or it is truncated")
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise LicError(
            f"{path} is not a lic checkpoint; "
            "give a file that train.py, prune.py or quantize.py wrote"
        )
    if checkpoint.get("version") != VERSION:
        raise LicError(
            f"{path} has checkpoint version {checkpoint.get('version')}; "
            f"this program reads {VERSION}: train again"
        )
    if stages and checkpoint.get("stage") not in stages:
        raise LicError(
            f"{path} is a checkpoint of stage {checkpoint.get('stage')!r}; "
            f"this needs one of {', '.join(stages)}"
        )
    try:
        state_dict, tables = checkpoint.pop("state_dict"), checkpoint.pop("tables")
        config, quantization = checkpoint["config"], checkpoint["quantization"]
        float_inputs = list(quantization.get("float_inputs", [])) if quantization else []
        found = fingerprint(config, quantization, state_dict, tables)
        intact = found == checkpoint["fingerprint"] and has_history(checkpoint)
    except UNREADABLE:
        intact = False
    if not intact:
        raise LicError(f"{path} is damaged: its contents do not match its fingerprint")
    if quantization:
        state_dict = unpack(state_dict)
    try:
        model = Codec(config)
        if quantization:
            quantize_layers(model, float_inputs=float_inputs)
        model.load_state_dict(state_dict)
        checkpoint["tables"] = {
            kind: table_of(tables[kind], count) for kind, count in numbers_of_tables(config).items()
        }
    except UNREADABLE as error:
        raise LicError(
            f"{path} does not have the layers of this program (codec/structure.py): train again"
        ) from error
    if quantization != model.quantization:
        raise LicError(
            f"{path} is quantized as {quantization}; this program knows {model.quantization}; "
            "quantize again with quantize.py"
        )
    checkpoint["bytes"] = Path(path).stat().st_size
    return model.to(memory_format=torch.channels_last).eval(), checkpoint
