"""The part of the facade that is about offload cards: authorised here, done by the card desk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from virtfabric.daemon.authority import Action

if TYPE_CHECKING:
    from collections.abc import Mapping

    from virtfabric.daemon.api import Caller
    from virtfabric.daemon.cardparts import CardParts

    Json = dict[str, Any]


class CardCalls:
    """To be inherited by the facade, which has `_cards` and `_require`."""

    _cards: CardParts

    def _require(self, caller: Caller, action: Action, **about: Any) -> None:
        raise NotImplementedError

    def cards(self, caller: Caller) -> list[Json]:
        """See `AgentApi`."""
        self._require(caller, Action.READ)
        return self._cards.desk.show()

    def card(self, caller: Caller, serial: str) -> Json:
        """See `AgentApi`."""
        self._require(caller, Action.READ)
        return self._cards.desk.show_card(serial)

    def card_trust(self, caller: Caller, serial: str) -> Json:
        """See `AgentApi`."""
        self._require(caller, Action.CARDS, card=serial)
        return self._cards.desk.trust(serial, by=str(caller.principal))

    def slices(self, caller: Caller) -> list[Json]:
        """See `AgentApi`."""
        self._require(caller, Action.READ)
        return self._cards.desk.slices()

    def slices_plan(self, caller: Caller, text: str, options: Mapping[str, str]) -> Json:
        """See `AgentApi`."""
        self._require(caller, Action.CARDS, options=dict(options))
        return self._cards.desk.preview_create(text, options)

    def slices_create(self, caller: Caller, text: str, options: Mapping[str, str]) -> Json:
        """See `AgentApi`."""
        self._require(caller, Action.CARDS, options=dict(options))
        by = str(caller.principal)
        return {"job": self._cards.desk.create(text, options, uid=caller.uid, by=by).id}

    def slice_plan_end(self, caller: Caller, name: str) -> Json:
        """See `AgentApi`."""
        self._require(caller, Action.CARDS, slice=name)
        return self._cards.desk.preview_destroy(name)

    def slice_destroy(self, caller: Caller, name: str) -> Json:
        """See `AgentApi`."""
        self._require(caller, Action.CARDS, slice=name)
        by = str(caller.principal)
        return {"job": self._cards.desk.destroy(name, uid=caller.uid, by=by).id}

    def slice_program(self, caller: Caller, name: str, path: str) -> Json:
        """See `AgentApi`."""
        self._require(caller, Action.CARDS, slice=name, image=path)
        by = str(caller.principal)
        return {"job": self._cards.desk.program(name, path, uid=caller.uid, by=by).id}
