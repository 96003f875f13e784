"""``fastsam finetune``: the options are the fields of ``Settings``; a file may hold them as well."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from fastsam.commands.finetune.settings import Settings, read_file


def finetune(context: typer.Context, **options: Any) -> None:
    """Fine-tune an image classifier of Transformers; without options a small ViT on handwritten digits.

    Ctrl-C, a kill or a full disk lose nothing: the same command again goes on from the last checkpoint, with the same
    weights in the end.
    """
    del context  # --config has given it the defaults by now
    del options["config"]
    _or_say(lambda: _run(Settings(**options)))


def _run(settings: Settings) -> None:
    from fastsam.commands.finetune.job import run

    with warnings.catch_warnings():
        warnings.showwarning = _say_warning
        run(settings)


def _say_warning(message: Warning | str, *where: Any, **_: Any) -> None:
    """Without the line of code that Python shows, which is not the reader's."""
    typer.echo(f"fastsam finetune: warning: {message}", err=True)


def _or_say(act) -> Any:
    """What cannot be used becomes one message and an exit status; an interrupted run exits as the signal has it."""
    from fastsam.commands.finetune.interruption import Interrupted, OutOfMemory
    from fastsam.commands.training.run import FolderInUse

    try:
        return act()
    except Interrupted as error:
        typer.echo(f"fastsam finetune: {error}", err=True)
        raise typer.Exit(128 + error.signal) from None
    except KeyboardInterrupt:
        typer.echo("fastsam finetune: interrupted; the last checkpoint is intact: the same command goes on", err=True)
        raise typer.Exit(130) from None
    except Exception as error:  # the libraries raise all kinds for data and checkpoints that cannot be used
        text = str(error).strip() or type(error).__name__
        expected = isinstance(error, (ValueError, OSError, ImportError, OutOfMemory, FolderInUse))
        typer.echo(f"fastsam finetune: {text if expected else f'{type(error).__name__}: {text}'}", err=True)
        raise typer.Exit(1) from None


def _defaults_from_file(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None:
        context.default_map = {**(context.default_map or {}), **_or_say(lambda: read_file(path))}
    return path


def _signature() -> inspect.Signature:
    """One keyword parameter for each field of ``Settings``, and --config, which is read before the others."""
    hints = get_type_hints(Settings, include_extras=True)
    config = typer.Option(
        callback=_defaults_from_file, is_eager=True, help="TOML or JSON file with options; the command line wins."
    )
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
        inspect.Parameter("config", kind, default=None, annotation=Annotated[Path | None, config]),
    ]
    for field in dataclasses.fields(Settings):
        default = field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        parameters.append(inspect.Parameter(field.name, kind, default=default, annotation=hints[field.name]))
    return inspect.Signature(parameters)


_made = _signature()
finetune.__signature__ = _made  # type: ignore[attr-defined]  # what typer makes the options of
finetune.__annotations__ = {p.name: p.annotation for p in _made.parameters.values()}

app = typer.Typer()
app.command()(finetune)
