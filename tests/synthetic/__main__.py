"""Write a synthetic model: `python -m tests.synthetic dense-200m /tmp/dense.gguf`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.synthetic import (
    CHAIN_TEXT,
    PRESETS,
    write_bert,
    write_chain,
    write_preset,
    write_reranker,
)


def main() -> None:
    """Parse the command line, write the file and print its path."""
    parser = argparse.ArgumentParser(prog="python -m tests.synthetic", description=__doc__)
    parser.add_argument("model", choices=[*PRESETS, "chain", "bert", "reranker"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--text", default=CHAIN_TEXT, help="what the chain says")
    parser.add_argument("--quant", help="f32, f16, q8_0, q4_0 or q4_k_m")
    arguments = parser.parse_args()
    options = {"quant": arguments.quant} if arguments.quant else {}
    if arguments.model == "chain":
        path = write_chain(arguments.path, arguments.text)
    elif arguments.model == "bert":
        path = write_bert(arguments.path, **options)
    elif arguments.model == "reranker":
        path = write_reranker(arguments.path, **options)
    else:
        path = write_preset(arguments.path, arguments.model, **options)
    print(path)  # noqa: T201 (a command's answer)


if __name__ == "__main__":
    main()
