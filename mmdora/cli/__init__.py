"""The roof: the command line. Each command's work is in its own file, imported when it runs, so that --help is
quick."""

from __future__ import annotations

import errno
import logging
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="mmdora",
    help="Tune vision-language models with DoRA, and know with error bars what it bought.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # typer's rich mode alone costs half a second
    pretty_exceptions_enable=False,
)

SHARED_ERROR = 3.0  # seconds within which rank 0 tells an error that all processes meet

Config = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped config such as quickstart.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Settings to change.")]
Target = Annotated[str, typer.Argument(help="A run directory, an adapter directory, or a model (directory or hub id).")]
Split = Annotated[str | None, typer.Option(help="Which of the benchmark's splits, if not its first.")]
JudgeUrl = Annotated[str | None, typer.Option(help="An OpenAI-compatible address of a judge, for judged benchmarks.")]
JudgeModel = Annotated[str | None, typer.Option(help="The judge's model.")]
Verdicts = Annotated[str | None, typer.Option(help="A file of verdicts, in place of a judge.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
Plugins = Annotated[list[str] | None, typer.Option("--plugin", help="A module to import first.")]


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest complete checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Move a run that is there aside.")] = False,
) -> None:
    """Tune a model as a config says, and score it before and after."""
    from mmdora.cli.train import run

    run(config, overrides or [], resume, overwrite)


@app.command()
def doctor(
    config: Config,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=1, help="How many of each source to look at.")] = 200,
    html: Annotated[Path | None, typer.Option(help="Write what is shown as a page, too.")] = None,
) -> None:
    """Show what a config's data becomes and what is wrong with it. Exits with 1 if a run would stop or go wrong."""
    from mmdora.cli.doctor import run

    raise typer.Exit(run(config, overrides or [], samples, html))


@app.command()
def plan(
    config: Config,
    gpus: Annotated[int, typer.Option(min=1, help="How many GPUs, over all nodes.")],
    gpu_memory: Annotated[float, typer.Option(min=0.001, help="GiB of each.")],
    overrides: Overrides = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="Of one node; 8, if not given.")] = None,
) -> None:
    """Show the memory that a run takes on each GPU, by ZeRO stage and offload. Exits with 1 if it fits under none."""
    from mmdora.cli.plan import run

    raise typer.Exit(run(config, overrides or [], gpus, gpu_memory, gpus_per_node))


@app.command("eval")
def evaluate(
    target: Target,
    only: Annotated[str | None, typer.Option(help="Just this entry of the run's `evaluation`.")] = None,
    benchmark: Annotated[str | None, typer.Option(help="A benchmark by name, in place of the run's own.")] = None,
    data: Annotated[str | None, typer.Option(help="The benchmark's data.")] = None,
    data_format: Annotated[
        str | None, typer.Option("--format", help="The data's format, if it cannot be told.")
    ] = None,
    split: Split = None,
    prompt: Annotated[str | None, typer.Option(help="The words around {question}, if not the benchmark's own.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many questions.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Questions at once.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where results go; a model without a run needs it.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished result.")] = False,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    verdicts: Verdicts = None,
    trust_remote_code: Trust = False,
    plugin: Plugins = None,
) -> None:
    """Score a run's own benchmarks, or any benchmark on any model."""
    from mmdora.apps.evaluate import Request
    from mmdora.cli.evaluate import run
    from mmdora.core.config_files import judge_config

    judge = judge_config(judge_url, judge_model, verdicts)
    request = Request(
        target, only, benchmark, data, data_format, split, prompt, limit, batch_size, out, overwrite, judge
    )
    run(request, trust_remote_code, plugin or [])


@app.command()
def score(
    benchmark: Annotated[str, typer.Argument(help="A benchmark by name.")],
    predictions: Annotated[Path, typer.Option(help="The answers, in the benchmark's official format or ours.")],
    annotations: Annotated[str, typer.Option(help="The benchmark's official files: their folder, or the one file.")],
    split: Split = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write a result directory too.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished result.")] = False,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    verdicts: Verdicts = None,
    plugin: Plugins = None,
) -> None:
    """Score answers that are already there, without a model."""
    from mmdora.cli.score import run
    from mmdora.core.config_files import judge_config

    judge = judge_config(judge_url, judge_model, verdicts)
    run(benchmark, predictions, annotations, split, as_json, out, overwrite, plugin or [], judge)


@app.command()
def submit(
    results: Annotated[list[Path], typer.Argument(help="Result directories; one, or one a split.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    plugin: Plugins = None,
) -> None:
    """Write the file that a benchmark's leaderboard takes."""
    from mmdora.cli.submit import run

    run(results, out, plugin or [])


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="RESULT_A", help="A result, a run, or a folder of results.")],
    b: Annotated[Path, typer.Argument(metavar="RESULT_B", help="What to hold against it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
    plugin: Plugins = None,
) -> None:
    """Compare two models' answers question by question, and say whether the difference may be chance."""
    from mmdora.cli.compare import run

    run(a, b, as_json, plugin or [])


@app.command()
def leaderboard(
    results: Annotated[
        list[str], typer.Argument(metavar="[NAME=]RESULT...", help="Results, runs, or folders of results.")
    ],
    html: Annotated[Path, typer.Option(help="The page to write.")],
    plugin: Plugins = None,
) -> None:
    """Write a page that ranks models, down to the single question."""
    from mmdora.cli.leaderboard import run

    run(results, html, plugin or [])


@app.command()
def merge(
    run: Target,
    out: Annotated[Path, typer.Argument(help="The new model's directory.")],
    lora_rank: Annotated[
        int | None, typer.Option(min=1, help="Write a plain LoRA of this rank instead, and how far it falls short.")
    ] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Fold a run's adapter into a plain Hugging Face model, and print how far the two differ."""
    from mmdora.cli.merge import run as merge_run

    merge_run(run, out, lora_rank, trust_remote_code)


@app.command()
def convert(
    folder: Annotated[Path, typer.Argument(metavar="LLAVA_DIR", help="What LLaVA's own code wrote, or a Llama.")],
    out: Annotated[Path, typer.Argument(help="The new model's directory.")],
    vision_tower: Annotated[str, typer.Option(help="The CLIP model it was trained with: a directory or a hub id.")],
    base: Annotated[
        Path | None, typer.Option(help="What a projector or a LoRA run was trained on: a language model or a LLaVA.")
    ] = None,
) -> None:
    """Turn a checkpoint of LLaVA's own code, or a Llama that shall become a LLaVA, into a plain Hugging Face model."""
    from mmdora.cli.convert import run

    run(folder, out, vision_tower, base)


@app.command()
def chat(
    target: Target,
    image: Annotated[list[Path] | None, typer.Option(help="A picture to talk about; may be given again.")] = None,
    video: Annotated[list[Path] | None, typer.Option(help="A video to talk about; may be given again.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 256,
    trust_remote_code: Trust = False,
) -> None:
    """Talk with a run or a model in the terminal."""
    from mmdora.cli.chat import run

    run(target, image or [], video or [], max_new_tokens, trust_remote_code)


@app.command()
def analyze(run: Target, trust_remote_code: Trust = False) -> None:
    """Show how far tuning moved each layer's magnitude and direction."""
    from mmdora.cli.analyze import run as analyze_run

    analyze_run(run, trust_remote_code)


@app.command("list")
def list_names(
    kind: Annotated[
        str,
        typer.Argument(help="adapters, vision-encoders, architectures, formats, video-readers or benchmarks"),
    ],
) -> None:
    """List what a config can name."""
    # Not `commands/list.py`: a submodule of that name would hide the builtin from the annotations in this file.
    from mmdora.cli.list_names import run

    run(kind)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Exits with 0 if done, 1 if failed, 2 if the user's input is wrong."""
    from mmdora.core.errors import RunError, UserError

    # On a CPU it asks for another package as soon as it is imported, quantized model or not.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app(arguments)
    except UserError as error:
        _stop(str(error), 2)
    except RunError as error:
        _stop(str(error), 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename or "the run"
        _stop(f"no disk space left on device while writing {where}; free some and go on with --resume", 2)
    except KeyboardInterrupt:
        sys.exit(130)


def _stop(message: str, code: int) -> None:
    from mmdora.core.distributed import rank

    if rank():  # most errors meet every process, and the launcher ends the others when the first has told it
        time.sleep(SHARED_ERROR)
    sys.stderr.write(f"error{f' (rank {rank()})' if rank() else ''}: {message}\n")
    sys.exit(code)
