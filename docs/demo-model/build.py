"""Makes the demo model, from the standard library's sources to the file in the package.

One command repeats everything (docs/demo-model.md says with what, and how long it takes):

    python docs/demo-model/build.py all --stdlib DIR... --out shimpy/demo/demo.gguf

Its steps can also be run one by one, so that training alone may happen on another machine:
corpus and tokenizer, then train, tune, export and
evaluate. Each leaves its files in --work.
"""

from __future__ import annotations

import argparse
import dataclasses
import sysconfig
from pathlib import Path
from typing import Any, get_type_hints

# The name of each step's product in the work folder.
_DOCUMENTS = "documents.jsonl"
_SNIPPETS = "snippets.jsonl"
_TOKENIZER = "tokenizer.json"
_CHECKPOINT = "checkpoint.pt"
_TUNED = "tuned.pt"


def main() -> None:
    """Runs the steps that the command line names."""
    args = _parser().parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    steps = _STEPS if args.step == "all" else {args.step: _STEPS[args.step]}
    for name, step in steps.items():
        print(f"== {name}", flush=True)
        step(args)


def _corpus(args: argparse.Namespace) -> None:
    """Texts, snippets and the tokenizer."""
    from corpus import collect_documents, collect_snippets, save_jsonl
    from vocabulary import train_tokenizer

    documents = collect_documents(args.stdlib or [Path(sysconfig.get_path("stdlib"))])
    save_jsonl(args.work / _DOCUMENTS, documents)
    save_jsonl(args.work / _SNIPPETS, collect_snippets(documents))
    texts = [d.text for d in documents if d.split == "train"]
    train_tokenizer(texts).save(str(args.work / _TOKENIZER))
    for split in ("train", "valid", "held-out"):
        for kind in ("module", "test", "prose"):
            n_bytes = sum(
                len(d.text.encode()) for d in documents if (d.split, d.kind) == (split, kind)
            )
            print(f"{split:9}{kind:7}{n_bytes:12,} bytes")


def _train(args: argparse.Namespace) -> None:
    from model import ModelConfig
    from train import TrainConfig, save_checkpoint, train

    model = train(args.work, _config(ModelConfig, args), _config(TrainConfig, args))
    save_checkpoint(args.work / _CHECKPOINT, model)


def _tune(args: argparse.Namespace) -> None:
    from train import TuneConfig, load_checkpoint, save_checkpoint, tune

    model = load_checkpoint(args.work / _CHECKPOINT)
    model = tune(args.work, model, _config(TuneConfig, args))
    save_checkpoint(args.work / _TUNED, model)


def _export(args: argparse.Namespace) -> None:
    from export import export
    from train import load_checkpoint
    from vocabulary import load_tokenizer

    model = load_checkpoint(args.work / _TUNED)
    export(args.out, model, load_tokenizer(args.work / _TOKENIZER), args.type)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


def _reference(args: argparse.Namespace) -> None:
    from reference import record
    from train import load_checkpoint
    from vocabulary import load_tokenizer

    model = load_checkpoint(args.work / _TUNED)
    record(args.reference, args.out, model, load_tokenizer(args.work / _TOKENIZER))


def _evaluate(args: argparse.Namespace) -> None:
    from corpus import load_documents
    from evaluate import evaluate

    evaluate(args.out, load_documents(args.work / _DOCUMENTS))


_STEPS = {
    "corpus": _corpus,
    "train": _train,
    "tune": _tune,
    "export": _export,
    "reference": _reference,
    "evaluate": _evaluate,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=["all", *_STEPS])
    parser.add_argument("--work", type=Path, default=Path("build/demo-model"))
    parser.add_argument(
        "--stdlib",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="standard libraries, newest first (default: this interpreter's)",
    )
    parser.add_argument("--out", type=Path, default=Path("shimpy/demo/demo.gguf"))
    parser.add_argument("--reference", type=Path, default=Path("tests/demo/reference.json"))
    parser.add_argument("--type", choices=["q8_0", "f32"], default="q8_0")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of ModelConfig, TrainConfig or TuneConfig, as in --set n_passes=2",
    )
    return parser


def _config(cls: Any, args: argparse.Namespace) -> Any:
    """Returns cls with the fields that --set names; those of other classes are passed over."""
    types = get_type_hints(cls)
    names = {field.name for field in dataclasses.fields(cls)}
    settings = dict(setting.split("=", 1) for setting in args.set)
    values = {
        name: value == "true" if types[name] is bool else types[name](value)
        for name, value in settings.items()
        if name in names
    }
    return cls(**values)


if __name__ == "__main__":
    main()
