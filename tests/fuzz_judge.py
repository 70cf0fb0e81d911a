"""Whether a mutated set was refused, is what it was, or broke the rule of `tests.fuzz`."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from stage2_student.attention import BY_ROWS
from stage2_student.batches import BatchReader, InputForm
from stage2_student.compatibility import check_objective, teacher_reading
from stage2_student.objective import Objective
from stage2_student.objective_config import ObjectiveConfig
from tests.cache_builders import NUM_IDS
from tests.fuzz import Case
from tide_cache.cache import Cache, open_cache
from tide_cache.errors import TideError
from tide_cache.manifest import SIGNATURE, CacheManifest, Manifest
from tide_cache.signing import check_signature
from tide_cache.store import Store
from tide_cache.verify import verify_set, wrong_identity

_STUDENT_SIZE = 8


class Judge:
    """Knows what the sets were before they were changed."""

    def __init__(self, bases: Path) -> None:
        self._bases = bases
        self._contents: dict[str, Any] = {}

    def warm_up(self) -> None:
        """Import and allocate what honest sets take, so that a limit can be set on top of it."""
        for base in sorted(path.name for path in self._bases.iterdir()):
            folder = self._bases / base / "set"
            case = Case(number=-1, base=base, kind="none", seed=0)
            assert self.verify(folder, case)[0] == "equal"
            assert self.train(folder) == "finite"

    def verify(self, folder: Path, case: Case) -> tuple[str, str]:
        """Return the verdict on a set, and by which check it was refused."""
        if (folder / SIGNATURE).exists():
            try:
                check_signature(Store(folder), self._bases / case.base / "key.pub")
                signed = None
            except TideError as error:
                signed = error.message
            if case.kind.startswith("signed"):
                # The signature alone has to see it: what verify says is another question.
                return ("broken", "a good signature") if signed is None else ("refused", signed)
        try:
            report = verify_set(Store(folder))
        except TideError as error:
            return "refused", error.message
        if not report.ok:
            return "refused", report.problems[0]
        if self._content(folder) == self._base_content(case.base):
            return "equal", ""
        if case.kind.startswith("forged"):
            before = open_cache(self._bases / case.base / "set").identity
            told = wrong_identity(report.identity, before)
            return ("refused by identity", told[0]) if told else ("broken", "the same identity")
        return "broken", "verify found nothing, and it decodes to something else"

    def train(self, folder: Path) -> str:
        """Read every row for training without verifying; returns `finite` or `refused`."""
        try:
            cache = open_cache(folder, check=True)  # as `stage2_student.plan.open_run` does
            for view in range(cache.num_views):
                self._losses(cache, view)
        except TideError:
            return "refused"
        return "finite"

    def _losses(self, cache: Cache, view: int) -> None:
        objective = ObjectiveConfig.model_validate({"losses": _losses_of(cache.manifest)})
        check_objective(cache, objective, NUM_IDS)
        if cache.manifest.student.vocab_size > NUM_IDS:
            raise TideError("as check_student says")
        form = InputForm(
            block_size=cache.manifest.block_size,
            mask_token_id=NUM_IDS - 1,
            attention=BY_ROWS,
            device=torch.device("cpu"),
        )
        reader = BatchReader(cache, form=form, teacher=teacher_reading(cache, objective))
        num_rows = min(cache.num_samples, 64)
        batch = reader.read(view, torch.arange(num_rows).numpy())
        generator = torch.Generator().manual_seed(0)
        hidden_PD = torch.randn(batch.num_masked, _STUDENT_SIZE, generator=generator)
        head_VD = torch.randn(NUM_IDS, _STUDENT_SIZE, generator=generator)
        hidden_PD.requires_grad_()
        compute = Objective(objective)
        losses = compute(hidden_PD, head_VD, batch, compute.denominators(batch), progress=0.5)
        losses.total.backward()
        assert torch.isfinite(losses.total), "a loss that is not finite"
        assert hidden_PD.grad is None or torch.isfinite(hidden_PD.grad).all(), "a bad gradient"

    def _base_content(self, base: str) -> Any:
        if base not in self._contents:
            self._contents[base] = self._content(self._bases / base / "set")
        return self._contents[base]

    def _content(self, folder: Path) -> Any:
        """Everything that a reader decodes: rows, codec files, and how the manifest says to."""
        cache = open_cache(folder)
        tables = [cache.read_rows(v, range(cache.num_samples)) for v in range(cache.num_views)]
        codec = {path.name: path.read_bytes() for path in (folder / "codec").glob("*")}
        header = cache.manifest.model_dump(exclude={"counts", "dropped", "files", "shards"})
        return [_Table(table) for table in tables], codec, repr(header)


class _Table:
    """A table that compares bit for bit, NaN included."""

    def __init__(self, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.combine_chunks())
        self.data = sink.getvalue().to_pybytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Table) and self.data == other.data

    __hash__ = None  # type: ignore[assignment]


def _losses_of(manifest: Manifest) -> dict[str, float]:
    losses = {"ce": 1.0}
    if isinstance(manifest, CacheManifest):
        if manifest.candidates is not None:
            losses |= {"tidal": 1.0, "kl": 1.0, "reverse_kl": 1.0}
        if manifest.chunks is not None:
            losses |= {"calm": 1.0}
    return losses
