"""Codecs of a finished cache, for another build that is to be merged with it.

What a rank table, a transform and a head are fitted to is a sample of rows, so two builds that
calibrate apart cannot become one set. The second takes them from the first, byte for byte: no
teacher is asked, and nothing is measured on rows that this build does not have.
"""

from stage1_teacher.build_plan import BuildPlan
from tide_cache.codec_files import read_codec_bytes
from tide_cache.errors import CompatibilityError
from tide_cache.manifest import CacheManifest
from tide_cache.payload_facts import PayloadFacts
from tide_cache.store import Store
from tide_cache.writer import read_manifest

_SAME_TEACHER = ("family", "weights_sha256", "config_sha256", "vocab_size", "attention")


def borrow_codecs(plan: BuildPlan, url: str) -> tuple[tuple[PayloadFacts, ...], dict[str, bytes]]:
    """Return the payloads of the cache at `url` and its codec files, by path, checked.

    Raises CompatibilityError where it is of another teacher, speaks of other ids, or holds other
    payloads than the config wants; FormatError where a file is damaged.
    """
    store = Store(url)
    manifest = read_manifest(store)
    if not isinstance(manifest, CacheManifest):
        raise CompatibilityError(f"{url}: kind: expected a cache, got a {manifest.kind}")
    theirs, ours = manifest.teacher_model, plan.teacher_model
    pairs = [(f"teacher_model.{n}", getattr(theirs, n), getattr(ours, n)) for n in _SAME_TEACHER]
    shared = plan.header_values["shared_vocab_size"]
    pairs.append(("shared_vocab_size", manifest.shared_vocab_size, shared))
    for field, found, expected in pairs:
        if found != expected:
            raise CompatibilityError(
                f"{url}: {field}: this build's is {expected}, that cache's {found}",
                hint="take codec_from a cache of the same teacher, or leave it out",
            )
    payloads = plan.with_chunks(tuple(p for p in manifest.payloads if p.name != "chunks"))
    held = [payload.name for payload in manifest.payloads]
    wanted = list(plan.config.wanted(plan.header_values["alignment"]))
    if plan.config.payload == "auto":
        wanted = [payload.name for payload in payloads]
    if sorted(held) != sorted(wanted):
        raise CompatibilityError(
            f"{url}: payloads: this build's are {', '.join(wanted)}, that cache's "
            f"{', '.join(held)}",
            hint="set payloads as that cache was built",
        )
    paths = [facts.path for facts in manifest.files if facts.path.startswith("codec/")]
    return payloads, {path: read_codec_bytes(store, manifest.files, path) for path in paths}
