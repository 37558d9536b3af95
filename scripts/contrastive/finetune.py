"""Contrastive fine-tuning; the same as `inft finetune-encoder`.

python scripts/contrastive/finetune.py configs/contrastive/contrastive_neobert.yaml [--section.key value …]
"""

import sys

from inft.__main__ import main

if __name__ == "__main__":
    main(["finetune-encoder", *sys.argv[1:]])
