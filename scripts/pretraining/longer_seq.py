"""Go on with a pretrained encoder at a longer context; the same as `inft pretrain neobert --continue-from RUN_DIR`.

    python scripts/pretraining/longer_seq.py outputs/neobert [--dataset.max_seq_length 4096] [--section.key value …]

The weights are the newest of RUN_DIR/model_checkpoints and the parameters those of the run, but for 50,000 steps at
4,096 tokens (the second stage of the NeoBERT paper) into RUN_DIR_longer.
"""

import sys

from inft.__main__ import main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not arguments:
        sys.exit("error: name the run to go on from: longer_seq.py RUN_DIR [--section.key value …]")
    named = not arguments[0].startswith("-")
    main(["pretrain", "neobert", *(["--continue-from"] if named else []), *arguments])
