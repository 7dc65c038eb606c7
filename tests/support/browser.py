"""A headless Chromium for tests of the page: what it logged and what it asked for can be read afterwards."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@dataclass
class Browser:
    """One window."""

    driver: webdriver.Chrome

    def find(self, selector: str) -> WebElement:
        """The first element of a CSS selector."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """The text of an element as it stands in the document, shown or not."""
        return str(self.run("return document.querySelector(arguments[0])?.textContent ?? ''", selector))

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a script in the page; its value."""
        return self.driver.execute_script(script, *arguments)

    def hover(self, element: WebElement, x: float, y: float) -> None:
        """Move the pointer to a place in an element, from its top left corner, in CSS pixels."""
        size = element.rect
        dx, dy = round(x - size["width"] / 2), round(y - size["height"] / 2)
        ActionChains(self.driver, duration=50).move_to_element_with_offset(element, dx, dy).perform()

    def dark(self, on: bool) -> None:
        """Prefer a dark or a light scheme."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def complaints(self) -> list[str]:
        """Warnings and errors on the console since the last call."""
        entries = self.driver.get_log("browser")
        return [f"{e['level']}: {e['message']}" for e in entries if e["level"] != "INFO"]

    def origins(self) -> set[str]:
        """Where the page's requests went since the last call: scheme, host and port."""
        entries = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        urls = [e["params"]["request"]["url"] for e in entries if e["method"] == "Network.requestWillBeSent"]
        return {f"{url.scheme}://{url.netloc}" for url in map(urlsplit, urls)}


@contextlib.contextmanager
def chromium(profile: Path, width: int = 1440, height: int = 1180) -> Iterator[Browser]:
    """A browser with a profile of its own. Raises AssertionError when it is not installed."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert binary and driver, "chromium and chromedriver are missing; `make browser` installs them"
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = webdriver.Chrome(options, Service(driver))
    try:
        window.get("about:blank")
        window.get_log("performance")  # what the browser's own first page asked for
        yield Browser(window)
    finally:
        window.quit()
