"""The built site in a real browser with the network cut off: every control moved, themes, gallery, ledger, formulas, search."""

import json
import re
import threading

import pytest

from paperbench.catalogue import catalogue, project_root
from paperbench.site import SiteServer, build_site, page_of

pytestmark = pytest.mark.xdist_group("site")
ENTRIES = list(catalogue(project_root(__file__), strict=False))
METHODS = [page_of(e) for e in ENTRIES if e.kind == "method"]
EXPLORED = METHODS + [page_of(e) for e in ENTRIES if e.kind == "kernel" or e.slug == "bakeoff"]
# what the plot shows, as a short text: the traces, and the parts of the layout that a frame decides
FIGURE = """root => {
  const plot = root.querySelector('.js-plotly-plot');
  const plain = (k, v) => ArrayBuffer.isView(v) ? Array.from(v) : v;
  const axes = Object.entries(plot.layout).filter(([k]) => /^[xy]axis/.test(k)).map(([k, v]) => [k, v.title, v.type, v.autorange ? null : v.range]);
  const text = JSON.stringify([plot.data, plot.layout.title, plot.layout.annotations, plot.layout.shapes, axes], plain);
  let h = 0;
  for (let i = 0; i < text.length; i++) h = (h * 31 + text.charCodeAt(i)) | 0;
  return h + ':' + text.length;
}"""
# start playing, and press again in the same moment in which the slider has left its first value
PLAY = """([play, slider]) => new Promise(done => {
  play.click();
  const look = setInterval(() => {
    if (Number(slider.value) < 1) return;
    clearInterval(look);
    const pressed = play.getAttribute('aria-pressed');
    play.click();
    done([Number(slider.value), pressed]);
  }, 20);
})"""


@pytest.fixture(scope="session")
def site(root):
    """The repository's own site, built from what the last run of its notebooks left, and a server for it."""
    report = build_site(root)
    absent = [name for name in report.missing if f"{name}.html" in METHODS]
    assert not absent, f"run the notebooks before this test (make test does): no results of {', '.join(absent)}"
    with SiteServer(report.site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.report = report
        yield server
        server.shutdown()


class Visit:
    """A browser page that may ask nobody but the site, and that notes everything that goes wrong."""

    def __init__(self, browser, site, **options):
        self.site, self.trouble = site, []
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "color_scheme": "light", **options})
        self.context.set_default_timeout(60_000)
        self.context.route("**/*", self.guard)
        self.page = self.context.new_page()
        self.page.on("console", lambda m: self.trouble.append(f"console: {m.text} ({m.location.get('url', '')})") if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.trouble.append(f"exception: {e}"))
        # a request that ends because the test goes on to the next page did not fail
        self.page.on("requestfailed", lambda r: self.trouble.append(f"failed: {r.url}") if "ERR_ABORTED" not in (r.failure or "") else None)
        self.page.on("response", lambda r: self.trouble.append(f"{r.status}: {r.url}") if r.status >= 400 else None)

    def guard(self, route):
        if route.request.url.startswith((self.site.address, "data:", "blob:")):
            return route.continue_()
        self.trouble.append(f"asked outside: {route.request.url}")
        return route.abort()

    def open(self, path):
        self.page.goto(self.site.address + path, wait_until="load")
        return self.page

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.context.close()
        if kind is None:
            assert self.trouble == []


def drawn(root):
    """Bring an exploration or figure into view and wait until its plot is there."""
    root.scroll_into_view_if_needed()
    root.locator(".main-svg").first.wait_for(timeout=60_000)
    root.page.wait_for_function("e => e.classList.contains('pb-ready')", arg=root.element_handle(), timeout=60_000)


def test_the_site_is_whole(site):
    assert site.report.problems == [] and METHODS


def test_no_page_asks_outside_or_complains(site, browser):
    pages = sorted(p.relative_to(site.report.site).as_posix() for p in site.report.site.rglob("*.html"))
    assert {"index.html", "ledger.html", "chapters.html", "runs.html", "api/index.html", *METHODS} <= set(pages)
    with Visit(browser, site) as visit:
        for path in pages:
            page = visit.open(path)
            assert page.locator("h1").count() == 1, path
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{path} is wider than the window"


def test_the_guard_sees_a_request_to_the_outside(site, browser):
    visit = Visit(browser, site)
    visit.open("index.html").evaluate("() => { document.body.append(Object.assign(new Image(), {src: 'https://example.org/x.png'})) }")
    visit.page.wait_for_timeout(300)
    visit.context.close()
    assert any("asked outside: https://example.org/x.png" in t for t in visit.trouble)


def step(control, key):
    """Press a key on a control."""
    control.focus()
    control.press(key)


@pytest.mark.parametrize("path", EXPLORED)
def test_every_control_of_every_exploration_changes_its_figure(site, browser, path):
    with Visit(browser, site) as visit:
        page = visit.open(path)
        explorations = page.locator(".pb-explore").all()
        assert explorations, f"{path} has no exploration"
        for root in explorations:
            drawn(root)
            first = root.evaluate(FIGURE)
            controls = root.locator("[data-control]").all()
            assert controls
            for control in controls:
                name, kind = control.get_attribute("data-control"), control.evaluate("e => e.type")
                assert control.is_enabled() and control.evaluate("e => e.labels.length") == 1, f"{path}: {name} has no label"
                count = int(control.get_attribute("data-count"))
                before = root.screenshot()
                for move in range(1, 1 if count < 2 else count + 1):
                    if kind == "range":
                        at = (int(control.get_attribute("data-initial")) + move) % count
                        step(control, "Home")
                        for _ in range(at):
                            step(control, "ArrowRight")
                    else:
                        step(control, "Space" if kind == "checkbox" else "ArrowDown" if move < count else "Home")
                    page.wait_for_timeout(30)
                    if root.evaluate(FIGURE) != first:
                        break
                assert root.evaluate(FIGURE) != first, f"{path}: no value of {name} changes the figure"
                assert root.screenshot() != before, f"{path}: {name} changes nothing that is seen"
                if kind == "range":
                    shown = root.locator(f"output[for='{control.get_attribute('id')}']").inner_text()
                    texts = json.loads(control.get_attribute("data-texts"))
                    assert shown == control.get_attribute("aria-valuetext") == texts[int(control.input_value())]
                root.locator(".pb-reset").press("Enter")
                page.wait_for_timeout(100)
                assert root.evaluate(FIGURE) == first, f"{path}: reset after {name} does not restore the figure"


def test_play_moves_its_slider_and_pauses(site, browser):
    found = 0
    for path in METHODS:
        if 'class="pb-play"' not in (site.report.site / path).read_text(encoding="utf-8"):
            continue
        with Visit(browser, site) as visit:
            root = visit.open(path).locator(".pb-explore:has(.pb-play)").first
            drawn(root)
            play = root.locator(".pb-play")
            slider = root.locator(f"[data-control='{play.get_attribute('data-slider')}']")
            if int(slider.get_attribute("data-count")) < 3:
                continue
            step(slider, "Home")
            before = root.evaluate(FIGURE)
            value, pressed = visit.page.evaluate(PLAY, [play.element_handle(), slider.element_handle()])
            assert (value, pressed) == (1, "true")
            visit.page.wait_for_timeout(1500)
            assert slider.input_value() == "1" and play.get_attribute("aria-pressed") == "false"
            found += root.evaluate(FIGURE) != before
    assert found, "no exploration on the site has a play button"


LUMINANCE = """e => { const [r, g, b] = getComputedStyle(e)[PROPERTY].match(/[\\d.]+/g).map(Number).map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; }"""


def luminance(locator, what):
    return locator.evaluate(LUMINANCE.replace("PROPERTY", json.dumps(what)))


def contrast(page):
    """Contrast of the page's text against its background, and the background's luminance."""
    text, ground = luminance(page.locator("main section p").first, "color"), luminance(page.locator("body"), "backgroundColor")
    bright, dark = sorted((text, ground), reverse=True)
    return (bright + 0.05) / (dark + 0.05), ground


def test_light_and_dark_and_the_switch_between_them(site, browser):
    for scheme in ("light", "dark"):
        with Visit(browser, site, color_scheme=scheme) as visit:
            page = visit.open(METHODS[0])
            ratio, ground = contrast(page)
            assert ratio > 7 and (ground < 0.03 if scheme == "dark" else ground > 0.9)
            root = page.locator(".pb-explore").first
            drawn(root)
            color = "e => getComputedStyle(e.querySelector('.xtick text')).fill"
            before = root.evaluate(color)
            page.locator(".quarto-color-scheme-toggle:visible").first.click()
            page.wait_for_function("before => getComputedStyle(document.querySelector('.pb-explore .xtick text')).fill !== before", arg=before)
            ratio, ground = contrast(page)
            assert ratio > 7 and (ground > 0.9 if scheme == "dark" else ground < 0.03)
            page.reload()
            assert contrast(page)[1] == ground  # the choice is remembered


def visible_cards(page):
    return page.locator(".pb-card:visible .pb-name").all_inner_texts()


def test_the_gallery_searches_and_filters(site, browser):
    entries = catalogue(project_root(__file__), strict=False).methods
    with Visit(browser, site) as visit:
        page = visit.open("index.html")
        assert len(visible_cards(page)) == len(entries)
        box = page.locator(".pb-gallery [name=q]")
        target = entries[0]
        box.press_sequentially(target.keywords[-1][:5].upper())
        wanted = sum(target.keywords[-1][:5].lower() in (card.get_attribute("data-text") or "") for card in page.locator(".pb-card").all())
        assert 1 <= len(visible_cards(page)) == wanted
        assert f"{wanted} of {len(entries)}" in page.locator("#pb-count").inner_text() or wanted == len(entries)
        assert "?q=" in page.url
        box.fill("no such method anywhere")
        assert visible_cards(page) == [] and page.locator(".pb-none").is_visible()
        page.locator(".pb-gallery button[type=reset]").press("Enter")
        page.wait_for_function("() => !document.querySelector('.pb-card[hidden]')")
        for name, key in (("chapter", "chapter"), ("verdict", "verdicts"), ("kernel", "kernel")):
            select = page.locator(f".pb-gallery [name={name}]")
            for value in filter(None, select.locator("option").evaluate_all("all => all.map(o => o.value)")):
                select.select_option(value)
                shown = page.locator(".pb-card:visible").evaluate_all(f"all => all.map(e => e.dataset.{key})")
                hidden = page.locator(".pb-card[hidden]").evaluate_all(f"all => all.map(e => e.dataset.{key})")
                assert all(value in s.split() for s in shown) and not any(value in s.split() for s in hidden)
            select.select_option("")
        years = sorted({e.year for e in entries if e.year})
        page.locator(".pb-gallery [name=from]").select_option(str(years[-1]))
        assert len(visible_cards(page)) == sum(e.year == years[-1] for e in entries)
        page.locator(".pb-gallery [name=from]").select_option("")
        page.locator(".pb-gallery [name=sort]").select_option("new")
        assert page.locator(".pb-card").first.get_attribute("data-year") == str(years[-1])
        visit.open(f"index.html?q={target.slug.replace('_', '%20')}")
        assert target.title in visible_cards(visit.page)
        visit.page.locator(".pb-gallery [name=sort]").focus()
        for _ in range(2):  # past the button to the first card
            visit.page.keyboard.press("Tab")
        visit.page.keyboard.press("Enter")
        visit.page.wait_for_url(re.compile(r".*/\w+/\w+\.html$"))


def test_the_gallery_is_a_plain_list_without_scripts(site, browser):
    with Visit(browser, site, java_script_enabled=False) as visit:
        page = visit.open("index.html")
        assert len(visible_cards(page)) == len(METHODS) and not page.locator(".pb-filters").first.is_visible()
        page.locator(".pb-card .pb-name a").first.click()
        assert page.locator("h1").count() == 1


def test_the_ledger_sorts_and_filters(site, browser):
    with Visit(browser, site) as visit:
        page = visit.open("ledger.html")
        rows = page.locator("[data-ledger] tbody tr")
        assert rows.count() >= len(METHODS)
        heads = page.locator("[data-ledger] thead th").all_inner_texts()
        for name in ("Method", "Improvement", "Verdict"):
            column = next(n for n, h in enumerate(heads) if h.startswith(name)) + 1
            values = f"all => all.map(r => r.cells[{column - 1}].dataset.value).filter(v => v !== undefined)"
            seen = []
            for way in ("ascending", "descending"):
                page.locator(f"[data-ledger] thead th:nth-child({column}) button").press("Enter")
                assert page.locator(f"[data-ledger] thead th:nth-child({column})").get_attribute("aria-sort") == way
                seen.append([float(v) if name == "Improvement" else v for v in rows.evaluate_all(values)])
            assert seen[0] == sorted(seen[0]) and seen[1] == sorted(seen[0], reverse=True) and seen[0]
        for button in page.locator("[data-ledger] .pb-buttons button").all():
            button.press("Enter")
            wanted, count = button.get_attribute("data-verdict"), int(button.locator("b").inner_text())
            shown = page.locator("[data-ledger] tbody tr:visible").evaluate_all("all => all.map(r => r.dataset.verdict)")
            assert len(shown) == count and all(not wanted or v == wanted for v in shown)
        page.locator("[data-ledger] [data-verdict='']").first.click()
        page.locator("[data-ledger] [name=q]").fill("no such claim")
        assert page.locator("[data-ledger] tbody tr:visible").count() == 0


@pytest.mark.parametrize("path", METHODS)
def test_formulas_are_set_and_no_latex_is_left(site, browser, path):
    with Visit(browser, site) as visit:
        page = visit.open(path)
        page.evaluate("document.fonts.ready")
        boxes = page.locator("main math:visible").evaluate_all("all => all.map(e => { const b = e.getBoundingClientRect(); return [b.width, b.height]; })")
        assert len(boxes) >= 5 and all(w > 2 and h > 2 for w, h in boxes)
        assert page.evaluate("document.fonts.check('16px \"STIX Two Math\"')")
        assert page.locator(".pb-math-error").count() == 0
        prose = page.evaluate("() => { const m = document.querySelector('main').cloneNode(true); m.querySelectorAll('pre, code, math, script').forEach(e => e.remove()); return m.textContent; }")
        assert not re.search(r"\$\$|\\(?:frac|begin|left|mathbf|sum|sqrt|text|operatorname)\b", prose)
        heights = page.locator("main mfrac:visible").evaluate_all("all => all.map(e => [e.getBoundingClientRect().height, ...[...e.children].map(c => c.getBoundingClientRect().height)])")
        assert all(whole > max(parts) for whole, *parts in heights)


@pytest.mark.parametrize("path", METHODS)
def test_a_method_page_fits_a_phone(site, browser, path):
    with Visit(browser, site, viewport={"width": 400, "height": 800}, color_scheme="dark") as visit:
        page = visit.open(path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        drawn(page.locator(".pb-explore").first)
        assert page.locator(".pb-explore .main-svg").first.bounding_box()["width"] <= 400


def test_the_search_of_the_site_works_offline(site, browser):
    target = catalogue(project_root(__file__), strict=False).methods[0]
    with Visit(browser, site) as visit:
        page = visit.open("ledger.html")
        page.locator("#quarto-search input").press_sequentially(target.title[:12])
        result = page.locator(f":is(.smalldocs-search-results, .aa-Item) a[href*='{page_of(target)}']:not([href*='api/'])").first
        result.wait_for()
        result.click()
        page.wait_for_url(re.compile(re.escape(page_of(target))))
        assert page.locator("h1").inner_text() == target.title
