"""A queue while a driver is quicker than the card, or takes back what it gave."""

from virtfabric.shim.cardpci.descriptors import Status
from virtfabric.shim.cardpci.operations import Result
from virtfabric.shim.cardpci.queue import Queue

ENTRIES = 4


class Memory:
    """The guest's, as a channel; calls `seen` with the number of each completion."""

    def __init__(self, seen=lambda _: None):
        self.seen = seen

    def read(self, _address, size):
        return bytes(size)

    def write(self, _address, data):
        if len(data) == 4:
            self.seen(int.from_bytes(data, "little"))


class Operations:
    def __init__(self, meanwhile=lambda: None):
        self.meanwhile = meanwhile
        self.done = 0

    def carry_out(self, *_):
        self.done += 1
        self.meanwhile()
        return Result(Status.DONE)


def run(queue, operations, most=100):
    for _ in range(most):
        if queue.step(None, operations, lambda _: None) is None:
            return


def test_a_place_is_free_from_the_completion_on():
    """A driver looks at the ring, not at COMPLETED, and gives the next descriptor at once."""
    answers = []

    def give_another(number):
        if number <= 10:
            answers.append(queue.submit(number + ENTRIES))

    queue = Queue(0, 0, ENTRIES, Memory(give_another))
    assert queue.submit(ENTRIES)
    operations = Operations()
    run(queue, operations)
    assert answers == [True] * 10
    assert operations.done == 10 + ENTRIES


def test_what_was_given_is_not_taken_back():
    queue = Queue(0, 0, ENTRIES, Memory())
    assert queue.submit(3)
    assert not queue.submit(2)
    assert queue.submit(3)
    assert queue.submit(4)


def test_nothing_is_done_that_was_taken_back_just_then():
    """Else COMPLETED runs past SUBMITTED, and the card goes round the ring for ever."""
    queue = Queue(0, 0, ENTRIES, Memory())
    operations = Operations(lambda: queue.submit(0))
    assert queue.submit(2)
    run(queue, operations)
    assert operations.done == 2


def test_counts_go_round():
    start = 2**32 - 2
    queue = Queue(0, 0, ENTRIES, Memory(), submitted=start, completed=start)
    assert not queue.submit((start + ENTRIES + 1) % 2**32)
    assert queue.submit((start + ENTRIES) % 2**32)
    operations = Operations()
    run(queue, operations)
    assert operations.done == ENTRIES
    assert queue.completed == queue.submitted == 2
