"""The commands of `care`, and how they begin."""

import typer

from . import chat, demo, evaluate, fit, inform, share, tune

# At the end of every help page.
EPILOG = (
    "Exit codes: 0 done; 1 something nobody foresaw, with a traceback; 2 a mistake, or something missing, that the "
    "message names; 130 interrupted, and the same command goes on. CARE_TRACEBACK=1 shows tracebacks of mistakes, too."
)

app = typer.Typer(
    help="Diagnose and repair unsafe channels in vision-language models.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
for command in (
    demo.demo,
    evaluate.diagnose,
    fit.fit,
    tune.tune,
    evaluate.evaluate,
    chat.chat,
    share.merge,
    share.push,
    share.convert,
    inform.info,
):
    app.command(**getattr(command, "settings", {}))(command)


@app.callback()
def care() -> None:
    """Diagnose and repair unsafe channels in vision-language models."""
