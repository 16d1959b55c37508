"""Ways to spoil a good file."""

import contextlib
import json
import random
from collections.abc import Iterator
from typing import Any

NUMBERS = [0, -1, 1, 2, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**64, 1e308, 0.5, "", "a", "é\ud83d", "\0", "x" * 10_000, [], {},
    [None], ["a"], [[]], {"a": 1}, {"content": 3}, float("nan"), float("inf"),
]  # fmt: skip


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A good file, spoilt in some way or other."""
    ways = [flipped, cut, spliced, with_numbers, random_bytes]
    with contextlib.suppress(ValueError):
        json.loads(content)
        ways += [other_values] * 5
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        content = rng.choice(ways)(content, rng)
    return content


def flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 8))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def spliced(content: bytes, rng: random.Random) -> bytes:
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    b = min(b, a + 200)
    return content[:a] + content[a:b] * rng.choice((0, 2, 20)) + content[b:]


def with_numbers(content: bytes, rng: random.Random) -> bytes:
    """A number of four or eight bytes in place of others; in a text, some digits."""
    size, at = rng.choice((4, 8)), rng.randrange(len(content) + 1)
    if rng.random() < 0.5:
        return (
            content[:at]
            + (rng.choice(NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")
            + content[at + size :]
        )
    digits = rng.choice(("9" * 5000, "1e999", "-1", "NaN", "[" * 20_000, '"', "\0", "٣")).encode()
    return content[:at] + digits + content[at + rng.randrange(3) :]


def random_bytes(content: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice((0, 1, 8, 100, 5000)))


def other_values(content: bytes, rng: random.Random) -> bytes:
    """A JSON text with one value of another kind, one that is gone, or one more."""
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError):
        return content
    places = list(containers(whole))
    if not places:
        return json.dumps(rng.choice(VALUES)).encode()
    place = rng.choice(places)
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    if keys and rng.random() < 0.8:
        key = rng.choice(keys)
        if rng.random() < 0.2:
            del place[key]
        else:
            place[key] = rng.choice(VALUES)
    elif isinstance(place, dict):
        place[rng.choice(("a", "", "type", "factor"))] = rng.choice(VALUES)
    else:
        place.append(rng.choice(VALUES))
    return json.dumps(whole).encode()


def containers(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list) and value:
        yield value
        for inner in list(value.values() if isinstance(value, dict) else value)[:50]:
            yield from containers(inner)
