"""A host behind any driver of a mailbox: TLS and the card protocol."""

from trust_data import HOST, end, hello

from virtfabric.trust.link import Link


class Host:
    """A host that speaks through a mailbox."""

    def __init__(self, mailbox, **ends):
        self.mailbox = mailbox
        mailbox.open()
        self.link = Link(end(HOST, **ends), hello(HOST))
        self.got = []
        mailbox.until(lambda: self.step() or self.link.is_open or self.link.ended_by)

    def step(self):
        self.mailbox.send(self.link.outgoing())
        if data := self.mailbox.receive():
            self.got += self.link.receive(data)
            self.mailbox.send(self.link.outgoing())

    def ask(self, message):
        number = self.link.send(message)
        answers = []

        def answered():
            self.step()
            answers[:] = [r.message for r in self.got if r.about == number]
            return answers or self.link.ended_by

        self.mailbox.until(answered)
        (answer,) = answers
        return answer
