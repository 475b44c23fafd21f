"""The page in a real browser: nothing overflows, nothing is fetched, and axe-core finds no fault."""

import shutil
from dataclasses import replace

import pytest

from leakage.audit.report import read_victims, write_victims
from tests.audit.made_up import FAILED, variant, write_pictures

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PHONE, DESKTOP = {"width": 360, "height": 740}, {"width": 1280, "height": 900}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (on Debian: apt install chromium)"),
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A page with all kinds of rows, and with fewer pictures than it may have, as each takes axe-core its time."""
    folder = tmp_path_factory.mktemp("audit")
    write_pictures(folder)
    rows = [row if row.victim < 5 else replace(row, reconstruction="") for row in read_victims(folder)]
    write_victims(folder, rows)
    report = variant("exceeded")
    report.measured = [replace(row, worst=row.worst[:3]) for row in report.measured]
    report.checks.append(FAILED)
    report.save(folder)
    return (folder / "report.html").as_uri()


@pytest.mark.parametrize(("scheme", "size"), [("light", PHONE), ("dark", DESKTOP)])
def test_page(scheme, size, browser, address):
    context = browser.new_context(color_scheme=scheme, viewport=size)
    page = context.new_page()
    requests, messages = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: messages.append(message.text))
    page.on("dialog", lambda dialog: messages.append(dialog.message))
    page.goto(address)
    assert [url for url in requests if not url.startswith("data:image/png;base64,")] == [address]
    assert messages == []

    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red = int(background.removeprefix("rgb(").split(",")[0])
    assert (red > 200) == (scheme == "light")
    assert page.evaluate("document.images.length") > 3 * 10
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    # The first stop of the keyboard jumps over the contents.
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.hash") == "#measured"
    # What is folded is judged too.
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    for width in (320, 800, 900, size["width"]):
        page.set_viewport_size({"width": width, "height": size["height"]})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = axe.Axe().run(page, options={"resultTypes": ["violations"]})
    assert [(one["id"], one["nodes"][0]["html"]) for one in found.response["violations"]] == []
    assert len(found.response["passes"]) > 20
    context.close()
