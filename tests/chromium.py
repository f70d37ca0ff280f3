"""A headless Chromium for tests of pages: driven over a pipe (Chrome DevTools Protocol), no port and no driver."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"
)

_KEYS = {
    "Enter": ("Enter", 13, "\r"),
    "Escape": ("Escape", 27, ""),
    "ArrowDown": ("ArrowDown", 40, ""),
    "ArrowUp": ("ArrowUp", 38, ""),
    "ArrowLeft": ("ArrowLeft", 37, ""),
    "ArrowRight": ("ArrowRight", 39, ""),
}


class Browser:
    """One tab. `messages` are lines of its console and errors; `requests` the addresses that it asked for."""

    def __init__(self, process: subprocess.Popen[bytes], to: int, back: int) -> None:
        self._process, self._to, self._back = process, to, back
        self._buffer, self._next, self._session = b"", 0, None
        self._answers: dict[int, dict[str, Any]] = {}
        self._loaded = 0
        self.messages: list[str] = []
        self.requests: list[str] = []

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol and its answer."""
        self._next += 1
        number = self._next
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 60
        while number not in self._answers:
            self._read(deadline)
        answer = self._answers.pop(number)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _read(self, deadline: float) -> None:
        ready, _, _ = select.select([self._back], [], [], max(0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"Chromium did not answer; its console: {self.messages}")
        got = os.read(self._back, 1 << 20)
        if not got:
            raise RuntimeError("Chromium has ended")
        self._buffer += got
        *whole, self._buffer = self._buffer.split(b"\0")
        for part in whole:
            self._take(json.loads(part))

    def _take(self, message: dict[str, Any]) -> None:
        if "id" in message:
            self._answers[message["id"]] = message
            return
        parameters = message["params"]
        match message["method"]:
            case "Runtime.consoleAPICalled":
                self.messages.append(str([a.get("value", a.get("description")) for a in parameters["args"]]))
            case "Runtime.exceptionThrown":
                self.messages.append(str(parameters["exceptionDetails"]))
            case "Log.entryAdded":
                self.messages.append(parameters["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])
            case "Page.loadEventFired":
                self._loaded += 1

    def attach(self) -> None:
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def open(self, address: str | Path) -> None:
        """Go to a page and wait until it is loaded."""
        before = self._loaded
        self.send("Page.navigate", url=address.as_uri() if isinstance(address, Path) else address)
        self.wait_for_load(before)

    def wait_for_load(self, before: int) -> None:
        deadline = time.monotonic() + 60
        while self._loaded == before:
            self._read(deadline)

    def do(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Wait until the expression is true."""
        deadline = time.monotonic() + 20
        while not (value := self.do(expression)):
            assert time.monotonic() < deadline, f"never true: {expression}; console: {self.messages}"
            time.sleep(0.02)
        return value

    def leads(self, expression: str) -> None:
        """Do something that opens another page, and wait for that."""
        before = self._loaded
        self.do(expression)
        self.wait_for_load(before)

    def key(self, key: str, *, opens: bool = False) -> None:
        """Press a key; `opens`: and wait for the page that it opens."""
        before = self._loaded
        name, code, text = _KEYS.get(key, (key, ord(key[0].upper()), key))
        down = {"type": "keyDown", "key": name, "windowsVirtualKeyCode": code, **({"text": text} if text else {})}
        self.send("Input.dispatchKeyEvent", **down)
        with suppress(AssertionError):
            self.send("Input.dispatchKeyEvent", type="keyUp", key=name, windowsVirtualKeyCode=code)
        if opens:
            self.wait_for_load(before)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.send("Input.insertText", text=text)

    def resize(self, width: int, height: int) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def dark(self, on: bool = True) -> None:
        self.send(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if on else "light"}],
        )

    def screenshot(self, path: Path) -> Path:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))
        return path

    def downloads(self, directory: Path) -> None:
        """Files that pages give go to `directory`."""
        session, self._session = self._session, None
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(directory))
        self._session = session

    def downloaded(self, path: Path) -> bytes:
        """A file that a page gave, once it is whole."""
        deadline = time.monotonic() + 20
        while not path.exists() or not path.stat().st_size:
            assert time.monotonic() < deadline, f"no {path.name}; console: {self.messages}"
            time.sleep(0.02)
        return path.read_bytes()


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with a fresh profile in `profile`, closed at the end."""
    (to_read, to_write), (back_read, back_write) = os.pipe(), os.pipe()

    def pipes() -> None:  # Chromium reads commands from file 3 and writes to file 4
        os.dup2(to_read, 30)
        os.dup2(back_write, 31)
        os.dup2(30, 3)
        os.dup2(31, 4)

    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, preexec_fn=pipes, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(to_read)
    os.close(back_write)
    browser = Browser(process, to_write, back_read)
    try:
        browser.attach()
        yield browser
    finally:
        with suppress(Exception):
            browser._session = None
            browser.send("Browser.close")
        os.close(to_write)
        os.close(back_read)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
