"""What Ctrl-C does: the command ends cleanly, and says how to go on."""

from typing import Any

import typer
from typer.core import TyperGroup

from cli.output import print_line

INTERRUPTED = 130
HOW_TO_GO_ON = {
    "upgrade": "run it again: it resumes from the registry, and adapters that were under way start again",
    "rollout": "run it again: each version continues from its status in the registry",
    "extract": "run it again with the same --out: finished tensors are kept",
    "continual": "nothing was stored; run it again",
    "register": "run it again: adapters that are registered stay registered",
    "assess": "nothing was changed, except that finished assessments are kept; run it again",
    "gc": "run it again: it goes on with what is left",
    "demo": "run it again: it starts from the beginning",
}


class Interruptible(TyperGroup):
    """The group of all commands. `serve` is meant to be ended with Ctrl-C, so that is a success."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; turn Ctrl-C into a line and an exit code."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            name = ctx.invoked_subcommand
            if name == "serve":
                print_line("stopped")
                raise typer.Exit(0) from None
            print_line(f"interrupted; {HOW_TO_GO_ON.get(name, 'run it again')}")
            raise typer.Exit(INTERRUPTED) from None
