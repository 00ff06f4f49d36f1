"""One thin function per command, nothing computed; its name is the command's.

A command that judges returns whether its judgement was good; the others return nothing.
"""

from refcurv.commands.edits import edit, prune, truncate
from refcurv.commands.factors import collect, decompose
from refcurv.commands.files import convert, corpus, export, inspect
from refcurv.commands.judgements import audit, cases, certify, evaluate, recite, trace, validate
from refcurv.commands.reports import demo, report, sweep

COMMANDS = (
    demo, report, convert, export, inspect, corpus, collect, decompose, edit, truncate, prune,
    recite, evaluate, sweep, certify, audit, validate, trace, cases,
)  # fmt: skip
"""In the order of `refcurv --help`."""
