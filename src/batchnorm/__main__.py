"""The entry point of ``batchnorm`` and ``python -m batchnorm``: the command line, and what is said when it fails."""

from __future__ import annotations

import sys

from batchnorm.errors import BatchNormError
from batchnorm.report.command import REFUSED, SUCCESS, run

_TOOLS = ("typer", "rich", "matplotlib", "jinja2", "sklearn", "PIL")


def main() -> None:
    """Run the command line.

    Exits with 2 and one line on standard error where the request cannot be met: an argument or data of no use, or
    a package of ``batchnorm[tools]`` that is not installed. For streams and signals see ``report.command.run``.
    """
    sys.exit(run("batchnorm", _command))


def _command() -> int:
    try:
        from batchnorm.cli import app

        app(prog_name="batchnorm")
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in _TOOLS:
            raise
        return _refuse(f"the command line needs {package}, which is not installed: pip install 'batchnorm[tools]'")
    except BatchNormError as error:
        return _refuse(str(error))
    return SUCCESS


def _refuse(why: str) -> int:
    print(f"batchnorm: {why}", file=sys.stderr)
    return REFUSED


if __name__ == "__main__":
    main()
