"""What slices must be, worked out the slow way: bit masks, and every possibility tried.

Shares no code with `virtfabric.policy`: it reads the nouns of the model, and nothing else.
"""

from functools import cache
from itertools import combinations, product

MIB = 1 << 20
WHAT = ("cores", "memory", "lanes", "keys", "units")


def bits(numbers):
    return sum(1 << number for number in numbers)


def pieces_mask(pieces):
    return bits(g for start, size in pieces for g in range(start // MIB, (start + size) // MIB))


def units_mask(adapter, seat):
    base = {}
    place = 0
    for kind in sorted(adapter.accelerators):
        base[kind] = place
        place += adapter.accelerators[kind]
    return bits(base[seat.capability] + unit for unit in seat.units) if seat.units else 0


def masks(adapter, seat):
    return (
        bits(seat.cores), pieces_mask(seat.memory), bits(seat.lanes), bits(seat.keys),
        units_mask(adapter, seat),
    )  # fmt: skip


def everything(adapter):
    return (
        bits(range(adapter.cores)), bits(range(adapter.memory // MIB)), bits(range(adapter.lanes)),
        bits(range(1, adapter.keys + 1)), bits(range(sum(adapter.accelerators.values()))),
    )  # fmt: skip


def judge(books):
    """What is wrong with an adapter's books; nothing may be."""
    wrong = []
    adapter = books.adapter
    whole = everything(adapter)
    held = [0] * 5
    speed = 0
    for name, one in books.slices.items():
        got = masks(adapter, one.seat)
        for what, mine, theirs, all_of in zip(WHAT, got, held, whole, strict=True):
            if mine & theirs:
                wrong.append(f"{name} shares {what}")
            if mine & ~all_of:
                wrong.append(f"{name} has {what} that are not there")
        held = [a | b for a, b in zip(held, got, strict=True)]
        speed += one.seat.bandwidth
        wrong += judge_slice(name, one)
    if speed > adapter.bandwidth:
        wrong.append(f"limits of {speed} Mbit/s on {adapter.bandwidth}")
    return wrong


def judge_slice(name, one):
    spec, seat = one.spec, one.seat
    memory = sum(size for _, size in seat.memory)
    has = (len(seat.cores), memory, len(seat.lanes), len(seat.keys), len(seat.units),
           seat.bandwidth)  # fmt: skip
    asked = (spec.cores, spec.memory, spec.lanes, spec.keys, spec.units, spec.bandwidth or 0)
    if has != asked:
        yield f"{name} asked for {asked} and has {has}"
    if spec.contiguous and len(seat.memory) > 1:
        yield f"{name} is in pieces"
    if seat.lanes and (
        seat.lanes[0] % len(seat.lanes) or seat.lanes[-1] - seat.lanes[0] != len(seat.lanes) - 1
    ):
        yield f"{name} has lanes {seat.lanes}"
    if seat.capability != spec.capability and seat.units:
        yield f"{name} has units of {seat.capability}"


def free_masks(books, without=()):
    free = list(everything(books.adapter))
    speed = books.adapter.bandwidth
    seats = [s.seat for n, s in books.slices.items() if n not in without]
    seats += [r.slice.seat for r in books.reservations.values()]
    for seat in seats:
        free = [f & ~m for f, m in zip(free, masks(books.adapter, seat), strict=True)]
        speed -= seat.bandwidth
    return free, speed


def kind_mask(adapter, capability):
    place = 0
    for kind in sorted(adapter.accelerators):
        if kind == capability:
            return bits(range(place, place + adapter.accelerators[kind]))
        place += adapter.accelerators[kind]
    return 0


def could_hold(books, spec, without=()):
    """Whether this slice fits here when these are gone."""
    (cores, memory, lanes, keys, units), speed = free_masks(books, without)
    return (
        cores.bit_count() >= spec.cores
        and keys.bit_count() >= spec.keys
        and (units & kind_mask(books.adapter, spec.capability)).bit_count() >= spec.units
        and (not spec.bandwidth or speed >= spec.bandwidth)
        and has_memory(memory, spec)
        and has_lanes(lanes, spec.lanes, books.adapter.lanes)
    )


def has_memory(memory, spec):
    count = spec.memory // MIB
    if not spec.contiguous:
        return memory.bit_count() >= count
    run = (1 << count) - 1
    return any(memory >> start & run == run for start in range(memory.bit_length() + 1))


def has_lanes(lanes, width, there):
    run = (1 << width) - 1
    return not width or any(lanes >> s & run == run for s in range(0, there, width))


def victims_that_do(books, spec):
    """Every set of slices that may be made to leave and whose leaving is enough."""
    able = [
        name for name, one in books.slices.items()
        if one.spec.reclaimable and one.spec.priority < spec.priority
    ]  # fmt: skip
    for count in range(len(able) + 1):
        for chosen in combinations(sorted(able), count):
            if could_hold(books, spec, chosen):
                yield set(chosen)


def fewest_cards(all_books, spec, *, reclaim):
    """On how few adapters a slice can be; None: on none. Tries every division of it."""

    @cache
    def holds(place, cores, memory, units):
        return part_fits(all_books[place], spec, (cores, memory, units), reclaim=reclaim)

    for count in range(1, len(all_books) + 1):
        if count > 1 and (spec.contiguous or not (spec.cores or spec.memory or spec.units)):
            return None
        for places in combinations(range(len(all_books)), count):
            if divides(holds, places, (spec.cores, spec.memory // MIB, spec.units)):
                return count
    return None


def divides(holds, places, amounts):
    if len(places) == 1:
        return holds(places[0], *amounts)
    for share in product(*(range(amount + 1) for amount in amounts)):
        rest = tuple(a - s for a, s in zip(amounts, share, strict=True))
        if any(share) and any(rest) and holds(places[0], *share):
            found = divides(holds, places[1:], rest)
            if found:
                return True
    return False


class _Part:
    """A share of a slice; only what `could_hold` asks for."""

    def __init__(self, spec, share):
        self.cores, granules, self.units = share
        self.memory = granules * MIB
        self.contiguous, self.lanes, self.keys = spec.contiguous, spec.lanes, spec.keys
        self.bandwidth, self.capability = spec.bandwidth, spec.capability


def part_fits(books, spec, share, *, reclaim):
    gone = [
        name for name, one in books.slices.items()
        if reclaim and one.spec.reclaimable and one.spec.priority < spec.priority
    ]  # fmt: skip
    return could_hold(books, _Part(spec, share), gone)


def could_change(books, name, spec):
    """Whether a slice can get other amounts, with what is free and what it has."""
    one = books.slices[name]
    if not one.holder:
        return could_hold(books, spec, (name,))
    if spec.lanes != one.spec.lanes or spec.capability != one.spec.capability:
        return False
    free, speed = free_masks(books)
    own = masks(books.adapter, one.seat)
    both = [f | o for f, o in zip(free, own, strict=True)]
    kind = kind_mask(books.adapter, spec.capability)
    enough = (
        both[0].bit_count() >= spec.cores
        and both[3].bit_count() >= spec.keys
        and (both[4] & kind).bit_count() >= spec.units
        and speed + one.seat.bandwidth >= (spec.bandwidth or 0)
    )
    return enough and memory_can_stay(free[1], one.seat.memory, spec)


def memory_can_stay(free, own, spec):
    count = spec.memory // MIB
    if not spec.contiguous or not own:
        had = pieces_mask(own).bit_count()
        if spec.contiguous:
            return has_memory(free, spec)
        return free.bit_count() + had >= count
    if len(own) > 1:
        return False
    ((start, size),) = own
    first = start // MIB
    return all(free >> g & 1 for g in range(first + size // MIB, first + count))
