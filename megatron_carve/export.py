"""Write a trained run as a Hugging Face folder: `python -m megatron_carve.export RUN OUT`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_carve.run.folder import new_folder
from megatron_carve.run.program import exit_status, run_parser

DESCRIPTION = """
Writes the model of a run, trained in whatever layout, as a folder for transformers
(AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True)): safetensors, config, tokenizer and modelling
code. `python -m megatron_carve.import` goes back.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status. A user's mistake ends in one line on stderr and status 2."""
    parser = run_parser("export", DESCRIPTION)
    parser.add_argument("out", type=Path, help="folder to write; new, or empty")
    chosen = parser.parse_args(arguments)
    return exit_status(lambda: _export(chosen.run, chosen.out, chosen.step))


def _export(run: str, out: Path, step: int | None) -> None:
    with new_folder(out) as partial:
        print("\n".join(_write(run, partial, out, step)))


def _write(run: str, folder: Path, out: Path, step: int | None) -> list[str]:
    """Fill the folder that becomes `out`; returns what a user should know about it."""
    # Here because torch and Megatron take seconds to import; a typing mistake need not wait.
    from megatron_carve.use import hugging_face
    from megatron_carve.use.trained import trained_model

    try:
        import safetensors  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(f'export needs transformers ({error}); run: pip install "megatron-carve[export]"') from error
    # One kind of layers, so that weights have one set of names; a CPU has room for any model.
    with trained_model(run, device="cpu", layers="local", backend="torch", step=step) as trained:
        weights = hugging_face.to_hugging_face(trained.model.state_dict(), trained.recipe)
        padded = weights["model.embed_tokens.weight"].shape[0]
        tokenizer = trained.tokenizer
        config = hugging_face.configuration(
            trained.recipe, padded, None if tokenizer is None else tokenizer.eod, trained.step
        )
        notes = hugging_face.write_folder(
            folder, weights, config, vocab_size=trained.vocab_size, tokenizer=tokenizer
        )  # fmt: skip
        numbers = sum(w.numel() for w in weights.values())
        return [f"{out}: step {trained.step}, {numbers:,} parameters", *notes]


if __name__ == "__main__":
    sys.exit(main())
