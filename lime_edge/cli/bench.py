"""lime-edge bench: time, memory and energy of a bundle, and the comparison of two measurements."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lime_edge import terminal
from lime_edge.cli.options import (
    TARGET_NAMES,
    Clean,
    ExpertOption,
    Hosts,
    Json,
    On,
    Provider,
    Quiet,
    RemotePython,
    SitePackages,
    Threads,
    Wheels,
    read_providers,
    split_names,
)
from lime_edge.cli.remote import Where, bench_there, clean_only, end
from lime_edge.errors import Faults, LimeEdgeError

if TYPE_CHECKING:
    from lime_edge.bench.remote.plan import Outcome

BENCH_EXAMPLES = """

[bold]Examples[/bold]

 lime-edge bench smollm2.lime --expert movie --threads 4

 lime-edge bench smollm2.lime --target onnx,executorch --prompt-tokens 128,512 --report report

 lime-edge bench smollm2.lime --baseline single.lime --json > after.json

 lime-edge bench smollm2.lime --batch 1,2,4,8,16

 lime-edge bench smollm2.lime --provider cuda      (a GPU, whatever the bundle was made for)

 lime-edge bench --compare before.json after.json

 lime-edge bench smollm2.lime --on ssh://pi@raspberrypi --json > pi.json

 lime-edge bench smollm2.lime --hosts desk.toml --report report
"""


def register(app: typer.Typer) -> None:
    """Add the command `bench`."""
    app.command(epilog=BENCH_EXAMPLES)(bench)


def bench(
    bundle: Annotated[Path | None, typer.Argument(metavar="BUNDLE", help="A bundle directory (OUT.lime).")] = None,
    expert: ExpertOption = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,...", help="Which artifacts to run; else the bundle's first.", autocompletion=TARGET_NAMES
        ),
    ] = None,
    threads: Threads = None,
    provider: Provider = None,
    prompt_tokens: Annotated[
        str, typer.Option(metavar="N,...", help="Tokens of the (random) prompt; a run for each length.")
    ] = "128",
    gen_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded per round.")] = 128,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds; medians and their spread are reported.")] = 5,
    depth: Annotated[
        int | None, typer.Option(min=1, help="Tokens in the cache before decoding is timed; else the prompt's.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="A --single bundle of the same backbone: what the expert costs beside it.")
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(metavar="N,...", help="Decode N sequences at once instead, each with an expert of its own."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write one HTML page with plots, PNGs and the JSON there.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A.json B.json", help="Compare two earlier --json outputs.")
    ] = None,
    on: On = None,
    hosts: Hosts = None,
    wheels: Wheels = None,
    python: RemotePython = None,
    site_packages: SitePackages = False,
    clean: Clean = False,
    quiet: Quiet = False,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, a line per run.")] = False,
    as_markdown: Annotated[bool, typer.Option("--md", help="Print a Markdown table.")] = False,
) -> None:
    """Time load, prefill, decode and switching; memory, energy; here or on devices; compare two measurements."""
    from lime_edge.bench.report import check_report, write_report

    if as_json + as_csv + as_markdown > 1:
        raise LimeEdgeError("--json, --csv and --md: one of them", "leave them out for a table")
    where = Where(on, hosts, wheels, python, site_packages, clean)
    if compare is not None:
        if bundle or report or as_csv or where.elsewhere:
            raise LimeEdgeError("--compare takes two files, and of the other options --json or --md only")
        _print_comparison(*compare, as_json, as_markdown)
        return
    if bundle is None and clean:
        clean_only(where)
        return
    if bundle is None:
        raise LimeEdgeError("bench: a BUNDLE is missing", "or compare two files: bench --compare A.json B.json")
    if batch is not None:
        if expert or depth or baseline or report or where.elsewhere:
            raise LimeEdgeError("--batch goes without --expert, --depth, --baseline, --report and --on")
        lengths, sizes = _read_numbers("--prompt-tokens", prompt_tokens), _read_numbers("--batch", batch)
        found = _measure_batch(bundle, split_names(target), threads, sizes, lengths, gen_tokens, repeat, provider)
        _print_batch(found, as_json, as_csv, as_markdown)
        return
    if report is not None:
        check_report(report)
    lengths = _read_numbers("--prompt-tokens", prompt_tokens)
    outcomes: list[Outcome] = []
    if where.elsewhere:
        words = _repeat_options(expert, threads, prompt_tokens, gen_tokens, repeat, depth)
        words += ["--target", ",".join(split_names(target))] if target else []
        words += ["--baseline", baseline] if baseline else []
        words += ["--provider", provider] if provider else []
        extras = (
            None
            if depth or baseline or target or provider
            else _name_extras(expert, threads, lengths, gen_tokens, repeat)
        )
        facts, outcomes = bench_there(where, [bundle, *words], tuple(split_names(target)), extras)
    else:
        facts = _measure(bundle, expert, target, threads, lengths, gen_tokens, repeat, depth, baseline, provider)
    if facts is not None:
        _print_document(facts, as_json, as_csv, as_markdown)
        if report is not None:
            write_report(report, facts)
            terminal.note(f"wrote {report}/index.html")
    end(outcomes, where.alone)


def _repeat_options(
    expert: str | None, threads: int | None, prompt_tokens: str, gen_tokens: int, repeat: int, depth: int | None
) -> list[Any]:
    """What was asked for here, as a device is asked for it."""
    asked = {"expert": expert, "threads": threads, "depth": depth}
    asked |= {"prompt-tokens": prompt_tokens, "gen-tokens": gen_tokens, "repeat": repeat}
    return [word for name, value in asked.items() if value is not None for word in (f"--{name}", str(value))]


def _name_extras(
    expert: str | None, threads: int | None, lengths: tuple[int, ...], gen_tokens: int, repeat: int
) -> dict[str, str] | None:
    """The same for the Android app: extras of its benchmark; None where it cannot do it."""
    if len(lengths) > 1:
        return None
    asked = {"prompt_tokens": lengths[0], "gen_tokens": gen_tokens, "repeat": repeat}
    given = {"expert": expert, "threads": threads}
    return {name: str(value) for name, value in (asked | given).items() if value is not None}


def _measure(
    bundle: Path,
    expert: str | None,
    targets: list[str] | None,
    threads: int | None,
    lengths: tuple[int, ...],
    gen_tokens: int,
    repeat: int,
    depth: int | None,
    baseline: Path | None,
    provider: str | None,
) -> dict[str, Any]:
    from lime_edge.bench.measure import FIRST, BenchOptions, bench_bundle
    from lime_edge.bundle.experts import parse_selection

    selection = FIRST if expert is None else parse_selection(expert)
    providers = read_providers(provider)
    options = BenchOptions(lengths, gen_tokens, repeat, depth=depth, baseline=baseline, providers=providers)
    with terminal.show_steps() as progress:
        return bench_bundle(bundle, split_names(targets) or None, selection, threads, options, progress)


def _read_numbers(option: str, text: str) -> tuple[int, ...]:
    """128,512 as numbers."""
    numbers = []
    with Faults(option, "write one number or several: 128,512") as faults:
        for part in text.split(","):
            if part.strip().isdecimal() and int(part) > 0:
                numbers.append(int(part))
            else:
                faults.add("number", "1 or more", repr(part))
    return tuple(numbers)


def _measure_batch(
    bundle: Path,
    targets: Sequence[str],
    threads: int | None,
    sizes: tuple[int, ...],
    lengths: tuple[int, ...],
    gen_tokens: int,
    repeat: int,
    provider: str | None,
) -> dict[str, Any]:
    from lime_edge.bench.batch import BatchOptions, bench_batch

    if len(targets) > 1 or len(lengths) > 1:
        raise LimeEdgeError("--batch takes one --target and one length of --prompt-tokens")
    options = BatchOptions(sizes, lengths[0], gen_tokens, repeat, read_providers(provider))
    with terminal.show_steps() as progress:
        return bench_batch(bundle, targets[0] if targets else None, threads, options, progress)


def _print_batch(facts: dict[str, Any], as_json: bool, as_csv: bool, as_markdown: bool) -> None:
    from lime_edge.bench.batch import tabulate_batch, write_batch_csv
    from lime_edge.bench.tables import write_markdown

    table = tabulate_batch(facts)
    if as_json:
        terminal.print_json(facts)
    elif as_csv:
        print(write_batch_csv(facts), end="")
    elif as_markdown:
        print(write_markdown(table))
    else:
        terminal.print_table(table.title, {header: "right" for header in table.headers}, table.rows)


def _print_document(facts: dict[str, Any], as_json: bool, as_csv: bool, as_markdown: bool) -> None:
    from lime_edge.bench.devices import is_fleet, list_documents, tabulate_devices
    from lime_edge.bench.tables import tabulate, write_csv, write_markdown

    if as_json:
        terminal.print_json(facts)
        return
    documents = list_documents(facts)
    if as_csv:
        print(write_csv(*documents.values()) if documents else "", end="")
        return
    table = tabulate_devices(facts) if is_fleet(facts) else tabulate(facts)
    if as_markdown:
        print(write_markdown(table))
    else:
        columns = {header: "right" if place else "left" for place, header in enumerate(table.headers)}
        terminal.print_table(table.title, columns, table.rows)


def _print_comparison(before: Path, after: Path, as_json: bool, as_markdown: bool) -> None:
    from lime_edge.bench.compare import compare_files, tabulate_comparison
    from lime_edge.bench.tables import write_markdown

    comparison = compare_files(before, after)
    for warning in comparison["warnings"]:
        terminal.warn(warning)
    if as_json:
        terminal.print_json(comparison)
        return
    for table in tabulate_comparison(comparison):
        if as_markdown:
            print(write_markdown(table))
        else:
            columns = {header: "right" if 0 < place < 4 else "left" for place, header in enumerate(table.headers)}
            terminal.print_table(table.title, columns, table.rows)
