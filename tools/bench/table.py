"""Figures and the machine, for people: a table by rich where it is installed, else plain text."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from tools.bench.figure import Figure, Spread, format_value

HEAD = ("figure", "shmcbw", "compared with", "that", "ratio", "target", "")
CAPTION = "three times are p50 · p99 · p999; the last one is the longest where fewer than 1000 were measured"
WIDTH = 160


def print_table(figures: Sequence[Figure], remarks: Mapping[str, str]) -> None:
    """Print all figures to stdout, in sections by measurement, each with its remark, and the notes below."""
    try:
        _print_rich(figures, remarks)
    except ImportError:
        _print_text(figures, remarks)
    for number, note in enumerate(_notes(figures), 1):
        print(f"({number}) {note}")


def row(figure: Figure, notes: Sequence[str], before: Figure | None = None) -> tuple[str, ...]:
    """The cells of a figure, as `HEAD` names them; what the line before it says already is left out.

    Single times are shown as `CAPTION` says.
    """
    mark = f" ({notes.index(figure.note) + 1})" if figure.note else ""
    name, ours = figure.name, "not measured"
    if figure.value is not None:
        ours = _value(figure.value, figure.unit, figure.spread)
    if before is not None and before.name == figure.name:
        name = ""
        ours = "" if before.value == figure.value else ours
    verdict = {True: "met", False: "NOT met", None: ""}[figure.met]
    return (
        name if figure.other else name + mark,
        ours,
        figure.other + mark if figure.other else "",
        "" if figure.other_value is None else _value(figure.other_value, figure.unit, figure.other_spread),
        "" if figure.ratio is None else f"{figure.ratio:.2f}x",
        figure.target,
        verdict,
    )


def _value(value: float, unit: str, spread: Spread | None) -> str:
    if spread is None:
        return format_value(value, unit)
    times_us = [each / 1000 for each in (spread.p50, spread.p99, spread.p999)]
    return " · ".join(f"{each:.0f}" if each >= 100 else f"{each:.3g}" for each in times_us) + " µs"


def _notes(figures: Sequence[Figure]) -> list[str]:
    return list(dict.fromkeys(figure.note for figure in figures if figure.note))


def _print_rich(figures: Sequence[Figure], remarks: Mapping[str, str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    table = Table(*HEAD, box=box.SIMPLE_HEAD, caption=CAPTION)
    table.columns[0].no_wrap = True
    notes = _notes(figures)
    colours = {True: "green", False: "bold red", None: ""}
    last, before = "", None
    for figure in figures:
        if figure.measurement != last:
            table.add_section()
            table.add_row(f"[bold]{figure.measurement}[/bold] [dim]{remarks.get(figure.measurement, '')}[/dim]")
            last = figure.measurement
        *cells, verdict = row(figure, notes, before)
        before = figure
        colour = colours[figure.met]
        table.add_row(*cells, f"[{colour}]{verdict}[/{colour}]" if colour else verdict)
    console.print(table)


def _print_text(figures: Sequence[Figure], remarks: Mapping[str, str]) -> None:
    notes = _notes(figures)
    rows = [row(figure, notes, before) for before, figure in zip((None, *figures), figures, strict=False)]
    widths = [max(map(len, column)) for column in zip(HEAD, *rows, strict=True)]
    last = ""
    for figure, cells in zip((None, *figures), (HEAD, *rows), strict=True):
        if figure is not None and figure.measurement != last:
            last = figure.measurement
            print(f"\n{last}  {remarks.get(last, '')}")
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    print(f"\n{CAPTION}")
