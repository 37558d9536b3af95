"""Start-up: `inft --help` against `trl sft --help`, each in a fresh process.

python scripts/bench/startup.py
"""

import subprocess
import sys
from pathlib import Path

from harness import interleave, parser, report


def main() -> None:
    """Check that both commands answer, then time them."""
    options = parser(__doc__, repetitions=7).parse_args()
    bin_dir = Path(sys.executable).parent
    commands = {
        "inft --help": [str(bin_dir / "inft"), "--help"],
        "inft train --help": [str(bin_dir / "inft"), "train", "--help"],
        "trl sft --help": [str(bin_dir / "trl"), "sft", "--help"],
    }

    def run(command: list[str]) -> None:
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
        assert "--help" in answer.stdout, f"{command} printed no help"

    seconds = interleave(
        {name: lambda command=command: run(command) for name, command in commands.items()},
        repetitions=options.repetitions,
    )
    report("start-up", seconds, ours="inft --help", peer="trl sft --help", limit=0.1, out=options.out)


if __name__ == "__main__":
    main()
