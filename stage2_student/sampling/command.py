"""`tide-eval generate`: what a student answers, to a prompt or to a file of them.

The options are read here; `run` does the work, and imports torch.
"""

from pathlib import Path
from typing import Annotated

import typer

from tide_cache.cli import INSTALL_HINT
from tide_cache.errors import ConfigError, TideError


def generate(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a block-diffusion student.")],
    prompt: Annotated[str | None, typer.Argument(help="Default: read from a pipe.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="File of prompts, one a line; in a .jsonl file strings, or objects with prompt or "
            "messages."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Upper bound on the answer.")] = 256,
    steps: Annotated[
        int | None, typer.Option(help="Forwards for all of them. Default: one a token.")
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="Default: what the student was trained with, else 32.")
    ] = None,
    block_origin: Annotated[
        str,
        typer.Option(help="prompt_end: as the published sampler; sequence_start: as in training."),
    ] = "prompt_end",
    threshold: Annotated[
        float | None,
        typer.Option(help="Commit every token likelier than this at once; goes without --steps."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn at a temperature above 0.")] = 0,
    cfg: Annotated[float, typer.Option("--cfg", help="Scale of guidance; 0: none.")] = 0.0,
    batch_size: Annotated[int, typer.Option(help="Prompts at once.")] = 32,
    raw: Annotated[bool, typer.Option("--raw", help="Use no chat template.")] = False,
    no_think: Annotated[
        bool,
        typer.Option(
            "--no-think", help="Append an empty think block, as the published evaluation does."
        ),
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Of a model on the hub.")] = None,
    device: Annotated[str, typer.Option(help="auto: a GPU if there is one.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto: bfloat16 on a GPU, float32 elsewhere; or one of the two.")
    ] = "auto",
    show_denoising: Annotated[
        bool, typer.Option("--show-denoising", help="Draw each step: masks become tokens.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="JSON lines of answers; run again to go on."),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Check everything, print the plan, stop.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Generate with a student: a prompt's answer, block by block, or those of a file.

    [bold]Examples[/bold]

    tide-eval generate runs/wedlm/student/final "Why is the sky blue?" --no-think

    tide-eval generate runs/wedlm/student/final "Why is the sky blue?" --show-denoising

    tide-eval generate runs/wedlm/student/final --prompts questions.jsonl -o answers.jsonl

    git diff | tide-eval generate runs/code/student/final --threshold 0.9 --json
    """
    if prompt is not None and prompts is not None:
        raise ConfigError("PROMPT: expected either a prompt or --prompts, got both")
    if show_denoising and (prompts is not None or json_output):
        raise ConfigError("--show-denoising: goes with one prompt, and not with --json")
    try:
        from stage2_student.sampling.run import GenerateRequest, run_generate
        from stage2_student.sampling.settings import GenerationSettings
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers", "safetensors"):
            raise
        raise TideError(
            f"tide-eval needs {error.name}, which is not installed",
            hint=INSTALL_HINT["stage2_student"],
        ) from error
    settings = GenerationSettings(
        max_new_tokens=max_new_tokens,
        num_steps=steps,
        block_size=32 if block_size is None else block_size,
        block_origin=block_origin,  # type: ignore[arg-type]
        threshold=threshold,
        temperature=temperature,
        seed=seed,
        cfg_scale=cfg,
    )
    run_generate(
        GenerateRequest(
            model=model,
            revision=revision,
            prompt=prompt,
            prompts_file=prompts,
            settings=settings,
            takes_block_size_of_model=block_size is None,
            batch_size=batch_size,
            is_raw=raw,
            has_empty_think_block=no_think,
            device=device,
            dtype=dtype,
            shows_denoising=show_denoising,
            output=output,
            is_dry_run=dry_run,
            is_json=json_output,
        )
    )
