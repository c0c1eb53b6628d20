# SPDX-License-Identifier: LGPL-2.1-or-later
"""A browser without a screen, and a client of its remote debugging port (the DevTools protocol over RFC 6455)."""

import ctypes
import json
import os
import urllib.request
from base64 import b64encode
from pathlib import Path
from typing import Any

from base import HOST, Served, asked, is_

PR_SET_CHILD_SUBREAPER = 36     # <linux/prctl.h>
PAGE = """data:text/html,<title>0</title><body style="background: green"><script>
let rounds = 0
const worker = new Worker(URL.createObjectURL(new Blob(["onmessage = event => postMessage(event.data)"])))
const use = () => new Promise(resolve => {
    worker.onmessage = event => { document.title = event.data; resolve(event.data) }
    worker.postMessage(++rounds)
})
</script>"""


class Page:
    """A page, and the connection to it: JSON in text frames, with one answer to each command."""

    def __init__(self, browser: Served, url: str) -> None:
        request = urllib.request.Request(f'http://{HOST}:{browser.port}/json/new?about:blank', method='PUT')
        with urllib.request.urlopen(request, timeout=20) as answer:
            path = f'/devtools/page/{json.load(answer)["id"]}'
        self._socket, self._number = browser.connect((HOST, browser.port)), 0
        self._socket.sendall(f'GET {path} HTTP/1.1\r\nHost: {HOST}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n'
                             f'Sec-WebSocket-Key: {b64encode(os.urandom(16)).decode()}\r\n'
                             'Sec-WebSocket-Version: 13\r\n\r\n'.encode())
        head = b''
        while not head.endswith(b'\r\n\r\n'):
            head += asked(self._socket, b'', 1)
        assert head.startswith(b'HTTP/1.1 101'), head
        self('Page.navigate', url=url)
        while self.evaluate('location.href + document.readyState') != self.evaluate('location.href') + 'complete' or \
                self.evaluate('location.href') == 'about:blank':
            pass

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        data = json.dumps({'id': self._number, 'method': method, 'params': parameters}).encode()
        # a text frame with two bytes of length, and a mask of zeros
        self._socket.sendall(b'\x81\xfe' + len(data).to_bytes(2, 'big') + bytes(4) + data)
        while (answer := json.loads(self._frame())).get('id') != self._number:
            pass        # an event
        assert 'result' in answer, answer
        return dict(answer['result'])

    def _frame(self) -> bytes:
        kind, size = asked(self._socket, b'', 2)
        assert kind == 0x81, f'a frame {kind:#x}'
        if size >= 126:
            size = int.from_bytes(asked(self._socket, b'', 2 if size == 126 else 8), 'big')
        return asked(self._socket, b'', size)

    def evaluate(self, expression: str) -> Any:
        found = self('Runtime.evaluate', expression=expression, awaitPromise=True)
        assert 'exceptionDetails' not in found, found
        return found['result'].get('value')

    def close(self) -> None:
        self('Page.close')
        self._socket.close()


class Chromium(Served):
    """A page whose script has a worker; in each round a picture of it, and another page."""

    def start(self) -> None:
        # the handlers of crashes, whose parents end, stay in the tree
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        # without the connections to the buses of the machine, which are outside of the tree
        os.environ.update(DBUS_SYSTEM_BUS_ADDRESS='unix:path=none', DBUS_SESSION_BUS_ADDRESS='unix:path=none')
        self.run('chromium', '--headless', '--no-sandbox', '--disable-gpu', f'--remote-debugging-port={self.port}',
                 f'--user-data-dir={Path.cwd()}/profile', 'about:blank')
        self.connect((HOST, self.port)).close()
        self.page = Page(self, PAGE)
        self.picture = self.page('Page.captureScreenshot')

    def use(self, number: int) -> None:
        is_(self.page.evaluate('use()'), number)
        is_(self.page.evaluate('document.title'), str(number))
        is_(self.page('Page.captureScreenshot'), self.picture)
        other = Page(self, PAGE)
        is_(other.evaluate('use()'), 1)
        other.close()
        self.page('Page.bringToFront')      # the pictures of hidden pages can take long
