"""What answers on a node's localhost:10249 in kube-proxy's place."""

import socket
import threading
from contextlib import closing, contextmanager
from pathlib import Path

from tracer.kernel import netns


class KubeProxy:
    """What answers on a node's localhost:10249, and how often it was asked."""

    def __init__(self, lab, node):
        self._lab, self._node = lab, node
        self.asked = 0
        self._listener = None

    def start(self, answer):
        with netns.inside(Path(self._lab.netns(self._node))):
            self._listener = socket.create_server(("127.0.0.1", 10249))
        self._thread = threading.Thread(target=self._serve, args=(self._listener, answer))
        self._thread.start()

    def stop(self):
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._thread.join()
            self._listener.close()
            self._listener = None

    def _serve(self, listener, answer):
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with closing(peer):
                peer.recv(4096)
                peer.sendall(answer)
            self.asked += 1


def said(mode):
    return b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n" + mode.encode()


@contextmanager
def kube_proxy_of(lab, node):
    proxy = KubeProxy(lab, node)
    try:
        yield proxy
    finally:
        proxy.stop()
