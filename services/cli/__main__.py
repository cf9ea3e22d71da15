"""`calm`: dispatches to one module per command; each is imported only when it is used."""

from __future__ import annotations

import asyncio
import sys

from services.cli.options import parser, settings_of
from shared.errors import CalmError


def main() -> None:
    """Entry point. Exit status 0, 1 for an answer that is an error, 2 for what cannot be done, 130 for Ctrl-C."""
    arguments = parser().parse_args()
    try:
        sys.exit(_run(arguments))
    except CalmError as error:
        print(f"calm: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)


def _run(arguments: object) -> int:
    from argparse import Namespace  # noqa: PLC0415

    assert isinstance(arguments, Namespace)
    settings = settings_of(arguments)
    match arguments.command:
        case "up":
            from services.cli.up import up  # noqa: PLC0415

            return asyncio.run(up(arguments, settings))
        case "ask":
            from services.cli.ask import ask  # noqa: PLC0415

            return asyncio.run(ask(arguments, settings))
        case "status":
            from services.cli.status import status  # noqa: PLC0415

            return asyncio.run(status(settings, as_json=arguments.json))
        case "explain":
            from services.cli.explain import explain  # noqa: PLC0415

            return asyncio.run(explain(arguments.query_id, settings, as_json=arguments.json))
        case "energy":
            from services.cli.energy import energy  # noqa: PLC0415

            return asyncio.run(energy(settings, as_json=arguments.json))
        case "feedback" | "cancel":
            from services.cli.small import cancel, feedback  # noqa: PLC0415

            return asyncio.run((feedback if arguments.command == "feedback" else cancel)(arguments, settings))
        case "policy":
            from services.cli.policy import policy  # noqa: PLC0415

            return asyncio.run(policy(arguments, settings))
        case "replay":
            from services.cli.replay import replay  # noqa: PLC0415

            return asyncio.run(replay(arguments, settings))
        case "models":
            from services.cli.models import models  # noqa: PLC0415

            return models(arguments, settings)
        case _:
            from services.cli.models import check_fleet  # noqa: PLC0415

            return check_fleet(arguments.file)


if __name__ == "__main__":
    main()
