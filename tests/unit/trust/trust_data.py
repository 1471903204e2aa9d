"""An authority, a card and a host; and a wire between two ends."""

import datetime
import functools

from virtfabric.protocol.messages import Hello, Role
from virtfabric.trust.authority import issue, make_authority
from virtfabric.trust.context import make_context
from virtfabric.trust.identity import Identity
from virtfabric.trust.link import Link
from virtfabric.trust.session import Session

NOW = datetime.datetime.now(datetime.UTC)
CARD, HOST = Identity.of(Role.CARD, "C-1"), Identity.of(Role.HOST, "host-a")


@functools.cache
def authority(name="virtfabric test"):
    return make_authority(name, NOW)


@functools.cache
def credentials(identity, name="virtfabric test", days=1, ago=0):
    return issue(authority(name), identity, NOW - datetime.timedelta(days=ago), days=days)


@functools.cache
def context_of(mine, server):
    return make_context(mine, server=server)


def end(identity, *, credentials_=None, context=None, peer=None, serial=""):
    """One end: cards wait, hosts begin."""
    server = identity.role == Role.CARD
    context = context or context_of(credentials_ or credentials(identity), server)
    other = Role.HOST if server else Role.CARD
    return Session(context, server=server, peer_role=peer or other, serial=serial)


def pair(**host):
    return end(CARD), end(HOST, **host)


def hello(identity, boot="boot-1"):
    return Hello(identity.role, identity.serial, "test 1", boot, (1,))


def links():
    card, host = pair()
    return Link(card, hello(CARD)), Link(host, hello(HOST))


def exchange(a, b):
    """Until nobody has anything to send. What each got."""
    got = [], []
    while (from_a := a.outgoing()) + (from_b := b.outgoing()):
        got[0].append(a.receive(from_b))
        got[1].append(b.receive(from_a))
    return tuple(type(part[0])().join(part) if part and isinstance(part[0], bytes)
                 else [m for some in part for m in some] for part in got)  # fmt: skip
