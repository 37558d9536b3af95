"""The package as a whole: what importing it costs, what it needs, and its names."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

import craft


def test_without_trl_its_trainer_alone_is_missing_and_says_what_to_install():
    code = (
        "import sys; sys.modules['trl'] = None\n"
        "import craft\n"
        "from craft import CRAFTTrainerMixin\n"
        "craft.CRAFTSFTTrainer"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    told = "ImportError: CRAFTSFTTrainer needs trl.SFTTrainer of TRL 1.16 or newer: pip install 'trl>=1.16'."
    assert done.stderr.strip().splitlines()[-1] == told


def test_the_version_is_that_of_the_distribution():
    assert craft.__version__ == version("inft")


def test_importing_craft_or_a_name_of_it_stays_light():
    code = (
        "import json, sys, craft\n"
        "names = dir(craft)\n"
        "from craft import CRAFT_PRESETS, get_preset, CRAFTConfigMixin\n"
        "CRAFTConfigMixin(); print(json.dumps([sorted({'torch', 'trl', 'transformers'} & set(sys.modules)), names]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, names = json.loads(done.stdout)
    assert heavy == []
    assert set(craft.__all__) <= set(names)


def test_every_public_name_is_there():
    assert all(getattr(craft, name) is not None for name in craft.__all__)
    with pytest.raises(AttributeError, match="CRAFTPPOConfig"):
        _ = craft.CRAFTPPOConfig
