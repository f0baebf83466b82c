"""The data report: its statistics, escaping of hostile data, and its layout in a browser."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from pipelines.data.histograms import LengthHistogram
from pipelines.data.report import Sample, render_report
from tests.support.broken_rows import jpeg
from tests.support.browser import open_browser
from tests.support.programs import needs_programs

HOSTILE = "<script>document.title = 'stolen'</script><img src=x onerror=\"document.title='stolen'\">"


def report(caption: str = "A house.", rejected: int = 2) -> str:
    return render_report(
        title="Prepared data",
        facts=[("rows in", "1,000"), ("source", HOSTILE)],
        rejected=[("image", f"{HOSTILE} {number}", number + 1) for number in range(rejected)],
        histograms=[
            LengthHistogram("Captions", {10: 60, 78: 20, 248: 10, 249: 6, 900: 4}),
            LengthHistogram("Nothing", {}),
        ],
        samples=[
            Sample("first", jpeg(1), caption, {"extractive": HOSTILE}, 12),
            Sample(HOSTILE, b"broken", caption, {}, 3),
            Sample("no picture", None, caption, {}, 3),
        ],
        settings={"input": HOSTILE},
    )


def test_data_is_escaped() -> None:
    html = report(caption=HOSTILE)
    assert "<script" not in html
    assert "<img src=x" not in html
    assert html.count("&lt;script&gt;") >= 7


def test_reasons_are_sorted_and_limited() -> None:
    html = report(rejected=60)
    assert "And 10 more reasons." in html
    assert html.index("&gt; 59</td>") < html.index("&gt; 58</td>")
    assert "&gt; 9</td>" not in html
    assert "No row was left out." in report(rejected=0)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    driver = open_browser(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@needs_programs("chromium", "chromedriver")
@pytest.mark.parametrize("width", [1280, 500])
def test_report_in_a_browser(browser: webdriver.Chrome, tmp_path: Path, width: int) -> None:
    path = tmp_path / "report.html"
    path.write_text(report(caption=HOSTILE + " A long word: " + "x" * 300), encoding="utf-8")
    browser.set_window_size(width, 1000)
    browser.get(path.as_uri())
    assert browser.title == "Prepared data"
    assert browser.get_log("browser") == []
    (image,) = browser.find_elements(By.CSS_SELECTOR, "article img")
    assert browser.execute_script("return arguments[0].naturalWidth", image) == 96
    bars = browser.find_elements(By.CSS_SELECTOR, "svg .bar")
    assert len(bars) == 41
    assert bars[1].size["height"] > 2 * bars[9].size["height"] > 0
    assert bars[5].size["height"] == 0
    marks = {mark.text: mark.location["x"] for mark in browser.find_elements(By.CSS_SELECTOR, ".at-mark")}
    assert bars[9].location["x"] < marks["77"] + 12 < bars[12].location["x"]
    assert marks["77"] < marks["248"]
    assert "40.0 %" in browser.find_element(By.CSS_SELECTOR, ".lengths").text
    overflow = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert overflow <= 0, "the page must not scroll horizontally"
