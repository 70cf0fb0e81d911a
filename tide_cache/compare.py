"""Why two sets can or cannot become one, or teach one student: field by field, from the manifests.

A field matters for merging (the rows would not be of one recipe), for training one student from
both (the rows would not fit it), or for neither. Everything that differs is told, with the reason
in plain words, so that a refusal can be understood without reading either manifest.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tide_cache.canonical import canonical_json
from tide_cache.errors import CompatibilityError
from tide_cache.manifest import CacheManifest, Manifest, identity

Matter = Literal["merge and train", "merge", "neither"]
_MOST_SHOWN = 60
_ABSENT = "(none)"

_SAME_STUDENT = "ids of the student would mean other tokens"
_SAME_TEACHER_IDS = "ids of the teacher would mean other tokens"
_OTHER_MASKS = "masks and timesteps would be drawn by two rules"
_OTHER_ANSWERS = "the answers are those of another teacher, or of one that was asked otherwise"
_OTHER_ROWS = "conversations would be rendered or cut in two ways"

# What matters for both, and why.
_TRAIN: dict[str, str] = {
    "alignment": "losses over positions and over chunks do not mix",
    "block_size": "the student's attention is built for one size of blocks",
    "student.sha256": _SAME_STUDENT,
    "student.vocab_size": _SAME_STUDENT,
    "student.mask_token_id": "the student has one mask token",
    "student.eos_token_id": "replies would end in two ways",
    "student.pad_token_id": "rows would be filled up in two ways",
}
# What matters for merging alone: a header says it once for all rows.
_MERGE: dict[str, str] = {
    "kind": "a cache and a premasked set hold other columns",
    "num_views": "every sample needs the same number of views",
    **{f"teacher.{name}": _SAME_TEACHER_IDS for name in ("sha256", "vocab_size", "mask_token_id")},
    "teacher.eos_token_id": "the teacher's replies would end in two ways",
    "teacher.pad_token_id": "the teacher's rows would be filled up in two ways",
    "shared_vocab_size": "payloads speak of the ids that both sides share",
    **{
        f"noising.{name}": _OTHER_MASKS
        for name in ("drawn", "seed", "num_timesteps", "t_min", "t_max", "demo_ratio")
    },
    **{
        f"config.{side}.{name}": _OTHER_ROWS
        for side in ("student", "teacher")
        for name in ("max_length", "chat_template", "template_kwargs")
    },
    "comp_demo": "one teacher was asked in one pass, the other in two (CompDemo)",
    **{
        f"teacher_model.{name}": _OTHER_ANSWERS
        for name in (
            "family",
            "weights_sha256",
            "config_sha256",
            "vocab_size",
            "dtype",
            "attention",
            "backend",
            "block_size",
            "mask_token_id",
        )
    },
    "payloads": "what was kept of the answers, and its codec, must be the same in every row",
    "codec files": "payloads of one set cannot be decoded with the other's rank table, transform "
    "or head",
}
_NEITHER: dict[str, str] = {
    "sources": "other samples are what merging is for",
    "student.name": "the tokenizer's content decides, not its name",
    "teacher.name": "the tokenizer's content decides, not its name",
    "teacher_model.name": "the weights decide, not their name",
    "teacher_model.revision": "the weights decide, not their revision",
    "teacher_model.device": "only the last bits of rounding differ",
    "premasked_sha256": "each cache was built from a premasked set of its own",
    "format_version": "both are read",
    "fidelity": "each was measured on rows of its own",
    "counts": "how many rows there are",
    "dropped": "what was left out",
    "origins": "how each came about",
}
_MAKING = "how it was made; what matters of it stands in the other fields"
_HEX = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One field in which two sets differ: both values as text, for what it matters, and why."""

    field: str
    first: str
    second: str
    matters_for: Matter
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What `compare` found of two sets."""

    identities: tuple[str, str]
    differences: tuple[Difference, ...]
    no_common_payload: bool

    @property
    def against_merging(self) -> list[Difference]:
        """The differences for which the two cannot become one set."""
        return [d for d in self.differences if d.matters_for != "neither"]

    @property
    def against_training(self) -> list[Difference]:
        """The differences for which the two cannot teach one student with one objective."""
        return [
            d
            for d in self.differences
            if d.matters_for == "merge and train"
            or (self.no_common_payload and d.field in ("kind", "payloads"))
        ]

    @property
    def immaterial(self) -> list[Difference]:
        """The differences that matter for neither."""
        return [d for d in self.differences if d.matters_for == "neither"]

    def as_json(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return {
            "identities": list(self.identities),
            "same": self.identities[0] == self.identities[1],
            "can_merge": not self.against_merging,
            "can_train_together": not self.against_training,
            "differences": [
                {
                    "field": d.field,
                    "first": d.first,
                    "second": d.second,
                    "matters_for": d.matters_for,
                    "why": d.why,
                }
                for d in self.differences
            ],
        }


def compare(first: Manifest, second: Manifest) -> Comparison:
    """Compare two sets by their manifests."""
    ours, theirs = _flat(first), _flat(second)
    found = []
    for field in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(field), theirs.get(field)
        if a == b:
            continue
        matters_for, why = _judge(field, is_in_both=field in ours and field in theirs)
        found.append(
            Difference(
                field=field, first=_text(a), second=_text(b), matters_for=matters_for, why=why
            )
        )
    order: list[Matter] = ["merge and train", "merge", "neither"]
    found.sort(key=lambda difference: order.index(difference.matters_for))
    return Comparison(
        identities=(identity(first), identity(second)),
        differences=tuple(found),
        no_common_payload=not _common_payloads(first, second),
    )


def require_mergeable(manifests: Sequence[Manifest], urls: Sequence[str]) -> None:
    """Raise CompatibilityError, naming the fields, unless all sets can become one."""
    for manifest, url in zip(manifests[1:], urls[1:], strict=True):
        hard = compare(manifests[0], manifest).against_merging
        if hard:
            told = "; ".join(f"{d.field}: {d.first} and {d.second} ({d.why})" for d in hard[:3])
            more = f"; and {len(hard) - 3} more" if len(hard) > 3 else ""
            raise CompatibilityError(
                f"{urls[0]} and {url} cannot become one set: {told}{more}",
                hint=f"see 'tide-cache diff {urls[0]} {url}'",
            )


def lines(found: Comparison, urls: tuple[str, str]) -> list[str]:
    """Return the comparison for people, one line after another."""
    if found.identities[0] == found.identities[1]:
        return [f"the same set: {found.identities[0]}"]
    out = [
        _verdict("can be merged", "cannot be merged", found.against_merging),
        _verdict(
            "can train one student together",
            "cannot train one student together",
            found.against_training,
        ),
    ]
    if found.against_merging or found.against_training:
        out.append("")
    for difference in found.against_merging:
        out += _explained(difference, urls)
    if found.immaterial:
        out += ["", "differs, and does not matter:"]
    for difference in found.immaterial:
        out.append(
            f"  {difference.field}: {difference.first} | {difference.second} ({difference.why})"
        )
    return out


def _verdict(yes: str, no: str, against: list[Difference]) -> str:
    return f"{no}: {', '.join(d.field for d in against)}" if against else yes


def _explained(difference: Difference, urls: tuple[str, str]) -> list[str]:
    return [
        f"{difference.field}: {difference.why} [{difference.matters_for}]",
        f"  {urls[0]}: {difference.first}",
        f"  {urls[1]}: {difference.second}",
    ]


def _judge(field: str, *, is_in_both: bool) -> tuple[Matter, str]:
    if field in _TRAIN:
        return "merge and train", _TRAIN[field]
    # The config of an older program lacks keys: what it did not know it did in one way.
    if field in _MERGE and (is_in_both or not field.startswith("config.")):
        return "merge", _MERGE[field]
    return "neither", _NEITHER.get(field, _MAKING)


def _flat(manifest: Manifest) -> dict[str, Any]:
    """Return what is compared by dotted field; lists and the free parts of configs are one."""
    values = manifest.model_dump(mode="json")
    files = values.pop("files")
    values.pop("shards")
    if isinstance(manifest, CacheManifest):
        codecs = sorted((f["path"], f["sha256"]) for f in files if f["path"] != "README.md")
        values["codec files"] = [f"{path} {sha256}" for path, sha256 in codecs]
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if name in ("counts", "dropped"):
            flat[name] = value
        else:
            flat.update(_leaves(name, value, depth=2))
    return flat


def _leaves(name: str, value: Any, *, depth: int) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict) or depth == 0 or not value:
        yield name, value
        return
    for key, item in value.items():
        yield from _leaves(f"{name}.{key}", item, depth=depth - 1)


def _common_payloads(first: Manifest, second: Manifest) -> bool:
    if not (isinstance(first, CacheManifest) and isinstance(second, CacheManifest)):
        return first.kind == second.kind  # premasked sets teach by cross entropy alone
    return bool({p.name for p in first.payloads} & {p.name for p in second.payloads})


def _text(value: Any) -> str:
    """Return a value in a few words; hashes by their beginning."""
    if value is None:
        return _ABSENT
    if isinstance(value, str):
        return f"{value[:12]}…" if len(value) == _HEX and " " not in value else _cut(value)
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return ", ".join(_file_text(item) for item in value)
    return _cut(canonical_json(value).decode().strip())


def _file_text(item: str) -> str:
    path, _, sha256 = item.rpartition(" ")
    return f"{path} {sha256[:12]}…" if len(sha256) == _HEX else _cut(item)


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"
