"""The report of a benchmark as a table for the terminal."""

from typing import Any

HEAD = (
    f"{'batch':>5}{'keep':>7}{'first token ms':>17}{'prefill ms [quartiles]':>27}{'speed-up':>10}{'of FLOPs':>10}"
    f"{'decode ms':>11}{'reducer ms':>12}{'share':>7}{'KV MB':>8}{'peak MB':>9}"
)


def bench_table(report: dict[str, Any]) -> str:
    """One line for the plain backbone and one for each budget, by batch size.

    ``speed-up`` is the plain prefill over this one, the median over turns; ``of FLOPs`` that over the ratio of the
    FLOPs; ``share`` the reducer's own time over the plain prefill.
    """
    where = [
        report["dtype"],
        report["attention"],
        report["device"],
        f"{report['threads']} threads",
        f"{report['clock']} clock",
    ]
    words = [report["backbone"]["name"], report["reducer"]["name"], *where, report["date"], f"{report['runs']} turns"]
    lines = [", ".join(words), HEAD, "-" * len(HEAD)]
    return "\n".join([*lines, *map(_line, report["rows"])]) + "\n"


def _line(row: dict[str, Any]) -> str:
    prefill, speedup = row["prefill_ms"], row["prefill_speedup"]["median"]
    quartiles = f"{prefill['median']:.1f} [{prefill['low']:.1f}, {prefill['high']:.1f}]"
    return (
        f"{row['batch']:>5}{row['keep']:>7}{row['first_token_ms']['median']:>17.1f}{quartiles:>27}{speedup:>9.2f}x"
        f"{speedup / row['prefill_flop_ratio']:>9.0%} {row['decode_ms']['median']:>10.1f}"
        f"{row['reducer_ms']['median']:>12.2f}{row['reducer_share']:>7.1%}"
        f"{row['kv_bytes'] / 1e6:>8.1f}{row['peak_bytes'] / 1e6:>9.1f}"
    )
