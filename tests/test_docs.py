"""The README's results are those of docs/results.json, and these belong to the files shipped."""

import json
import re
from pathlib import Path

import pytest
from helpers import ROOT

from lic.codec.checkpoint import load_checkpoint

RESULTS = json.loads((ROOT / "docs/results.json").read_text())
CODECS = {Path(result["path"]).name: result for result in RESULTS["checkpoints"]}
SHIPPED = ["dense.pt", "pruned.pt", "quantized.pt"]


def rows_of_the_readme():
    """{file name: cells} of the table of results."""
    rows = {}
    for line in (ROOT / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        name = re.search(r"`([a-z0-9]+\.pt)`", cells[0])
        if line.startswith("|") and name:
            rows[name[1]] = cells
    return rows


def seconds(result, verb):
    levels = result["levels"]
    return sum(level[f"{verb}_seconds"] for level in levels) / len(levels)


def test_every_codec_of_the_table_was_measured():
    assert rows_of_the_readme().keys() == CODECS.keys() >= set(SHIPPED)


@pytest.mark.parametrize("name", CODECS)
def test_a_row_of_the_readme_is_that_of_the_json(name):
    result, macs = CODECS[name], CODECS[name]["kmac_per_pixel"]
    assert rows_of_the_readme()[name][1:] == [
        f"{result['parameters']:,}",
        f"{macs['encoder']:.2f}, {macs['decoder']:.2f}",
        f"{result['bytes']:,}",
        f"{seconds(result, 'encode'):.3f}, {seconds(result, 'decode'):.3f}",
        f"{result['bd_rate_percent']:+.2f} %",
    ]


@pytest.mark.parametrize("name", SHIPPED)
def test_what_was_measured_is_what_is_shipped(name):
    path = ROOT / "checkpoints" / name
    model, meta = load_checkpoint(path)
    assert CODECS[name]["fingerprint"] == meta["fingerprint"]
    assert CODECS[name]["bytes"] == path.stat().st_size


def test_the_codecs_shipped_are_one_lineage():
    metas = [load_checkpoint(ROOT / "checkpoints" / name)[1] for name in SHIPPED]
    for parent, child in zip(metas, metas[1:]):
        steps = child["lineage"][len(parent["lineage"]) :]
        assert child["lineage"][: len(parent["lineage"])] == parent["lineage"]
        assert steps[0]["parent"] == parent["fingerprint"]
        assert steps[0]["stage"] == child["stage"]
