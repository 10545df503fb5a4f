"""Every notebook runs at its default, short scale; explorations redraw in time; pages keep their budget."""

import json

import pytest

from paperbench import runner
from paperbench.catalogue import notebook_paths, project_root
from paperbench.explore import MIME as EXPLORE_MIME
from paperbench.explore import check_figure, plain_figure

ROOT = project_root(__file__)
NOTEBOOKS = [p.relative_to(ROOT / "nbs").with_suffix("").as_posix() for p in notebook_paths(ROOT)]
PLOTLY_MIME = "application/vnd.plotly.v1+json"
PAGE_BUDGET = 1_500_000
LIVE_MS = 150
HARD_LIMIT_S = 120  # of wall time on a busy machine; on a quiet one the slowest takes 32 s, and authors aim for 10 s


@pytest.fixture(scope="session", params=NOTEBOOKS)
def run(request):
    """The recorded run of one notebook; notebooks that have not been run in their present state are run now."""
    name = request.param
    state = runner.status(ROOT, name)[0]
    if state.status in ("stale", "missing"):
        state = runner.run(name, root=ROOT, workers=1, timeout=300, progress=False)[0]
    return name, state


@pytest.mark.xdist_group("runs")
def test_notebook_is_green_and_in_time(run):
    name, state = run
    assert state.status in ("green", "skipped"), f"{name}: {state.reason}\n{state.traceback}"
    assert state.seconds <= HARD_LIMIT_S, f"{name} took {state.seconds:.0f} s"


@pytest.fixture(scope="session")
def outputs(run):
    """The outputs of the executed notebook, as data by type."""
    cells = json.loads((ROOT / "_runs" / f"{run[0]}.ipynb").read_text())["cells"]
    return [o["data"] for c in cells for o in c.get("outputs", []) if "data" in o]


@pytest.mark.xdist_group("runs")
def test_explorations_are_fast_and_small(run, outputs):
    name, state = run
    reports = [data[EXPLORE_MIME] for data in outputs if EXPLORE_MIME in data]
    for report in reports:
        assert report["redraw_ms"] <= LIVE_MS, f"{name}: a live redraw of {report['title']!r} takes {report['redraw_ms']} ms"
    assert sum(r["bytes"] for r in reports) <= PAGE_BUDGET, f"{name}: {sum(r['bytes'] for r in reports):,} bytes of frames"


@pytest.mark.xdist_group("runs")
def test_figures_show_what_they_hold(run, outputs):
    for number, data in enumerate(d for d in outputs if PLOTLY_MIME in d):
        check_figure(plain_figure(data[PLOTLY_MIME]), {"notebook": run[0], "figure": number})
