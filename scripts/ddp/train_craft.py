"""Fine-tune a language model with SFT and CRAFT in one process or in several: torchrun, accelerate launch, or plain.

    torchrun --nproc_per_node 2 scripts/ddp/train_craft.py --model_name_or_path MODEL --sft_data train.jsonl \\
        --sources flores=flores/ nllb=bitext/ --languages sin_Sinh --output_dir out

--help tells the flags; launch_craft.sh starts this script on all GPUs of a machine; run_craft.py is the walk.
"""

import sys
from collections.abc import Sequence

from inft import __main__ as command
from inft.training.processes import joined, wait_for_main
from params.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    command.quiet_libraries()  # before they are imported
    from craft_parser import parse
    from run_craft import run

    from inft.training import quiet

    quiet.quiet_libraries(progress_bars=False)
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        with joined():
            run(arguments)
    except UserError as error:
        wait_for_main()
        print("error:", error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
