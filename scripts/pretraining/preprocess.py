"""Tokenise the data set of a pretraining configuration and save it; the same as `inft preprocess`.

python scripts/pretraining/preprocess.py configs/pretraining/pretrain_neobert.yaml [-o DIR] [--section.key value …]
"""

import sys

from inft.__main__ import main

if __name__ == "__main__":
    main(["preprocess", "--task", "pretraining", *sys.argv[1:]])
