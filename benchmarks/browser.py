"""A headless Chromium controlled over two pipes (DevTools protocol), to test pages in a real browser.

with Browser.start() as browser:
    page = browser.open("file:///tmp/page.html", width=390)
    page.run("document.title")
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell", "chrome")
VARIABLES = ("CHROMIUM", "CHROME_BIN", "CHROME_PATH")
HEIGHT = 900
# The browser expects the two pipes as file descriptors 3 and 4.
LAUNCH = """
import os, sys
for pipe, number in zip(sys.argv[1:3], (3, 4)):
    os.dup2(int(pipe), number)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_chromium() -> str | None:
    """Return an installed Chromium: named in the environment, on PATH, or installed by Playwright; None without one."""
    from_environment = [os.environ[name] for name in VARIABLES if os.environ.get(name)]
    if binary := next((path for name in (*from_environment, *NAMES) if (path := shutil.which(name))), None):
        return binary
    cache = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH", Path.home() / ".cache" / "ms-playwright"))
    installed = [path for name in ("chrome", "headless_shell") for path in cache.glob(f"chromium*/*/{name}")]
    return str(installed[0]) if installed else None


class Browser:
    """A running browser; `requests` holds the address of every request by a page."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.to_browser, self.from_browser = to_browser, from_browser
        self.received, self.number = b"", 0
        self.requests: list[str] = []

    @classmethod
    @contextmanager
    def start(cls) -> Iterator[Browser]:
        """Start a browser. Raise FileNotFoundError if no Chromium is installed."""
        binary = find_chromium()
        if binary is None:
            raise FileNotFoundError("no Chromium on PATH; install one or set CHROME_BIN")
        (child_reads, writes), (reads, child_writes) = os.pipe(), os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (child_reads, child_writes)]
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
            options += ["--remote-debugging-pipe", "--disable-background-networking", f"--user-data-dir={profile}"]
            command = [sys.executable, "-c", LAUNCH, *map(str, high), binary, *options]
            process = subprocess.Popen(command, pass_fds=high, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for fd in (child_reads, child_writes, *high):
                os.close(fd)
            try:
                yield cls(writes, reads)
            finally:
                os.close(writes)  # the browser exits when its pipe closes
                os.close(reads)
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Call a protocol method and return its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        data = json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0"
        while data:
            data = data[os.write(self.to_browser, data) :]
        while True:
            answer = self._receive()
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self.received:
            data = os.read(self.from_browser, 1 << 20)
            assert data, "the browser has exited"
            self.received += data
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def open(self, address: str, width: int = 1200, dark: bool = False) -> Page:
        """Open an address in a new window and wait until it is loaded. A `width` under 600 CSS pixels is mobile."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        page.call("Network.enable")
        page.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=HEIGHT, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.call("Page.navigate", url=address)
        page.run("new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', done))")
        return page


class Page:
    """A page in a window of its own."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression, awaited if it is a promise."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str, code: int = 0, text: str = "") -> None:
        """Press and release a key: `press("Tab", 9)`, `press("Enter", 13, "\\r")`."""
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)
