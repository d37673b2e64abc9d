"""The page in Chromium with a service in the test's process, and images whose cells its network finds without fault."""

import base64
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np
import uvicorn
from hosts import wait_until
from in_process import Service
from numpy.typing import NDArray
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from raylivecell.targets.distance import distances

DISKS = [(30, 30, 12), (70, 30, 12), (30, 70, 12), (100, 75, 16), (130, 25, 6)]
"""Centre x, y and radius of the cells of `image`."""
DROP = """
const transfer = new DataTransfer();
for (const [name, data] of arguments[0]) {
  transfer.items.add(new File([Uint8Array.from(atob(data), (character) => character.charCodeAt(0))], name));
}
for (const type of ["dragover", "drop"]) {
  document.body.dispatchEvent(new DragEvent(type, {bubbles: true, cancelable: true, dataTransfer: transfer}));
}
"""


def disks(circles: list[tuple[int, int, int]]) -> NDArray[np.int32]:
    labels = np.zeros((100, 150), np.int32)
    for number, (x, y, radius) in enumerate(circles, 1):
        cv2.circle(labels, (x, y), radius, number, -1)
    return labels


def image(labels: NDArray[np.int32]) -> NDArray[np.uint8]:
    return np.where(labels != 0, 200, 60).astype(np.uint8)


def maps_of_disks(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What a perfect network answers for `image`."""
    foreground = pixels > (int(pixels.min()) + int(pixels.max())) / 2
    labels = cv2.connectedComponents(foreground.astype(np.uint8), connectivity=4)[1]
    centre, boundary = distances(labels.astype(np.uint16))
    return np.stack([np.where(foreground, 0.99, 0.01), np.where(foreground, centre, 1), boundary]).astype(np.float32)


class Page:
    """A page in the browser, and its service."""

    def __init__(self, browser: Any, service: Service, url: str) -> None:
        self.browser, self.service, self.url = browser, service, url

    def find(self, id_: str) -> Any:
        return self.browser.find_element("id", id_)

    def wait(self, what: str, expression: str) -> None:
        wait_until(what, lambda: self.browser.execute_script(f"return Boolean({expression})"), 30)

    def drop(self, files: dict[str, bytes]) -> None:
        self.browser.execute_script(DROP, [(name, base64.b64encode(data).decode()) for name, data in files.items()])

    def wait_for_cells(self, count: int) -> None:
        self.wait(f"{count} cells", f"document.getElementById('count').textContent === '{count}'")

    def at(self, x: float, y: float) -> tuple[int, int]:
        """Offset from the canvas' centre of an image position."""
        canvas = self.find("canvas")
        zoom = min(canvas.size["width"] / 150, canvas.size["height"] / 100)
        return round((x + 0.5 - 75) * zoom), round((y + 0.5 - 50) * zoom)

    def click(self, x: float, y: float, shift: bool = False) -> None:
        actions = ActionChains(self.browser).move_to_element_with_offset(self.find("canvas"), *self.at(x, y))
        actions = actions.key_down(Keys.SHIFT).click().key_up(Keys.SHIFT) if shift else actions.click()
        actions.perform()

    def drag(self, *points: tuple[float, float]) -> None:
        actions = ActionChains(self.browser)
        for number, (x, y) in enumerate(points):
            actions.move_to_element_with_offset(self.find("canvas"), *self.at(x, y))
            if number == 0:
                actions.click_and_hold()
        actions.release().perform()

    def press(self, *keys: str) -> None:
        for key in keys:
            self.find("canvas").send_keys(key)


@contextmanager
def served(browser: Any, service: Service, tmp_path: Path) -> Iterator[Page]:
    """Open the page; afterwards its console must be empty, and each request must have been to the service."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        server = uvicorn.Server(uvicorn.Config(service.application, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        wait_until("the server", lambda: server.started, 30)
        browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
        browser.get_log("browser")
        browser.get_log("performance")
        browser.get(url)
        try:
            yield Page(browser, service, url)
            console = browser.get_log("browser")
            messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        finally:
            browser.get("about:blank")
            server.should_exit = True
            thread.join(30)
    requested = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert {urlsplit(address).netloc for address in requested if address.startswith("http")} == {urlsplit(url).netloc}
    assert [entry for entry in console if not re.search("status of (401|415|422)", entry["message"])] == []


def png(pixels: NDArray[Any]) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()


@contextmanager
def opened(browser: Any, checkpoint: str, tmp_path: Path) -> Iterator[Page]:
    """The page of a service whose network finds `disks` without fault, connected."""
    with served(browser, Service(checkpoint, maps_of_disks), tmp_path) as page:
        page.wait("the model", "document.getElementById('model').textContent.startsWith('network')")
        yield page
