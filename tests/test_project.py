"""What must hold between notebooks and the files made from them, and for every notebook of the project."""

import json
import os
import re

import pytest

from paperbench.catalogue import catalogue, notebook_paths, project_root
from paperbench.cli import clean
from paperbench.contract import check_notebook
from paperbench.export import export

ROOT = project_root(__file__)
NOTEBOOKS = [p.relative_to(ROOT / "nbs").with_suffix("").as_posix() for p in notebook_paths(ROOT)]


def test_library_tests_lists_and_readme_are_in_step_with_the_notebooks():
    assert export(ROOT, check=True) == []


def test_notebooks_are_committed_without_outputs():
    assert clean(ROOT, check=True) == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_contract(name):
    assert check_notebook(ROOT / "nbs" / f"{name}.ipynb", ROOT) == []


def test_every_chapter_has_a_page_and_names_are_unique():
    entries = catalogue(ROOT)
    for chapter in entries.chapters:
        assert any(e.chapter == chapter and e.kind == "chapter" for e in entries), f"nbs/{chapter}/index.ipynb is missing"
    slugs = [e.slug for e in entries.methods]
    assert len(slugs) == len(set(slugs))


def test_prerequisites_make_no_circle():
    needs = {e.slug: set(e.prerequisites) for e in catalogue(ROOT)}
    done = set()
    while ready := {s for s, n in needs.items() if s not in done and not (n & needs.keys()) - done}:
        done |= ready
    assert done == set(needs), f"in a circle: {sorted(set(needs) - done)}"


@pytest.mark.xdist_group("groups")
def test_tests_of_one_group_stay_on_one_worker(request):
    """pytest-xdist 3.8 marks the group in the test's name; with pytest 9.2 it silently does not, and two workers share a group."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    assert request.node.nodeid.endswith("@groups" if worker else "stay_on_one_worker")


def test_the_readme_names_the_python_whose_text_the_models_were_trained_on():
    named = re.search(r"verdicts are those of Python ([\d.]+\d)\.", (ROOT / "README.md").read_text()).group(1)
    cards = [json.loads(p.read_text()) for p in (ROOT / "paperbench/weights").glob("text_*.json")]
    read = {c["name"]: c["data"] for c in cards if "python_text()" in c.get("data", "")}
    assert {"text_gpt", "text_linear"} <= read.keys() and all(f"Python {named}" in d for d in read.values()), read
    assert f"TEXT = ({named.replace('.', ', ')})" in (ROOT / "bootstrap.py").read_text()
