"""A QEMU's monitor and its ports: what `device_add` and `device_del` do, told as QMP tells it."""

import contextlib
import json
import socket
import threading


class FakeQemu:
    """Answers on a socket, one client at a time.

    Attributes:
        devices: bus and socket of each, by id.
        calls: commands in order, with the id that each is about.
        keeps: ids that the machine does not let go; of those in `protests` it says so.
    """

    def __init__(self, path, ports=()):
        self.path, self.ports = path, tuple(ports)
        self.devices, self.calls, self.keeps, self.protests = {}, [], set(), set()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self):
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _serve(self):
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            with client, contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._client = client
                self._say({"QMP": {"version": {"qemu": {"major": 10, "minor": 1, "micro": 0},
                                               "package": ""}, "capabilities": []}})  # fmt: skip
                for asked in _read(client):
                    self._take(asked)

    def _take(self, asked):
        command, given = asked["execute"], asked.get("arguments", {})
        if command not in ("qmp_capabilities", "qom-list"):
            self.calls.append((command, given["id"]))
        problem, told, events = None, {}, []
        if command == "qom-list":
            told = [{"name": name, "type": "child<vfio-user-pci>"} for name in self.devices]
        elif command == "device_add":
            problem = self._add(given)
        elif command == "device_del":
            problem, events = self._delete(given["id"])
        error = {"error": {"class": "GenericError", "desc": problem}}
        number = {"id": asked["id"]} if "id" in asked else {}
        self._say(number | (error if problem else {"return": told}))
        for event in events:
            self._say(event)

    def _add(self, given):
        taken = [bus for bus, _ in self.devices.values()]
        if given["bus"] not in self.ports:
            return f"Bus '{given['bus']}' not found"
        if given["id"] in self.devices or given["bus"] in taken:
            return "slot 0 function 0 already occupied"
        self.devices[given["id"]] = given["bus"], given["socket"]["path"]
        return None

    def _delete(self, name):
        if name not in self.devices:
            return f"Device '{name}' not found", []
        if name in self.protests:
            return None, [_event("DEVICE_UNPLUG_GUEST_ERROR", name)]
        if name in self.keeps:
            return None, []
        del self.devices[name]
        # of the port's own secondary bus, too: an event without an id
        return None, [_event("DEVICE_DELETED", None), _event("DEVICE_DELETED", name)]

    def _say(self, message):
        self._client.sendall(json.dumps(message).encode() + b"\r\n")


def _read(client):
    """One value after the other; nothing need stand between them."""
    text, decoder = "", json.JSONDecoder()
    while data := client.recv(1 << 16):
        text += data.decode()
        while text := text.lstrip():
            try:
                asked, end = decoder.raw_decode(text)
            except json.JSONDecodeError:
                break
            text = text[end:]
            yield asked


def _event(what, name):
    about = {"path": "/machine/peripheral/x"} | ({"device": name} if name else {})
    return {"event": what, "data": about, "timestamp": {"seconds": 1, "microseconds": 0}}
