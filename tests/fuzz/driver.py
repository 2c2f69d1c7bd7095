"""Runs a fuzz target: with atheris if it is installed, else with its own mutation loop.

A target is a file with ``SEEDS`` (inputs that are mutated) and ``check(data)``, which raises when
the code under test does what it must not: anything but a result, or an error that names what is
wrong. ``FUZZ_SECONDS`` is the length of a run, in seconds.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from fuzz import scratch
from helpers.soak_record import record

try:
    import atheris
except ImportError:
    atheris = None

SECONDS = float(os.environ.get("FUZZ_SECONDS", "60"))
# Seconds of CPU time: what takes longer is a hang, not a busy machine.
TIMEOUT = 20.0
_INTERESTING = (
    b"\0", b"\xff", b"\xef\xbb\xbf", b"\r", b"\xe2\x80\xa8", b"\xed\xa0\x80", b"\\ud800", b"NaN",
    b"1e999", b"9" * 5000, b"[" * 2000, b"{", b"}", b"&a", b"*a", b"<<: ", b"!!int ", b"-", b":",
    b'"', b"{{", b"{%", b"%}", b"18446744073709551616", b"-2",
)  # fmt: skip


class Draws:
    """Numbers read from the front of some bytes; zeros when there are no more."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0

    def byte(self) -> int:
        self._place += 1
        return self._data[self._place - 1] if self._place <= len(self._data) else 0

    def below(self, limit: int) -> int:
        return self.byte() % limit

    def choose(self, values: Sequence[Any]) -> Any:
        return values[self.below(len(values))]

    def rest(self) -> bytes:
        return self._data[self._place :]


def instrumented(*packages: str) -> AbstractContextManager:
    """Instrument packages imported inside, so that atheris sees which lines an input reaches."""
    if atheris is None or "FUZZ_SECONDS" not in os.environ:
        return nullcontext()
    return atheris.instrument_imports(include=list(packages))


def refused(call: Callable[[], Any], *names: str) -> bool:
    """Return whether ``call`` is refused by an error that has one of ``names`` in its message.

    Any other error propagates; one that has none of the names is an AssertionError.
    """
    try:
        call()
    except (ValueError, TypeError, OSError) as error:
        if not any(name in str(error) for name in names):
            raise AssertionError(f"names none of {names}: {error!r}"[:2000]) from error
        if len(str(error)) > 5000:
            raise AssertionError(f"a message of {len(str(error))} characters") from error
        return True
    return False


def mutate(data: bytes, generator: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Change some bytes, cut, repeat, insert, or splice with another seed."""
    value = bytearray(data)
    for _ in range(generator.choice((1, 1, 2, 4, 8))):
        at = generator.randrange(len(value) + 1)
        to = min(len(value), at + generator.randrange(1, 16))
        kind = generator.randrange(7)
        if kind == 0 and value:
            value[at % len(value)] = generator.randrange(256)
        elif kind == 1:
            del value[at:to]
        elif kind == 2:
            value[at:at] = generator.choice(_INTERESTING)
        elif kind == 3:
            value[at:at] = value[at:to] * generator.choice((1, 2, 100))
        elif kind == 4:
            other = generator.choice(seeds)
            value[at:] = other[generator.randrange(len(other) + 1) :]
        elif kind == 5:
            value[at:at] = generator.randbytes(generator.randrange(1, 8))
        elif value:
            value[at % len(value)] ^= 1 << generator.randrange(8)
        del value[1 << 16 :]
    return bytes(value)


def try_mutations(
    check: Callable[[bytes], None],
    seeds: Sequence[bytes],
    *,
    seed: int = 0,
    count: int | None = None,
) -> int:
    """Check the seeds and mutations of them, ``count`` or for :data:`SECONDS`; return how many.

    Now and then an input is kept as a seed itself, so that mutations accumulate.
    """
    generator, pool = random.Random(seed), list(seeds)
    end, done = time.monotonic() + SECONDS, 0
    while done < count if count is not None else time.monotonic() < end:
        data = pool[done] if done < len(seeds) else mutate(generator.choice(pool), generator, seeds)
        start = time.process_time()
        try:
            check(data)
        except BaseException as error:
            raise AssertionError(f"{repr(error)[:2000]}\ninput: {data[:3000]!r}") from error
        if (seconds := time.process_time() - start) > TIMEOUT:
            raise AssertionError(f"took {seconds:.0f} s: {data[:3000]!r}")
        if generator.random() < 0.02 and len(pool) < 500:
            pool.append(data)
        done += 1
    return done


def main(check: Callable[[bytes], None], seeds: Sequence[bytes]) -> None:
    """Fuzz for :data:`SECONDS` and record the number of inputs; a finding ends the process."""
    name = os.path.splitext(os.path.basename(sys.argv[0]))[0]
    start, done = time.monotonic(), 0
    if atheris is None:
        _report(name, "mutations", try_mutations(check, seeds, seed=int(start)), start)
        return

    def one_input(data: bytes) -> None:
        nonlocal done
        done += 1
        check(data)
        if time.monotonic() - start > SECONDS:
            _report(name, "atheris", done, start)
            sys.stdout.flush()
            scratch.remove()
            os._exit(0)  # libFuzzer itself would end the process as an error

    for i, seed in enumerate(seeds):
        scratch.write(f"seeds/{i}", seed)
    options = [f"-timeout={TIMEOUT:.0f}", "-rss_limit_mb=8192", "-max_len=65536", "-verbosity=0"]
    # Where an input with a finding is kept.
    options.append(f"-artifact_prefix={tempfile.gettempdir()}/{name}-")
    corpus = str(scratch.folder / "seeds")
    atheris.Setup([sys.argv[0], *options, *sys.argv[1:], corpus], one_input)
    atheris.Fuzz()


def _report(name: str, how: str, inputs: int, start: float) -> None:
    seconds = round(time.monotonic() - start, 1)
    print(f"{name}: {inputs} inputs in {seconds} s by {how}, no finding")
    record(f"fuzz {name}", inputs=inputs, seconds=seconds, by=how)
