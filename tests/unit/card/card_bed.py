"""A card on a bench: power can be cut, time moves when told to, images are signed by a signer."""

import functools
import secrets

from slice_world import AES, adapter

from virtfabric.adapters.simulated.clock import SimulatedClock
from virtfabric.model.units import MIB, Bytes
from virtfabric.protocol import messages as m
from virtfabric.shim.firmware.firmware import Firmware
from virtfabric.shim.firmware.programming import EmulatedPort
from virtfabric.shim.firmware.statelog import StateLog
from virtfabric.trust.images import describe_image, make_signer, sign_image

SIGNER, PUBLIC = make_signer()
NEVER = 4_000_000_000
BITS = bytes(range(256)) * 4096
"""An image of 1 MiB."""


@functools.cache
def signed(name="aes-1", capability=AES, data=BITS, not_after=NEVER, key=SIGNER):
    manifest = describe_image(name, capability, data, not_after)
    return manifest, sign_image(key, manifest)


class Bench:
    """One card; `cut_power` and on again."""

    def __init__(self, path, *, rotate=1 << 20, **amounts):
        self.path = path / "flash"
        self.adapter = adapter(**amounts)
        self.clock = SimulatedClock()
        self.rotate = rotate
        self.secret = secrets.token_bytes(32)
        self.power_on()

    def power_on(self):
        self.port = EmulatedPort()
        self.log = StateLog(self.path, rotate=self.rotate)
        self.card = Firmware(
            self.adapter,
            self.log,
            clock=self.clock,
            port=self.port,
            signers=[PUBLIC],
            secret=self.secret,
        )

    def cut_power(self):
        self.log.close()
        self.power_on()

    def ask(self, message):
        (answer,) = self.card.handle(message)
        return answer

    def pass_time(self, seconds):
        self.clock.advance(seconds)
        return self.card.tick()

    def wish(self, request, spec, **more):
        return self.ask(m.AllocationRequest(request, spec, **more))

    def make(self, request, spec, **more):
        decision = self.wish(request, spec, **more)
        assert isinstance(decision, m.Decision), decision
        grant = self.ask(m.Commit(decision.reservation))
        assert isinstance(grant, m.Grant), grant
        return grant.slice

    def load(self, name, image=None, data=BITS, step=300_000):
        manifest, signature = image or signed()
        answer = self.ask(m.Configure(name, manifest, signature))
        for first in range(0, len(data), step):
            if isinstance(answer, m.Error) or answer.detail:
                return answer
            answer = self.ask(m.ImageData(name, first, data[first : first + step]))
        return answer

    def program(self, name, image=None, data=BITS):
        answer = self.load(name, image, data)
        assert answer.phase == "programming", answer
        return [t for t in self.pass_time(5) if isinstance(t, m.Progress)][-1]


def mib(count):
    return Bytes(count * MIB)
