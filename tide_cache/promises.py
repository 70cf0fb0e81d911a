"""What a manifest says against itself, which costs nothing to check before anything is read."""

from tide_cache.manifest import CacheManifest, Manifest
from tide_cache.payloads import codec_paths


def broken_promises(manifest: Manifest) -> list[str]:
    """Return a line for each count that its shards contradict and each codec file not listed."""
    expected = {
        "num_rows": sum(shard.num_rows for shard in manifest.shards),
        "size_bytes": sum(shard.size_bytes for shard in manifest.shards),
        "num_samples": sum(shard.num_rows for shard in manifest.shards if shard.view == 0),
    }
    problems = wrong_counts(manifest, expected)
    if isinstance(manifest, CacheManifest):
        listed = {facts.path for facts in manifest.files}
        for path in codec_paths(manifest.payloads):
            if path not in listed:
                problems.append(f"files: {path}: not listed, though a payload needs it")
    return problems


def wrong_counts(manifest: Manifest, expected: dict[str, int]) -> list[str]:
    """Return a line for each count of the manifest that is another than `expected`.

    Only `num_rows` has to be there.
    """
    problems = []
    for name, count in expected.items():
        found = manifest.counts.get(name)
        if found != count and not (found is None and name != "num_rows"):
            problems.append(f"counts.{name}: expected {count}, got {found}")
    return problems
