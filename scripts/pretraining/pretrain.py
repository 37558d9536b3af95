"""MLM pretraining; the same as `inft pretrain neobert`.

python scripts/pretraining/pretrain.py configs/pretraining/pretrain_neobert.yaml [--section.key value …]
"""

import sys

from inft.__main__ import main

if __name__ == "__main__":
    main(["pretrain", "neobert", *sys.argv[1:]])
