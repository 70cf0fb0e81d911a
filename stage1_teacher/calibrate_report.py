"""What `tide-cache calibrate` says: a table of settings, or a cache beside its promise."""

from typing import Any

from rich.console import Console
from rich.table import Table

from stage1_teacher.calibrate import Calibration, CalibrationPlan, Measured, default_tail
from stage1_teacher.settings import codec_files

_TABLE_WIDTH = 160


def as_json(found: Calibration) -> dict[str, Any]:
    """Return the whole table as JSON values.

    `chosen` is the smallest setting that reaches the target under its default tail, or None.
    """
    target = found.plan.config.fidelity
    lines = [_line(found, measured) for measured in found.measured]
    good = [li for li in lines if li["is_default_tail"] and li["worst_cosine"] >= target]
    smallest = min(good, key=lambda li: li["bytes_per_position"], default=None)
    return {
        "student": found.student,
        "num_fit_positions": found.fit.num_positions,
        "num_positions": found.num_positions,
        "num_payload_positions": found.plan.num_payload_positions,
        "fidelity_target": target,
        "chosen": None if smallest is None else smallest["setting"],
        "settings": lines,
    }


def dry_run_facts(plan: CalibrationPlan) -> dict[str, Any]:
    """Return what would be asked of the teacher."""
    return {
        "dry_run": True,
        "num_fit_positions": plan.fit_rows.num_positions,
        "num_fit_rows": len(plan.fit_rows.rows),
        "num_positions": plan.measure_rows.num_positions,
        "num_rows": len(plan.measure_rows.rows),
        "vocab_size": plan.vocab_size,
    }


def print_facts(facts: dict[str, Any]) -> None:
    """Print the facts of any of the three as people read them."""
    out = Console(soft_wrap=True)
    # Wider than a narrow terminal: lines wrap, figures are never cut.
    out = Console(soft_wrap=True, width=max(out.width, _TABLE_WIDTH))
    if "settings" in facts:
        _print_settings(facts, out)
    elif "losses" in facts:
        _print_check(facts, out)
    else:
        for name, value in facts.items():
            out.print(f"{name:<20} {value}", highlight=False)


def _line(found: Calibration, measured: Measured) -> dict[str, Any]:
    weight = measured.weight
    once = sum(len(data) for data in codec_files(measured.fitted, found.fit).values())
    per_position = weight.bytes_per_position
    total = found.plan.row_bytes + once + per_position * found.plan.num_payload_positions
    return {
        "setting": measured.fitted.setting.name,
        "tail": measured.tail,
        "is_default_tail": measured.tail == default_tail(measured.fitted),
        "worst_cosine": measured.worst_cosine,
        "losses": [loss.model_dump() for loss in measured.losses],
        "bytes_per_position": round(per_position, 2),
        "bytes_by_column": {name: round(v, 2) for name, v in weight.bytes_by_column.items()},
        "codec_files_bytes": once,
        "projected_cache_bytes": round(total),
        "decode_us_per_position": round(1e6 * weight.decode_s_per_position, 3),
    }


def _print_settings(facts: dict[str, Any], out: Console) -> None:
    kinds = list(dict.fromkeys(_kind(loss) for loss in facts["settings"][0]["losses"]))
    title = (
        f"gradient cosine with full logits over {facts['num_positions']:,} positions, against a "
        f"{facts['student']}; each the least over temperatures"
    )
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    table.add_column("setting", no_wrap=True)
    table.add_column("tail", no_wrap=True)
    for name in ["worst", *kinds, "rel. error", "B/pos", "GB", "us/pos"]:
        table.add_column(name, justify="right", no_wrap=True)
    for line in facts["settings"]:
        losses = line["losses"]
        table.add_row(
            line["setting"],
            line["tail"],
            f"{line['worst_cosine']:.4f}",
            *[f"{min(x['cosine'] for x in losses if _kind(x) == kind):.4f}" for kind in kinds],
            f"{max(loss['relative_error'] for loss in losses):.3f}",
            f"{line['bytes_per_position']:.1f}",
            f"{line['projected_cache_bytes'] / 1e9:.3f}",
            f"{line['decode_us_per_position']:.2f}",
        )
    out.print(table)
    chosen = facts["chosen"] or "none of them"
    out.print(
        f"payload: auto with fidelity {facts['fidelity_target']:g} takes: {chosen}",
        markup=False,
        highlight=False,
    )


def _print_check(facts: dict[str, Any], out: Console) -> None:
    out.print(f"{facts['cache']}: {facts['num_positions']:,} other positions", highlight=False)
    for loss in facts["losses"]:
        promised = loss["promised_cosine"]
        text = "not promised" if promised is None else f"promised {promised:.4f}"
        out.print(f"  {_loss_name(loss):<16} {loss['cosine']:.4f}  {text}", highlight=False)


def _kind(loss: dict[str, Any]) -> str:
    name = {"tidal": "tidal", "kl": "kl", "reverse_kl": "rkl"}[loss["loss"]]
    return name if loss["weight"] is None else f"{name} {loss['weight']:g}"


def _loss_name(loss: dict[str, Any]) -> str:
    return f"{_kind(loss)} T{loss['temperature']:g}"
