"""Thousands of damaged and forged sets: `python -m tests.fuzz --number 10000 --seed 0 --json`.

The rule: `verify` refuses every mutation, by an error or a problem of its own, or what it decodes
to is what it was. A forger who makes all hashes right may write another sound set, with everything
in it within bounds; that is refused when `verify` is told which set was meant (`--identity`).
Whoever trains from a set without having verified it gets an error of ours or finite losses. Nothing
else comes out: no traceback, no more memory than `MEMORY_BYTES` beyond the imports, no more time
than `TIMEOUT_S`.

Mutations run one after another in child processes; a child that dies names its mutation.
"""

import argparse
import json
import multiprocessing
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.cache_builders import SetShape, save_tokenizer, write_premasked
from tests.mutations import kinds_of, mutate
from tests.payload_caches import PAYLOADS, make_cache

MEMORY_BYTES = 2 << 30
TIMEOUT_S = 20
SHAPE = SetShape(num_samples=8, samples_per_task=4, num_views=2, ragged=True, lone_share=0.3)
SIGNED = "ranked"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One mutation of one set."""

    number: int
    base: str
    kind: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`verdict`: refused (by identity alone, or without it), equal, or broken: against the rule."""

    case: Case
    verdict: str
    by: str
    done: str
    trained: str

    @property
    def is_broken(self) -> bool:
        return self.verdict == "broken"


def make_bases(folder: Path) -> list[str]:
    """Write a small set of every kind; returns their names."""
    for kind in PAYLOADS:
        made = make_cache(folder / kind / "set", kind, SHAPE)
        if kind == SIGNED:
            _sign(made.folder)
    save_tokenizer(folder / "premasked" / "tokenizer")
    write_premasked(folder / "premasked" / "set", folder / "premasked" / "tokenizer", SHAPE)
    return [*PAYLOADS, "premasked"]


def _sign(folder: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from tide_cache.signing import sign_set
    from tide_cache.store import Store

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder.parent / "key.pem", folder.parent / "key.pub"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    sign_set(Store(folder), private)


def make_cases(folder: Path, number: int, seed: int) -> list[Case]:
    """Every kind of mutation of every base in turn, so that each has its share."""
    pairs = sorted(
        (kind, base)
        for base in [*PAYLOADS, "premasked"]
        for kind in kinds_of(folder / base / "set")
    )
    chance = random.Random(seed)
    return [
        Case(
            number=n,
            kind=pairs[n % len(pairs)][0],
            base=pairs[n % len(pairs)][1],
            seed=chance.randrange(1 << 48),
        )
        for n in range(number)
    ]


def run(cases: list[Case], bases: Path) -> Iterator[Outcome]:
    """Judge every case, in a child process that is replaced when it dies."""
    context = multiprocessing.get_context("spawn")
    left = list(cases)
    while left:
        here, there = context.Pipe()
        child = context.Process(target=_child, args=(there, left, bases))
        child.start()
        there.close()
        try:
            while left:
                # The alarm in the child is the first bound; this one is for what ignores alarms.
                if not here.poll(4 * TIMEOUT_S):
                    raise EOFError
                yield here.recv()
                del left[0]
        except EOFError:
            child.kill()
            child.join()
            yield Outcome(
                case=left.pop(0),
                verdict="broken",
                by=f"the process died or hung ({child.exitcode})",
                done="?",
                trained="?",
            )
        child.join(TIMEOUT_S)


def _child(connection: Connection, cases: list[Case], bases: Path) -> None:
    from tests.fuzz_judge import Judge

    judge = Judge(bases)
    judge.warm_up()
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used_bytes + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGALRM, _hang)
    for case in cases:
        with tempfile.TemporaryDirectory() as apart:
            folder = Path(apart) / "set"
            shutil.copytree(bases / case.base / "set", folder)
            done = "?"
            signal.alarm(TIMEOUT_S)
            try:
                done = mutate(folder, case.kind, random.Random(case.seed))
                verdict, by = judge.verify(folder, case)
                trained = judge.train(folder)
            except BaseException:
                verdict, trained = "broken", "?"
                by = "".join(traceback.format_exc(limit=-4))
            signal.alarm(0)
        connection.send(Outcome(case=case, verdict=verdict, by=by, done=done, trained=trained))


def _hang(*_: Any) -> None:
    raise TimeoutError(f"no answer in {TIMEOUT_S} s")


def table_of(outcomes: list[Outcome]) -> dict[str, dict[str, int]]:
    """Count verdicts by kind of mutation."""
    table: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        table.setdefault(outcome.case.kind, Counter())[outcome.verdict] += 1
    return {kind: dict(sorted(counts.items())) for kind, counts in sorted(table.items())}


def checks_of(outcomes: list[Outcome]) -> dict[str, int]:
    """Count by which check mutations were refused, the names and numbers in it left out."""
    counts = Counter(_shape_of(outcome.by) for outcome in outcomes if outcome.verdict == "refused")
    return dict(counts.most_common())


def _shape_of(text: str) -> str:
    text = re.sub(r"/tmp/\S+/set", "SET", text)
    text = re.sub(r"(data|codec)/[\w./-]+", "FILE", text)
    text = re.sub(r"(sample|row) \S+( view \S+)?", "ROW", text)
    text = re.sub(r"(expected|got) .*", r"\1 …", text)
    text = re.sub(r"\(.*", "", text)
    return re.sub(r"\b(0x)?[0-9a-f]*\d[0-9a-f.e+]*\b", "N", text)[:90].strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    options = parser.parse_args()
    began_s = time.monotonic()
    outcomes = []
    with tempfile.TemporaryDirectory() as apart:
        make_bases(Path(apart))
        cases = make_cases(Path(apart), options.number, options.seed)
        for outcome in run(cases, Path(apart)):
            outcomes.append(outcome)
            if outcome.is_broken:
                sys.stderr.write(f"{outcome.case} {outcome.done}\n{outcome.by}\n")
            if len(outcomes) % 500 == 0:
                sys.stderr.write(f"{len(outcomes)} of {options.number}\n")
    num_broken = sum(outcome.is_broken for outcome in outcomes)
    report = {
        "number": len(outcomes),
        "seed": options.seed,
        "seconds": round(time.monotonic() - began_s, 1),
        "verdicts": dict(Counter(outcome.verdict for outcome in outcomes)),
        "trained": dict(Counter(outcome.trained for outcome in outcomes)),
        # Of those that verify refuses, without having run it: which kinds training reads all the
        # same, with finite losses.
        "refused_but_trained": dict(
            Counter(
                outcome.case.kind
                for outcome in outcomes
                if outcome.verdict == "refused" and outcome.trained == "finite"
            )
        ),
        "by_kind": table_of(outcomes),
        "by_check": checks_of(outcomes),
    }
    if options.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        for kind, counts in report["by_kind"].items():
            told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
            sys.stdout.write(f"{kind:24} {told}\n")
        for check, count in report["by_check"].items():
            sys.stdout.write(f"{count:8} {check}\n")
        sys.stdout.write(f"{num_broken} of {len(outcomes)} broke the rule\n")
    return 1 if num_broken else 0


if __name__ == "__main__":
    sys.exit(main())
