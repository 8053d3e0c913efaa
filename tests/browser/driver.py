"""A browser to look at pages with: Debian's Chromium, driven by the WebDriver protocol."""

import base64
import json
import os
import subprocess
import tempfile
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

# It starts in a second; a busy machine takes longer. Only a broken test waits so long.
_PATIENCE_S = 60
_ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",  # tests run as root
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1400,900",
)


class Browser:
    """One session. ``execute`` runs a script in the page, ``log`` returns what was logged."""

    def __init__(self, port):
        self._http = HTTPConnection("127.0.0.1", int(port), timeout=_PATIENCE_S)
        self._profile = tempfile.TemporaryDirectory()
        options = {
            "args": [*_ARGUMENTS, f"--user-data-dir={self._profile.name}"],
            "binary": "/usr/bin/chromium",
        }
        wishes = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wishes}})
        self._session = f"/session/{session['sessionId']}"
        # Away from the page that it starts with, which fetches this and that.
        self._ask("/url", {"url": "about:blank"})

    def _call(self, method, path, body=None):
        headers = {"Content-Type": "application/json"}
        self._http.request(method, path, json.dumps(body) if body else None, headers)
        answer = self._http.getresponse()
        value = json.load(answer)["value"]
        assert answer.status == 200, value
        return value

    def _ask(self, path, body):
        return self._call("POST", self._session + path, body)

    def open(self, path, fragment=""):
        """Show a file."""
        self._ask("/url", {"url": f"file://{path}{fragment}"})

    def execute(self, script, *arguments):
        """Run the body of a function in the page; return its value."""
        return self._ask("/execute/sync", {"script": script, "args": list(arguments)})

    def log(self, kind):
        """Return and forget what was logged: ``browser`` (the console) or ``performance``."""
        return self._ask("/se/log", {"type": kind})

    def requested(self):
        """Return the URLs that were asked for since the last time, and forget them."""
        messages = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        urls = [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]
        # The browser's own pages, such as the one that it starts with.
        return [url for url in urls if not url.startswith("chrome")]

    def prefer(self, scheme):
        """Prefer ``light`` or ``dark``."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        command = {"cmd": "Emulation.setEmulatedMedia", "params": {"features": [feature]}}
        self._ask("/goog/cdp/execute", command)

    def resize(self, width, height):
        """Make the window so large."""
        self._ask("/window/rect", {"width": width, "height": height})

    def picture(self, file):
        """Write what is shown as a PNG."""
        Path(file).write_bytes(base64.b64decode(self._call("GET", f"{self._session}/screenshot")))

    def close(self):
        """End the browser."""
        self._call("DELETE", self._session)
        self._http.close()
        self._profile.cleanup()


@contextmanager
def browser():
    """Start a driver and a browser, and end both."""
    with subprocess.Popen(
        ["/usr/bin/chromedriver", "--port=0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Nothing is fetched; a proxy would only be asked in vain.
        env={k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")},
    ) as driver:
        try:
            for line in driver.stdout:
                if "started successfully on port" in line:
                    break
            found = Browser(line.rstrip(".\n").rpartition(" ")[2])
            try:
                yield found
            finally:
                found.close()
        finally:
            driver.terminate()
