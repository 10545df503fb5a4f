"""What every kernel module must keep, whatever it computes."""

import importlib
import inspect
from pathlib import Path

import pytest

from paperbench.kernels import core
from paperbench.kernels.core import HAS_TRITON, read_results

NOTEBOOKS = Path(__file__).parents[2] / "nbs" / "kernels"
KERNELS = sorted(p.stem for p in Path(core.__file__).parent.glob("*.py") if p.stem not in ("__init__", "core"))
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def module(name):
    return importlib.import_module(f"paperbench.kernels.{name}")


def test_kernels_are_found():
    assert "linear_attention" in KERNELS


@pytest.mark.parametrize("name", KERNELS)
def test_one_public_function_chooses_the_implementation(name):
    public = getattr(module(name), name)
    assert inspect.signature(public).parameters["impl"].default == "auto"
    reference = getattr(module(name), f"{name}_reference")
    assert callable(reference) and reference.__doc__


@pytest.mark.parametrize("name", KERNELS)
def test_benchmark_takes_a_device(name):
    assert inspect.signature(module(name).benchmark).parameters["device"].default == "cuda"


def test_imports_without_triton(run_python):
    code = "import sys; sys.modules['triton'] = None\nimport importlib\n" + "\n".join(
        f"m = importlib.import_module('paperbench.kernels.{name}'); assert callable(m.{name})" for name in KERNELS
    )
    run_python(code)


@needs_triton
@pytest.mark.parametrize("name", KERNELS)
def test_the_compile_report_is_complete_and_clean(name):
    if not NOTEBOOKS.exists():
        pytest.skip("the report lies beside the notebook, which is not part of the package")
    report = read_results(NOTEBOOKS / f"{name}_compiled.json")
    assert report["fingerprint"] == module(name).fingerprint(), "the kernel has changed: write compile_all() again"
    wanted = sorted((c.kernel.__name__, c.target, c.num_warps) for c in module(name).configurations())
    assert sorted((r["kernel"], r["target"], r["warps"]) for r in report["rows"]) == wanted
    assert {r["target"] for r in report["rows"]} == set(core.TARGETS)
    for row in report["rows"]:
        target = core.TARGETS[row["target"]]
        assert row["spill_bytes"] == 0 and row["registers"] <= target.register_limit, row
        assert row["shared_bytes"] <= target.shared_limit and row["fits"], row
