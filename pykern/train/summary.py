"""The table at the end of a run, and the same figures as JSON."""

import platform
import time
from pathlib import Path
from statistics import mean, median

from .._native import info
from .config import Config

MIB = 1 << 20

CAPTION = (
    "Each row: the same batch from the same weights, one update of pykern and one of plain PyTorch (prefixes repeated, "
    "rows padded, scaled_dot_product_attention, full logits of the response tokens, eager low-rank step) in a process "
    "of its own. Loss difference: |pykern - plain| / |plain|. Gradient difference: norm of the difference of all "
    "gradients / norm of plain's. Where responses are of equal length the terms of the loss cancel, and its "
    "last digits are rounding; the JSON also has each difference over the mean magnitude of the terms. "
    "Seconds: token lists to stepped weights. Memory: {method}, interpreter and PyTorch included."
)


def summarize(config: Config, rows: list[dict], before: float | None, after: float | None) -> dict:
    warmup = [row for row in rows if row["phase"] == "warmup"]
    grpo = [row for row in rows if row["phase"] == "grpo"]
    window = max(1, min(10, len(grpo) // 2))
    return {
        "data": config.data,
        "seed": config.seed,
        "warmup_steps": len(warmup),
        "steps": len(grpo),
        "accuracy_before": before,
        "accuracy_after": after,
        "reward_first": mean(row["reward"] for row in grpo[:window]) if grpo else None,
        "reward_last": mean(row["reward"] for row in grpo[-window:]) if grpo else None,
        "seconds": {
            "warmup": sum(row["seconds"]["update"] for row in warmup),
            "collect": sum(row["seconds"]["collect"] for row in grpo),
            "update": sum(row["seconds"]["update"] for row in grpo),
        },
        "tokens_per_update": median(row["tokens"] for row in grpo) if grpo else None,
        "peak_memory": max((row["memory"]["peak"] for row in grpo), default=None),
        "offload": grpo[-1].get("offload") if grpo else None,
        "compare": _comparison([row for row in grpo if "compare" in row]),
    }


def _comparison(rows: list[dict]) -> dict | None:
    if not rows:
        return None

    def both(ours, theirs) -> dict:
        return {"pykern": median(map(ours, rows)), "plain": median(map(theirs, rows))}

    result = {
        "updates": len(rows),
        "tokens": both(lambda r: r["tokens"], lambda r: r["compare"]["tokens"]),
        "seconds": both(lambda r: r["seconds"]["update"], lambda r: r["compare"]["seconds"]),
        "memory": both(lambda r: r["memory"]["peak"], lambda r: r["compare"]["memory"]["peak"]),
        "memory_before": both(lambda r: r["memory"]["before"], lambda r: r["compare"]["memory"]["before"]),
        "memory_method": rows[0]["memory"]["method"],
    }
    for name in ("token_ratio", "time_ratio", "memory_ratio"):
        result[name] = median(row["compare"][name] for row in rows)
    for name in ("loss_difference", "loss_difference_over_terms", "gradient_difference"):
        result[name] = max(row["compare"][name] for row in rows)
    worst = max(rows, key=lambda row: row["compare"]["loss_difference"])
    result["loss_over_terms"] = worst["compare"]["loss_over_terms"]
    return result


def table(found: dict) -> str:
    """What the run ends with on the terminal."""
    lines = [""]

    def line(name: str, value: str) -> None:
        lines.append(f"{name:<28}{value}")

    seconds = found["seconds"]
    if found["accuracy_before"] is not None and found["accuracy_after"] is not None:
        gain = found["accuracy_after"] - found["accuracy_before"]
        line(
            "held-out greedy accuracy",
            f"{found['accuracy_before']:.3f} before GRPO, {found['accuracy_after']:.3f} after ({gain:+.3f})",
        )
    if found["warmup_steps"]:
        line("supervised warm-up", f"{found['warmup_steps']} steps, {seconds['warmup']:.1f} s")
    if found["steps"]:
        line(
            "GRPO", f"{found['steps']} steps, {seconds['collect']:.1f} s collecting, {seconds['update']:.1f} s updating"
        )
        line("reward, first and last", f"{found['reward_first']:.3f}, {found['reward_last']:.3f}")
        line("peak memory of an update", f"{found['peak_memory'] / MIB:,.0f} MiB")
    if found["compare"]:
        compare = found["compare"]
        title = f"update, median of {compare['updates']}"
        lines += ["", f"{title:<28}{'pykern':>12}{'plain PyTorch':>16}{'plain / pykern':>17}"]
        for name, key, unit, form, ratio in (
            ("tokens processed", "tokens", 1, ",.0f", "token_ratio"),
            ("seconds", "seconds", 1, ".3f", "time_ratio"),
            ("peak memory, MiB", "memory", MIB, ",.0f", "memory_ratio"),
        ):
            ours, theirs = compare[key]["pykern"] / unit, compare[key]["plain"] / unit
            lines.append(f"{name:<28}{ours:>12{form}}{theirs:>16{form}}{compare[ratio]:>16.2f}x")
        cancels = (
            f", whose terms cancel to {compare['loss_over_terms']:.0e}" if compare["loss_over_terms"] < 1e-2 else ""
        )
        line("largest loss difference", f"{compare['loss_difference']:.1e} of the loss{cancels}")
        line("", f"{compare['loss_difference_over_terms']:.1e} of the mean magnitude of its terms")
        line("largest gradient difference", f"{compare['gradient_difference']:.1e} of the gradient's norm")
    return "\n".join(lines)


def step_table(rows: list[dict]) -> str:
    """One line per compared update, in Markdown."""
    lines = [
        "| step | loss | loss difference | gradient difference "
        "| tokens | plain | s | plain | ratio | MiB | plain | ratio |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if "compare" not in row:
            continue
        other = row["compare"]
        lines.append(
            f"| {row['step']} | {row['loss']:+.5f} "
            f"| {other['loss_difference']:.1e} | {other['gradient_difference']:.1e} "
            f"| {row['tokens']:,} | {other['tokens']:,} "
            f"| {row['seconds']['update']:.2f} | {other['seconds']:.2f} | {other['time_ratio']:.1f} "
            f"| {row['memory']['peak'] / MIB:,.0f} | {other['memory']['peak'] / MIB:,.0f} "
            f"| {other['memory_ratio']:.1f} |"
        )
    return "\n".join(lines)


def comparison_record(found: dict, rows: list[dict]) -> dict:
    """comparison.json: the summary, every compared step, and both as a Markdown table with its caption."""
    caption = CAPTION.format(method=found["compare"]["memory_method"])
    return {
        "environment": {**info(), "processor": _processor(), "date": time.strftime("%Y-%m-%d", time.gmtime())},
        "summary": found["compare"],
        "steps": [
            {
                "step": row["step"],
                "pykern": {
                    "loss": row["loss"],
                    "tokens": row["tokens"],
                    "seconds": row["seconds"]["update"],
                    "memory": row["memory"],
                },
                "plain": {name: row["compare"][name] for name in ("loss", "tokens", "seconds", "memory")},
                **{
                    name: value
                    for name, value in row["compare"].items()
                    if name.endswith(("difference", "terms", "ratio"))
                },
            }
            for row in rows
            if "compare" in row
        ],
        "table": f"{step_table(rows)}\n\n{caption}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
