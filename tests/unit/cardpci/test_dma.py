"""What a slice's DMA counts, seen by a guest that is quick."""

from threading import Thread

from virtfabric.shim.cardpci.dma import Channel, Dma


class QuickGuest:
    """A bus; the guest asks for the counts between a byte's arrival and the copy's end."""

    def __init__(self, dma):
        self.dma = dma
        self.found = []
        self.asker = Thread(target=self.ask)

    def ask(self):
        self.found.append(self.dma.counts.written)

    def write(self, _address, _data):
        self.asker.start()
        self.asker.join(0.1)


def test_a_byte_that_the_guest_sees_is_counted():
    dma = Dma()
    guest = QuickGuest(dma)
    dma.attach(guest)
    Channel(dma).write(0, b"four")
    guest.asker.join()
    assert guest.found == [4]
