"""A browser without a window, in which tests look at pages."""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find_browser() -> str | None:
    """Return the path of a browser that speaks the DevTools protocol, if any."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A tab, driven by the DevTools protocol over two pipes."""

    def __init__(self, path: str, profile: Path) -> None:
        # The browser reads commands from descriptor 3 and writes replies to 4.
        commands, self._commands = os.pipe()
        replies, answers = os.pipe()
        self._replies = os.fdopen(replies, "rb")
        arguments = (
            "--headless=new --no-sandbox --disable-gpu --no-first-run "
            f"--disable-dev-shm-usage --remote-debugging-pipe --user-data-dir={profile}"
        )
        # Through a shell, which alone can place descriptors at 3 and 4.
        script = f'exec "$0" "$@" 3</dev/fd/{commands} 4>/dev/fd/{answers}'
        self._process = subprocess.Popen(
            ["sh", "-c", script, path, *arguments.split()],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._number = 0
        self._session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": found["sessionId"]}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._commands)
        self._process.terminate()
        self._process.wait()
        self._replies.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return the result of a command."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters}
        data = json.dumps(command | self._session).encode() + b"\0"
        while data:
            data = data[os.write(self._commands, data) :]
        while True:
            answer = json.loads(self._read())
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return dict(answer["result"])

    def _read(self) -> bytes:
        found = bytearray()
        while (byte := self._replies.read(1)) != b"\0":
            assert byte, "the browser died"
            found += byte
        return bytes(found)

    def show(
        self, page: Path | str, width: int, scheme: str = "light", media: str = "screen"
    ) -> None:
        """Load a file or address at a width, on a light or dark screen or in print."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", media=media, features=[feature])
        address = page if isinstance(page, str) else page.as_uri()
        self.call("Page.navigate", url=address)
        loaded = f"complete {address}"
        while self.evaluate("document.readyState + ' ' + location.href") != loaded:
            time.sleep(0.01)

    def evaluate(self, script: str) -> Any:
        """Return the value of a script on the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def picture(self) -> bytes:
        """Return what can be seen of the page as a PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])
