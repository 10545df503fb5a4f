"""The runner under faults: real kernels, process pools, Dask workers and signals.

Every process started here inherits a mark in its environment, so each test can also prove that nothing is
left running.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import uuid
from pathlib import Path

import psutil
import pytest

from paperbench import runner
from paperbench.runner import (
    Interrupted,
    content_hash,
    cores,
    notebook_inputs,
    read_record,
    report_table,
    run,
    status,
    write_output,
)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="process groups and signals of a POSIX system")

MARK = "PAPERBENCH_TEST_MARK"
FRONT_MATTER = "# Toy\n> A toy.\n\n- chapter: a\n- keywords: [toy]"
# tells the process that runs it, and waits until the test lets it go on
WAIT_FOR_GO = """
    import os, pathlib, time
    pathlib.Path("starting").write_text(str(os.getppid()))
    os.replace("starting", "started")
    while not pathlib.Path("go").exists():
        time.sleep(0.02)
"""


def notebook(*cells: str, parameters: str | None = None, first: str = FRONT_MATTER) -> str:
    """A notebook as text: front matter, a `parameters` cell where given, and code cells."""
    made = [{"cell_type": "markdown", "id": "first", "metadata": {}, "source": first}]
    tagged = [(parameters, ["parameters"])] if parameters is not None else []
    for i, (source, tags) in enumerate([*tagged, *((c, []) for c in cells)]):
        cell = {
            "cell_type": "code",
            "id": f"c{i}",
            "metadata": {"tags": tags},
            "source": textwrap.dedent(source).strip(),
        }
        made.append(cell | {"outputs": [], "execution_count": None})
    return json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def project(folder: Path, **notebooks: str) -> Path:
    """A project with notebooks nbs/a/<name>.ipynb."""
    (folder / "nbs/a").mkdir(parents=True)
    (folder / "settings.ini").write_text("[DEFAULT]\n")
    for name, text in notebooks.items():
        (folder / f"nbs/a/{name}.ipynb").write_text(text)
    return folder


def printed(path: Path) -> str:
    """What the cells of an executed notebook wrote to the standard output."""
    cells = json.loads(path.read_text())["cells"]
    outputs = [o for c in cells for o in c.get("outputs", ())]
    return "".join(
        "".join(o["text"]) for o in outputs if o["output_type"] == "stream" and o["name"] == "stdout"
    )


def marked(value: str) -> list[psutil.Process]:
    """The processes, other than this one, that carry a mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            own = process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE
            # the resource tracker of multiprocessing lives as long as the test process
            if (
                not own
                and process.environ().get(MARK) == value
                and "resource_tracker" not in command(process)
            ):
                found.append(process)
    return found


def until(condition, seconds: float = 30.0, what: str = "the condition"):
    """Wait for something to become true, and give it back."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come true within {seconds} s"
        time.sleep(0.05)
    return value


@contextlib.contextmanager
def nothing_left_behind(scratch: bool = False):
    """Mark all processes started inside; afterwards none may be left, nor anything in their temporary folder.

    Args:
        scratch: whether scratch folders may stay, because everybody who could remove them was killed.
    """
    value = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="pb") as temporary, pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, value)
        patch.setenv("TMPDIR", temporary)
        try:
            yield value
            until(lambda: not marked(value), 20.0, "the end of all processes")
            assert scratch or not list(Path(temporary).glob("paperbench-*"))
        finally:
            for process in marked(value):
                with contextlib.suppress(psutil.Error):
                    process.kill()


def command(process: psutil.Process) -> str:
    """Command line of a process, empty when it is gone."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


# ------------------------------------------------------------------------------
# one run with every fault that a notebook can have: one red row each

FAULTY = {
    "raises": (notebook("x = {}", "x['absent']"), r"KeyError: 'absent'"),
    "exits": (
        notebook("import os", "os._exit(3)"),
        r"kernel died \(exit code 3\) in the cell that starts with `os._exit\(3\)`",
    ),
    "killed": (
        notebook("import os, signal", "os.kill(os.getpid(), signal.SIGKILL)"),
        r"kernel died \(killed by signal 9, SIGKILL: out of memory\?\) in the cell that starts with `os.kill",
    ),
    "crashes": (
        notebook("import ctypes", "ctypes.string_at(0)"),
        r"kernel died \(killed by signal 11, SIGSEGV\)",
    ),
    # holds the interpreter's lock in C code, ignores polite signals, and has a subprocess
    "a_hang": (
        notebook(
            "import ctypes, signal, subprocess\nprint('before')",
            "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
            "other = subprocess.Popen(['sleep', '600'])\nctypes.PyDLL(None).sleep(600)",
        ),
        r"time limit of 20 s exceeded in the cell that starts with `other = subprocess",
    ),
    "leaves": (
        notebook("import sys", "sys.exit()", "print('never')"),
        r"1 cells below it did not run \(sys.exit\?\)",
    ),
    "orphaned": (
        notebook(
            "import ctypes, os, signal",
            "os.kill(os.getppid(), signal.SIGKILL)\nctypes.PyDLL(None).sleep(600)",
        ),
        r"the process that ran the notebook ended early \(killed by signal 9",
    ),
    "half": (notebook("1")[:-20], r"nbs/a/half.ipynb: not valid JSON .*restore it from version control"),
    "listed": ("[]", r"nbs/a/listed.ipynb: JSON, but not a notebook of format 4"),
    "untitled": (
        notebook("1", first="no title"),
        r"nbs/a/untitled.ipynb: the first cell must be Markdown with '# Title'",
    ),
    "looping": (
        notebook("1", parameters="for i in range(3): pass"),
        r"nbs/a/looping.ipynb: the parameters cell may hold only assignments .*`for i in range\(3\):`",
    ),
}
SOUND = notebook(
    """
    import json, os, subprocess, sys
    left_behind = subprocess.Popen(["sleep", "600"])
    names = ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"]
    names += ["PAPERBENCH_RUN", "JPY_SESSION_NAME"]
    env = {name: os.environ.get(name) for name in names}
    seen = {"env": env, "startup": "from_startup" in globals(), "scale": scale}
    print(json.dumps(seen | {"python": sys.executable, "folder": os.getcwd()}))
    """,
    parameters='scale = "short"',
)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """All faulty notebooks and a sound one, run in surroundings that would mislead a kernel."""
    root = project(
        tmp_path_factory.mktemp("faulty"), sound=SOUND, **{n: text for n, (text, _) in FAULTY.items()}
    )
    spec = root / "elsewhere/kernels/python3"  # a kernel called python3 that is no Python
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(
        json.dumps({"argv": ["false"], "display_name": "?", "language": "python"})
    )
    startup = root / "profile/profile_default/startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text("from_startup = True\n")
    with pytest.MonkeyPatch.context() as patch, nothing_left_behind():
        patch.setenv("JUPYTER_PATH", str(root / "elsewhere"))
        patch.setenv("IPYTHONDIR", str(root / "profile"))
        patch.setenv("JPY_SESSION_NAME", "the caller's")
        patch.setenv("OMP_NUM_THREADS", "64")
        results = run(root=root, workers=2, timeout=20, parameters={"scale": "short"}, progress=False)
    return root, {r.notebook.removeprefix("a/"): r for r in results}


@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_notebook_is_one_red_row_with_the_reason(faulty, name):
    root, found = faulty
    result, output = found[name], root / f"_runs/a/{name}.ipynb"
    assert result.status == "red" and re.search(FAULTY[name][1], result.reason), result
    assert "\n" not in result.reason and f"a/{name}" in report_table([result])
    record = read_record(output)
    assert record["status"] == "red" and record["reason"] == result.reason and Path(result.output) == output


def test_the_sound_notebook_beside_them_is_green_and_runs_in_its_own_surroundings(faulty):
    root, found = faulty
    assert [n for n, r in found.items() if r.status == "green"] == ["sound"] and len(found) == len(FAULTY) + 1
    seen = json.loads(printed(root / "_runs/a/sound.ipynb"))
    threads = str(max(1, cores() // 2))
    assert seen["env"] == {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "PAPERBENCH_RUN": "1",
        "JPY_SESSION_NAME": None,
    }
    assert Path(seen["python"]).samefile(sys.executable) and Path(seen["folder"]).samefile(root / "nbs/a")
    assert seen["startup"] is False and seen["scale"] == "short"
    record = read_record(root / "_runs/a/sound.ipynb")
    assert (
        record["parameters"] == {} and record["versions"]["python"].startswith("3.") and record["seconds"] > 0
    )


def test_red_outputs_keep_what_ran_and_say_where_it_ended(faulty):
    root, found = faulty
    assert "KeyError" in found["raises"].traceback and "x['absent']" in found["raises"].traceback
    assert printed(root / "_runs/a/a_hang.ipynb") == "before\n"
    for name in ("exits", "killed", "a_hang"):
        cells = json.loads((root / f"_runs/a/{name}.ipynb").read_text())["cells"]
        assert [o["evalue"] for o in cells[-1]["outputs"] if o["output_type"] == "error"] == [
            found[name].reason
        ]
    assert found["a_hang"].seconds < 20 + 8


def test_a_parameter_for_a_notebook_without_parameters_cell_is_a_red_row(tmp_path):
    root = project(tmp_path, bare=notebook("1"))
    (result,) = run("bare", root=root, parameters={"scale": "full"}, progress=False)
    assert (
        result.status == "red" and "no cell has the tag `parameters`, so scale cannot be set" in result.reason
    )


# ------------------------------------------------------------------------------
# workers that die


def in_thread(**arguments):
    """Start `run` in a thread; the returned function waits for its results."""
    box: dict = {}

    def call():
        try:
            box["results"] = run(**arguments)
        except BaseException as e:
            box["error"] = e

    thread = threading.Thread(target=call)
    thread.start()

    def results(seconds: float = 60.0):
        thread.join(seconds)
        assert not thread.is_alive(), "the run did not end"
        if "error" in box:
            raise box["error"]
        return {r.notebook.removeprefix("a/"): r for r in box["results"]}

    return results


def worker_of(root: Path) -> psutil.Process:
    """The worker that runs the waiting notebook: above its kernel's parent and any fork server."""
    parent = psutil.Process(int((root / "nbs/a/started").read_text())).parent()
    return parent.parent() if "_serve_forks" in command(parent) else parent


def test_a_killed_pool_worker_loses_no_notebook(tmp_path):
    log = "import os\nwith open('log', 'a') as f: print(os.path.basename(os.getcwd()), '{}', file=f)"
    names = ["first", "waits", "later"]
    texts = {n: notebook(log.format(n), WAIT_FOR_GO if n == "waits" else "1") for n in names}
    root = project(tmp_path, **texts)
    with nothing_left_behind() as value:
        results = in_thread(root=root, workers=2, progress=False, timeout=60)
        until((root / "nbs/a/started").exists)
        until(lambda: (read_record(root / "_runs/a/first.ipynb") or {}).get("status") == "green")
        worker = worker_of(root)
        assert "spawn_main" in command(worker) and worker in marked(value)
        worker.kill()
        (root / "nbs/a/go").touch()
        found = results()
    assert {n: r.status for n, r in found.items()} == dict.fromkeys(names, "green")
    ran = (root / "nbs/a/log").read_text().split()[1::2]
    assert ran.count("first") == 1 and ran.count("waits") == 2, ran


def test_a_notebook_that_always_kills_its_worker_is_red_and_the_others_are_green(tmp_path):
    # takes its parent and its worker down, then holds the lock: its kernel cannot even look for a parent
    killer = """
        import ctypes, os, psutil, signal
        child = worker = psutil.Process(os.getppid())
        while "spawn_main" not in " ".join(worker.cmdline()):
            worker = psutil.Process(worker.ppid())
        for process in (worker, child):
            os.kill(process.pid, signal.SIGKILL)
        ctypes.PyDLL(None).sleep(600)
    """
    root = project(tmp_path, killer=notebook(killer), other=notebook("1 + 1"), third=notebook("2 + 2"))
    with nothing_left_behind(scratch=True):
        found = in_thread(root=root, workers=2, progress=False, timeout=60)()
    assert {n: r.status for n, r in found.items()} == {"killer": "red", "other": "green", "third": "green"}
    assert found["killer"].reason.startswith("its worker died twice while running it")
    assert read_record(root / "_runs/a/killer.ipynb")["status"] == "red"


linux = pytest.mark.skipif(sys.platform != "linux", reason="forks are used on Linux only")
# In what follows processes look for those above them by `ppid`. `psutil.Process.parents` compares times of creation,
# which it takes from the system's clock; when the clock is set meanwhile, it stops at the first parent.

# kills the process that its parent was forked from
KILLS_THE_SERVER = """
    import os, psutil, signal, time
    server = psutil.Process(psutil.Process(os.getppid()).ppid())
    assert "_serve_forks" in " ".join(server.cmdline()), server.cmdline()
    os.kill(server.pid, signal.SIGKILL)
    time.sleep(600)
"""
LEAVES_TRACES = """
    import json, math, os, random, sys
    early = sorted(n for n in sys.modules if n.startswith("paperbench"))
    import numpy, paperbench.catalogue
    traces = ["trace" in os.environ, hasattr(math, "trace"), hasattr(paperbench.catalogue, "trace")]
    draws = [numpy.random.rand(), random.random()]
    print(json.dumps([early, traces, os.path.basename(os.getcwd()), draws]))
    os.environ["trace"] = "left"
    math.trace = True
    paperbench.catalogue.trace = True
    os.chdir("/")
"""


@linux
def test_a_killed_fork_server_costs_one_notebook_its_row_and_the_worker_goes_on(tmp_path):
    grandparent = "import os, psutil\nprint(psutil.Process(os.getppid()).ppid())"
    root = project(tmp_path, x=notebook(grandparent), y=notebook(KILLS_THE_SERVER), z=notebook(grandparent))
    with nothing_left_behind():
        found = in_thread(root=root, workers=1, progress=False, timeout=60)()
    told = {n: (r.reason, r.traceback) for n, r in found.items()}
    assert {n: r.status for n, r in found.items()} == {"x": "green", "y": "red", "z": "green"}, told
    assert "the process that ran the notebook ended early" in found["y"].reason
    servers = [int(printed(root / f"_runs/a/{n}.ipynb")) for n in ("x", "z")]
    assert servers[0] != servers[1]


@linux
def test_forked_notebooks_share_nothing_that_one_of_them_changed(tmp_path):
    root = project(tmp_path, x=notebook(LEAVES_TRACES), y=notebook(LEAVES_TRACES))
    with nothing_left_behind():
        found = in_thread(root=root, workers=1, progress=False, timeout=60)()
    assert {r.status for r in found.values()} == {"green"}
    first, second = [json.loads(printed(root / f"_runs/a/{n}.ipynb")) for n in ("x", "y")]
    assert first[:3] == second[:3] == [[], [False, False, False], "a"]
    assert all(a != b for a, b in zip(first[3], second[3]))


@linux
def test_numerical_modules_are_there_before_the_first_cell_and_nothing_runs_in_the_server(tmp_path):
    check = """
        import os, sys
        early = sorted({"torch", "plotly.graph_objects", "scipy.stats"} & sys.modules.keys())
        import numpy, psutil, torch, paperbench.plots
        server = psutil.Process(psutil.Process(os.getppid()).ppid())
        alone = server.num_threads() <= max(1, int(os.environ["OPENBLAS_NUM_THREADS"]))
        print(early, alone, torch.get_num_threads(), numpy.random.get_state()[1][:4].tolist())
        assert torch.allclose(torch.eye(500) @ torch.ones(500, 500), torch.ones(500, 500))
    """
    root = project(tmp_path, x=notebook(check), y=notebook(check))
    with nothing_left_behind():
        found = in_thread(root=root, workers=1, progress=False, timeout=120)(120.0)
    assert {n: r.status for n, r in found.items()} == {"x": "green", "y": "green"}, found
    seen = [printed(root / f"_runs/a/{n}.ipynb").strip() for n in ("x", "y")]
    early = "['plotly.graph_objects', 'scipy.stats', 'torch']"
    assert all(text.startswith(f"{early} True {cores()} [") for text in seen), seen
    assert seen[0] != seen[1]  # the state of NumPy's global generator


def test_cold_runs_start_every_process_afresh(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERBENCH_COLD", "1")
    check = """
        import os, psutil
        child = psutil.Process(os.getppid())
        print([" ".join(p.cmdline()) for p in (child, psutil.Process(child.ppid()))])
    """
    root = project(tmp_path, x=notebook(check), y=notebook("import os", "os._exit(3)"))
    with nothing_left_behind():
        found = in_thread(root=root, workers=1, progress=False, timeout=60)()
    assert found["x"].status == "green" and "_serve_forks" not in printed(root / "_runs/a/x.ipynb")
    assert found["y"].reason.startswith("kernel died (exit code 3)")


def test_a_dask_cluster_survives_the_loss_of_a_worker(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="the extra `cluster` is not installed")
    threads = "import os\nprint(os.environ['OMP_NUM_THREADS'])"
    root = project(
        tmp_path, waits=notebook(WAIT_FOR_GO, threads), one=notebook(threads), two=notebook(threads)
    )
    with nothing_left_behind():
        cluster = distributed.LocalCluster(
            n_workers=2, processes=True, threads_per_worker=1, dashboard_address=None, silence_logs="CRITICAL"
        )
        with cluster:
            results = in_thread(root=root, cluster=cluster.scheduler_address, progress=False, timeout=60)
            until((root / "nbs/a/started").exists)
            worker = worker_of(root)
            assert worker.pid in [nanny.pid for nanny in cluster.workers.values()]
            worker.kill()
            (root / "nbs/a/go").touch()
            found = results()
            assert {n: r.status for n, r in found.items()} == {
                "waits": "green",
                "one": "green",
                "two": "green",
            }
            assert printed(root / "_runs/a/one.ipynb").strip() == str(max(1, cores() // 2))
            # Dask itself moved the notebook to the other worker; where it gives up, the runner resubmits
            cluster.scheduler.allowed_failures = 0
            until(lambda: len(cluster.scheduler.workers) == 2, what="the restart of the worker")
            for name in ("started", "go"):
                (root / "nbs/a" / name).unlink()
            results = in_thread(
                selection="waits",
                root=root,
                cluster=cluster.scheduler_address,
                fresh=True,
                progress=False,
                timeout=60,
            )
            until((root / "nbs/a/started").exists)
            worker_of(root).kill()
            (root / "nbs/a/go").touch()
            assert results()["waits"].status == "green"
            again = {
                r.notebook: r.status
                for r in run(root=root, cluster=cluster.scheduler_address, progress=False)
            }
            assert set(again.values()) == {"skipped"}
    monkeypatch.setattr(runner, "CONNECT_SECONDS", 0.5)
    with pytest.raises(ConnectionError, match="no Dask scheduler answers"):
        run("one", root=root, cluster="tcp://127.0.0.1:1", fresh=True, progress=False)


# ------------------------------------------------------------------------------
# the command that dies

COMMAND = """
import signal, sys
from paperbench.runner import Interrupted, report_table, run
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores Ctrl-C
    try:
        print(report_table(run(root=sys.argv[1], workers=2, timeout=60, progress=True)))
    except Interrupted as stopped:
        print("finished:", *(r.notebook for r in stopped.results))
        sys.exit(130)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
def test_a_stopped_command_leaves_finished_outputs_and_the_next_run_resumes(tmp_path, how):
    root = project(tmp_path, quick=notebook("1"), waits=notebook(WAIT_FOR_GO))
    (tmp_path / "command.py").write_text(COMMAND)
    with nothing_left_behind():
        with open(tmp_path / "out.txt", "w") as out, open(tmp_path / "err.txt", "w") as err:
            process = subprocess.Popen(
                [sys.executable, str(tmp_path / "command.py"), str(root)],
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        until((root / "nbs/a/started").exists)
        until(lambda: "green a/quick" in (tmp_path / "err.txt").read_text())
        if how == signal.SIGINT:
            os.killpg(process.pid, how)  # as a terminal does: to the command and its workers
        else:
            process.kill()
        process.wait(60)
        if how == signal.SIGINT:
            assert process.returncode == 130
            assert (tmp_path / "out.txt").read_text().split() == ["finished:", "a/quick"]
            assert "Traceback" not in (tmp_path / "err.txt").read_text()
            assert not list((root / "_runs").glob(".lease-*"))
    assert sorted(p.name for p in (root / "_runs/a").iterdir()) == ["quick.ipynb"]
    assert {r.notebook: r.status for r in status(root)} == {"a/quick": "green", "a/waits": "missing"}
    (root / "nbs/a/go").touch()
    assert [(r.notebook, r.status) for r in run(root=root, progress=False)] == [
        ("a/quick", "skipped"),
        ("a/waits", "green"),
    ]


def test_a_script_without_a_main_guard_is_told_so_and_nothing_is_recorded(tmp_path):
    root = project(tmp_path, one=notebook("1"))
    (tmp_path / "script.py").write_text(
        f"from paperbench.runner import run\nrun(root={str(root)!r}, workers=2)\n"
    )
    with nothing_left_behind():
        done = subprocess.run(
            [sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 1 and "worker processes do not start" in done.stderr.splitlines()[-1]
    assert status(root)[0].status == "missing"


def test_interrupted_is_a_keyboard_interrupt():
    assert issubclass(Interrupted, KeyboardInterrupt) and Interrupted([]).results == []


def test_a_writer_that_is_killed_leaves_the_old_output_or_the_new_one(tmp_path):
    path = tmp_path / "out.ipynb"
    nb = json.loads(notebook(*(f"'{'x' * 50_000}'" for _ in range(40))))
    write_output(path, nb, {"status": "green", "n": -1})
    (tmp_path / "nb.json").write_text(json.dumps(nb))
    code = textwrap.dedent("""
        import itertools, json, sys
        from paperbench.runner import write_output
        nb = json.load(open(sys.argv[2]))
        for n in itertools.count():
            write_output(sys.argv[1], nb, {"status": "green", "n": n})
    """)
    written = []
    for trial in range(4):
        before = path.stat().st_mtime_ns
        writer = subprocess.Popen([sys.executable, "-c", code, str(path), str(tmp_path / "nb.json")])
        until(lambda since=before: path.stat().st_mtime_ns != since)
        time.sleep(0.013 * trial)
        writer.kill()
        writer.wait()
        whole = json.loads(path.read_text())
        assert len(whole["cells"]) == 41
        written.append(whole["metadata"]["paperbench"]["n"])
    assert max(written) >= 0


# ------------------------------------------------------------------------------
# skipping


def test_unchanged_notebooks_are_skipped_and_any_change_below_them_runs_them_again(tmp_path):
    root = project(
        tmp_path,
        uses=notebook("from paperbench.near import answer", "print(answer())", "weights = 'net'"),
        plain=notebook("1"),
    )
    library = root / "paperbench"
    (library / "weights").mkdir(parents=True)
    (library / "__init__.py").write_text("")
    (library / "near.py").write_text("from paperbench import far\n\n\ndef answer():\n    return far.value\n")
    (library / "far.py").write_text("value = 'first'\n")
    (library / "weights/net.safetensors").write_bytes(b"1")
    (root / "constraints.txt").write_text("torch==1\n")

    def statuses(**arguments):
        results = run(root=root, workers=2, progress=False, **arguments)
        return {r.notebook.removeprefix("a/"): r.status for r in results}

    def stale():
        return {r.notebook.removeprefix("a/"): r.reason for r in status(root) if r.status == "stale"}

    with nothing_left_behind():
        assert statuses() == {"plain": "green", "uses": "green"}
        assert (
            printed(root / "_runs/a/uses.ipynb") == "first\n"
        )  # the checkout's library, not an installed one
        begin = time.monotonic()
        assert statuses() == {"plain": "skipped", "uses": "skipped"}
        assert time.monotonic() - begin < 1.0

        (library / "far.py").write_text("value = 'second'\n")
        assert stale() == {"uses": "changed since its last run: paperbench/far.py"}
        assert statuses() == {"plain": "skipped", "uses": "green"}
        assert printed(root / "_runs/a/uses.ipynb") == "second\n" and stale() == {}

        (library / "weights/net.safetensors").write_bytes(b"2")
        assert stale() == {"uses": "changed since its last run: paperbench/weights/net.safetensors"}
        (library / "weights/net.safetensors").write_bytes(b"1")
        (root / "constraints.txt").write_text("torch==2\n")
        assert stale() == dict.fromkeys(["plain", "uses"], "changed since its last run: constraints.txt")
        (root / "constraints.txt").write_text("torch==1\n")
        assert stale() == {} and statuses(selection="plain", fresh=True) == {"plain": "green"}


def test_a_red_notebook_runs_again_although_nothing_changed(tmp_path):
    root = project(tmp_path, flaky=notebook("import pathlib", "assert pathlib.Path('go').exists()"))
    with nothing_left_behind():
        assert run(root=root, progress=False)[0].status == "red" == status(root)[0].status
        (root / "nbs/a/go").touch()
        assert run(root=root, progress=False)[0].status == "green" == status(root)[0].status
    inputs = notebook_inputs(root, "a/flaky", {})
    assert read_record(root / "_runs/a/flaky.ipynb")["hash"] == content_hash(inputs)
