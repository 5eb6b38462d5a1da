"""The report in a real browser: Debian's chromium, headless, driven by selenium; skipped where there is none."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_runs import hard_views, make_run

from jobs.analyse import analyse
from jobs.pretrain import pretrain
from jobs.report import write_report
from jobs.reporting.gallery import gallery
from jobs.reporting.page import page
from jobs.reporting.rundata import read_run
from jobs.run.config import PretrainConfig

WIDE, PHONE = (1280, 900), (375, 740)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.skipif(not CHROMIUM or not DRIVER, reason="no chromium with chromedriver; apt install chromium-driver"),
    # Selenium and urllib3 leave closing their sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two runs, one of them with pictures, as a file on the disk."""
    folder = tmp_path_factory.mktemp("report")
    runs = [read_run(make_run(folder / name, seed=seed)) for seed, name in enumerate(("one", "two"))]
    runs[0] = dataclasses.replace(runs[0], pictures={"views": gallery([hard_views(), hard_views(size=200, views=8)])})
    out = folder / "report.html"
    out.write_text(page(runs), encoding="utf-8")
    return out.as_uri()


def open_at(browser: Any, address: str, size: tuple[int, int], scheme: str = "light") -> None:
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}  # a scrolling page dodges clicks
    media = {"features": [{"name": name, "value": value} for name, value in features.items()]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get("about:blank")
    browser.get(address)


def visible_tabpanels(browser: Any) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll('[role=tabpanel]:not([hidden])')].map(e => e.id)"
    )


def test_no_console_message_no_request_and_every_picture_drawn(browser: Any, address: str) -> None:
    open_at(browser, address, WIDE)
    assert browser.get_log("browser") == []
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    browser.find_element("id", "tab-run-0").click()
    pictures = browser.execute_script(
        "return Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth, () => 0)))"
    )
    assert len(pictures) == 14
    assert all(pictures)
    lines = browser.execute_script(
        "return [...document.querySelectorAll('#run-0 path.line')].map(p => p.getBoundingClientRect().width)"
    )
    assert len(lines) >= 5
    assert all(width > 100 for width in lines)


def test_the_report_of_a_real_run_draws_every_picture(browser: Any, tiny: PretrainConfig, tmp_path: Path) -> None:
    pretrain(tiny, tmp_path / "run")
    analyse(tmp_path / "run", pictures=False)
    report = write_report([tmp_path / "run"], tmp_path / "report.html", images=4)
    open_at(browser, report.as_uri(), WIDE)
    assert browser.get_log("browser") == []
    pictures = browser.execute_script(
        "return Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth, () => 0)))"
    )
    assert len(pictures) >= 4 * (1 + tiny.selection.views)  # each image of the gallery and its views
    assert all(pictures)


def test_tabs_switch_runs_by_click_and_by_arrow_keys(browser: Any, address: str) -> None:
    open_at(browser, address, WIDE)
    assert visible_tabpanels(browser) == ["compare"]
    browser.find_element("id", "tab-run-1").click()
    assert visible_tabpanels(browser) == ["run-1"]
    active = browser.switch_to.active_element
    active.send_keys("\ue012")  # arrow left
    assert visible_tabpanels(browser) == ["run-0"]
    browser.switch_to.active_element.send_keys("\ue011")  # home
    assert visible_tabpanels(browser) == ["compare"]
    assert browser.switch_to.active_element.get_attribute("aria-selected") == "true"


def test_an_address_with_a_section_shows_its_run(browser: Any, address: str) -> None:
    open_at(browser, f"{address}#run-1-scores", WIDE)
    assert visible_tabpanels(browser) == ["run-1"]


def test_tables_sort_both_ways_by_value(browser: Any, address: str) -> None:
    open_at(browser, f"{address}#run-0-scores", WIDE)
    read = "return [...document.querySelector('#run-0-scores table').tBodies[0].rows].map(r => r.cells[0].textContent)"
    top1 = browser.find_element("xpath", "//section[@id='run-0-scores']//th/button[text()='Top-1']")
    top1.click()
    assert browser.execute_script(read) == ["knn", "linear"]
    top1.send_keys("\ue007")  # enter: the header is a button
    assert browser.execute_script(read) == ["linear", "knn"]
    head = top1.find_element("xpath", "..")
    assert head.get_attribute("aria-sort") == "descending"


def test_charts_read_out_by_pointer_and_by_keys(browser: Any, address: str) -> None:
    open_at(browser, f"{address}#run-0-curves", WIDE)
    plot = browser.find_element("css selector", "#run-0-curves .plot")
    plot.send_keys("\ue011")  # home
    figure = plot.find_element("xpath", "..")
    assert figure.find_element("css selector", ".live").get_attribute("textContent").startswith("step 0, train/loss 8")
    plot.send_keys("\ue014")  # arrow right
    assert figure.find_element("css selector", ".live").get_attribute("textContent").startswith("step 10,")
    assert figure.find_element("css selector", ".tip").is_displayed()


@pytest.mark.parametrize("panel", ["compare", "run-0", "run-1"])
def test_a_phone_needs_no_sideways_scrolling(browser: Any, address: str, panel: str) -> None:
    open_at(browser, f"{address}#{panel}", PHONE)
    browser.find_element("id", f"tab-{panel}").click()
    assert browser.execute_script("return document.documentElement.scrollWidth") == PHONE[0]
    small = browser.execute_script(
        "return [...document.querySelectorAll('.tick')].filter(e => e.offsetParent)"
        ".map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert all(size >= 11 for size in small)


def test_dark_mode_follows_the_system_and_can_be_chosen(browser: Any, address: str) -> None:
    colour = "return getComputedStyle(document.body).backgroundColor"
    open_at(browser, address, WIDE, "light")
    light = browser.execute_script(colour)
    open_at(browser, address, WIDE, "dark")
    dark = browser.execute_script(colour)
    assert light != dark
    button = browser.find_element("css selector", ".theme")
    button.click()
    assert browser.execute_script(colour) == light
    button.click()
    button.click()
    assert browser.execute_script(colour) == dark


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser: Any, address: str, scheme: str) -> None:
    """WCAG AA: at least 4.5 to 1 for every text colour of the style sheet on every ground it is used on."""
    open_at(browser, address, WIDE, scheme)
    ratios = browser.execute_script(
        """
        const style = getComputedStyle(document.documentElement);
        const light = name => {
          const probe = document.body.appendChild(document.createElement('i'));
          probe.style.color = style.getPropertyValue(name);
          const [r, g, b] = getComputedStyle(probe).color.match(/[0-9.]+/g).map(x => x / 255)
            .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
          probe.remove();
          return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const found = {};
        for (const ink of ['--ink', '--ink-2', '--muted', '--accent', '--chosen', '--good', '--warn', '--bad'])
          for (const ground of ['--page', '--surface']) {
            const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x);
            found[ink + ' on ' + ground] = (a + 0.05) / (b + 0.05);
          }
        return found;
        """
    )
    assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}


def test_everything_that_acts_is_reached_by_tab_and_named(browser: Any, address: str) -> None:
    open_at(browser, f"{address}#run-0", WIDE)
    browser.find_element("id", "tab-run-0").click()
    unnamed = browser.execute_script(
        "return [...document.querySelectorAll('#run-0 [tabindex=\"0\"], button, a, summary')].filter(e =>"
        " !(e.getAttribute('aria-label') || e.textContent.trim())).map(e => e.outerHTML.slice(0, 80))"
    )
    assert unnamed == []
    without = browser.execute_script("return [...document.images].filter(i => !i.alt).length")
    assert without == 0
