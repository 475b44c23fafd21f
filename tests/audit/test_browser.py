"""The page in a real browser: nothing overflows, nothing is fetched, and axe-core finds no fault."""

import shutil

import pytest

from tests.audit.made_up import variant, write_pictures

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
def pages(tmp_path_factory):
    """One with all kinds of rows and pictures, one of an audit that ended early."""
    folder = tmp_path_factory.mktemp("audit")
    write_pictures(folder)
    variant("exceeded").save(folder)
    early = folder / "early"
    variant("failed check").save(early)
    return {"exceeded": folder / "report.html", "failed check": early / "report.html"}


@pytest.mark.parametrize(
    ("verdict", "scheme", "size"),
    [("exceeded", "light", PHONE), ("exceeded", "dark", DESKTOP), ("failed check", "dark", PHONE)],
)
def test_page(verdict, scheme, size, browser, pages):
    context = browser.new_context(color_scheme=scheme, viewport=size)
    page = context.new_page()
    requests, messages = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: messages.append(message.text))
    page.on("dialog", lambda dialog: messages.append(dialog.message))
    page.goto(pages[verdict].as_uri())
    fetched = [url for url in requests if not url.startswith("data:image/png;base64,")]
    assert fetched == [pages[verdict].as_uri()]
    assert messages == []

    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red = int(background.removeprefix("rgb(").split(",")[0])
    assert (red > 200) == (scheme == "light")
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.evaluate("document.images.length") == (0 if verdict == "failed check" else page_images(page))
    # The first stop of the keyboard jumps over the contents.
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.hash") == "#measured"
    # What is folded is judged too.
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    found = axe.Axe().run(page, options={"resultTypes": ["violations"]})
    faults = [(one["id"], one["nodes"][0]["html"]) for one in found.response["violations"]]
    assert faults == []
    assert len(found.response["passes"]) > 20
    context.close()


def page_images(page):
    figures = page.locator("figure .triple").count()
    assert figures > 20
    return 3 * figures
