"""One of several processes works for all; when it dies another takes over."""

import multiprocessing
import threading
import time
from pathlib import Path

from stage1_teacher.turns import one_for_all
from tests.executor_workers import wait_for
from tide_cache.store import Store

BEAT_S, PATIENCE_S = 0.1, 2.0


def take_part(folder: Path, seconds: float) -> None:
    """Work if it is one's turn, and leave a file `worked.N`."""
    store = Store(folder)
    with one_for_all(
        store,
        "turns",
        lambda: store.exists("done"),
        beat_s=BEAT_S,
        patience_s=PATIENCE_S,
    ) as is_mine:
        if is_mine:
            number = len(list(folder.glob("worked.*")))
            store.publish(f"worked.{number}", b"")
            time.sleep(seconds)
            store.publish("done", b"")


def test_one_works_and_the_others_wait_for_it(tmp_path: Path) -> None:
    parties = [threading.Thread(target=take_part, args=(tmp_path, PATIENCE_S + 1))]
    parties[0].start()
    wait_for(lambda: (tmp_path / "worked.0").exists(), "the first to work")
    parties += [threading.Thread(target=take_part, args=(tmp_path, 0)) for _ in range(3)]
    for party in parties[1:]:
        party.start()
    for party in parties:
        party.join()
    assert len(list(tmp_path.glob("worked.*"))) == 1, "longer than others' patience, but heard of"
    assert not list((tmp_path / "turns").iterdir()), "nobody leaves a word behind"


def test_who_is_killed_at_work_is_followed_by_another(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    first = context.Process(target=take_part, args=(tmp_path, 600))
    first.start()
    wait_for(lambda: (tmp_path / "worked.0").exists(), "the first to work")
    first.kill()
    first.join()
    began_s = time.monotonic()
    take_part(tmp_path, 0)
    assert time.monotonic() - began_s < PATIENCE_S, "of this machine it is known that it is gone"
    assert (tmp_path / "worked.1").exists()


def test_who_falls_silent_on_another_machine_is_followed_by_another(tmp_path: Path) -> None:
    (tmp_path / "turns").mkdir()
    (tmp_path / "turns" / "0~1~elsewhere.working.7").touch()
    began_s = time.monotonic()
    take_part(tmp_path, 0)
    assert time.monotonic() - began_s >= PATIENCE_S
    assert (tmp_path / "worked.0").exists()


def test_what_is_done_needs_nobody(tmp_path: Path) -> None:
    (tmp_path / "done").touch()
    take_part(tmp_path, 0)
    assert not (tmp_path / "turns").exists()
