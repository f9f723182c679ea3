"""The README's results are those of docs/results.json, and these belong to the files shipped.

And every link of the docs leads somewhere.
"""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from helpers import ROOT, run_script

from lic.codec.checkpoint import load_checkpoint
from lic.codec.model import LAMBDAS, PRESETS, preset_config
from lic.files import LicError

RESULTS = json.loads((ROOT / "docs/results.json").read_text())
CODECS = {Path(result["path"]).name: result for result in RESULTS["checkpoints"]}
SHIPPED = ["dense.pt", "pruned.pt", "quantized.pt"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


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


def test_the_table_of_effort_is_that_of_the_json():
    measured = json.loads((ROOT / "docs/effort.json").read_text())["checkpoints"]
    page = (ROOT / "docs/effort.md").read_text()
    _, meta = load_checkpoint(ROOT / "checkpoints/quantized.pt")
    assert [codec["effort"] for codec in measured] == [0, 60, 200]
    assert {codec["fingerprint"] for codec in measured} == {meta["fingerprint"]}
    for level, rows in enumerate(zip(*(codec["levels"] for codec in measured))):
        cells = [f"{row['bpp']:.4f}, {row['psnr']:.3f}, {row['ms_ssim']:.4f}" for row in rows]
        assert f"| {level} | {' | '.join(cells)} |" in page
    for codec in measured[1:]:
        assert f" {codec['bd_rate_percent']:+.2f} %" in page


def test_the_codecs_shipped_are_one_lineage():
    metas = [load_checkpoint(ROOT / "checkpoints" / name)[1] for name in SHIPPED]
    for parent, child in zip(metas, metas[1:]):
        steps = child["lineage"][len(parent["lineage"]) :]
        assert child["lineage"][: len(parent["lineage"])] == parent["lineage"]
        assert steps[0]["parent"] == parent["fingerprint"]
        assert steps[0]["stage"] == child["stage"]


def without_code(page):
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def anchors(page):
    """What a link may name behind "#": the headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.*)$", without_code(page), flags=re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def commands():
    """(page, script, options) of each command in a page that runs a script of this repository."""
    for page in PAGES:
        lines = re.findall(r"`([^`]+)`", " ".join(without_code(page).split()))
        for block in re.findall(r"```.*?```", page.read_text(), flags=re.DOTALL):
            lines += block.splitlines()
        for line in lines:
            for script, options in re.findall(
                r"python ((?:tools/)?\w+\.py|-m lic)(?![\w.])([^&`;|]*)", line
            ):
                yield page.name, script, options


def test_the_scripts_know_the_options_of_every_command(monkeypatch):
    parsers, wrong, count = {}, [], 0
    for page, script, options in commands():
        words = [word for word in shlex.split(options, comments=True) if word != "..."]
        path = ROOT / ("lic/__main__.py" if script == "-m lic" else script)
        if path not in parsers:
            parsers[path] = runpy.run_path(str(path))["parse_args"]
        # --resume reads the state of a run; without options a script may be what is talked of
        if not words or {"--resume", "--help"} & set(words):
            continue
        monkeypatch.setattr(sys, "argv", [str(path), *words])
        try:
            parsers[path]()
        except LicError as error:
            if "are required" not in str(error):  # of `python -m lic export` in a sentence, say
                wrong.append(f"{page}: python {script}{options}: {error}")
        count += 1
    assert not wrong, wrong
    assert count > 100


def test_the_ports_are_as_long_as_the_page_says():
    page = (ROOT / "docs/porting.md").read_text()
    rows = re.findall(r"`(ports/\w+\.\w+)`: all of it \| (\d+) \|", page)
    assert len(rows) == 2
    for name, lines in rows:
        assert len((ROOT / name).read_text().splitlines()) == int(lines), name


def test_every_picture_is_shown_and_all_are_small():
    pictures = [path for path in (ROOT / "docs").rglob("*.png")]
    text = "".join(page.read_text() for page in PAGES)
    assert all(f"/{path.name}" in text for path in pictures)
    assert sum(path.stat().st_size for path in pictures) < 3_000_000


def test_the_readme_names_files_and_functions_that_exist():
    """`lic/train/effort.py: search` and the like, in all pages but the notebook's."""
    count = 0
    for page in PAGES:
        if "notebook" in page.parts:
            continue
        text = " ".join(page.read_text().split())  # a reference may be broken into two lines
        for name, functions in re.findall(r"`([\w/]+\.py): ([\w., ]+)`", text):
            source = (ROOT / name).read_text()
            for function in functions.split(", "):
                part = function.split(".")[-1]
                defined = rf"(def|class) {part}\b|^{part}( =|:)"
                assert re.search(defined, source, flags=re.MULTILINE), (page.name, name, function)
                count += 1
    assert count > 40


def test_the_figures_of_the_docs_are_those_of_the_tool(monkeypatch, capsys):
    assert run_script(monkeypatch, "tools/figures.py", "no_such") == 2
    assert "no figure is called no_such" in capsys.readouterr().err
    source = (ROOT / "tools/figures.py").read_text()
    saved = re.findall(r'save\(figure, "(\w+)"|FOLDER / "(\w+)\.png"', source)
    names = {a or b for a, b in saved}
    assert names == {path.stem for path in (ROOT / "docs/figures").iterdir()}


def test_the_presets_of_the_page_are_those_of_the_code():
    page = (ROOT / "docs/training.md").read_text()
    assert " ".join(map(str, LAMBDAS)) in page.replace("\n", " ")
    for name in PRESETS:
        config = preset_config(name)
        widths = config["widths"]
        assert widths["h_s.1"] == widths["y"] and len({widths["g_a.1"], widths["z"]}) == 1
        row = re.search(rf"^\| `{name}`[^|]*\| (.*) \|$", page, re.MULTILINE)[1].split(" | ")
        assert row[:3] == [str(widths[group]) for group in ("g_a.1", "y", "h_s.2")]
        assert row[3].split()[-1] == str(len(config["lambdas"]))
        assert config["lambdas"] == LAMBDAS[: len(config["lambdas"])]
