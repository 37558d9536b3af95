"""Tokenise any data set and save it for pretraining, without a configuration.

    python scripts/pretraining/tokenize_dataset.py --dataset EleutherAI/SmolLM2-1.7B-stage-4-100B \
        --output tokenized_data/smollm2 --tokenizer BEE-spoke-data/wordpiece-tokenizer-32k-en_code-msp --max-length 1024

--dataset is a hub id, a file, a directory of shards or a glob. Train on it with --dataset.path tokenized_data/smollm2.
"""

import argparse
import sys
from pathlib import Path

from params.errors import UserError


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="hub id, file, directory of shards, or glob")
    parser.add_argument("--config", help="configuration of a hub data set")
    parser.add_argument("--output", required=True, type=Path, help="directory that is made")
    parser.add_argument("--tokenizer", required=True, help="hub id or directory of a fast tokenizer with a mask token")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a document; longer ones are split")
    parser.add_argument("--text-column", default="text", help="of the rows")
    parser.add_argument("--language-column", help="of the rows: evaluation is then shown per language")
    parser.add_argument("--max-bad-fraction", type=float, default=0.01, help="of rows that cannot be read; 0: none may")
    parser.add_argument("--long-documents", choices=("split", "drop"), default="split", help="what becomes of them")
    parser.add_argument("--num-workers", type=int, default=0, help="processes")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser.parse_args()


def main() -> None:
    told = options()
    from inft.__main__ import quiet_libraries

    quiet_libraries()
    from inft.cli.console import make_console
    from inft.encoders.data.preprocess import tokenize_dataset

    if told.output.exists() and not told.output.is_dir():
        raise UserError(f"{told.output} is a file: name a directory.")
    if told.output.exists() and any(told.output.iterdir()) and not told.overwrite:
        raise UserError(f"{told.output} exists: give --overwrite to replace it, or another --output.")
    tokenize_dataset(
        told.dataset,
        told.output,
        tokenizer=told.tokenizer,
        max_length=told.max_length,
        config=told.config,
        text_column=told.text_column,
        language_column=told.language_column,
        max_bad_fraction=told.max_bad_fraction,
        long_documents=told.long_documents,
        num_workers=told.num_workers,
        console=make_console(),
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print("error:", error, file=sys.stderr)
        sys.exit(2)
