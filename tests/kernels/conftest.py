"""What the batteries of the kernels share: watched launches, compiled samples, and a fresh Python."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import paperbench
from paperbench.kernels import core

ROOT = Path(paperbench.__file__).parents[1]


@pytest.fixture
def run_python():
    """Runs code in a fresh interpreter that can import the package under test, and returns what it prints."""

    def run(code, **environment):
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "PYTHONPATH": paths, **environment},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


@pytest.fixture
def watched_launches(monkeypatch):
    """Watches a module's launches, which must ask for no more than its report has compiled.

    What a configuration calls aligned, pointers too, must be divisible by 16, and the compile-time arguments,
    warps and stages must be those of one configuration. Gives a list that fills with pairs of kernel and
    compile-time arguments.
    """

    def watch(module):
        listed = module.configurations(("sm_80",))
        aligned = {c.kernel: c.aligned for c in listed}
        known = {
            (c.kernel, c.num_warps, c.num_stages, *sorted(map(str, c.constants.items()))) for c in listed
        }
        seen = []

        def check(kernel, programs, *args, num_warps=4, num_stages=2, **constants):
            for name, value in zip(kernel.arg_names, args):
                if name in aligned[kernel]:
                    assert (value.data_ptr() if name.endswith("_ptr") else value) % 16 == 0, name
            assert (kernel, num_warps, num_stages, *sorted(map(str, constants.items()))) in known, constants
            seen.append((kernel, constants))
            core.launch(kernel, programs, *args, num_warps=num_warps, num_stages=num_stages, **constants)

        monkeypatch.setattr(module, "launch", check)
        return seen

    return watch


@pytest.fixture
def compile_sample():
    """Compiles chosen configurations, which must fit: so many or more, all if PAPERBENCH_COMPILE_ALL is 1."""

    def compile_chosen(configurations, chosen, least):
        if os.environ.get("PAPERBENCH_COMPILE_ALL") != "1":
            configurations = [c for c in configurations if chosen(c)]
        assert len(configurations) >= least
        for configuration in configurations:
            row = core.compile_configuration(configuration)
            assert row["fits"], row

    return compile_chosen
