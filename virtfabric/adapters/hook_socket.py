"""Answers libvirt's hook script over a Unix socket, on threads of its own.

It must always answer, however busy the agent is: a hook that waits blocks libvirt. So it touches
no libvirt, asks only the `hook_*` calls of the agent (made not to block), and bounds everything a
client can do: size, time to send, time to read. Policy (who starts, which pins) is the agent's.
"""

from __future__ import annotations

import contextlib
import logging
import pwd
import selectors
import socket
import stat
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, assert_never

from virtfabric.adapters.farewell import Farewells, drain
from virtfabric.daemon.api import Caller
from virtfabric.model.errors import (
    AlreadyRunningError,
    InstallationError,
    InvalidValueError,
    RefusedError,
    VirtfabricError,
)
from virtfabric.model.request import Principal
from virtfabric.protocol.hook import HookCode, HookDecoder, HookOperation, HookReply, HookRequest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from virtfabric.daemon.api import AgentApi

_log = logging.getLogger(__name__)

PREPARE_WAIT_S: Final = 5.0
"""How long a start may wait for memory to come home; the hook itself gives up after 8 s."""
_READ_S: Final = 2.0
_WRITE_S: Final = 2.0
_UCRED: Final = struct.Struct("3i")
_WORKERS: Final = 16


@dataclass(frozen=True, slots=True)
class MissedCall:
    """A mark that the hook left while nobody answered. `at` is UNIX seconds."""

    key: str
    operation: HookOperation
    at: float
    name: str
    path: Path


def read_missed_calls(run_dir: Path) -> tuple[MissedCall, ...]:
    """The marks in `run_dir`/missed, oldest first; a mark that cannot be read is left out.

    `key` is the guest's UUID, or its name (quoted as in the file's name) where the XML had none.
    The caller unlinks `path` when it has dealt with the call.
    """
    found = []
    for path in sorted((run_dir / "missed").glob("[!.]*.*")):
        try:
            operation, at, name = path.read_text("utf-8", "replace").rstrip("\n").split(" ", 2)
            key = path.name.removesuffix(f".{operation}")
            found.append(MissedCall(key, HookOperation(operation), float(at), name, path))
        except (OSError, ValueError):
            _log.warning("%s is not a mark of the hook; left alone", path)
    return tuple(sorted(found, key=lambda mark: mark.at))


class HookServer:
    """Listens for the hook. Only uid 0 is answered; anybody else is told so and reported.

    Args:
        path: the socket; its directory is made (0755) when missing, a stale socket is removed.
        agent: the facade.
        on_denied: called for each peer that is not uid 0, for the audit log; must not block.
        mode: of the socket. 0600 lets the kernel turn others away before we see them; with 0666
            they get as far as "not allowed" and into the audit log.
        read_s: seconds that a client has to send its request.
    """

    def __init__(
        self,
        path: Path,
        agent: AgentApi,
        *,
        on_denied: Callable[[Caller], None],
        mode: int = 0o600,
        read_s: float = _READ_S,
    ) -> None:
        self._path = path
        self._agent = agent
        self._on_denied = on_denied
        self._mode = mode
        self._read_s = read_s
        self._listener: socket.socket | None = None
        self._inode = -1
        self._wake, self._woken = socket.socketpair()
        self._acceptor = threading.Thread(target=self._accept_all, name="hook-acceptor")
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="hook")
        self._closed = threading.Event()

    def start(self) -> None:
        """Begin to listen.

        Raises:
            AlreadyRunningError: somebody answers at that socket.
            InstallationError: the path is taken by something else, or cannot be bound.
        """
        try:
            self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            _remove_stale(self._path)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            listener.bind(str(self._path))
            # Nobody gets in between bind and chmod: until listen the kernel refuses connections.
            self._path.chmod(self._mode)
            self._inode = self._path.stat().st_ino
            listener.listen(64)
        except OSError as error:
            raise InstallationError(f"hook socket {self._path}: {error.strerror}") from error
        listener.settimeout(0)
        self._listener = listener
        self._acceptor.start()

    def close(self) -> None:
        """Stop accepting, finish the calls under way, remove the socket; safe to repeat."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._wake.close()
        if self._listener is not None:
            self._acceptor.join()
            self._remove_own()
            self._listener.close()
        self._pool.shutdown(wait=True)
        self._woken.close()

    def _remove_own(self) -> None:
        try:
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()
        except FileNotFoundError:
            pass

    def _accept_all(self) -> None:
        assert self._listener is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            denied = Farewells(selector)
            while not self._closed.is_set():
                ready = [key.fileobj for key, _ in selector.select(denied.timeout_s())]
                for peer in ready:
                    if isinstance(peer, socket.socket) and denied.has(peer):
                        denied.take(peer)
                denied.expire()
                if self._listener in ready:
                    self._accept_one(self._listener, denied)
            denied.close()

    def _accept_one(self, listener: socket.socket, denied: Farewells) -> None:
        try:
            peer, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # Out of descriptors, most likely: the hook sees a timeout and goes without us.
            _log.error("hook socket: %s", error)
            self._closed.wait(0.05)
            return
        caller = _read_caller(peer)
        if caller.uid != 0:
            self._deny(peer, caller, denied)
            return
        self._pool.submit(self._serve, peer, caller, time.monotonic())

    def _deny(self, peer: socket.socket, caller: Caller, denied: Farewells) -> None:
        # What it sends is thrown away beside other work, so that a stranger holds no thread.
        if _send(peer, HookReply(HookCode.REFUSED, "not allowed: the hook socket takes root only")):
            denied.add(peer)
        else:
            peer.close()
        try:
            self._on_denied(caller)
        except Exception:  # noqa: BLE001 - the acceptor must live on
            _log.exception("reporting a denied caller failed")

    def _serve(self, peer: socket.socket, caller: Caller, since: float) -> None:
        try:
            request = _receive(peer, since + self._read_s)
            reply = self._answer(caller, request, since)
        except (InvalidValueError, TimeoutError, OSError) as error:
            reply = HookReply(HookCode.UNABLE, str(error))
        except Exception as error:  # noqa: BLE001 - the hook must hear something
            _log.exception("answering a hook failed")
            reply = HookReply(HookCode.UNABLE, f"internal error ({type(error).__name__})")
        with peer, contextlib.suppress(OSError):
            if _send(peer, reply):
                drain(peer)

    def _answer(self, caller: Caller, request: HookRequest, since: float) -> HookReply:
        try:
            return self._ask_agent(caller, request, since)
        except RefusedError as error:
            return HookReply(HookCode.REFUSED, _one_line(error.refusal.detail))
        except VirtfabricError as error:
            _log.warning("hook %s of %s: %s", request.operation, request.name, error)
            return HookReply(HookCode.UNABLE, _one_line(str(error)))

    def _ask_agent(self, caller: Caller, request: HookRequest, since: float) -> HookReply:
        operation = request.operation
        match operation:
            case HookOperation.PREPARE:
                # Time in our own queue is time that libvirt has already waited.
                wait_s = max(0.0, PREPARE_WAIT_S - (time.monotonic() - since))
                line = _one_line(self._agent.hook_prepare(caller, request.xml, wait_s=wait_s))
                return HookReply(HookCode.REFUSED if line else HookCode.DONE, line)
            case HookOperation.STARTED | HookOperation.RELEASE | HookOperation.RECONNECT:
                self._agent.hook_notify(caller, request.name, operation.value, request.xml)
                return HookReply(HookCode.DONE)
            case HookOperation.MIGRATE | HookOperation.RESTORE:
                xml = self._agent.hook_filter(caller, operation.value, request.xml)
                return HookReply(HookCode.DONE, output="" if xml == request.xml else xml)
            case _:
                assert_never(operation)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _read_caller(peer: socket.socket) -> Caller:
    data = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(data)
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    return Caller(Principal(name, uid), uid, frozenset({gid}), pid)


def _receive(peer: socket.socket, deadline: float) -> HookRequest:
    decoder = HookDecoder()
    while True:
        # The deadline is for the whole request: a client that drips bytes gets no longer.
        peer.settimeout(max(deadline - time.monotonic(), 0.001))
        data = peer.recv(1 << 16)
        if not data:
            raise InvalidValueError("request", "", "ended before it was whole")
        if request := decoder.feed(data):
            return request


def _send(peer: socket.socket, reply: HookReply) -> bool:
    """Whether the answer was taken."""
    try:
        peer.settimeout(_WRITE_S)
        peer.sendall(reply.encode())
    except OSError as error:
        _log.debug("the hook went away before its answer: %s", error)
        return False
    return True


def _remove_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise InstallationError(
                f"hook socket {path}: there is something else", advice="remove it, or choose a path"
            )
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except TimeoutError:
            pass
    raise AlreadyRunningError(
        f"another agent listens at {path}", advice="stop it, or set agent.hook_socket"
    )
