"""Changed copies of good inputs: some bytes, a part of a JSON document, a word of a command."""

import copy
import json
import random
from collections.abc import Sequence
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308,
    "", " ", "x", "..", "../../etc/passwd", "/dev/zero", "a/b", "\x00", "\n", "\x1b[2J", "\u202e",
    "NaN", "<script>", "%s{}", "x" * 300, [], {}, [[]], [None], {"": None}, [{}] * 3,
)  # fmt: skip
TOKENS = (
    b"NaN", b"Infinity", b"-", b"1e999", b"\xff\xfe", b"\x00", b"\xef\xbb\xbf", b"[" * 400,
    b'{"a":' * 400, b"null", b'"\\ud800"', b"'", b"\r\n", b"\xc3\x28",
)  # fmt: skip


def changed_bytes(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Bytes of a good input with one to four changes, or bytes of no input at all."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(8):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[at % len(data)] = rng.randrange(256)
            case 2:
                del data[at:]
            case 3:
                del data[at : at + rng.randint(1, 64)]
            case 4:
                data[at:at] = rng.choice(TOKENS)
            case 5:
                other = rng.choice(seeds)
                cut = rng.randrange(len(other) + 1)
                data[at:] = other[cut:]
            case 6:
                data[at:at] = data[: rng.randint(1, 64)]
            case _:
                data[at:at] = rng.randbytes(rng.randint(1, 16))
    return bytes(data)


def changed_json(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """A JSON document with one to three places changed; one in five with its bytes changed."""
    if rng.random() < 0.2:
        return changed_bytes(rng, seeds)
    document = [json.loads(rng.choice(seeds))]
    for _ in range(rng.randint(1, 3)):
        holder, key = rng.choice(_places(document))
        match rng.randrange(6):
            case 0 if holder is not document:
                del holder[key]
            case 1 if isinstance(holder[key], list) and holder[key]:
                holder[key] = holder[key] * rng.randint(0, 3)
            case 2 if isinstance(holder[key], dict):
                holder[key][rng.choice(("extra", "", "kind", "../x"))] = copy.deepcopy(
                    rng.choice(ODD)
                )
            case 3 if isinstance(holder[key], (int, float)) and abs(holder[key]) < 1e300:
                holder[key] = holder[key] * rng.choice((-1, 2, 1000, 0.5)) + rng.choice((-1, 0, 1))
            case 4:
                holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}
            case _:
                holder[key] = copy.deepcopy(rng.choice(ODD))
    return json.dumps(document[0]).encode(errors="surrogatepass")


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every part of a document, as its holder and its key."""
    found: list[tuple[Any, Any]] = []
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in keys:
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            found += _places(value[key])
    return found
