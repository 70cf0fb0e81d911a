"""A few hundred mutations of every kind; `make fuzz` runs ten thousand (`tests.fuzz`)."""

from pathlib import Path

from tests.fuzz import make_bases, make_cases, run, table_of
from tests.mutations import MUTATIONS


def test_every_mutation_is_refused_or_decodes_to_what_it_was(tmp_path: Path) -> None:
    make_bases(tmp_path)
    cases = make_cases(tmp_path, 400, seed=5)
    outcomes = list(run(cases, tmp_path))
    assert [outcome for outcome in outcomes if outcome.is_broken] == []
    assert [outcome.case.number for outcome in outcomes] == list(range(400))
    table = table_of(outcomes)
    assert set(table) == set(MUTATIONS)
    # Nobody who leaves the hashes alone gets past them, and what is signed is refused as a whole.
    for kind in ("shard_byte", "shard_cut", "shard_longer", "shards_swapped", "codec_byte"):
        assert set(table[kind]) == {"refused"}, kind
    assert all(set(table[kind]) == {"refused"} for kind in table if kind.startswith("signed"))
    # Training sees what verify sees in a shard, though nobody ran verify.
    for outcome in outcomes:
        if outcome.by.startswith("shard ") and "of the other views" not in outcome.by:
            assert outcome.trained == "refused", outcome
