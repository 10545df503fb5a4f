"""Set up the project: a virtual environment in .venv with the tested versions, and the package itself, editable.

Needs nothing but Python >= 3.10. The Makefile calls it; a second call with unchanged requirements does nothing.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = Path(os.environ.get("VENV", ROOT / ".venv")).resolve()
PYTHON = VENV / "bin" / "python"
INPUTS = ("constraints.txt", "settings.ini", "pyproject.toml", "setup.py", "bootstrap.py")
EXTRAS = "cluster,data,minilm,site,dev"
TEXT = (3, 11, 7)  # the Python whose documentation and library the language models of the pages were trained on


def fingerprint() -> str:
    """Hash of everything that decides what is installed."""
    text = b"".join((ROOT / name).read_bytes() for name in INPUTS)
    return hashlib.sha256(text + sys.version.encode()).hexdigest()


def call(*command: object, **options: object) -> None:
    """Run a command and stop with its own message when it fails."""
    done = subprocess.run([str(c) for c in command], **options)
    if done.returncode:
        sys.exit(f"set-up failed: {' '.join(map(str, command))} (exit code {done.returncode})")


def works(*command: object) -> bool:
    """Whether a command succeeds, without showing what it says."""
    return subprocess.run([str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def make_environment() -> None:
    """Make the virtual environment; some systems ship Python without the part of `venv` that installs pip."""
    shutil.rmtree(VENV, ignore_errors=True)
    if works(sys.executable, "-m", "venv", VENV) and works(PYTHON, "-m", "pip", "--version"):
        return
    shutil.rmtree(VENV, ignore_errors=True)
    if works(sys.executable, "-m", "pip", "--version"):
        tool = ROOT / "build" / "virtualenv"
        call(sys.executable, "-m", "pip", "install", "--quiet", "--target", tool, "virtualenv")
        call(sys.executable, "-m", "virtualenv", "--quiet", VENV, env={**os.environ, "PYTHONPATH": str(tool)})
        return
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
    command = ["apt-get", "install", "-y", package]
    if shutil.which("apt-get") and hasattr(os, "geteuid"):
        command = command if os.geteuid() == 0 else ["sudo", "-n", *command]
        if works(*command) and works(sys.executable, "-m", "venv", VENV):
            return
    sys.exit(f"set-up failed: this Python has neither venv with pip nor pip; install it, for example: sudo apt-get install {package}")


def main() -> None:
    """Install, unless what is installed is up to date."""
    if sys.version_info < (3, 10):
        sys.exit(f"Paperbench needs Python 3.10 or newer, this is {sys.version.split()[0]}; name another one: make PYTHON=python3.12 ...")
    stamp = VENV / "paperbench-setup"
    if stamp.exists() and stamp.read_text() == fingerprint() and PYTHON.exists():
        return
    print(f"setting up {VENV} with Python {sys.version.split()[0]} (only the first time; downloads torch)", flush=True)
    if sys.version_info[:3] != TEXT:
        print(f"the verdicts about language models belong to the library text of Python {'.'.join(map(str, TEXT))}; thin ones may differ here", flush=True)
    if not (PYTHON.exists() and works(PYTHON, "-m", "pip", "--version")):
        make_environment()
    pip = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    call(*pip, "setuptools", "wheel")
    # torch first and alone: asked for by name and version, an index with a smaller build for this machine can serve it
    call(*pip, "torch==2.13.0")
    call(*pip, "--no-build-isolation", "-e", f"{ROOT}[{EXTRAS}]", cwd=ROOT)
    if sys.version_info < (3, 11):
        # smalldocs asks for 3.11 in its metadata but uses nothing that 3.10 lacks; the site's tests prove it
        call(*pip[:-2], "--no-deps", "--ignore-requires-python", "smalldocs==0.5.4")
    # particles asks for NumPy 1 in its metadata; the tests that compare with it run it on NumPy 2
    call(*pip[:-2], "--no-deps", "particles==0.4")
    # the popup that asks whether to fetch news has no place in front of a class
    call(PYTHON, "-m", "jupyter", "labextension", "disable", "@jupyterlab/apputils-extension:announcements")
    stamp.write_text(fingerprint())


if __name__ == "__main__":
    main()
