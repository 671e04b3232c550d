"""Search every scenario, then every mutation, and print what came out.

    python -m tools.model                     everything, some minutes
    python -m tools.model full no-drain       these scenarios and mutations
    python -m tools.model --trace no-drain    a counter-example, step by step
    python -m tools.model --steps             the steps and their names
    python -m tools.model --unreduced full    without the reductions: a minute more

Exit status 1 if the protocol fails in a scenario or a mutation is not caught.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial

from tools.model.explorer import Search, Verdict
from tools.model.mutations import Mutation
from tools.model.trace import lines
from tools.model.worlds import KINDS, LARGER, MUTATIONS, WORLDS, Anyone, kind_of

ROW = "{:<24} {:<8} {:>9} {:>7}  {}"


def search_scenario(scenario: Anyone, *, reduced: bool = True) -> Verdict:
    """The protocol as it is, judged by everything."""
    return Search(kind_of(scenario).protocol, scenario, reduced=reduced).run()


def search_mutation(mutation: Mutation, *, reduced: bool = True) -> Verdict:
    """The protocol with a rule removed, judged by the promise that should break."""
    judged = [mutation.promise]
    return Search(mutation.protocol, mutation.scenario, judged=judged, reduced=reduced).run()


def print_row(name: str, scenario: str, verdict: Verdict, started: float, expected: str) -> bool:
    """Print a line of the table; True if the verdict is the expected one."""
    text = f"{verdict.broken}, {verdict.steps} steps" if verdict.broken else "holds"
    wrong = verdict.broken != expected
    if wrong:
        text += f"  <- should be: {expected or 'holds'}"
    seconds = f"{time.monotonic() - started:.1f} s"
    print(ROW.format(name, scenario, verdict.states, seconds, text), flush=True)
    return not wrong


def print_table(names: Sequence[str], *, reduced: bool) -> bool:
    """Search what is named, or everything; True if all verdicts are as expected."""
    good = True
    print(ROW.format("protocol", "scenario", "states", "time", "verdict"))
    for scenario in (*WORLDS, *LARGER):
        if not names or scenario.name in names:
            started = time.monotonic()
            verdict = search_scenario(scenario, reduced=reduced)
            good &= print_row("unmutated", scenario.name, verdict, started, "")
    for mutation in MUTATIONS:
        if not names or mutation.name in names:
            started = time.monotonic()
            verdict = search_mutation(mutation, reduced=reduced)
            where = mutation.scenario.name
            good &= print_row(mutation.name, where, verdict, started, mutation.promise)
    return good


def print_trace(mutation: Mutation) -> None:
    """Print the shortest counter-example to the promise."""
    verdict = search_mutation(mutation)
    print(f"{mutation.name}: {mutation.meaning}")
    print(f"scenario {mutation.scenario.name}: {mutation.scenario.size}\n")
    kind = kind_of(mutation.scenario)
    layout = Search(mutation.protocol, mutation.scenario).protocol.layout
    for line in lines(partial(kind.words, layout), {**kind.steps, **kind.mutated_steps}, verdict.trace):
        print(line)
    print(f"\n{verdict.broken}: {verdict.what}" if verdict.broken else "holds")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    mutations = {mutation.name: mutation for mutation in MUTATIONS}
    known = [scenario.name for scenario in (*WORLDS, *LARGER)] + list(mutations)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--trace", metavar="MUTATION", choices=mutations, help="how it breaks")
    parser.add_argument("--steps", action="store_true", help="print the steps' names")
    parser.add_argument("--unreduced", action="store_true", help="keep all states apart")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(known):
        parser.error(f"no such scenario or mutation: {', '.join(sorted(unknown))}")
    if options.steps:
        for title, kind in KINDS.items():
            print(f"{title}:")
            for name, meaning in kind.steps.items():
                print(f"  {name:<26} {meaning}")
        return 0
    if options.trace is not None:
        print_trace(mutations[options.trace])
        return 0
    return 0 if print_table(options.names, reduced=not options.unreduced) else 1


if __name__ == "__main__":
    sys.exit(main())
