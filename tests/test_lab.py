"""JupyterLab as a person meets it: the home page before anything is run, a notebook opened from it and run, a slider moved."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

pytestmark = pytest.mark.xdist_group("browser")
TOKEN = "a-token-for-this-test"
NOTEBOOK = "SMOTE"


@pytest.fixture(scope="module")
def lab(root, tmp_path_factory):
    """The address of a JupyterLab started by the project's own command."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    home = tmp_path_factory.mktemp("home")
    env = {**os.environ, "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_DATA_DIR": str(home / "data"), "JUPYTER_RUNTIME_DIR": str(home / "run"),
           "IPYTHONDIR": str(home / "ipython")}
    # what the test runs must not be saved into the checkout, as it would be after two minutes
    settings = home / "settings" / "@jupyterlab" / "docmanager-extension" / "plugin.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"autosave": false}')
    env["JUPYTERLAB_SETTINGS_DIR"] = str(home / "settings")
    env.pop("PAPERBENCH_EXPLORE", None)
    log = open(home / "log", "w")
    command = [sys.executable, "-m", "paperbench.cli", "open", "--no-browser", "--port", str(port), f"--IdentityProvider.token={TOKEN}"]
    server = subprocess.Popen(command, cwd=root, env=env, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    for _ in range(120):
        try:
            urllib.request.urlopen(f"{address}/api?token={TOKEN}", timeout=1)
            break
        except (urllib.error.URLError, OSError):
            assert server.poll() is None, (home / "log").read_text()
            time.sleep(0.5)
    yield address
    server.terminate()
    server.wait(20)


def test_lab_asks_for_its_token(lab):
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{lab}/api/contents", timeout=5)


def test_open_a_notebook_from_home_run_it_and_move_a_slider(lab, browser):
    context = browser.new_context(viewport={"width": 1500, "height": 1000})
    outside = []
    context.route(re.compile(r"^https?://(?!127\.0\.0\.1)"), lambda route: (outside.append(route.request.url), route.abort()))
    page = context.new_page()
    try:
        page.set_default_timeout(120_000)
        page.goto(f"{lab}/?token={TOKEN}", timeout=120_000)  # the address that the command prints
        # the home page is there, with links to every method, before any cell has been run
        home = page.locator(".jp-NotebookPanel:visible")
        home.get_by_role("heading", name="Paperbench").first.wait_for()
        link = home.locator("a", has_text=re.compile(f"^{NOTEBOOK}"))
        link.first.scroll_into_view_if_needed()
        link.first.click()
        panel = page.locator(".jp-NotebookPanel:visible")
        panel.locator("h1", has_text=NOTEBOOK).wait_for()
        page.get_by_text("| Idle").wait_for()  # the kernel is there
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        slider = panel.locator(".widget-slider, .widget-hslider").locator(".noUi-handle").first
        for _ in range(240):  # cells far below the window are only rendered when it comes near them
            if slider.count():
                break
            panel.locator(".jp-WindowedPanel-outer").evaluate("e => e.scrollBy(0, 600)")
            page.wait_for_timeout(500)
            if panel.locator(".jp-WindowedPanel-outer").evaluate("e => e.scrollTop + e.clientHeight >= e.scrollHeight - 2"):
                panel.locator(".jp-WindowedPanel-outer").evaluate("e => e.scrollTo(0, 0)")
        slider.wait_for()
        slider.scroll_into_view_if_needed()
        output = slider.locator("xpath=ancestor::*[contains(@class, 'jp-OutputArea-child')][1]")
        plot = output.locator(".js-plotly-plot").filter(has=page.locator(".main-svg")).first
        plot.wait_for()
        shown = "e => JSON.stringify(e.data.map(t => [t.x, t.y, t.z]))"
        before = plot.evaluate(shown)
        slider.focus()
        page.keyboard.press("PageUp")
        page.wait_for_timeout(300)
        for _ in range(60):
            if plot.evaluate(shown) != before:
                break
            page.wait_for_timeout(250)
        assert plot.evaluate(shown) != before, "the figure did not change"
        assert outside == [], outside
    finally:
        if folder := os.environ.get("PAPERBENCH_SCREENSHOTS"):
            page.screenshot(path=f"{folder}/lab.png")
        context.close()
