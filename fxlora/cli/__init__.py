"""The command line: `fxlora demo, explain, inspect, graph, diff, compare, doctor, plot, merge, extract, check, portable`.

Each command is a thin cover over one or two Python calls.

Exit codes: 0 success, 1 an error that fxlora explains, 2 wrong usage.
"""

from __future__ import annotations

import sys

import click

from fxlora.cli.demonstration import demo
from fxlora.cli.files import check, extract, merge, portable
from fxlora.cli.looking import compare, diff, doctor, explain, graph, inspect, plot


def main() -> None:
    """Run the command line; an error that fxlora explains is one line on standard error, without a traceback."""
    from fxlora.errors import FxloraError

    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (FxloraError, FileNotFoundError, ImportError, NotImplementedError) as error:
        click.echo(f"fxlora: {error}", err=True)
        sys.exit(1)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fxlora")
def cli() -> None:
    """LoRA as a compiler pass for PyTorch."""


for _command in (demo, explain, inspect, graph, doctor, diff, compare, plot, merge, extract, check, portable):
    cli.add_command(_command)
