"""The site of a small project, from executed notebooks to checked pages, with the real builder and with a stand-in for Quarto."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import plotly.graph_objects as go
import pytest

from paperbench import site
from paperbench.claims import claim
from paperbench.explore import explore

pytestmark = [
    pytest.mark.xdist_group("site-build"),
    pytest.mark.skipif(shutil.which("quarto") is None and not site.importlib.util.find_spec("smalldocs"), reason="NO WEBSITE BUILDER: neither quarto nor smalldocs"),
]
ALPHA = """# Alpha method
> About $\\alpha$ and *more*.

- paper: {title: "An alpha paper", year: 2021, arxiv: "2101.00001"}
- chapter: toy
- keywords: [ode, fast]
- prerequisites: []
- kernel: none
"""
BETA = ALPHA.replace("Alpha", "Beta").replace("alpha paper", "beta paper").replace("2021", "2015").replace("prerequisites: []", "prerequisites: [alpha]")
PROSE = """## The idea

A price of $5 is no formula, $x_t = \\frac{a}{b}$ is one, and so is

$$\\begin{aligned} y &= \\hat{x} \\\\ z &= \\mathbf{y}^\\top \\end{aligned}$$

| symbol | in the code |
|---|---|
| $|x| \\mid y$ | `x` |

See [beta](beta.ipynb#the-idea) and the [chapter](index.ipynb).

<details><summary>What you should have seen</summary>

It *moves*, $k$ times.

</details>
"""
LIBRARY = '''"""Alpha, as a library."""

__all__ = ['double']


def double(x: float, *, times: int = 1) -> float:
    """Double a number.

    Args:
        x: the number.
        times: how often.

    Returns:
        The product.
    """
    return x * 2**times
'''


def output(data):
    return {"output_type": "display_data", "data": json.loads(json.dumps(data)), "metadata": {}}


def draw(n=2, shifted=False):
    return go.Figure(go.Scatter(x=[0, 1, 2], y=[0, n, n + shifted]))


def notebook(*cells, **metadata):
    made = []
    for number, (kind, source, *outputs) in enumerate(cells):
        more = {"outputs": list(outputs), "execution_count": None} if kind == "code" else {}
        made.append({"cell_type": kind, "id": f"c{number}", "metadata": {}, "source": source, **more})
    return {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def write(root, name, nb, run=True):
    """Write a notebook, and its executed copy with the outputs."""
    bare = {**nb, "cells": [{**c, **({"outputs": []} if "outputs" in c else {})} for c in nb["cells"]], "metadata": {}}
    for folder, content in (("nbs", bare), ("_runs", nb)) if run else (("nbs", bare),):
        path = root / folder / f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")


def make_project(root, repository):
    """A project with a home page, a chapter and two methods, as the runner leaves it."""
    exploration = explore(draw, n=(1, 4), shifted=False, title="Toy")
    figure = {"text/html": exploration.render(), site.EXPLORE_MIME: exploration.report}
    measured = claim(paper="Alpha is better.", metric="error (m)", method=[1.0, 1.1, 0.9], baseline=[2.0, 2.2, 1.9], verdict="holds")
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "text/plain": "IntSlider()"}
    alpha = notebook(
        ("markdown", ALPHA), ("code", "#| default_exp toy.alpha"), ("markdown", PROSE), ("code", "#| hide\nsecret = 1"),
        ("code", "#| export\ndef double(x):\n    return 2 * x"), ("code", "#| test\ndef test_double():\n    assert double(1) == 2"),
        ("markdown", "## Does the claim hold?"), ("code", "claim()", output(measured._repr_mimebundle_())),
        ("code", "plain()", output({site.PLOTLY_MIME: json.loads(draw().to_json()), "text/html": "<script src='https://cdn.plot.ly/x.js'></script>"})),
        ("code", "explore()", output(figure)), ("code", "slider", output(widget)),
        ("code", '#| code-fold: true\n#| code-summary: "Solution 1"\nprint(7)', {"output_type": "stream", "name": "stdout", "text": "7\n"}),
        paperbench={"status": "green", "seconds": 1.5, "parameters": {}, "versions": {"torch": "2.13.0"}, "started": "2026-01-02T03:04:05+00:00", "reason": ""},
    )
    write(root, "index", notebook(("markdown", "# Toy bench\n> A small bench."), ("markdown", 'Welcome.\n\n<div id="pb-gallery"></div>\n\n## After')))
    write(root, "toy/index", notebook(("markdown", "# Toys\n> The toy chapter.\n\n- chapter: toy"), ("markdown", "Two methods.")))
    write(root, "toy/alpha", alpha)
    write(root, "toy/beta", notebook(("markdown", BETA), ("markdown", "## The idea\n\nNothing yet."), ("code", "1 + 1")), run=False)
    (root / "paperbench/toy").mkdir(parents=True)
    (root / "paperbench/toy/alpha.py").write_text(LIBRARY)
    (root / "settings.ini").write_text("[DEFAULT]\n")
    shutil.copy(repository / "_quarto.yml", root)
    (root / "nbs/workbench").mkdir()
    write(root, "workbench/plots", notebook(("markdown", "# Plots\n> Pictures.\n\n- chapter: workbench")))


@pytest.fixture(scope="module")
def built(tmp_path_factory, root):
    folder = tmp_path_factory.mktemp("site")
    make_project(folder, root)
    report = site.build_site(folder, engine="smalldocs") if site.importlib.util.find_spec("smalldocs") else site.build_site(folder)
    return folder, report


def page(built, name):
    return (built[0] / "_site" / name).read_text(encoding="utf-8")


def test_every_page_is_there_and_nothing_is_wrong(built):
    folder, report = built
    assert report.errors == [] and report.warnings == [], str(report)
    assert list(report.missing) == ["toy/beta"] and not report.red and not report.stale
    pages = {p.relative_to(folder / "_site").as_posix() for p in (folder / "_site").rglob("*.html")}
    assert pages == {
        "index.html", "chapters.html", "ledger.html", "runs.html", "toy/index.html", "toy/alpha.html", "toy/beta.html", "workbench/index.html",
        "workbench/plots.html", "api/index.html", "api/toy/alpha.html",
    } and report.pages == len(pages)
    assert (folder / "_site/toy/alpha.ipynb").read_bytes() == (folder / "nbs/toy/alpha.ipynb").read_bytes()
    assert not (folder / "_proc/_site").exists()


def test_a_method_page(built):
    text = page(built, "toy/alpha.html")
    assert "secret" not in text and "IntSlider" not in text and "cdn." not in text and "#| " not in re.sub(r"<[^>]+>", "", text)
    assert text.count('class="pb-explore"') == 1 and text.count('class="pb-figure"') == 1 and text.count('class="pb-claim"') == 1
    assert [text.count(f"../assets/{name}") for name in ("plotly.min.js", "explore.js", "explore.css", "gallery.js")] == [1, 1, 1, 0]
    assert text.index("plotly.min.js") < text.index("explore.js")
    assert "<mfrac>" in text and "<mtable" in text and "price of $5 is no formula" in text and "katex" not in text.lower() and "mathjax" not in text.lower()
    assert re.search(r"<td[^>]*><math>.*?∣", text) and re.search(r"<details><summary>What you should have seen</summary>\s*<p>It <em>moves</em>", text)
    assert 'class="pb-cell pb-export"' in text and "test passed" in text
    assert re.search(r'<details class="code-fold">\s*<summary>Solution 1</summary>', text)
    assert 'href="../toy/beta.html#the-idea"' in text or 'href="beta.html#the-idea"' in text
    assert "An alpha paper" in text and 'href="../api/toy/alpha.html"' in text and "1.5 s, 2026-01-02" in text
    assert "About <span" in text or "About <math" in text
    assert "plotly" not in page(built, "toy/beta.html") and "Not run yet" in page(built, "toy/beta.html")


def test_home_chapter_ledger_and_reference(built):
    home = page(built, "index.html")
    assert home.count('<li class="pb-card"') == 2 and home.index("Welcome") < home.index("pb-cards") < home.index("After")
    assert (built[0] / "_site/assets/thumbnails/toy-alpha.svg").read_text().startswith("<svg")
    assert page(built, "toy/index.html").count('<li class="pb-card"') == 2 and "Two methods" in page(built, "toy/index.html")
    ledger = page(built, "ledger.html")
    assert "Alpha is better." in ledger and "1.000 ± 0.058" in ledger and 'href="toy/alpha.html#does-the-claim-hold"' in ledger
    reference = page(built, "api/toy/alpha.html")
    assert "times: int = 1" in re.sub(r"<[^>]+>", "", reference) and "how often." in reference and "Alpha, as a library." in reference
    assert "torch 2.13.0" in page(built, "runs.html")


def test_search_finds_the_pages(built):
    entries = json.loads(page(built, "search.json"))
    assert {"toy/alpha.html", "toy/index.html", "api/toy/alpha.html"} <= {e["href"].partition("#")[0] for e in entries}
    assert any("price of" in e["text"] for e in entries)


def test_a_second_build_changes_nothing_and_is_quick(built):
    folder, first = built
    before = {p: p.stat().st_mtime_ns for p in (folder / "_site").rglob("*") if p.is_file()}
    again = site.build_site(folder, engine=first.engine)
    assert again.made == 0 and {p: p.stat().st_mtime_ns for p in before} == before and again.pages == first.pages
    assert list(again.missing) == ["toy/beta"]


def test_builds_are_deterministic(built, tmp_path, root):
    make_project(tmp_path, root)
    site.build_site(tmp_path, engine=built[1].engine)
    for path in sorted((built[0] / "_site").rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "_site" / path.relative_to(built[0] / "_site")).read_bytes(), path.name


def test_problems_are_reported_and_the_rest_is_built(tmp_path, root):
    make_project(tmp_path, root)
    bad = notebook(("markdown", ALPHA + "\n$\\nosuchcommand$ and [gone](gone.ipynb) and [place](index.ipynb#nowhere)"), ("code", "1"))
    write(tmp_path, "toy/alpha", bad)
    (tmp_path / "nbs/toy/broken.ipynb").write_text("{")
    write(tmp_path, "toy/untitled", notebook(("markdown", "no title")))
    failing = {"output_type": "error", "ename": "ValueError", "evalue": "no luck", "traceback": ["ValueError: no luck"]}
    write(tmp_path, "toy/beta", notebook(("markdown", BETA), ("code", "#| test\nassert 0", failing)))
    (tmp_path / "paperbench/toy/wrong.py").write_text("__all__ = ['x']\ndef (")
    report = site.build_site(tmp_path, engine="auto")
    said = "\n".join(report.errors)
    for words in ("nosuchcommand", "gone.html leads nowhere", "index.html#nowhere names a place", "broken.ipynb: not a notebook", "untitled.ipynb: the first cell",
                  "paperbench.toy.wrong"):
        assert words in said, words
    assert report.red == {"toy/beta": "ValueError: no luck"} and len(report.problems) == len(report.errors) + 1
    text = (tmp_path / "_site/toy/beta.html").read_text()
    assert "The last run failed" in text and "no luck" in text and "test failed" in text
    repaired = site.build_site(tmp_path, engine="auto")
    assert sorted(repaired.errors) == sorted(report.errors)  # what is still wrong is said again


def test_two_builds_at_once_take_turns(tmp_path, root):
    make_project(tmp_path, root)
    start = threading.Barrier(2)

    def build(_):
        start.wait(30)
        return site.build_site(tmp_path, engine="auto")

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(build, range(2))
    assert first.errors == second.errors == [] and first.pages == second.pages > 0
    assert sorted([first.made, second.made])[0] == 0  # the one that waited found everything in place
    assert (tmp_path / "_site/toy/alpha.html").exists() and not (tmp_path / "_proc/_site").exists()


def test_removed_notebooks_lose_their_pages(tmp_path, root):
    make_project(tmp_path, root)
    site.build_site(tmp_path)
    (tmp_path / "nbs/toy/beta.ipynb").unlink()
    write(tmp_path, "toy/alpha", notebook(("markdown", ALPHA), ("code", "1")))
    report = site.build_site(tmp_path)
    assert report.errors == [] and not (tmp_path / "_site/toy/beta.html").exists() and not (tmp_path / "_proc/toy/beta.ipynb").exists()


def test_what_a_project_needs_is_said(tmp_path, root):
    with pytest.raises(FileNotFoundError, match="_quarto.yml is missing"):
        site.build_site(tmp_path)
    with pytest.raises(FileNotFoundError, match="no site"):
        site.serve(tmp_path)


QUARTO = """#!{python}
import json, pathlib, shutil, sys
project = pathlib.Path(sys.argv[-1])
(project.parent / "arguments.json").write_text(json.dumps(sys.argv[1:]))
print("WARN: a warning of quarto's", file=sys.stderr)
if (project.parent / "fail").exists():
    sys.exit("ERROR: quarto could not")
for page in [*project.rglob("*.ipynb"), *project.rglob("*.qmd")]:
    if "_site" not in page.parts:
        target = project / "_site" / page.relative_to(project).with_suffix(".html")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("<h1>" + page.stem + "</h1>")
"""


def test_quarto_is_used_where_it_is_installed(tmp_path, root, monkeypatch):
    project, binaries = tmp_path / "project", tmp_path / "bin"
    project.mkdir()
    binaries.mkdir()
    make_project(project, root)
    quarto = binaries / "quarto"
    quarto.write_text(QUARTO.format(python=sys.executable))
    quarto.chmod(quarto.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{binaries}{os.pathsep}{os.environ['PATH']}")
    report = site.build_site(project)
    assert report.engine == "quarto" and report.warnings == ["a warning of quarto's"] and report.errors == []
    assert json.loads((project / "arguments.json").read_text()) == ["render", str(project / "_proc")]
    assert (project / "_site/toy/alpha.html").read_text() == "<h1>alpha</h1>"
    (project / "fail").touch()
    (project / "nbs/toy/beta.ipynb").unlink()
    with pytest.raises(RuntimeError, match="(?s)quarto failed with code 1.*quarto could not"):
        site.build_site(project)
    assert (project / "_site/toy/alpha.html").exists()  # a failed build leaves the last site in place


def test_quarto_project_file_has_only_keys_that_the_other_builder_knows_too(root, tmp_path):
    config = pytest.importorskip("smalldocs.config")
    shutil.copy(root / "_quarto.yml", tmp_path)
    assert config.load(tmp_path).warnings == []


def test_pandoc_reads_the_processed_pages_alike(built):
    """Quarto is Pandoc with filters; where a Pandoc is installed, formulas, divisions and details must come through it whole."""
    if shutil.which("pandoc") is None:
        pytest.skip("no pandoc here")
    source = "\n\n".join("".join(c["source"]) for c in json.loads((built[0] / "_proc/toy/alpha.ipynb").read_text())["cells"][1:] if c["cell_type"] == "markdown")
    done = subprocess.run(["pandoc", "-f", "markdown-tex_math_dollars", "-t", "html"], input=source, capture_output=True, text=True, check=True)
    mine = page(built, "toy/alpha.html")
    assert done.stdout.count("<math") == mine.count("<math") and done.stdout.count("<mtr") == mine.count("<mtr")
    assert "price of $5 is no formula" in " ".join(done.stdout.split()) and 'class="pb-cell pb-export"' in done.stdout


def test_the_font_for_formulas_travels_with_its_licence(built):
    fonts = built[0] / "_site/assets/fonts"
    assert (fonts / "stix-two-math.woff2").read_bytes()[:4] == b"wOF2" and "SIL OPEN FONT LICENSE" in (fonts / "OFL.txt").read_text()
    assert Path(site.files("paperbench") / "assets/site.css").read_text().count("fonts/stix-two-math.woff2") == 1
