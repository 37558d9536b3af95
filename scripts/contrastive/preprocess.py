"""Tokenise rows of {query, pos, neg[]} for contrastive fine-tuning; the same as `inft preprocess --task contrastive`.

python scripts/contrastive/preprocess.py configs/contrastive/contrastive_neobert.yaml --dataset.path pairs.jsonl -o DIR
"""

import sys

from inft.__main__ import main

if __name__ == "__main__":
    main(["preprocess", "--task", "contrastive", *sys.argv[1:]])
