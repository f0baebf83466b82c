"""The web page in a real browser. The API runs without Serve: the browser cannot tell the difference."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from longclip.checkpoint import Checkpoint
from tests.support.api_requests import LONG_TEXT
from tests.support.browser import open_browser
from tests.support.live_api import KEY, running_api, scenes_api
from tests.support.programs import needs_programs
from tests.support.scenes_index import COUNT, scene, write_index

pytestmark = needs_programs("chromium", "chromedriver")
PAGE_SIZE = 12


@pytest.fixture(scope="module")
def index(tiny_checkpoint: Checkpoint, tiny_checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_index(tmp_path_factory.mktemp("web") / "index", tiny_checkpoint, tiny_checkpoint_dir)


@pytest.fixture(scope="module")
def url(index: Path, tiny_checkpoint_dir: Path) -> Iterator[str]:
    with running_api(scenes_api(tiny_checkpoint_dir, index, key=None)) as url:
        yield url


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    driver = open_browser(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: webdriver.Chrome, url: str) -> Iterator["Page"]:
    """The page, freshly opened; fails the test if the browser's console has unexpected messages."""
    browser.get(url)
    page = Page(browser, url)
    page.until(lambda: "30 pictures indexed" in page.text("footer"))
    page.until(lambda: len(page.all("#examples button")) == 4)
    yield page
    page.check_console()


class Page:
    """The page as the tests use it."""

    def __init__(self, browser: webdriver.Chrome, url: str) -> None:
        self.browser = browser
        self.url = url
        self.allowed_in_console: tuple[str, ...] = ()

    def one(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.one(selector).text

    def until(self, condition: Callable[[], bool]) -> None:
        # The page may replace an element between finding and reading it; the next attempt finds the new one.
        stale = [StaleElementReferenceException]
        WebDriverWait(self.browser, 30, poll_frequency=0.05, ignored_exceptions=stale).until(lambda _: condition())

    def until_results(self, status: str) -> list[str]:
        """Wait until the status line contains `status`; returns the ids of the results."""
        self.until(lambda: status in self.text("#status"))
        return self.ids()

    def ids(self) -> list[str]:
        """Ids of the results, read in one step."""
        script = "return [...document.querySelectorAll('#results > li')].map((card) => card.dataset.id)"
        return self.browser.execute_script(script)

    def keys(self, *keys: str) -> None:
        webdriver.ActionChains(self.browser).send_keys(*keys).perform()

    def focused(self) -> str:
        return self.browser.switch_to.active_element.get_attribute("id") or ""

    def check_console(self) -> None:
        entries = [entry["message"] for entry in self.browser.get_log("browser")]  # type: ignore[no-untyped-call]
        assert [entry for entry in entries if not any(part in entry for part in self.allowed_in_console)] == []


def test_the_page_opens_ready_to_type(page: Page) -> None:
    assert page.browser.title == "Long-CLIP search"
    assert page.focused() == "query"
    assert "tiny" in page.text("footer")
    page.until(lambda: page.text("#counter") == "2 / 248 tokens")


def test_enter_starts_a_search_by_text(page: Page) -> None:
    page.keys("A goldenrod disc")
    webdriver.ActionChains(page.browser).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
    page.keys("beside a square", Keys.ENTER)
    assert len(page.until_results("12 pictures nearest to your description")) == PAGE_SIZE
    assert page.one("#query").get_property("value") == "A goldenrod disc\nbeside a square"
    first = page.one("#results > li")
    assert first.find_element(By.CLASS_NAME, "caption").text.startswith("Scene ")
    picture = first.find_element(By.TAG_NAME, "img")
    page.until(lambda: picture.get_property("naturalWidth") == 96)
    float(first.find_element(By.CLASS_NAME, "score").text)
    assert "?q=A+goldenrod+disc" in page.browser.current_url


def test_tokens_are_counted_while_typing(page: Page) -> None:
    page.keys("a dog on a beach")
    page.until(lambda: page.text("#counter") == "7 / 248 tokens")


def test_a_long_text_is_truncated_only_on_request(page: Page) -> None:
    page.allowed_in_console = ("422",)  # the browser itself reports the refused request
    page.browser.execute_script("query.value = arguments[0]; query.dispatchEvent(new Event('input'))", LONG_TEXT)
    page.until(lambda: "over" in (page.one("#counter").get_attribute("class") or ""))
    page.one("#search").click()
    page.until(lambda: page.one("#error").is_displayed())
    assert page.text("#error-text") == "This description is longer than the model can read."
    page.one("#truncate").click()
    assert len(page.until_results("first 248 tokens were used")) == PAGE_SIZE
    assert not page.one("#error").is_displayed()


def test_more_like_this(page: Page) -> None:
    page.keys("a steelblue square", Keys.ENTER)
    best = page.until_results("your description")[0]
    page.one("#results .like").click()
    ids = page.until_results(f"nearest to “{best}”")
    assert len(ids) == PAGE_SIZE
    assert best not in ids
    page.browser.back()
    assert page.until_results("your description")[0] == best
    assert page.one("#query").get_property("value") == "a steelblue square"


def test_search_by_image(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "mine.png"
    file.write_bytes(scene(21)[0])
    page.one("#file").send_keys(str(file))
    assert page.until_results("nearest to your image")[0] == "scene/21"
    assert page.text("#chip-name") == "mine.png"
    assert page.text("#results .score") == "1.000"
    page.one("#remove-image").click()
    assert not page.one("#chip").is_displayed()


def test_a_damaged_image_shows_an_error(page: Page, tmp_path: Path) -> None:
    page.allowed_in_console = ("422", "blob:")  # the preview cannot be shown either
    file = tmp_path / "broken.png"
    file.write_bytes(scene(21)[0][:60])
    page.one("#file").send_keys(str(file))
    page.until(lambda: "cannot be decoded" in page.text("#error-text"))
    assert page.ids() == []


def test_clicking_an_example_searches_for_it(page: Page) -> None:
    page.one("#examples button").click()
    page.until_results("your description")
    assert page.one("#query").get_property("value") == scene(0)[1]


def test_show_more_adds_results(page: Page) -> None:
    page.keys("a disc", Keys.ENTER)
    first = page.until_results("12 pictures")
    for count in (24, COUNT):
        page.one("#more").click()
        assert page.until_results(f"{count} pictures")[:PAGE_SIZE] == first
    assert not page.one("#more").is_displayed()


def test_a_caption_can_be_expanded(page: Page) -> None:
    page.keys("a disc", Keys.ENTER)
    page.until_results("12 pictures")
    button, caption = page.one("#results .expand"), page.one("#results .caption")
    short = caption.size["height"]
    button.click()
    assert button.get_attribute("aria-expanded") == "true"
    assert caption.size["height"] > short


def test_the_page_works_with_the_keyboard_alone(page: Page) -> None:
    page.keys("an orchid disc", Keys.ENTER)
    page.until_results("12 pictures")
    page.keys(Keys.TAB)
    assert page.focused() == "choose"
    page.keys(Keys.TAB)
    assert page.focused() == "search"
    best = page.ids()[0]
    for _ in range(2 + 4 + 1 + 2 + 1):  # what narrows, the examples, then the first result's expansion and tags
        page.keys(Keys.TAB)
    assert "like" in (page.browser.switch_to.active_element.get_attribute("class") or "")
    page.keys(Keys.ENTER)
    page.until_results(f"nearest to “{best}”")


def test_filters_from_tags_and_from_the_form(page: Page) -> None:
    page.keys("a disc", Keys.ENTER)
    page.until_results("12 pictures")
    tag = next(tag for tag in page.all("#results .tags button") if tag.text == "parity: even")
    tag.click()
    page.until(lambda: page.text("#conditions") == "parity is even ✕")
    page.until(lambda: bool(page.ids()) and all(int(id.partition("/")[2]) % 2 == 0 for id in page.ids()))
    page.one("#filters summary").click()
    page.one("#operator").send_keys("<")
    page.one("#value").send_keys("5", Keys.ENTER)
    page.until(lambda: sorted(page.ids()) == ["scene/2", "scene/4"])
    page.browser.refresh()
    page.until(lambda: sorted(page.ids()) == ["scene/2", "scene/4"])
    page.one("#conditions button").click()
    page.until(lambda: len(page.ids()) == 5)
    assert page.focused() == "query"


def test_search_among_captions(page: Page) -> None:
    page.keys(scene(7)[1], Keys.ENTER)
    page.until_results("12 pictures")
    page.one("#target").send_keys("captions")
    page.until(lambda: page.ids()[:1] == ["scene/7"] and page.text("#results .score") == "1.000")
    assert "target=caption" in page.browser.current_url


def test_slash_focuses_the_text_and_escape_clears_it(page: Page) -> None:
    page.keys("a disc", Keys.TAB, "/")
    assert page.focused() == "query"
    page.keys(Keys.ESCAPE)
    assert page.one("#query").get_property("value") == ""


def test_a_link_restores_a_search(page: Page) -> None:
    page.browser.get(f"{page.url}/?q=a+seagreen+square")
    assert len(page.until_results("12 pictures")) == PAGE_SIZE
    assert page.one("#query").get_property("value") == "a seagreen square"
    page.browser.get(f"{page.url}/?like=scene%2F3")
    assert "scene/3" not in page.until_results("nearest to “scene/3”")


def test_markup_is_shown_as_text(page: Page) -> None:
    page.browser.get(f"{page.url}/?like=%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E")
    page.allowed_in_console = ("404",)
    page.until(lambda: "no such item" in page.text("#error-text"))
    assert page.all("#error img") == []


def test_the_page_asks_for_a_key_and_uses_it_for_thumbnails(
    index: Path, tiny_checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    api = scenes_api(tiny_checkpoint_dir, index, KEY)
    with running_api(api) as url, open_browser(tmp_path_factory.mktemp("profile")) as browser:
        page = Page(browser, url)
        page.allowed_in_console = ("401",)
        browser.get(url)
        for key in ("not-the-key-0123456789", KEY):
            page.until(lambda: page.one("#key-dialog").is_displayed() and page.focused() == "key")
            page.keys(key, Keys.ENTER)
        page.until(lambda: "tiny" in page.text("footer"))
        assert not page.one("#key-dialog").is_displayed()
        page.one("#query").send_keys("a disc", Keys.ENTER)
        page.until_results("12 pictures")
        picture = page.one("#results img")
        page.until(lambda: picture.get_property("naturalWidth") == 96)
        assert KEY not in browser.page_source
        page.check_console()
