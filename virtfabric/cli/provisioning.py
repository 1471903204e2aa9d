"""`virtfabric card provision` and `card sign`: local commands, for whoever has the keys."""

from __future__ import annotations

import datetime
import os
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from virtfabric.cli.arguments import checked
from virtfabric.cli.screen import note, print_json, print_lines
from virtfabric.cli.session import DONE
from virtfabric.model.errors import InvalidValueError, VirtfabricError
from virtfabric.model.want import parse_number

if TYPE_CHECKING:
    import argparse

AUTHORITY_DIR: Final = Path("/var/lib/virtfabric/authority")
SIGNING_KEY: Final = "signer.pem"
PUBLIC_KEY: Final = "signer.pub"
_DAY_S: Final = 86400
_MAX_IMAGE: Final = 1 << 30


def _provision(args: argparse.Namespace) -> int:
    # imported late: OpenSSL's binding takes a quarter of a second
    store = import_module("virtfabric.trust.store")
    identity = import_module("virtfabric.trust.identity").Identity
    role = import_module("virtfabric.protocol.messages").Role
    if args.signer:
        return _make_signer(args, store)
    about = (
        identity.of(role.CARD, args.card) if args.card else identity.of(role.HOST, args.host)
    )  # fmt: skip
    if (args.out / store.CERTIFICATE).exists():
        raise InvalidValueError(
            "--out", str(args.out), "holds credentials already, which are not overwritten"
        )
    authority = store.AuthorityStore(args.authority)
    fresh = not authority.exists
    now = datetime.datetime.now(datetime.UTC)
    made = authority.issue(f"virtfabric of {os.uname().nodename}", about, now, days=args.days)
    store.write_credentials(args.out, made)
    until = (now + datetime.timedelta(days=args.days)).date()
    if args.json:
        print_json({"identity": about.uri, "directory": str(args.out), "authority":
                    str(args.authority), "made_authority": fresh, "until": str(until)})  # fmt: skip
        return DONE
    if fresh:
        note(f"a new authority in {args.authority}: back it up, and keep its key on this host")
    print_lines([f"{about}: credentials in {args.out}, until {until}"])
    return DONE


def _make_signer(args: argparse.Namespace, store: Any) -> int:
    key, public = import_module("virtfabric.trust.images").make_signer()
    args.out.mkdir(parents=True, exist_ok=True, mode=0o700)
    store.write_new(args.out / SIGNING_KEY, key)
    store.write_new(args.out / PUBLIC_KEY, public)
    if args.json:
        print_json({"key": str(args.out / SIGNING_KEY), "public": str(args.out / PUBLIC_KEY)})
    else:
        print_lines([f"signing key {args.out / SIGNING_KEY}; cards get {args.out / PUBLIC_KEY}"])
    return DONE


def _sign(args: argparse.Namespace) -> int:
    images = import_module("virtfabric.trust.images")
    imagefile = import_module("virtfabric.protocol.imagefile")
    store = import_module("virtfabric.trust.store")
    if not 0 < args.image.stat().st_size <= _MAX_IMAGE:
        raise InvalidValueError("IMAGE", str(args.image), f"is not of 1 to {_MAX_IMAGE} bytes")
    not_after = int(time.time()) + args.days * _DAY_S
    name = args.name or args.image.stem
    manifest = images.describe_image(name, args.capability, args.image.read_bytes(), not_after)
    signature = images.sign_image(store.read_key(args.key), manifest)
    path = args.image.with_name(args.image.name + imagefile.SUFFIX)
    path.write_text(imagefile.format_manifest(manifest, signature))
    if args.json:
        print_json({"manifest": str(path), "name": name, "digest": manifest.digest,
                    "not_after": not_after})  # fmt: skip
    else:
        print_lines([f"{path}: image {name} for {args.capability}, sha256 {manifest.digest}"])
    return DONE


def _reported(run: Any) -> Any:
    """The same command, with what the file system says as an error of ours."""

    def command(args: argparse.Namespace) -> int:
        try:
            return int(run(args))
        except OSError as error:
            raise VirtfabricError(f"{error.filename}: {error.strerror}") from error

    return command


def add_parsers(commands: Any) -> None:
    """Register `provision` and `sign`, below `card`."""
    days = checked(lambda text: parse_number(text, 1, 36500, field=""))
    provision = commands.add_parser(
        "provision",
        help="make the certificates of cards and hosts",
        description=(
            "Make credentials for one card or one host: certificate, key, and the authority that\n"
            "they are checked against. The first call makes the authority, whose key stays on\n"
            "this host and is readable by its owner only. --signer makes a key for images.\n"
            "Needs no agent."
        ),
        example="virtfabric card provision --card C-1 --out /etc/virtfabric/card-C-1",
    )
    who = provision.add_mutually_exclusive_group(required=True)
    who.add_argument("--card", metavar="SERIAL", help="for the card with this serial number")
    who.add_argument("--host", metavar="ID", help="for the host with this id")
    who.add_argument("--signer", action="store_true", help="a key that signs images")
    provision.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where it goes; never overwritten"
    )
    provision.add_argument(
        "--authority", type=Path, default=AUTHORITY_DIR, metavar="DIR",
        help="the authority's directory (default: %(default)s)",
    )  # fmt: skip
    provision.add_argument(
        "--days", type=days, default=3650, metavar="N", help="how long it is good (%(default)s)"
    )
    provision.set_defaults(run=_reported(_provision))
    sign = commands.add_parser(
        "sign",
        help="sign an image for slices",
        description=(
            "Sign an image: writes IMAGE.manifest beside it, which `virtfabric card program`\n"
            "needs. Needs no agent."
        ),
        example="virtfabric card sign aes.img --capability crypto.aes --key signer.pem",
    )
    sign.add_argument("image", type=Path, metavar="IMAGE", help="the bytes for the accelerators")
    sign.add_argument("--capability", required=True, metavar="WORD", help="what it makes of them")
    sign.add_argument("--key", type=Path, required=True, metavar="FILE", help="the signing key")
    sign.add_argument("--name", metavar="NAME", help="for people (default: the file's)")
    sign.add_argument(
        "--days", type=days, default=365, metavar="N", help="how long cards take it (%(default)s)"
    )
    sign.set_defaults(run=_reported(_sign))
