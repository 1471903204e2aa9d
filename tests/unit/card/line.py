"""A line between a card and a host, with somebody on it who has no keys."""

import contextlib
import socket
import threading


class Line:
    """A line on which each record of the card can come twice, or cut short."""

    def __init__(self, path, target):
        self.replay = False
        self.cut = False
        self._target = target
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            far.connect(str(self._target))
            for a, b, back in ((near, far, False), (far, near, True)):
                threading.Thread(target=self._carry, args=(a, b, back), daemon=True).start()

    def _carry(self, source, target, back):
        try:
            while data := source.recv(1 << 16):
                if back and self.cut:
                    target.sendall(data[:-3])
                    break
                target.sendall(data * 2 if back and self.replay else data)
        except OSError:
            pass
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
