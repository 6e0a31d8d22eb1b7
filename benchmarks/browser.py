"""A headless Chromium, spoken to over two pipes (the DevTools protocol): what pages do in a real browser.

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
# Takes the two pipes as 3 and 4, as the browser wants them.
LAUNCH = """
import os, sys
for pipe, number in zip(sys.argv[1:3], (3, 4)):
    os.dup2(int(pipe), number)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_chromium() -> str | None:
    """A Chromium that is installed: named in the environment, on PATH, or one that Playwright brought."""
    named = [os.environ[name] for name in VARIABLES if os.environ.get(name)]
    if found := next((path for name in (*named, *NAMES) if (path := shutil.which(name))), None):
        return found
    cache = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH", Path.home() / ".cache" / "ms-playwright"))
    brought = [path for name in ("chrome", "headless_shell") for path in cache.glob(f"chromium*/*/{name}")]
    return str(brought[0]) if brought else None


class Browser:
    """`asked` holds every address that pages asked for."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.to_browser, self.from_browser = to_browser, from_browser
        self.received, self.number = b"", 0
        self.asked: list[str] = []

    @classmethod
    @contextmanager
    def start(cls) -> Iterator[Browser]:
        """Raises FileNotFoundError where no Chromium is installed."""
        binary = find_chromium()
        if binary is None:
            raise FileNotFoundError("no Chromium on PATH, nor named in CHROME_BIN")
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
                os.close(writes)  # the browser ends with its pipe
                os.close(reads)
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for its answer."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        data = json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0"
        while data:
            data = data[os.write(self.to_browser, data) :]
        while True:
            answer = self._receive()
            if answer.get("method") == "Network.requestWillBeSent":
                self.asked.append(answer["params"]["request"]["url"])
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self.received:
            data = os.read(self.from_browser, 1 << 20)
            assert data, "the browser has ended"
            self.received += data
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def open(self, address: str, width: int = 1200, dark: bool = False) -> Page:
        """A page in a window of its own, once it is loaded. `width` in CSS pixels; under 600 it is a phone's."""
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
    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def run(self, script: str) -> Any:
        """What a JavaScript expression (or the promise that it is) comes to."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str, code: int = 0, text: str = "") -> None:
        """A key, as it is pressed and let go: `press("Tab", 9)`, `press("Enter", 13, "\\r")`."""
        about = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)
