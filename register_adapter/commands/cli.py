"""The command line: ``register-adapter``."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["main"]


def main() -> None:
    """Run ``register-adapter``; every error of the package's own ends as one line, without a traceback."""
    try:
        import typer  # noqa: F401
    except ImportError:
        sys.exit("the command line needs typer and rich: pip install 'register-adapter[cli]'")
    from ..errors import RegisterAdapterError

    try:
        _app()()
    except (RegisterAdapterError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _app() -> Any:
    import typer

    app = typer.Typer(
        help="Register tokens for vision transformers.", no_args_is_help=True, pretty_exceptions_enable=False
    )

    @app.callback()
    def version_callback() -> None:
        """Register tokens for vision transformers."""

    @app.command()
    def version() -> None:
        """Print the version."""
        from .. import __version__

        typer.echo(__version__)

    @app.command()
    def demo(
        output_dir: str = typer.Option(
            "demo", "--output_dir", "--out", help="Folder for adapter, figure and demo.json."
        ),
        model: str | None = typer.Option(None, help="Your model: name on the Hub, or folder."),
        images: str | None = typer.Option(None, help="Your pictures: a folder with one sub-folder a class."),
        num_registers: int = typer.Option(4, "--num_registers", min=1, help="Number of registers."),
        max_train_steps: int = typer.Option(150, "--max_train_steps", min=1, help="Optimiser steps."),
        batch_size: int = typer.Option(32, "--batch_size", min=1, help="Pictures a step."),
        learning_rate: float = typer.Option(0.01, "--learning_rate", help="Peak learning rate."),
        num_eval_images: int = typer.Option(256, "--num_eval_images", min=2, help="Held-out pictures, at most."),
        seed: int = typer.Option(0, help="Seed of everything random."),
    ) -> None:
        """Train registers on a model with artifacts; measure before and after.

        Without --model and --images it runs on the small ViT with planted artifacts that the package ships.
        """
        _quieten()
        from .demo import DemoArguments, run_demo
        from .demo_report import print_demo

        report = run_demo(
            DemoArguments(
                output_dir,
                model,
                images,
                num_registers,
                max_train_steps,
                batch_size,
                learning_rate,
                num_eval_images,
                seed,
            )
        )
        print_demo(report, output_dir)

    @app.command()
    def audit(
        model: str = typer.Argument(help="Model: folder, name on the Hub; planted or clean for the shipped ViT."),
        images: str = typer.Argument(help="Folder of pictures, with those below it; scenes for made ones."),
        output_dir: str = typer.Option(
            "report", "--output_dir", "--out", help="Folder for audit.json and the page index.html."
        ),
        adapter: list[str] | None = typer.Option(  # noqa: B008 - typer's way
            None, help="Folder or name of an adapter; may be given several times."
        ),
        rule: str = typer.Option("auto", help="Rule for outliers, such as auto, mixture, fixed:150, sigma:3, mad:6."),
        attentions: bool = typer.Option(True, help="Sum attention maps; without them it is faster."),
        batch_size: int = typer.Option(32, "--batch_size", min=1, help="Pictures a batch."),
        max_images: int | None = typer.Option(None, "--max_images", min=1, help="Use the first so many pictures."),
        device: str | None = typer.Option(None, help="Where to run; default a GPU if there is one."),
        strict: bool = typer.Option(False, "--strict", help="Refuse bad pictures instead of skipping them."),
    ) -> None:
        """Find out whether a model has artifacts, with and without adapters: a table, audit.json and a page.

        Try it on what the package ships: register-adapter audit planted scenes
        """
        _quieten()
        from .audit import AuditArguments, print_reports, run_audit

        arguments = AuditArguments(
            model, images, output_dir, adapter or (), rule, attentions, batch_size, max_images, device, strict
        )
        reports, no_pictures = run_audit(arguments)
        print_reports(reports, output_dir, no_pictures)

    @app.command()
    def probe(
        model: str = typer.Argument(help="Model: folder, name on the Hub; planted or clean for the shipped ViT."),
        images: str = typer.Argument(help="Folder of pictures, one sub-folder a class; scenes for made ones."),
        output_dir: str = typer.Option(
            ..., "--output_dir", "--out", help="Folder for probes.json, and registers.json if there are registers."
        ),
        adapter: str | None = typer.Option(None, help="Folder or name of an adapter, to be probed too."),
        rule: str = typer.Option("auto", help="Rule for outliers, as in the audit."),
        layer: int = typer.Option(-1, help="Layer: 0 is the input of the first block, -1 the last one's output."),
        min_images: int = typer.Option(100, "--min_images", min=10, help="Fewest pictures with outliers."),
        max_images: int | None = typer.Option(None, "--max_images", min=1, help="Use so many pictures, at random."),
        batch_size: int = typer.Option(32, "--batch_size", min=1, help="Pictures a batch."),
        seed: int = typer.Option(0, help="Seed of everything random."),
        device: str | None = typer.Option(None, help="Where to run; default a GPU if there is one."),
        strict: bool = typer.Option(False, "--strict", help="Refuse bad pictures instead of skipping them."),
    ) -> None:
        """Find out what tokens know (place, pixels, class of the picture), and what registers do.

        Try it on what the package ships: register-adapter probe planted scenes --out probes
        """
        _quieten()
        from .probe import ProbeArguments, print_probes, run_probes

        found = run_probes(
            ProbeArguments(
                model=model,
                images=images,
                output_dir=output_dir,
                adapter=adapter,
                rule=rule,
                layer=layer,
                min_images=min_images,
                max_images=max_images,
                batch_size=batch_size,
                seed=seed,
                device=device,
                strict=strict,
            )
        )
        print_probes(found, output_dir)

    @app.command()
    def fit(
        model: str = typer.Argument(help="Model: folder, name on the Hub; planted or clean for the shipped ViT."),
        images: str = typer.Argument(help="Folder of pictures, with those below it; scenes for made ones."),
        output_dir: str = typer.Option(..., "--output_dir", "--out", help="Folder for the adapter."),
        num_registers: int = typer.Option(1, "--num_registers", min=1, help="Number of registers."),
        remove: str = typer.Option("zero", help="What other tokens keep: zero, mean, or outliers (only those go)."),
        attention_bias: bool = typer.Option(
            False, "--attention_bias", help="Constant keys and values in place of a token."
        ),
        rule: str = typer.Option("auto", help="Rule for outliers, as in the audit."),
        threshold: float | None = typer.Option(None, help="Norm of an outlier behind --top-block, instead of a rule."),
        top_block: int | None = typer.Option(None, "--top-block", min=0, help="Last block with register neurons."),
        num_neurons: int | None = typer.Option(None, "--num_neurons", min=1, help="How many; default: chosen."),
        image_sizes: list[int] | None = typer.Option(  # noqa: B008 - typer's way
            None, "--image_sizes", min=1, help="Side to resize to; several are pooled."
        ),
        max_images: int = typer.Option(256, "--max_images", min=3, help="Use the first so many pictures."),
        batch_size: int | None = typer.Option(None, "--batch_size", min=1, help="Pictures a batch."),
        device: str | None = typer.Option(None, help="Where to run; default a GPU if there is one."),
        strict: bool = typer.Option(False, "--strict", help="Refuse bad pictures instead of skipping them."),
    ) -> None:
        """Repair a model without training: find its register neurons, and move what they do to a register.

        Try it on what the package ships: register-adapter fit planted scenes --out fitted
        """
        _quieten()
        from ..errors import NoArtifactsError
        from .fit import FitArguments, print_fit, run_fit

        arguments = FitArguments(
            model=model,
            images=images,
            output_dir=output_dir,
            num_registers=num_registers,
            remove=remove,
            attention_bias=attention_bias,
            rule=rule,
            threshold=threshold,
            top_block=top_block,
            num_neurons=num_neurons,
            image_sizes=image_sizes or (),
            max_images=max_images,
            batch_size=batch_size,
            device=device,
            strict=strict,
        )
        try:
            neurons, found = run_fit(arguments)
        except NoArtifactsError as nothing:  # good news, and no failure
            typer.echo(str(nothing))
            return
        print_fit(neurons, found, output_dir)

    @app.command()
    def export(
        adapter: str = typer.Argument(help="Folder of the adapter, or its name on the Hub."),
        base: str | None = typer.Option(None, help="Base model: folder or name; default the one the adapter names."),
        out: str = typer.Option(..., "--output_dir", "--out", help="Folder for the result."),
        form: str = typer.Option("native", "--format", help="native, onnx or program (torch.export)."),
        image_size: int | None = typer.Option(
            None, "--image_size", min=1, help="Side of the pictures in pixels; default the model's own."
        ),
    ) -> None:
        """Write a model with its trained registers for people who do not have this package.

        native: a plain transformers or timm model with registers. onnx, program: a graph for one picture size.
        """
        _quieten()
        from ..export import export_saved

        typer.echo(export_saved(adapter, out, form, base, image_size))

    @app.command()
    def families(
        full: bool = typer.Option(False, "--full", help="One line a family, with where registers enter and leave."),
        into: str | None = typer.Option(None, "--into", help="A document to put the table into, such as README.md."),
    ) -> None:
        """Print the supported models as a Markdown table."""
        from ..towers.supported import full_table, short_table, write_table

        table = full_table() if full else short_table()
        if into is None:
            typer.echo(table)
        else:
            write_table(into, table)

    return app


def _quieten() -> None:
    """No messages of other libraries that tell a user nothing: the command has a bar of its own."""
    import warnings

    from transformers.utils import logging

    # PEFT reads an attribute that transformers has renamed.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    logging.disable_progress_bar()


if __name__ == "__main__":
    main()
