"""What `hidden` costs at real sizes: encoding in stage 1, replaying in stage 2, share of a step.

A random output head of d = 2,048 and V = 157,184 and random hidden states: speed does not depend on
what they say. Stage 1 is timed from hidden states to encoded columns, beside candidates of k = 64
without hidden states, and beside the head's product alone, which any payload needs. Stage 2 is
timed from columns to full logits (decode, replay), and as the difference that the tail `hidden`
makes to a whole training step of a randomly drawn 0.6B student, beside the tail `mean`, which
replays nothing. On a CPU take few positions; the share of a step does not depend on how many.

    python -m benchmarks.replay                                   # a GPU where there is one
    python -m benchmarks.replay --positions 64 --length 64        # a CPU

Shapes: P masked positions, R components, D hidden size, V vocabulary.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from stage1_teacher.hidden_fit import DeviceTransform, Head
from stage1_teacher.questions import as_candidates
from stage1_teacher.scoring import reduce_logits, rows_per_slice
from stage1_teacher.teachers.base import Scores, ScoreSpec
from stage2_student.aligned_rows import NoisedRows
from stage2_student.attention import BY_ROWS
from stage2_student.batches import Batch, InputForm, assemble
from stage2_student.forward import batch_losses
from stage2_student.losses import HiddenRows, ReplayHead, TeacherCandidates
from stage2_student.objective import Objective
from stage2_student.objective_config import ObjectiveConfig
from stage2_student.optimizer import OptimizerConfig, make_optimizer
from stage2_student.student import Student
from stage2_student.teacher_rows import TeacherRows
from tide_cache.payload_facts import HiddenFacts, RankedFacts
from tide_cache.payloads.candidates_ranked import RankedCandidates
from tide_cache.payloads.hidden import HiddenCodec, Transform, limits
from tide_cache.tails import Tail

_TEMPERATURES = (1.0, 2.0)
_SLICE_MIB = 256
# Qwen3-0.6B, but for the vocabulary, which is the head's.
_STUDENT = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}


class Setting:
    """A random head and hidden states on a device, and the codecs that store them."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        torch.manual_seed(0)
        size, vocab_size = options.hidden_size, options.vocab_size
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        weight_VD = torch.empty((vocab_size, size), dtype=dtype, device=device)
        self.head = Head(weight_VD=weight_VD.normal_(std=size**-0.5), bias_V=None)
        self.hidden_PD = torch.randn((options.positions, size), device=device, dtype=dtype)
        self.labels_P = torch.randint(vocab_size, (options.positions,), device=device)
        self.facts = HiddenFacts(
            hidden_size=size,
            vocab_size=vocab_size,
            bands=_bands(options.components),
            num_wide=0,
            step=0.25,
            fit_positions=1,
        )
        basis_DR = torch.linalg.qr(torch.randn(size, options.components))[0].numpy()
        self.transform = Transform(
            analysis_RD=np.ascontiguousarray(basis_DR.T),
            synthesis_DR=np.ascontiguousarray(basis_DR),
            mean_D=np.zeros(size, np.float32),
            limit_R=limits(self.facts),
            step=self.facts.step,
        )
        self.device = device
        self.num_positions_B = np.full(options.rows, options.positions // options.rows, np.int64)

    def spec(self, k: int, transform: Transform | None) -> ScoreSpec:
        """Return what stage 1 is asked for."""
        return ScoreSpec(
            k=k,
            temperatures=_TEMPERATURES,
            vocab_size=self.facts.vocab_size,
            transform=transform,
        )

    def candidates_codec(self, k: int, bits: int) -> RankedCandidates:
        """Return the codec of candidates."""
        facts = RankedFacts.model_validate(
            {
                "k": k,
                "vocab_size": self.facts.vocab_size,
                "temperatures": _TEMPERATURES,
                "mean_logits_positions": 1,
                "bits": bits,
                "ranks": "answers",
            }
        )
        return RankedCandidates(facts, np.arange(facts.vocab_size, dtype=np.int32))

    @torch.no_grad()
    def logits(self) -> None:
        """Apply the head to everything, slice by slice."""
        step = rows_per_slice(self.facts.vocab_size, _SLICE_MIB)
        for start in range(0, len(self.hidden_PD), step):
            self.head.logits(self.hidden_PD[start : start + step])
        _wait(self.device)

    @torch.no_grad()
    def encode(self, k: int, bits: int, *, hidden: bool) -> pa.Table:
        """Reduce and encode as a build does, from hidden states on."""
        spec = self.spec(k, self.transform if hidden else None)
        step = rows_per_slice(self.facts.vocab_size, _SLICE_MIB)
        parts = []
        for start in range(0, len(self.hidden_PD), step):
            logits_PV = self.head.logits(self.hidden_PD[start : start + step])
            labels_P = self.labels_P[start : start + step]
            parts.append(reduce_logits(logits_PV, labels_P, replace(spec, transform=None)))
        scores = Scores.concatenate(parts, replace(spec, transform=None))
        codec = self.candidates_codec(k, bits)
        columns = codec.encode(as_candidates(scores, codec.facts), self.num_positions_B)
        fields = codec.fields()
        if hidden:
            codes_PR = DeviceTransform(self.transform, self.device).to_codes(self.hidden_PD)
            hidden_codec = HiddenCodec(self.facts)
            columns += hidden_codec.encode(codes_PR, self.num_positions_B)
            fields += hidden_codec.fields()
        return pa.table(columns, schema=pa.schema(fields))

    def teacher(self, table: pa.Table, tail: Tail) -> TeacherCandidates:
        """Decode a table of k = 16 and hidden states as a trainer does."""
        found = self.candidates_codec(16, 8).decode(table, self.num_positions_B)
        assert found.tail_logshare_PT is not None
        hidden = None
        if tail == "hidden":
            code_PR = HiddenCodec(self.facts).decode(table, self.num_positions_B)
            head = ReplayHead(
                weight_VD=self.head.weight_VD,
                bias_V=None,
                synthesis_DR=torch.from_numpy(self.transform.synthesis_DR).to(self.device),
                mean_D=torch.from_numpy(self.transform.mean_D).to(self.device),
                step=self.facts.step,
            )
            hidden = HiddenRows(code_PR=torch.from_numpy(code_PR), head=head)
        return TeacherCandidates(
            ids_PK=torch.from_numpy(found.ids_PK.astype(np.int64)),
            logits_PK=torch.from_numpy(np.array(found.logits_PK)),
            logsumexp_PT=torch.from_numpy(np.array(found.logsumexp_PT)),
            tail_logshare_PT=torch.from_numpy(np.array(found.tail_logshare_PT)),
            temperatures=_TEMPERATURES,
            vocab_size=self.facts.vocab_size,
            mean_logits_V=torch.zeros(self.facts.vocab_size),
            hidden=hidden,
            tail=tail,
        ).to(self.device)

    def replay(self, table: pa.Table, tail: Tail) -> None:
        """Decode a table and rebuild the full logits of every position, slice by slice."""
        teacher = self.teacher(table, tail)
        step = rows_per_slice(self.facts.vocab_size, _SLICE_MIB)
        for start in range(0, teacher.num_positions, step):
            teacher.slice(start, start + step).dense(2.0)
        _wait(self.device)


class Step:
    """A training step of a 0.6B student on one batch: forward, losses, backward, AdamW."""

    def __init__(self, setting: Setting, options: argparse.Namespace) -> None:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        self.device = setting.device
        config = Qwen3Config(vocab_size=options.vocab_size, **_STUDENT)
        model = Qwen3ForCausalLM._from_config(
            config, dtype=torch.float32, attn_implementation=BY_ROWS
        )
        self.student = Student(model.to(self.device)).train()
        self.optimizer = make_optimizer(self.student, OptimizerConfig())
        self.objective = Objective(ObjectiveConfig(losses={"ce": 1.0, "tidal": 1.0}))
        self.batch = _batch(options, self.device)

    def run(self, teacher: TeacherCandidates) -> None:
        """Do one update."""
        answers = TeacherRows(
            index_Q=torch.arange(teacher.num_positions),
            candidates=teacher,
            chunks=None,
        )
        batch = replace(self.batch, teacher=answers)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            losses, _ = batch_losses(
                self.student,
                batch,
                self.objective,
                num_ids=len(self.student.head_VD),
                device=self.device,
                progress=0.5,
            )
        losses.total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        _wait(self.device)


def _batch(options: argparse.Namespace, device: torch.device) -> Batch:
    """Make a batch, on the host, in which the last positions of each row are masked."""
    rows, length = options.rows, options.length
    per_row = options.positions // rows
    masked_BL = np.zeros((rows, length), dtype=bool)
    masked_BL[:, length - per_row :] = True
    noised = NoisedRows(
        ids_BL=np.random.default_rng(0).integers(0, options.vocab_size, (rows, length)),
        length_B=np.full(rows, length),
        masked_BL=masked_BL,
        labelled_B=np.full(rows, per_row),
        timestep_B=np.full(rows, 0.5, np.float32),
    )
    form = InputForm(block_size=32, mask_token_id=0, attention=BY_ROWS, device=device)
    return assemble(noised, TeacherRows.none(), form)


def _bands(num_components: int) -> tuple[int, ...]:
    """Cut components into bands as they come out of a fit: each about as wide as all before."""
    edges = sorted({num_components // 2**power for power in range(6)} | {0})
    return tuple(int(width) for width in np.diff(edges))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(steps: dict[str, Callable[[], Any]], num_repeats: int) -> dict[str, float]:
    """Return the median seconds of each, interleaved, after one round that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(num_repeats + 1):
        for name, step in steps.items():
            began_s = time.perf_counter()
            step()
            if round_number:
                taken[name].append(time.perf_counter() - began_s)
    return {name: statistics.median(values) for name, values in taken.items()}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time everything."""
    device = torch.device(options.device)
    setting = Setting(options, device)
    table = setting.encode(16, 8, hidden=True)
    replayed: dict[str, Callable[[], Any]] = {
        "head_alone": setting.logits,
        "encode_hidden_and_k16": lambda: setting.encode(16, 8, hidden=True),
        "encode_k64_alone": lambda: setting.encode(64, 6, hidden=False),
        "decode_and_replay": lambda: setting.replay(table, "hidden"),
        "decode_and_mean_tail": lambda: setting.replay(table, "mean"),
    }
    seconds = _seconds(replayed, options.repeats)
    rates = {name: round(options.positions / value, 1) for name, value in seconds.items()}
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "hidden_size": options.hidden_size,
        "vocab_size": options.vocab_size,
        "components": options.components,
        "num_positions": options.positions,
        "positions_per_s": rates,
        "head_bytes": setting.head.weight_VD.nbytes,
    }
    if not options.no_step:
        figures["step"] = _measure_step(setting, table, options)
    if device.type == "cuda":
        figures["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    return figures


def _measure_step(
    setting: Setting, table: pa.Table, options: argparse.Namespace
) -> dict[str, float]:
    step = Step(setting, options)
    teachers = {tail: setting.teacher(table, tail) for tail in ("hidden", "mean")}
    seconds = _seconds(
        {
            "hidden": lambda: step.run(teachers["hidden"]),
            "mean": lambda: step.run(teachers["mean"]),
        },
        options.repeats,
    )
    share = 1 - seconds["mean"] / seconds["hidden"]
    return {
        "student_parameters": sum(p.numel() for p in step.student.parameters()),
        "rows": options.rows,
        "tokens": options.rows * options.length,
        "masked_positions": options.positions,
        "seconds_with_tail_hidden": round(seconds["hidden"], 4),
        "seconds_with_tail_mean": round(seconds["mean"], 4),
        "share_of_replay": round(share, 4),
    }


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, default=157_184)
    parser.add_argument("--components", type=int, help="kept; default: a fifth of the hidden size")
    parser.add_argument("--positions", type=int, default=1024, help="masked, over all rows (1024)")
    parser.add_argument("--rows", type=int, default=1, help="of the training step's batch (1)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row (2048)")
    parser.add_argument("--repeats", type=int, default=5, help="median of so many (5)")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-step", action="store_true", help="leave the training step out")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    options.components = options.components or options.hidden_size // 5
    if options.positions % options.rows or options.positions // options.rows > options.length:
        parser.error("--positions: expected a multiple of --rows, at most --length for each")
    torch.set_num_threads(options.threads)
    figures = measure(options)
    if options.json:
        sys.stdout.write(json.dumps(figures, indent=2) + "\n")
        return
    for name, value in figures.items():
        if isinstance(value, dict):
            for inner, figure in value.items():
                sys.stdout.write(f"{name}.{inner:<32} {figure}\n")
        else:
            sys.stdout.write(f"{name:<37} {value}\n")


if __name__ == "__main__":
    main()
