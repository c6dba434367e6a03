"""A headless Chromium for tests, driven over WebDriver's interface: it says what pages log and ask for."""

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from uniemox_dist.distributed.local_launcher import free_port

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)
TIMEOUT_S = 90


def missing() -> str:
    """The reason why no browser can be used here; empty if one can."""
    if not any(shutil.which(name) for name in NAMES):
        return "needs Chromium (Debian's package chromium)"
    return "" if shutil.which("chromedriver") else "needs chromedriver (Debian's package chromium-driver)"


class Browser:
    """One window."""

    def __init__(self, url: str) -> None:
        self._url = url
        options = {"args": list(ARGUMENTS), "binary": next(p for name in NAMES if (p := shutil.which(name)))}
        wanted = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        self._url = f"{url}/session/{session}"

    def open(self, page: Path) -> None:
        """Loads a file."""
        self._call("POST", "/url", {"url": page.resolve().as_uri()})

    def size(self, width: int, height: int) -> None:
        """Gives the page this many pixels, as of a phone or a screen."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._devtools("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, scheme: str) -> None:
        """Prefers `light` or `dark` pages."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._devtools("Emulation.setEmulatedMedia", {"features": features})

    def run(self, script: str) -> Any:
        """Returns the result of a function's body in the page; the page's content policy does not apply to it."""
        return self._call("POST", "/execute/sync", {"script": script, "args": []})

    def said(self) -> list[str]:
        """The console's messages since the last call."""
        entries = self._call("POST", "/se/log", {"type": "browser"})
        return [f"{entry['level']}: {entry['message']}" for entry in entries]

    def asked_for(self) -> list[str]:
        """The addresses that the page asked for since the last time."""
        entries = self._call("POST", "/se/log", {"type": "performance"})
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def picture(self) -> bytes:
        """The whole page as PNG."""
        found = self._devtools("Page.captureScreenshot", {"captureBeyondViewport": True})
        return base64.b64decode(found["data"])

    def close(self) -> None:
        """Ends the browser."""
        self._call("DELETE", "", None)

    def _devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._url + path, data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return json.load(answer)["value"]


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser that is ended with its driver."""
    port = free_port()
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline, window = time.monotonic() + TIMEOUT_S, None
        while window is None:
            try:
                window = Browser(f"http://127.0.0.1:{port}")
            except ConnectionError:
                _still_starting(driver, deadline)
            except urllib.error.URLError as error:
                if not isinstance(error.reason, ConnectionError):
                    raise
                _still_starting(driver, deadline)
        try:
            yield window
        finally:
            window.close()
    finally:
        driver.terminate()
        driver.wait(30)


def _still_starting(driver: "subprocess.Popen[bytes]", deadline: float) -> None:
    assert time.monotonic() < deadline, "chromedriver does not start"
    assert driver.poll() is None, "chromedriver ended at once"
    time.sleep(0.05)
