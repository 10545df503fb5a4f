"""What the hand-written tests share: the project's root, and a browser where there is one."""

import os
import shutil
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# the background services of a browser would ask the network; a test's browser asks nobody but the test's own server
BROWSER_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic",
    "--no-first-run", "--disable-features=OptimizationHints,MediaRouter,Translate",
]


def pytest_configure(config):
    for line in ("xdist_group(name): tests that one worker runs together",):
        config.addinivalue_line("markers", line)


@pytest.fixture(scope="session")
def root():
    """The repository's root."""
    return Path(__file__).resolve().parents[1]


def browser_path():
    """Path of a Chromium, or None."""
    named = os.environ.get("PAPERBENCH_BROWSER")
    mac = ["/Applications/Chromium.app/Contents/MacOS/Chromium", "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"]
    return named or next(filter(None, map(shutil.which, BROWSERS)), None) or next((p for p in mac if Path(p).exists()), None)


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium; skipped with one reason where there is none, a failure where PAPERBENCH_REQUIRE_BROWSER is set."""
    path = browser_path()
    if path is None:
        reason = "NO BROWSER: install Chromium (Debian, Ubuntu: apt-get install chromium; macOS: brew install --cask chromium)"
        if os.environ.get("PAPERBENCH_REQUIRE_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=path, args=BROWSER_FLAGS)
        yield found
        found.close()
