"""What people ask of the audit log: the story of something, records, and whether it is whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from virtfabric.daemon.story import tell
from virtfabric.model.errors import Reason, Refusal, RefusedError

if TYPE_CHECKING:
    from virtfabric.daemon.jobs import Jobs
    from virtfabric.daemon.observatory import Observatory
    from virtfabric.ports import AuditLog

    Json = dict[str, Any]


class Archive:
    """Reads the log; whoever writes to it does that without this."""

    def __init__(self, audit: AuditLog, observatory: Observatory, jobs: Jobs) -> None:
        """Guests are found by name in `observatory`, jobs in `jobs`."""
        self._audit = audit
        self._observatory = observatory
        self._jobs = jobs

    def explain(self, subject: str) -> Json:
        """All that is recorded about it, and about the requests that these records belong to.

        Raises:
            RefusedError: UNKNOWN_ID.
        """
        records = self._audit.read(subject=self._subject(subject))
        if not records:
            raise RefusedError(Refusal(Reason.UNKNOWN_ID, f"nothing is recorded about {subject!r}"))
        related = {r.sequence: r for r in records}
        for request in {str(r.body["request"]) for r in records if r.body.get("request")}:
            related |= {r.sequence: r for r in self._audit.read(subject=request)}
        ordered = [related[n] for n in sorted(related)]
        return {"subject": subject, "lines": tell(ordered), "records": [_json(r) for r in ordered]}

    def records(self, since: float, subject: str) -> list[Json]:
        """Since UNIX seconds, 0 for all; about a subject, "" for any."""
        chosen = self._subject(subject) if subject else None
        return [_json(r) for r in self._audit.read(since=since or None, subject=chosen)]

    def verify(self, head: str) -> Json:
        """Whether nothing was changed or cut off, up to `head` if that is given."""
        verdict = self._audit.verify(head or None)
        return {
            "whole": not verdict.problem, "records": verdict.records, "head": verdict.head,
            "problem": verdict.problem,
        }  # fmt: skip

    def _subject(self, subject: str) -> str:
        """A job is known by its request; a guest by its UUID."""
        guest = self._observatory.find(subject)
        if guest is not None:
            return guest.uuid
        for job in self._jobs.all():
            if job.id == subject and job.result:
                return str(job.result.get("request", subject))
        return subject


def _json(record: Any) -> Json:
    return {
        "sequence": record.sequence, "at": record.at, "kind": record.kind,
        "subjects": list(record.subjects), "body": dict(record.body), "mac": record.mac,
    }  # fmt: skip
